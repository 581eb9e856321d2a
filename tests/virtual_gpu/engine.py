"""Builds the engine by the system's C compiler, once for each version of it and kind of machine, and loads it."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from . import layout, semantics
from .caches import cache_folder

_SOURCES = Path(__file__).parent / "core"
_FLAGS = (
    *("-O2", "-ftree-vectorize", "-fvect-cost-model=dynamic", "-march=native"),
    # Floats as PTX has them: each operation rounds once.
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    *("-shared", "-fPIC", "-std=gnu11", "-w"),
)


class NoCompiler(RuntimeError):
    """There is no C compiler to build the engine by."""


@functools.cache
def load_engine() -> ctypes.CDLL:
    """The engine; built where there is none yet.

    Raises:
        NoCompiler: if it is not built and cannot be.
    """
    sources = {path.name: path.read_text(encoding="utf-8") for path in sorted(_SOURCES.iterdir())}
    sources |= {"layout.inc": layout.header(), "rules.inc": semantics.CASES}
    key = hashlib.sha256("\0".join([*sources, *sources.values(), *_FLAGS, _machine()]).encode()).hexdigest()
    library = cache_folder() / f"engine-{key[:16]}.so"
    if not library.exists():
        _build(library, sources)
    engine = ctypes.CDLL(str(library))
    engine.run_launch.argtypes = [ctypes.POINTER(layout.Launch)]
    return engine


def _machine() -> str:
    """What code for this machine may not run on another one."""
    flags = ""
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.system()} {platform.machine()} {flags}"


def _compiler() -> list[str]:
    """Its command, which may have arguments already."""
    chosen = shlex.split(os.environ.get("CC", ""))
    commands = [chosen] if chosen else [["cc"], ["gcc"], ["clang"]]
    for command in commands:
        if shutil.which(command[0]):
            return command
    names = " or ".join(command[0] for command in commands)
    raise NoCompiler(f"the virtual GPU's engine is built by a C compiler, and there is no {names}")


def _build(library: Path, sources: dict[str, str]) -> None:
    """Several processes may do so at once: each in a folder of its own, and the last one's library remains."""
    compiler = _compiler()
    with tempfile.TemporaryDirectory(dir=library.parent, prefix="build-") as folder:
        for name, text in sources.items():
            Path(folder, name).write_text(text, encoding="utf-8")
        made = Path(folder, library.name)
        command = [*compiler, *_FLAGS, str(Path(folder, "grid.c")), "-o", str(made), "-lm"]
        built = subprocess.run(command, capture_output=True, text=True, check=False)
        if built.returncode != 0:
            raise RuntimeError(f"the virtual GPU's engine does not build:\n{' '.join(command)}\n{built.stderr}")
        made.replace(library)
