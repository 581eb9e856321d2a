"""The same tests on a real GPU: each launch of a kernel copies its tensors there and back.

Bytes around each copy are compared after the launch, so that a kernel that writes beside its tensors is found.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from virtual_gpu.harness import as_on_a_gpu, filled_memory

# Bytes on either side of a copy: whole sectors, and more than any alignment.
_EDGE = 512
_UNTOUCHED = 0xFF


class Copies:
    """What the tensors of the CPU in one launch are on a device; tensors that share memory share it there."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._held = device, dict[int, tuple[Tensor, Tensor]]()

    def of(self, value: Any) -> Any:
        """A copy of a tensor, or of those in a tuple; anything else as it is."""
        if isinstance(value, tuple):
            parts = [self.of(part) for part in value]
            return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
        if not isinstance(value, Tensor) or value.device.type != "cpu":
            return value
        there = self._copy(value.untyped_storage())
        place = _EDGE // value.itemsize + value.storage_offset()
        empty = torch.empty(0, dtype=value.dtype, device=self._device)
        return empty.set_(there.untyped_storage(), place, value.shape, value.stride())

    def _copy(self, storage: torch.UntypedStorage) -> Tensor:
        if storage.data_ptr() not in self._held:
            here = torch.empty(0, dtype=torch.uint8).set_(storage)
            there = torch.full((len(here) + 2 * _EDGE,), _UNTOUCHED, dtype=torch.uint8, device=self._device)
            there[_EDGE : _EDGE + len(here)] = here.to(self._device)
            self._held[storage.data_ptr()] = here, there
        return self._held[storage.data_ptr()][1]

    def bring_back(self) -> int:
        """Copy all back; how many bytes around them have changed."""
        changed = 0
        for here, there in self._held.values():
            found = there.cpu()
            here.copy_(found[_EDGE : _EDGE + len(here)])
            changed += int((found[:_EDGE] != _UNTOUCHED).sum() + (found[_EDGE + len(here) :] != _UNTOUCHED).sum())
        return changed


class BorrowedDevice:
    """A GPU of this machine.

    Attributes:
        totals: of all launches.
        errors: descriptions of what is wrong.
    """

    def __init__(self, device: torch.device | str = "cuda") -> None:
        self.device, self.totals, self.errors = torch.device(device), Counter[str](), list[str]()

    def run(self, launch: Any, name: str, arguments: tuple[Any, ...]) -> None:
        """Launch with copies of the arguments."""
        copies = Copies(self.device)
        launch(*map(copies.of, arguments))
        if changed := copies.bring_back():
            self.errors.append(f"{name}: {changed} bytes written beside its tensors")
        self.totals["launches"] += 1


class _Driver:
    """A driver of Triton's, whose launches of CPU tensors borrow the device."""

    def __init__(self, real: Any, device: BorrowedDevice) -> None:
        self._real, self._device = real, device

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        launch = self._real.launcher_cls(source, metadata)
        return lambda *arguments: self._device.run(launch, metadata.name, arguments)

    def get_device_interface(self) -> Any:
        """A CPU tensor has no device to be made the current one."""
        return SimpleNamespace(device=lambda device: contextlib.nullcontext())


@contextlib.contextmanager
def package_on_borrowed(device: BorrowedDevice) -> Iterator[None]:
    """Within, ``backend="triton"`` and ``"pairwise"`` of CPU tensors run on the device of Triton's active driver."""
    from triton.runtime import driver

    before = driver._active
    driver.set_active(_Driver(driver.active, device))
    try:
        with as_on_a_gpu(), filled_memory():
            yield
    finally:
        driver.set_active(before)
