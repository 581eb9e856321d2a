"""Launch settings: a fixed choice for each kernel and architecture, or the result of a search.

``alrp-triton bench --autotune`` searches and stores the results in ``$ALRP_TRITON_CACHE`` (by default
``~/.cache/alrp-triton/settings.json``). A training only reads that file once and times no step. So all processes with
the same file use the same settings, and a CUDA graph can be captured at any time. Triton's own ``autotune`` searches at
the first launch of a kernel, in each process. Settings do not change the results of the linear form, which are sums of
integers.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

Settings = dict[str, int]

# Size classes are powers of four; launches of one class share their settings.
_LOG2_OF_CLASS = 2

PINNED: dict[str, dict[str, Settings]] = {
    "find": {"default": {"block": 1024, "num_warps": 4}},
    # As many warps as share a table in shared memory; in global memory it makes no difference.
    "count": {"default": {"block": 2048, "num_warps": 8}},
    "count_grouped": {"default": {"block": 2048, "num_warps": 8}},
    "write": {"default": {"block": 1024, "num_warps": 4}},
    "write_grouped": {"default": {"block": 1024, "num_warps": 4}},
    # 32 sums a thread, so 32 pairs share the other work for a logit. In the interpreter tests have few positives, and
    # the padding of a block costs most.
    "pairwise_count": {
        "default": {"block": 128, "block_p": 128, "tiles": 16, "num_warps": 4},
        "interpreter": {"block": 128, "block_p": 32, "tiles": 16, "num_warps": 4},
    },
    "pairwise_count_general": {"default": {"block": 128, "block_p": 32, "tiles": 16, "num_warps": 4}},
    "pairwise_write": {
        "default": {"block": 1024, "block_p": 128, "num_warps": 4},
        "gfx": {"block": 512, "block_p": 128, "num_warps": 4},
        "interpreter": {"block": 1024, "block_p": 16, "num_warps": 4},
    },
    "pairwise_write_general": {
        "default": {"block": 256, "block_p": 128, "num_warps": 4},
        "interpreter": {"block": 256, "block_p": 16, "num_warps": 4},
    },
    # For kernels that compare positives with positives. They are too short for a search. In the interpreter each
    # program costs time.
    "compare": {
        "default": {"block": 128, "block_p": 4, "num_warps": 4},
        "interpreter": {"block": 64, "block_p": 128, "num_warps": 4},
    },
}
"""By kernel, then by the longest prefix of the architecture's name (``sm_90``, ``gfx942``, ``interpreter``) that is
listed. ``grouped``: with groups; ``general``: with groups, or in float64."""

_STREAMING: list[Settings] = [{"block": b, "num_warps": w} for b in (512, 1024, 2048, 4096) for w in (4, 8)]
_PAIRWISE_COUNT: list[Settings] = [
    {"block": b, "block_p": p, "tiles": t, "num_warps": 4}
    for b in (128, 256)
    for p in (32, 64, 128, 256)
    for t in (8, 16, 32)
]
_PAIRWISE_WRITE: list[Settings] = [
    {"block": b, "block_p": p, "num_warps": w} for b in (256, 512, 1024, 2048) for p in (16, 128) for w in (4, 8)
]

CANDIDATES: dict[str, list[Settings]] = {
    **dict.fromkeys(("find", "count", "count_grouped", "write", "write_grouped"), _STREAMING),
    **dict.fromkeys(("pairwise_count", "pairwise_count_general"), _PAIRWISE_COUNT),
    **dict.fromkeys(("pairwise_write", "pairwise_write_general"), _PAIRWISE_WRITE),
}
"""The candidates of a search. They include every pinned choice, so a search never selects a slower setting."""


def settings_of(kernel: str, logits: Tensor, num_logits: int) -> Settings:
    """Settings for one launch.

    Args:
        kernel: its name in :data:`PINNED`.
        logits: tensor that it reads; gives device and dtype.
        num_logits: number of logits that it reads.
    """
    if kernel in _tried:
        return _tried[kernel]
    found = _loaded()
    if found and logits.device.type == "cuda":
        known = found.get(key_of(kernel, logits, num_logits))
        if known is not None:
            return known
    return pinned(kernel, architecture_of(logits.device))


def pinned(kernel: str, architecture: str) -> Settings:
    """The settings that ship with the package."""
    table = PINNED[kernel]
    return table[max((name for name in table if architecture.startswith(name)), key=len, default="default")]


def architecture_of(device: torch.device) -> str:
    """``sm_90``, ``gfx942`` and so on; for the CPU ``interpreter``, or the target of Triton's driver."""
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        return "interpreter"
    if device.type == "cpu":
        from triton.runtime import driver

        target = driver.active.get_current_target()
        return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)
    return _architecture_of_gpu(device)


@cache
def _architecture_of_gpu(device: torch.device) -> str:
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def key_of(kernel: str, logits: Tensor, num_logits: int) -> str:
    """The key of a found setting: kernel, device, dtype and size class."""
    size_class = num_logits.bit_length() // _LOG2_OF_CLASS * _LOG2_OF_CLASS
    return f"{kernel}|{torch.cuda.get_device_name(logits.device)}|{logits.dtype}|2^{size_class}"


def cache_file() -> Path:
    """The file of found settings."""
    root = os.environ.get("ALRP_TRITON_CACHE") or Path.home() / ".cache" / "alrp-triton"
    return Path(root) / "settings.json"


def load() -> dict[str, Settings]:
    """The results of searches, without entries that are not candidates; empty if there is no readable file."""
    try:
        found = json.loads(cache_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict):
        return {}
    # Use the candidates themselves, because the file may have an equal value such as 1024.0.
    return {
        key: candidate
        for key, value in found.items()
        for candidate in CANDIDATES.get(key.split("|")[0], [])
        if candidate == value
    }


_loaded = cache(load)
_tried: dict[str, Settings] = {}


@contextlib.contextmanager
def trying(kernel: str, candidate: Settings) -> Iterator[None]:
    """A context in which all launches of a kernel have these settings."""
    _tried[kernel] = candidate
    try:
        yield
    finally:
        del _tried[kernel]


def keep(found: dict[str, Settings]) -> None:
    """Add to the file through a temporary file, so that no reader sees half of it; use the settings from now on."""
    together, target = load() | found, cache_file()
    partial = target.with_suffix(f".{os.getpid()}")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text(json.dumps(together, indent=1, sort_keys=True), encoding="utf-8")
    partial.replace(target)
    _loaded.cache_clear()
    _loaded()


def search(kernel: str, milliseconds: Callable[[], float]) -> list[tuple[float, Settings]]:
    """All candidates with their times, the fastest first; infinite for a candidate that does not run on this device.

    Args:
        kernel: its name in :data:`CANDIDATES`.
        milliseconds: times one or more launches of the kernel.
    """
    times = []
    for candidate in CANDIDATES[kernel]:
        with trying(kernel, candidate):
            try:
                times.append((milliseconds(), candidate))
            except Exception:  # too large for this device: compiler, driver and launch raise different errors
                times.append((float("inf"), candidate))
    return sorted(times, key=lambda timed: timed[0])
