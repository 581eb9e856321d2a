"""The global memory of a launch: storages of tensors at virtual addresses, and the parameters that point there."""

from __future__ import annotations

import bisect
import ctypes
import math
import struct
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from . import layout
from .program import Array, Program, Unsupported

# Each storage has a range of addresses to itself (see core/memory.h), and begins some way into it, so that what lies a
# little before it is in no other storage's range.
_RANGE = 1 << 40
_MARGIN = 1 << 20
# An address is aligned as it is in the machine's memory, up to this.
_ALIGNMENT = 64
_SECTOR = 32

_FORMATS = {"i1": "<b", "i8": "<b", "i16": "<h", "i32": "<i", "i64": "<q"}
_FORMATS |= {"u1": "<B", "u8": "<B", "u16": "<H", "u32": "<I", "u64": "<Q"}
_FORMATS |= {"fp16": "<e", "fp64": "<d"}
_SIZES = {"1": 1, "8": 1, "16": 2, "32": 4, "64": 8}


@dataclass
class Storage:
    """A tensor's storage, and what the arguments of the launch cover of it."""

    number: int
    base: int
    num_bytes: int
    arguments: list[int] = field(default_factory=list)
    views: list[tuple[int, int]] = field(default_factory=list)
    granule: int = 0
    """The bytes that every element's size is a multiple of."""
    extents: ctypes.Array[layout.Extent] | None = None
    granules: Array | None = None
    sectors: Array | None = None

    @property
    def low(self) -> int:
        """The offset in its range of addresses at which it begins."""
        return _MARGIN + self.base % _ALIGNMENT

    @property
    def high(self) -> int:
        return self.low + self.num_bytes

    @property
    def address(self) -> int:
        return (self.number + 1) * _RANGE + self.low

    def cover(self, tensor: torch.Tensor, element_size: int) -> int:
        """Count a tensor among the views; returns its address."""
        if tensor.numel() == 0:
            return self.address
        begin = tensor.data_ptr() - self.base
        last = sum((length - 1) * step for length, step in zip(tensor.shape, tensor.stride()))
        bisect.insort(self.views, (self.low + begin, self.low + begin + (last + 1) * tensor.element_size()))
        self.granule = math.gcd(self.granule, tensor.element_size(), element_size)
        return self.address + begin

    def merged_views(self) -> list[tuple[int, int]]:
        """The views, those that touch as one."""
        merged: list[tuple[int, int]] = []
        for low, high in self.views:
            if merged and low <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(merged[-1][1], high))
            else:
                merged.append((low, high))
        return merged

    def allocation(self, watched: bool) -> layout.Allocation:
        """For the engine; it keeps who accesses what if the storage is watched."""
        views = [layout.Extent(*view) for view in self.merged_views()]
        self.extents = (layout.Extent * len(views))(*views)
        shift = max(self.granule, 1).bit_length() - 1
        begin = self.low // _SECTOR * _SECTOR
        allocation = layout.Allocation(self.base, self.low, self.high, self.extents, len(views), shift, begin)
        if watched:
            # Pages of zeros that nothing touches take no memory.
            self.granules = np.zeros(((self.high - begin) >> shift) + 1, layout.GRANULE)
            self.sectors = np.zeros((self.high - begin) // _SECTOR + 1, np.uint8)
            allocation.granules, allocation.sectors = self.granules.ctypes.data, self.sectors.ctypes.data
        return allocation


class Memory:
    """The arguments of a launch, as its parameters, and the storages that they point into."""

    def __init__(self, program: Program, kinds: list[str], values: list[Any]) -> None:
        self._storages: dict[int, Storage] = {}
        # Pointers to scratch memory follow the arguments, and are null where there is none.
        if not len(values) <= len(program.params) <= len(values) + 2:
            raise Unsupported(f"{program.name}: {len(values)} arguments for {len(program.params)} parameters")
        self.params = np.zeros(max(program.params_size, 8), np.uint8)
        for k, (param, kind, value) in enumerate(zip(program.params, kinds, values)):
            raw = struct.pack("<Q", self._pointer(k, kind, value)) if kind.startswith("*") else _pack(kind, value)
            if len(raw) != param.size:
                raise Unsupported(f"{program.name}: an argument of type {kind} for {param.size} bytes")
            self.params[param.offset : param.offset + param.size] = np.frombuffer(raw, np.uint8)

    @property
    def storages(self) -> list[Storage]:
        return list(self._storages.values())

    def allocations(self, watched: bool) -> ctypes.Array[layout.Allocation]:
        """The storages, for the engine."""
        return (layout.Allocation * len(self._storages))(*(s.allocation(watched) for s in self.storages))

    def describe(self, address: int) -> str:
        """Where a virtual address lies."""
        number = address // _RANGE - 1
        if not 0 <= number < len(self._storages):
            return f"address {address:#x}, which is in no argument's range"
        storage = self.storages[number]
        offset = address - storage.address
        arguments = ", ".join(map(str, storage.arguments))
        return f"byte {offset} of the {storage.num_bytes} that argument {arguments} lies in"

    def _pointer(self, argument: int, kind: str, value: Any) -> int:
        if value is None:
            return 0
        # A tensor that triton.reinterpret gave another type.
        value = getattr(value, "base", value) if not isinstance(value, torch.Tensor) else value
        if not isinstance(value, torch.Tensor) or value.device.type != "cpu":
            raise TypeError(f"a virtual GPU takes tensors of the CPU, and not {value!r}")
        own = value.untyped_storage()
        base = own.data_ptr()
        # Empty storages, which all lie at 0, have no bytes to tell apart.
        storage = self._storages.setdefault(base, Storage(len(self._storages), base, own.nbytes()))
        storage.arguments.append(argument)
        return storage.cover(value, _element_size(kind, value))


def _element_size(kind: str, tensor: torch.Tensor) -> int:
    """Of what a kernel takes a tensor for."""
    digits = "".join(c for c in kind if c.isdigit())
    return _SIZES.get(digits, tensor.element_size())


def _pack(kind: str, value: Any) -> bytes:
    # As Triton's launchers do: what is too large for float32 is infinite, and bfloat16 is cut off.
    if kind in ("fp32", "f32", "bf16"):
        raw = bytes(ctypes.c_float(value))
        return raw[2:] if kind == "bf16" else raw
    if kind not in _FORMATS:
        raise Unsupported(f"an argument of type {kind}")
    return struct.pack(_FORMATS[kind], value)
