"""Where the environment variable VIRTUAL_GPU names a target, such as 90, kernels are compiled for it and run on the
virtual GPU, in every process of the tests. VIRTUAL_GPU_SEED draws other orders of its warps and CTAs. With
VIRTUAL_GPU=borrowed they run on a real GPU of this machine."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from virtual_gpu import Device
from virtual_gpu.harness import package_on

from .borrowed_gpu import BorrowedDevice, package_on_borrowed
from .cases import BORROWED, COMPILED_FOR

SEED = int(os.environ.get("VIRTUAL_GPU_SEED", "0"))
DEVICE = BorrowedDevice() if BORROWED else Device(COMPILED_FOR, seed=SEED, keep=False, guarded=True)


@contextlib.contextmanager
def kernel_session() -> Iterator[None]:
    """Within, kernels run as this process is to run them."""
    if isinstance(DEVICE, BorrowedDevice):
        within = package_on_borrowed(DEVICE)
    else:
        within = package_on(DEVICE) if COMPILED_FOR else contextlib.nullcontext()
    with within:
        yield


@contextlib.contextmanager
def sound_kernels() -> Iterator[None]:
    """What a kernel does wrong meanwhile is an error."""
    before = len(DEVICE.errors)
    yield
    assert not DEVICE.errors[before:], "\n".join(DEVICE.errors[before:])
