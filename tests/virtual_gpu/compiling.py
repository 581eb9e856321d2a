"""Compiling kernels for GPUs that need not be there, by launching them."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .driver import Driver, active

_BINARIES = ("cubin", "hsaco")
_numbers = itertools.count(1)


@dataclass
class Compiled:
    """A compiled kernel: what each stage of the compiler made, by its name, such as ``ptx``, and its metadata."""

    name: str
    asm: dict[str, str | bytes] = field(repr=False)
    metadata: dict[str, Any] = field(repr=False)


@dataclass
class Compilation:
    """The different kernels that have been launched."""

    kernels: list[Compiled] = field(default_factory=list)


class CompileOnly(Driver):
    """Compiles what is launched, and does not run it.

    Args:
        target: an architecture: a number such as 90 for sm_90, or a name such as ``gfx942``.
    """

    def __init__(self, target: int | str) -> None:
        # Each has its own kernels, so that it gets to know of all that it launches.
        super().__init__(target, f"nowhere {target} {next(_numbers)}")


@contextlib.contextmanager
def compiling_for(target: int | str, *, assemble: bool) -> Iterator[Compilation]:
    """Within, Triton's launches of CPU tensors compile, and do nothing else.

    Args:
        target: an architecture: a number such as 90 for sm_90, or a name such as ``gfx942``.
        assemble: whether to go on to machine code, which is what takes longest; without, to PTX or AMD's assembly.
    """
    compilation = Compilation()

    def loaded(module: Any, function: Any, name: str, files: dict[str, str], hash: str) -> None:
        paths = [Path(path) for path in files.values()]
        metadata = next(json.loads(path.read_text()) for path in paths if path.suffix == ".json")
        asm = {path.suffix[1:]: _read(path) for path in paths if path.suffix != ".json"}
        compilation.kernels.append(Compiled(name, asm, metadata))

    with active(CompileOnly(target), assemble=assemble), _when_loading(loaded):
        yield compilation


def _read(path: Path) -> str | bytes:
    return path.read_bytes() if path.suffix[1:] in _BINARIES else path.read_text()


@contextlib.contextmanager
def _when_loading(hook: Callable[..., None]) -> Iterator[None]:
    from triton import knobs

    knobs.runtime.kernel_load_end_hook.add(hook)
    try:
        yield
    finally:
        knobs.runtime.kernel_load_end_hook.remove(hook)
