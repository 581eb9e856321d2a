"""What Triton takes for the driver of a GPU: its launches of CPU tensors run on a virtual one, or nowhere."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch

from .device import Device
from .engine import load_engine
from .parse import parse
from .program import Program, Unsupported

# Bytes of shared memory that one CTA may have.
SHARED = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
SHARED_OF_AMD = 65536
_MAX_THREADS = 1024

Grid = tuple[int, int, int]
Launch = Callable[[Any, Grid, list[str], list[Any]], None]


def _arguments(kind: Any, value: Any) -> Iterator[tuple[str, Any]]:
    """Those that a kernel gets at run time: tuples in parts, and no constants."""
    if isinstance(kind, tuple):
        for part, of in zip(kind, value):
            yield from _arguments(part, of)
    elif kind != "constexpr":
        yield kind, value


class _Launcher:
    """Triton keeps one with each compiled kernel, and it launches on the driver that is active then."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self._kinds = tuple(source.signature.values())
        self._clusters = getattr(metadata, "num_ctas", 1) > 1
        self._scratch = getattr(metadata, "global_scratch_size", 0) > 0

    def __call__(
        self,
        x: int,
        y: int,
        z: int,
        stream: int,
        function: Any,
        packed: Any,
        metadata: Any,
        enter: Callable[[Any], None] | None,
        leave: Callable[[Any], None] | None,
        *values: Any,
    ) -> None:
        if enter is not None:
            enter(metadata)
        arguments = list(_arguments(self._kinds, values))
        active: Driver = _active_driver()
        if active.runs and (self._clusters or self._scratch):
            raise Unsupported("clusters and scratch memory")
        active.launch(function, (x, y, z), [kind for kind, _ in arguments], [value for _, value in arguments])
        if leave is not None:
            leave(metadata)


def _active_driver() -> Any:
    from triton.runtime import driver

    return driver.active


class Driver:
    """What Triton asks of a driver.

    Args:
        target: an architecture, as a number of NVIDIA's or a name of AMD's.
        key: Triton keeps the kernels that it has compiled in this process by device; this stands for one.
    """

    runs = False
    launcher_cls = _Launcher

    def __init__(self, target: int | str, key: str) -> None:
        self._target, self._key = target, key
        self.utils = SimpleNamespace(load_binary=self.load_binary, get_device_properties=self.get_device_properties)

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        is_amd = isinstance(self._target, str)
        return GPUTarget("hip" if is_amd else "cuda", self._target, 64 if is_amd else 32)

    def get_current_device(self) -> str:
        return self._key

    def set_current_device(self, device: str) -> None:
        pass

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_device_capability(self, device: str | None = None) -> tuple[int, int]:
        major, minor = divmod(int(self._target), 10)
        return major, minor

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        """What stands for ``torch.cuda``."""
        return SimpleNamespace(device=self.guard)

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind

    def get_benchmarker(self) -> Callable[..., Any]:
        # There is no time to measure; every choice is as good as another.
        return lambda call, quantiles=None, **_: [1.0] * len(quantiles) if quantiles else 1.0

    def get_device_properties(self, device: str) -> dict[str, int]:
        shared = SHARED_OF_AMD if isinstance(self._target, str) else SHARED[self._target]
        return {"max_shared_mem": shared, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}

    def load_binary(self, name: str, binary: bytes, shared: int, device: str) -> tuple[Any, Any, int, int, int]:
        """Module, function, registers, spilled registers, and how many threads a CTA may have."""
        function = self.load(name, binary, shared)
        return function, function, 0, 0, _MAX_THREADS

    def load(self, name: str, binary: bytes, shared: int) -> Any:
        """What stands for a function of the driver; anything but nothing."""
        return name

    def launch(self, function: Any, grid: Grid, kinds: list[str], values: list[Any]) -> None:
        """Launch a function with arguments of some of Triton's types."""

    def guard(self, device: Any) -> contextlib.AbstractContextManager[None]:
        """Make a device of PyTorch the current one."""
        return contextlib.nullcontext()


class VirtualDriver(Driver):
    """Launches on a virtual GPU."""

    runs = True

    def __init__(self, device: Device) -> None:
        super().__init__(device.target, f"virtual sm_{device.target}")
        self._device = device

    def load(self, name: str, binary: bytes, shared: int) -> tuple[Program, int]:
        return parse(binary.decode()), shared

    def launch(self, function: tuple[Program, int], grid: Grid, kinds: list[str], values: list[Any]) -> None:
        program, shared = function
        self._device.run(program, grid, shared, kinds, values)

    def guard(self, device: Any) -> contextlib.AbstractContextManager[None]:
        return self._device.guard()


@contextlib.contextmanager
def active(driver: Driver, *, assemble: bool) -> Iterator[None]:
    """Within, Triton compiles for a driver, as far as assembly or all the way, and launches on it."""
    from triton.runtime import driver as drivers

    from .backends import compilers

    before = drivers._active
    drivers.set_active(driver)
    try:
        with compilers(assemble=assemble):
            yield
    finally:
        drivers.set_active(before)


@contextlib.contextmanager
def virtual_gpu(device: Device | None = None) -> Iterator[Device]:
    """Within, Triton's launches of CPU tensors, in any thread, run on a virtual GPU.

    Raises:
        NoCompiler: without a C compiler, which the virtual GPU needs once.
    """
    device = device or Device()
    load_engine()
    with active(VirtualDriver(device), assemble=False):
        yield device
