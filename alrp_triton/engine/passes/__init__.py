"""The passes over all logits (find, count and write), and the choice of the backend that runs them.

``torch`` (:mod:`.eager`), ``numba`` (:mod:`.numba`) and ``triton`` (:mod:`.gpu`) search every score in a sorted table
of ramps; ``pairwise`` compares every score with every positive, by tiles. ``reference`` has no passes:
:mod:`alrp_triton.reference` computes the whole loss.
"""

from __future__ import annotations

import importlib.util
import os

from torch import device as Device

from ..devices import is_gpu
from .protocol import Found, Own, Passes

__all__ = [
    "BACKENDS",
    "Found",
    "Own",
    "Passes",
    "choose",
    "choose_for_pairs",
    "compares_positives",
    "has_passes",
    "kernels_take",
    "looks_at_pairs",
    "numba_installed",
    "passes_of",
    "runs_triton",
    "triton_installed",
    "why_unavailable",
]

BACKENDS = ("torch", "numba", "triton", "pairwise", "reference")
_OF_TRITON = ("triton", "pairwise")

# Evaluated once, because torch.compile cannot do it. This does not import the packages.
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
# The second is our module, which a copy of the package without NumPy (tools/hub.py) does not have.
_NUMBA_INSTALLED = all(importlib.util.find_spec(name, __name__) for name in ("numba", ".numba"))


def passes_of(backend: str) -> Passes:
    """The passes of a backend; imports them."""
    if backend == "torch":
        from . import eager

        return eager.Eager()
    if backend == "numba":
        from . import numba

        return numba.Compiled()
    if backend == "reference":
        from . import whole

        return whole.Whole()
    from . import gpu

    return gpu.Linear() if backend == "triton" else gpu.Pairwise()


def has_passes(backend: str) -> bool:
    """Whether a backend has passes; the reference has none."""
    return backend != "reference"


def compares_positives(backend: str) -> bool:
    """Whether kernels run the steps of size P, if there are few enough positives to compare."""
    return backend == "triton"


def looks_at_pairs(backend: str) -> bool:
    """Whether a backend compares every score with every positive, without a table."""
    return backend == "pairwise"


def runs_triton(backend: str) -> bool:
    """Whether kernels run the passes of a backend."""
    return backend in _OF_TRITON


def triton_installed() -> bool:
    """Whether Triton can be imported; does not import it."""
    return _TRITON_INSTALLED


def kernels_take(device: Device) -> bool:
    """Whether Triton's kernels take tensors of this device, and are there."""
    return is_gpu(device) and triton_installed()


def numba_installed() -> bool:
    """Whether Numba can be imported; does not import it."""
    return _NUMBA_INSTALLED


def why_unavailable(backend: str, device: Device) -> str | None:
    """Why a backend cannot take tensors of this device, or None if it can."""
    if backend in ("torch", "reference"):
        return None
    if backend == "numba":
        if not numba_installed():
            return "numba is not installed; pip install 'alrp-triton[numba]'"
        return None if device.type == "cpu" else "numba compiles for the CPU alone"
    if not triton_installed():
        return "Triton is not installed"
    if is_gpu(device):
        return None
    if device.type != "cpu":
        return f"no kernels for device type {device.type!r}"
    if os.environ.get("TRITON_INTERPRET", "0") != "1":
        return "Triton runs on GPUs; on the CPU only in its interpreter (set TRITON_INTERPRET=1 before the first use)"
    return None


def choose(backend: str, device: Device, alone: bool = True) -> str:
    """The backend for the argument ``backend``: ``"auto"`` takes triton on a GPU and numba on a CPU if they are
    installed, otherwise torch. ``alone``: no other processes rank with this one.

    Raises:
        ValueError: for an unknown name, or a backend that cannot run here (saying why).
    """
    if not isinstance(backend, str) or backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend: expected one of {('auto', *BACKENDS)}, got {backend!r}")
    if backend == "auto":
        preferred = "triton" if is_gpu(device) else "numba"
        return preferred if why_unavailable(preferred, device) is None else "torch"
    if backend == "reference" and not alone:
        raise ValueError("backend: expected another than 'reference' with a process_group, got 'reference'")
    reason = why_unavailable(backend, device)
    if reason is not None:
        raise ValueError(f"backend: expected one that runs on device {str(device)!r}, got {backend!r}: {reason}")
    return backend


def choose_for_pairs(backend: str, device: Device, alone: bool = True) -> str:
    """:func:`choose` for a loss with pair functions, which run in PyTorch."""
    if runs_triton(backend):
        raise ValueError(f"backend: expected 'torch' or 'reference' with smoothing or distribution, got {backend!r}")
    chosen = choose(backend, device, alone)
    return "torch" if runs_triton(chosen) else chosen
