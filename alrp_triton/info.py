"""Versions, devices, backends and settings of this machine. Prints nothing, and queries only the properties of a
GPU."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import numpy
import torch

from . import __version__
from .engine.passes import BACKENDS, choose, numba_installed, triton_installed, why_unavailable

ENVIRONMENT = {
    "ALRP_TRITON_CACHE": "folder for the launch settings that alrp-triton bench --autotune finds",
    "ALRP_TRITON_DEBUG": "1: check on a GPU what the host would have to wait for; warn of doubtful arguments",
    "TRITON_INTERPRET": "1: Triton's interpreter, in which kernels run on the CPU",
}
"""The environment variables that the package reads."""

# The distributions that install the module ``triton``.
_TRITON_DISTRIBUTIONS = ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-rocm", "triton-windows")


def devices() -> list[torch.device]:
    """The CPU, and each CUDA or ROCm device."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.device("cpu"), *(torch.device("cuda", i) for i in range(count))]


def collect() -> dict[str, Any]:
    """Everything that ``alrp-triton info`` shows, ready for JSON.

    Returns:
        ``versions``: name to version or None; ``devices``: a dict for each, memory in bytes; ``backends``: a dict for
        each backend and device, with a ``reason`` if it is not ``available``, and whether ``backend="auto"`` takes it;
        ``settings``: architecture, then kernel, to the settings of the package; ``autotuning``: the cache file, whether
        it exists, and the results of earlier searches; ``environment``: variable to value or None.
    """
    # Here, so that a package without its kernels can be examined.
    from .kernels import settings

    found = devices()
    architectures = {settings.architecture_of(device) for device in found if device.type == "cuda"}
    return {
        "versions": versions(),
        "devices": [describe(device) for device in found],
        "backends": [_backend(backend, device) for device in found for backend in BACKENDS],
        "settings": {
            architecture: {kernel: settings.pinned(kernel, architecture) for kernel in settings.PINNED}
            for architecture in sorted(architectures) or ["default"]
        },
        "autotuning": {
            "cache_file": str(settings.cache_file()),
            "exists": settings.cache_file().exists(),
            "found": settings.load(),
        },
        "environment": {name: os.environ.get(name) for name in ENVIRONMENT},
    }


def versions() -> dict[str, str | None]:
    """Of the package, and of what it runs on; None for what is not installed."""
    return {
        "alrp-triton": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "triton": _version_of(triton_installed(), *_TRITON_DISTRIBUTIONS),
        "numba": _version_of(numba_installed(), "numba"),
        "numpy": numpy.__version__,
        "platform": platform.platform(),
    }


def _version_of(installed: bool, *distributions: str) -> str | None:
    """From metadata, because importing Triton or Numba is slow, and Triton reads TRITON_INTERPRET on import."""
    if not installed:
        return None
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"


def describe(device: torch.device) -> dict[str, Any]:
    """Name, architecture and memory in bytes, or None, of a device."""
    if device.type == "cpu":
        name, architecture, memory = platform.machine(), torch.backends.cpu.get_cpu_capability(), _host_memory()
        return {"device": "cpu", "name": name, "architecture": architecture, "memory": memory}
    # The driver gives the properties; free memory would need a context, which takes memory itself.
    from .kernels import settings

    properties = torch.cuda.get_device_properties(device)
    architecture, memory = settings.architecture_of(device), properties.total_memory
    return {"device": str(device), "name": properties.name, "architecture": architecture, "memory": memory}


def _host_memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # not on this system
        return None


def _backend(backend: str, device: torch.device) -> dict[str, Any]:
    reason = why_unavailable(backend, device)
    return {
        "backend": backend,
        "device": str(device),
        "available": reason is None,
        "reason": reason,
        "auto": choose("auto", device) == backend,
    }
