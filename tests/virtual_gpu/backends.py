"""Triton's compilers, made to stop before they assemble machine code."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

from triton import knobs
from triton.backends import backends
from triton.backends.amd.compiler import HIPBackend
from triton.backends.nvidia.compiler import CUDABackend

from .caches import cache_folder


class _Unassembled:
    """A compiler without its last stage, which takes longest; the assembly is the binary then."""

    binary_ext: str
    _last_stage: str

    def add_stages(self, stages: dict[str, Any], *given: Any) -> None:
        super().add_stages(stages, *given)  # type: ignore[misc]
        del stages[self._last_stage]

    def hash(self) -> str:
        # By which Triton tells compilers apart in its cache.
        return f"{super().hash()}-{self.binary_ext}"  # type: ignore[misc]


class _ToPTX(_Unassembled, CUDABackend):  # type: ignore[misc]
    _last_stage = "cubin"

    def __init__(self, target: Any) -> None:
        super().__init__(target)
        self.binary_ext = "ptx"


class _ToAMDGCN(_Unassembled, HIPBackend):  # type: ignore[misc]
    _last_stage = "hsaco"

    def __init__(self, target: Any) -> None:
        super().__init__(target)
        self.binary_ext = "amdgcn"


@contextlib.contextmanager
def compilers(*, assemble: bool) -> Iterator[None]:
    """Within, Triton's compilers go as far as assembly, or all the way; and keep what they make in a cache of ours."""
    unassembled = {"nvidia": _ToPTX, "amd": _ToAMDGCN}
    replaced = {
        name: dataclasses.replace(backend, compiler=unassembled[name])
        for name, backend in backends.items()
        if name in unassembled and not assemble
    }
    with patch.dict(backends, replaced), knobs.cache.scope():
        knobs.cache.dir = str(cache_folder() / "triton")
        yield
