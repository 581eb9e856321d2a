"""Where the environment variable VIRTUAL_GPU names a target, such as 90, kernels are compiled for it and run on the
virtual GPU, in every process of the tests. VIRTUAL_GPU_SEED draws other orders of its warps and CTAs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from virtual_gpu import Device
from virtual_gpu.harness import package_on

from .cases import COMPILED_FOR

DEVICE = Device(COMPILED_FOR, seed=int(os.environ.get("VIRTUAL_GPU_SEED", "0")), keep=False, guarded=True)


@contextlib.contextmanager
def kernel_session() -> Iterator[None]:
    """Within, kernels run as this process is to run them."""
    with package_on(DEVICE) if COMPILED_FOR else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def sound_kernels() -> Iterator[None]:
    """What a kernel does wrong meanwhile is an error."""
    before = len(DEVICE.errors)
    yield
    assert not DEVICE.errors[before:], "\n".join(DEVICE.errors[before:])
