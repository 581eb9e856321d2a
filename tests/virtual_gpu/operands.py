"""Operands of PTX instructions: registers, which get places in a warp's frame, constants and addresses."""

from __future__ import annotations

import re
import struct
from typing import NamedTuple

import numpy as np

from .layout import Special
from .program import Array, Unsupported

WIDTHS = {"pred": 32} | dict.fromkeys(("b8", "u8", "s8", "b16", "u16", "s16", "f16"), 16)
WIDTHS |= dict.fromkeys(("b32", "u32", "s32", "f32"), 32) | dict.fromkeys(("b64", "u64", "s64", "f64"), 64)
"""Bits of a register of a type, as the engine keeps it."""

_ADDRESS = re.compile(r"\[\s*([^\s+\]]+)\s*(?:\+\s*(-?\w+)\s*)?\]")
_FLOAT = re.compile(r"-?\d+\.\d*(e[+-]?\d+)?")
_SPECIALS = {
    "%tid.x": Special.TID_X,
    "%laneid": Special.LANEID,
    "%warpid": Special.WARPID,
    "%ctaid.x": Special.CTAID_X,
    "%ctaid.y": Special.CTAID_Y,
    "%ctaid.z": Special.CTAID_Z,
    "%nctaid.x": Special.NCTAID_X,
    "%nctaid.y": Special.NCTAID_Y,
    "%nctaid.z": Special.NCTAID_Z,
}


class Register(NamedTuple):
    """A register: its place in the frame, and its bits."""

    place: int
    width: int


class Address(NamedTuple):
    """The operand that an address is in, its bits, and what is added to it."""

    base: int
    width: int
    offset: int


class Operands:
    """The registers of a kernel, and the constants in its code, which take places after them.

    An operand is a place, or where it is -2 or less, a constant, whose place is known in the end.
    """

    def __init__(self, num_threads: int, symbols: dict[str, int]) -> None:
        self._symbols = symbols
        self._registers: dict[str, Register] = {}
        self._hidden: list[dict[str, Register | None]] = []
        self._specials = [-1] * len(Special)
        self._constants: dict[tuple[int, int], int] = {}
        self._size = 0
        self._fixed = {"%ntid.x": num_threads, "%ntid.y": 1, "%ntid.z": 1, "%tid.y": 0, "%tid.z": 0}

    def open_scope(self) -> None:
        """What is declared from here on to the scope's end hides registers of the same name."""
        self._hidden.append({})

    def close_scope(self) -> None:
        for name, register in (self._hidden.pop() if self._hidden else {}).items():
            if register is None:
                del self._registers[name]
            else:
                self._registers[name] = register

    def declare(self, kind: str, names: str) -> None:
        """Make registers: several names, each for one or, as in ``%r<5>``, for several."""
        if kind not in WIDTHS:
            raise Unsupported(f"registers of type {kind}")
        for name in names.split(","):
            stem, _, number = name.strip().rstrip(">").partition("<")
            for one in [f"{stem}{k}" for k in range(int(number))] if number else [stem]:
                if self._hidden:
                    self._hidden[-1].setdefault(one, self._registers.get(one))
                self._registers[one] = Register(self._take(WIDTHS[kind]), WIDTHS[kind])

    def temporary(self, width: int) -> int:
        """A register without a name."""
        return self._take(width)

    def _take(self, width: int) -> int:
        place = self._size
        self._size += 32 * width // 8
        return place

    def width(self, text: str) -> int | None:
        """Bits of a register; nothing for anything else."""
        register = self._registers.get(text)
        return register.width if register else None

    def operand(self, text: str, width: int) -> int:
        """A register of this width, or a constant."""
        register = self._registers.get(text)
        if register is not None:
            if register.width != width:
                raise Unsupported(f"{text} has {register.width} bits where {width} are needed")
            return register.place
        if text in _SPECIALS and width == 32:
            special = _SPECIALS[text]
            if self._specials[special] < 0:
                self._specials[special] = self._take(32)
            return self._specials[special]
        number = self._fixed.get(text, self._symbols.get(text))
        return self._constant(_bits_of(text, width) if number is None else number, width)

    def predicate(self, text: str) -> int:
        """A register, or a constant, of which any but 0 holds."""
        if self._registers.get(text):
            return self.operand(text, 32)
        return self._constant(-1 if _bits_of(text, 32) else 0, 32)

    def _constant(self, bits: int, width: int) -> int:
        key = (width, bits & ((1 << width) - 1))
        return -2 - self._constants.setdefault(key, len(self._constants))

    def address(self, text: str, constant_width: int) -> Address:
        """An address, in a register or constant."""
        parts = _ADDRESS.fullmatch(text)
        if not parts:
            raise Unsupported(f"address {text}")
        base, offset = parts[1], int(parts[2] or "0", 0)
        width = self.width(base) or constant_width
        return Address(self.operand(base, width), width, offset)

    def frame(self) -> tuple[Array, int]:
        """A warp's registers when it begins, and the size of those that are no constants."""
        variables_size = self._size
        for width, _ in self._constants:
            self._take(width)
        # Whole words of 64 bits, so that they are aligned.
        frame = np.zeros(-(-self._size // 8) + 1, np.uint64).view(np.uint8)
        for (width, bits), place in zip(self._constants, self.places_of_constants(variables_size)):
            frame[place : place + 4 * width].view(f"u{width // 8}")[:] = bits
        return frame, variables_size

    def places_of_constants(self, variables_size: int) -> list[int]:
        places, place = [], variables_size
        for width, _ in self._constants:
            places.append(place)
            place += 32 * width // 8
        return places

    def specials(self) -> tuple[int, ...]:
        """Where each special register lies, or -1."""
        return tuple(self._specials)


def _bits_of(text: str, width: int) -> int:
    try:
        if text[:2].lower() in ("0f", "0d"):
            if width != (32 if text[1] in "fF" else 64):
                raise Unsupported(f"constant {text} of {width} bits")
            return int(text[2:], 16)
        if _FLOAT.fullmatch(text):
            return int.from_bytes(struct.pack("<d" if width == 64 else "<f", float(text)), "little")
        return int(text.rstrip("U"), 0)
    except ValueError:
        raise Unsupported(f"operand {text}") from None
