"""Ways to do the two passes over the logits, and the one place that chooses between them.

A backend is a module with ``count_negatives`` (pass 1) and ``write_gradient`` (pass 2). The linear ones, ``torch``,
``triton`` and ``numba``, work on sorted knots; ``pairwise`` compares every logit with every positive, as does
``direct``, which users do not name: it is what ``torch`` and ``numba`` mean where the linear form does not apply.
``reference`` is no engine backend: it computes losses whole, in :mod:`alrp_triton.reference`.
"""

from __future__ import annotations

import importlib.util
import os

from torch import device as Device  # not torch itself, whose name is a submodule's here

from ..devices import is_gpu

BACKENDS = ("torch", "numba", "triton", "pairwise", "reference")
LINEAR_BACKENDS = ("torch", "triton", "numba")
TRITON_BACKENDS = ("triton", "pairwise")


# Found once, since torch.compile cannot look; found, not imported.
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
_NUMBA_INSTALLED = importlib.util.find_spec("numba") is not None


def triton_installed() -> bool:
    """Whether Triton can be imported; does not import it."""
    return _TRITON_INSTALLED


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


def choose_backend(backend: str, device: Device, alone: bool = True) -> str:
    """The backend that ``backend`` asks for: ``"auto"`` takes triton on a GPU where Triton is present, else torch;
    numba compiles at its first call, and so is for those who name it. ``alone``: there are no other processes to rank
    with.

    Raises:
        ValueError: for an unknown name, or a backend that cannot run here (saying why).
    """
    if not isinstance(backend, str) or backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend: expected one of {('auto', *BACKENDS)}, got {backend!r}")
    if backend == "auto":
        return "triton" if is_gpu(device) and triton_installed() else "torch"
    if backend == "reference" and not alone:
        raise ValueError("backend: 'reference' ranks what one process has; got a group")
    reason = why_unavailable(backend, device)
    if reason is not None:
        raise ValueError(f"backend: {backend!r} cannot run on device {str(device)!r}: {reason}")
    return backend


def pairwise_form(backend: str) -> str:
    """The backend that looks at every pair where ``backend`` computes."""
    return "pairwise" if backend in TRITON_BACKENDS else "direct"
