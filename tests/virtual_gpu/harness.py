"""The package's kernels on the virtual GPU: tensors of the CPU are then those of a GPU, for Triton and the package."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from alrp_triton.engine import devices

from .device import Device
from .driver import virtual_gpu
from .reports import Fault


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Within, the package takes tensors of the CPU for those of a GPU, whose values nobody looks at."""
    with patch.object(devices, "GPUS", devices.GPUS | {"cpu"}):
        yield


@contextlib.contextmanager
def filled_memory(byte: int = 0xFF) -> Iterator[None]:
    """Within, all bytes of memory that nobody has set are this one; by default they make NaN, or -1. No operation of
    PyTorch sets them, so that who counts those does not count these."""

    def filled(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*given: Any, **named: Any) -> Tensor:
            tensor = allocate(*given, **named)
            if type(tensor) is Tensor and tensor.device.type == "cpu" and tensor.dtype != torch.bool:
                storage = tensor.untyped_storage()
                ctypes.memset(storage.data_ptr(), byte, storage.nbytes())
            return tensor

        return call

    with contextlib.ExitStack() as stack:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
            stack.enter_context(patch.object(owner, name, filled(getattr(owner, name))))
        yield


@contextlib.contextmanager
def package_on(device: Device) -> Iterator[None]:
    """Within, ``backend="triton"`` and ``"pairwise"`` of CPU tensors run what Triton compiles for the device."""
    with virtual_gpu(device), as_on_a_gpu(), filled_memory():
        yield


@contextlib.contextmanager
def on_virtual_gpu(target: int = 90, count: bool = False, *, seed: int = 0) -> Iterator[Device]:
    """:func:`package_on` a new device.

    Args:
        target: 80, 90 or 100.
        count: also the sectors and the atomics of every launch; see :attr:`Device.results`.
        seed: of the order in which warps and CTAs take turns.

    Raises:
        Fault: at the end, if a check found anything wrong.
        NoCompiler: without a C compiler.
    """
    device = Device(target, count=count, seed=seed, guarded=True)
    with package_on(device):
        yield device
    if device.errors:
        raise Fault("\n".join(device.errors))
