"""Launch settings: one pinned choice per kernel and architecture; a search only when asked for.

With ``ALRP_TRITON_AUTOTUNE=1`` each kernel's candidates are timed once per device and size class, and the fastest is
kept in ``$ALRP_TRITON_CACHE`` (by default ``~/.cache/alrp-triton/settings.json``). Settings never change results of
the linear form, which are sums of integers. What was chosen stays, so that no results change between two runs.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

Settings = dict[str, int]

# A class of sizes is a power of four; launches of one class share their settings.
_LOGITS_PER_CLASS_STEP = 2

PINNED: dict[str, dict[str, Settings]] = {
    "collect": {"default": {"block": 1024, "num_warps": 4}},
    "buckets": {"default": {"block": 1024, "num_warps": 4}},
    "buckets_grouped": {"default": {"block": 1024, "num_warps": 4}},
    "gradient": {"default": {"block": 1024, "num_warps": 4}},
    # Ids of groups take registers; half as many logits leave as many blocks on a processor.
    "gradient_grouped": {"default": {"block": 512, "num_warps": 4}},
    # 32 sums a thread: as many pairs share what else there is to do for a logit. In the interpreter, where tests have
    # few positives, what fills up a block costs most.
    "pairwise_count": {
        "default": {"block": 128, "block_p": 128, "tiles": 16, "num_warps": 4},
        "interpreter": {"block": 128, "block_p": 32, "tiles": 16, "num_warps": 4},
    },
    "pairwise_count_general": {"default": {"block": 128, "block_p": 32, "tiles": 16, "num_warps": 4}},
    "pairwise_gradient": {
        "default": {"block": 1024, "block_p": 128, "num_warps": 4},
        "gfx": {"block": 512, "block_p": 128, "num_warps": 4},
        "interpreter": {"block": 1024, "block_p": 16, "num_warps": 4},
    },
    "pairwise_gradient_general": {
        "default": {"block": 256, "block_p": 128, "num_warps": 4},
        "interpreter": {"block": 256, "block_p": 16, "num_warps": 4},
    },
    "sorting": {"default": {"block": 64, "block_p": 8, "num_warps": 4}},
}
"""By kernel, then by the longest prefix of the architecture's name (``sm_90``, ``gfx942``, ``interpreter``) that is
listed. ``grouped``: with groups; ``general``: with groups, with a function in the place of the ramp, or in float64."""

_STREAMING: list[Settings] = [{"block": b, "num_warps": w} for b in (512, 1024, 2048, 4096) for w in (4, 8)]
_PAIRWISE_COUNT: list[Settings] = [
    {"block": b, "block_p": p, "tiles": t, "num_warps": 4}
    for b in (128, 256)
    for p in (32, 64, 128, 256)
    for t in (8, 16, 32)
]
_PAIRWISE_GRADIENT: list[Settings] = [
    {"block": b, "block_p": p, "num_warps": w} for b in (256, 512, 1024, 2048) for p in (16, 128) for w in (4, 8)
]

# Every pinned choice is among them, so that a search never ends with something slower.
CANDIDATES: dict[str, list[Settings]] = {
    "collect": _STREAMING,
    "buckets": _STREAMING,
    "buckets_grouped": _STREAMING,
    "gradient": _STREAMING,
    "gradient_grouped": _STREAMING,
    "pairwise_count": _PAIRWISE_COUNT,
    "pairwise_count_general": _PAIRWISE_COUNT,
    "pairwise_gradient": _PAIRWISE_GRADIENT,
    "pairwise_gradient_general": _PAIRWISE_GRADIENT,
    "sorting": [{"block": b, "block_p": p, "num_warps": 4} for b in (32, 64, 128) for p in (4, 8, 16)],
}

_known: dict[str, Settings] = {}


def pinned(kernel: str, architecture: str) -> Settings:
    """The settings that ship with the package."""
    table = PINNED[kernel]
    return table[max((name for name in table if architecture.startswith(name)), key=len, default="default")]


def architecture_of(device: torch.device) -> str:
    """``sm_90``, ``gfx942`` and so on; for the CPU ``interpreter``, or what Triton's driver compiles for there."""
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        return "interpreter"
    if device.type == "cpu":
        from triton.runtime import driver

        target = driver.active.get_current_target()
        return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def choose(kernel: str, logits: Tensor, launch: Callable[..., None], num_logits: int | None = None) -> Settings:
    """Settings for one launch.

    Args:
        kernel: its name in :data:`PINNED`.
        logits: what it will read; says the device and the size class.
        launch: runs the kernel once with settings as keywords, to no lasting effect; called only when searching.
        num_logits: how many it will read, where these are not all.
    """
    if not autotuning() or logits.device.type != "cuda":
        return pinned(kernel, architecture_of(logits.device))
    found = search(kernel, key_of(kernel, logits, num_logits), lambda settings: _milliseconds(launch, settings))
    # Where no candidate runs, the launch itself is to say why.
    return found or pinned(kernel, architecture_of(logits.device))


def autotuning() -> bool:
    """Whether ``ALRP_TRITON_AUTOTUNE=1`` asks for a search."""
    return os.environ.get("ALRP_TRITON_AUTOTUNE", "0") not in ("", "0")


def key_of(kernel: str, logits: Tensor, num_logits: int | None = None) -> str:
    """What a found choice is filed under: kernel, device, dtype and size class."""
    number = logits.numel() if num_logits is None else num_logits
    size_class = number.bit_length() // _LOGITS_PER_CLASS_STEP * _LOGITS_PER_CLASS_STEP
    return f"{kernel}|{torch.cuda.get_device_name(logits.device)}|{logits.dtype}|2^{size_class}"


def search(kernel: str, key: str, milliseconds: Callable[[Settings], float]) -> Settings | None:
    """The fastest candidate: from memory, else from the file, else by timing them all.

    Args:
        kernel: its name in :data:`CANDIDATES`.
        key: what the choice is filed under, see :func:`key_of`.
        milliseconds: times one candidate. One that raises or takes infinitely long is passed over.

    Returns:
        The settings, or None, which is not kept, where no candidate runs.
    """
    if key not in _known:
        # What this process has used already stays, whatever others have written since.
        _known.update(load() | _known)
    if key not in _known:
        times = [_time(milliseconds, candidate) for candidate in CANDIDATES[kernel]]
        best = min(range(len(times)), key=times.__getitem__)
        if times[best] == float("inf"):
            return None
        _known[key] = CANDIDATES[kernel][best]
        _store()
    return _known[key]


def _time(milliseconds: Callable[[Settings], float], candidate: Settings) -> float:
    try:
        return milliseconds(candidate)
    except Exception:  # too large for this device, in one of the ways in which compiler, driver and launch say so
        return float("inf")


def cache_file() -> Path:
    """Where found settings are kept."""
    root = os.environ.get("ALRP_TRITON_CACHE") or Path.home() / ".cache" / "alrp-triton"
    return Path(root) / "settings.json"


def load() -> dict[str, Settings]:
    """What earlier searches found; empty where there is no readable file. Whatever is no candidate is left out."""
    try:
        found = json.loads(cache_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict):
        return {}
    # The candidates themselves rather than what equals them in the file, such as 1024.0.
    return {
        key: candidate
        for key, value in found.items()
        for candidate in CANDIDATES.get(key.split("|")[0], [])
        if candidate == value
    }


def _store() -> None:
    """Add to the file what it does not have, by way of a file of our own, so that no reader sees half of it."""
    target = cache_file()
    # Backward runs in a thread for each device.
    partial = target.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
    with contextlib.suppress(OSError):
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(_known | load(), indent=1, sort_keys=True), encoding="utf-8")
        partial.replace(target)


def _milliseconds(launch: Callable[..., None], settings: Settings) -> float:
    from triton.testing import do_bench

    return float(do_bench(lambda: launch(**settings), warmup=10, rep=50, return_mode="median"))
