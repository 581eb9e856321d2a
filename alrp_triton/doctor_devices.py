"""What is wrong with the devices of this machine, with Triton on them, and with the folders for compiled code."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import ALRPLoss, info, warm_up
from .engine.passes import BACKENDS, choose, numba_installed, triton_installed, why_unavailable

KERNELS = "alrp_triton.kernels"


class Fault(NamedTuple):
    """Something wrong."""

    what: str
    mend: str


Findings = Iterator[str | Fault]


def one_line(error: Exception) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0]}"


def devices() -> Findings:
    for device in info.devices():
        found = info.describe(device)
        memory = "memory unknown" if found["memory"] is None else f"{found['memory'] / 2**30:.1f} GiB"
        yield f"{device}: {found['name']}, {found['architecture']}, {memory}"
        taken = choose("auto", device)
        why = why_unavailable("triton" if device.type == "cuda" else "numba", device)
        yield f"  backend='auto' takes {taken}: {why or 'it is installed, and the fastest here'}"
        others = ", ".join(name for name in BACKENDS if name != taken and why_unavailable(name, device) is None)
        yield f"  others that run: {others}"
        if device.type == "cuda" and not triton_installed():
            yield Fault(f"{device} runs without kernels, because Triton is not installed", "pip install triton")
    yield from _other_accelerator()
    interpreted = os.environ.get("TRITON_INTERPRET", "0") == "1"
    if torch.cuda.is_available():
        if interpreted:
            yield Fault("TRITON_INTERPRET=1: the kernels run in Python, and slowly", "unset TRITON_INTERPRET")
        return
    if interpreted:
        yield "TRITON_INTERPRET=1: triton and pairwise run in Triton's interpreter, for tests; auto does not take them"
    yield from _unused_gpus()


def _unused_gpus() -> Findings:
    unused = gpus_of_driver()
    if not unused:
        yield "no GPU"
        return
    what = f"PyTorch finds no GPU, but the driver has {'; '.join(unused)}"
    if torch.version.cuda is None:
        mend = "install PyTorch's build for CUDA: https://pytorch.org/get-started/locally"
        yield Fault(f"{what}: this PyTorch is built without CUDA", mend)
    elif os.environ.get("CUDA_VISIBLE_DEVICES") is not None:
        yield Fault(f"{what}: CUDA_VISIBLE_DEVICES hides it", "unset CUDA_VISIBLE_DEVICES")
    else:
        mend = "update the driver, or install a build for an older CUDA: https://pytorch.org/get-started/locally"
        yield Fault(f"{what}: it may be too old for CUDA {torch.version.cuda}", mend)


def _other_accelerator() -> Findings:
    found = torch.accelerator.current_accelerator()
    if found is None or found.type in ("cpu", "cuda"):
        return
    try:
        torch.zeros(1, dtype=torch.float64, device=found)
    except (RuntimeError, TypeError):
        yield f"{found.type}: has no float64, in which the losses sum; move logits, labels and boxes to the CPU"
    else:
        yield f"{found.type}: backend='auto' takes {choose('auto', found)}"


def kernels() -> Findings:
    gpus = [device for device in info.devices() if device.type == "cuda"]
    if not triton_installed() or find_spec(KERNELS) is None:
        yield "not there"
        return
    yield from _launcher(bool(gpus))
    try:
        from .engine.passes import gpu  # noqa: F401  (which imports them all)
    except Exception as error:
        yield Fault(f"the kernels cannot be imported: {one_line(error)}", "pip install --force-reinstall triton")
        return
    yield "they can be imported"
    if not gpus:
        yield "no GPU, so there is nothing to compile for"
    for device in gpus:
        begin = time.perf_counter()
        try:
            warm_up(4, 8, criterion=ALRPLoss(backend="triton"), device=device)
        except Exception as error:
            mend = "mend what the error says; until then backend='torch' runs on this device"
            yield Fault(f"the kernels do not compile and run on {device}: {one_line(error)}", mend)
        else:
            yield f"those of ALRPLoss compile and run on {device}, in {time.perf_counter() - begin:.1f} s"


def _launcher(needed: bool) -> Findings:
    """Triton compiles the code that launches a kernel by the machine's C compiler."""
    if os.name != "posix":
        return
    compiler = shutil.which(os.environ["CC"]) if os.environ.get("CC") else shutil.which("gcc") or shutil.which("clang")
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    missing = {"a C compiler": compiler is None, f"Python's headers, {header}": not header.is_file()}
    for name, is_missing in missing.items():
        if is_missing and needed:
            mend = "install them: apt-get install gcc python3-dev, or what your system calls them; or set CC"
            yield Fault(f"Triton's launcher needs {name}, which is not found", mend)
        elif is_missing:
            yield f"not found, and on a GPU needed by Triton's launcher: {name}"


def caches() -> Findings:
    has_gpu = torch.cuda.is_available()
    if triton_installed():
        from triton import knobs

        yield from _cache("Triton's kernels", Path(knobs.cache.dir), "TRITON_CACHE_DIR", has_gpu)
    if numba_installed():
        yield from _cache_of_numba()
    if find_spec(KERNELS) is None:
        return
    stored = info.collect()["autotuning"]
    file = Path(stored["cache_file"])
    yield from _cache(f"launch settings ({len(stored['found'])})", file.parent, "ALRP_TRITON_CACHE", has_gpu)
    if stored["exists"] and not stored["found"]:
        mend = "delete it, and run alrp-triton bench --autotune if you want settings for your GPU"
        yield Fault(f"{file} has no settings for this version", mend)


def _cache_of_numba() -> Findings:
    if os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0"):
        yield Fault("NUMBA_DISABLE_JIT is set: Numba's loops run in Python", "unset NUMBA_DISABLE_JIT")
        return
    try:
        from .engine.passes import numba_loops
    except Exception as error:
        mend = "pip install --upgrade numba, or uninstall it, and torch takes its place"
        yield Fault(f"Numba cannot be imported: {one_line(error)}", mend)
        return
    dispatcher: Any = numba_loops.count
    path = dispatcher.stats.cache_path
    if path is None:
        mend = "set NUMBA_CACHE_DIR to a folder that you can write"
        yield Fault("Numba compiles again in each process, because it finds no folder to write to", mend)
    else:
        yield from _cache("Numba's loops", Path(path), "NUMBA_CACHE_DIR", True)


def _cache(name: str, folder: Path, variable: str, needed: bool) -> Findings:
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else None
    writable = _can_write(folder)
    there = "not there yet" if size is None else f"{size / 2**20:.1f} MiB"
    yield f"{name}: {folder}, {there}, {'writable' if writable else 'not writable'}"
    if needed and not writable:
        yield Fault(f"{name}: {folder} cannot be written", f"set {variable} to a folder that you can write")


def _can_write(folder: Path) -> bool:
    """Whether a file can be made in it, or in the nearest folder above that is there."""
    there = next((each for each in (folder, *folder.parents) if each.exists()), folder)
    try:
        with tempfile.TemporaryFile(dir=there):
            return True
    except OSError:
        return False


def gpus_of_driver() -> list[str]:
    """Name and driver's version of each NVIDIA GPU; empty without a driver."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.strip().splitlines() if done.returncode == 0 else []
