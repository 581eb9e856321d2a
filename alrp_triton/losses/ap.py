"""AP Loss: one minus the average precision.

K. Chen, J. Li, W. Lin, J. See, J. Wang, L. Duan, Z. Chen, C. He and J. Zou, "Towards Accurate One-Stage Object
Detection with AP-Loss", CVPR 2019; with the smoothed step of Oksuz et al., NeurIPS 2020, as an instance of their
framework.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import reference
from ..engine import Ranking, Statistics, check_inputs
from ..engine.backends import choose_backend
from ..engine.inputs import compute_dtype
from . import exact


def ap_error(ranking: Statistics, interpolated: bool) -> Tensor:
    """l(i): one minus the precision at positive i, or minus the largest among i and the positives below it; ``[P]``."""
    error = ranking.num_false_positives / ranking.rank
    return -ranking.running_max(-error) if interpolated else error


def ap_loss(
    logits: Tensor | Sequence[Tensor],
    labels: Tensor | Sequence[Tensor],
    *,
    delta: float = 1.0,
    interpolated: bool = True,
    num_positives: int | None = None,
    groups: Tensor | Sequence[Tensor] | None = None,
    ignore_index: int = -1,
    backend: str = "auto",
) -> Tensor:
    r"""AP Loss, exact, in O(M log P) time for M logits and P positives.

    With ``rank+(i) = 1 + sum_{k != i} H(p_k - p_i)``, ``rank(i) = rank+(i) + sum_j H(n_j - p_i)`` and the ramp H of
    :func:`alrp_loss`, the precision at positive i is ``rank+(i) / rank(i)``, and the loss is one minus its mean. The
    gradient is error-driven: each positive sends one minus its precision to its false positives.

    Args:
        logits, labels, groups, ignore_index, backend: see :func:`alrp_loss`.
        delta: half width of the ramp, from 1e-30 to 1e30, or 0 for the step.
        interpolated: take for the precision at i the largest among i and the positives below it, as the published code
            does and as the AP of detection benchmarks is defined.
        num_positives: P, where the caller knows it. Otherwise the positives are counted, for which the host has to wait
            for a GPU, and which ``torch.compile(fullgraph=True)`` refuses.

    Returns:
        A scalar: float64 for float64 logits, else float32. 0, attached to the graph, without positives.

    Raises:
        TypeError, ValueError, RuntimeError: see :func:`alrp_loss`.
    """
    levels = check_inputs(
        logits, labels, delta=delta, ignore_index=ignore_index, groups=groups, num_positives=num_positives
    )
    if not isinstance(interpolated, bool):
        raise TypeError(f"interpolated: expected a bool, got {type(interpolated).__name__}")
    dtype, device = compute_dtype(levels.logits[0].dtype), levels.logits[0].device
    backend = choose_backend(backend, device)
    if backend == "reference":
        flat = exact.flatten(levels, ignore_index, num_positives, "num_positives")
        result = reference.ap(*flat[:2], delta=delta, interpolated=interpolated, groups=flat[2])
        return exact.attach(result.value, levels, result.grad_logits).to(dtype)
    ranking = Ranking(levels, num_positives, delta=delta, ignore_index=ignore_index, backend=backend)
    with torch.no_grad():
        error, share = ap_error(ranking, interpolated), ranking.share
        value = (error * share).sum() + ranking.poison
    return ranking.error_driven(value, error, share).to(dtype)


class APLoss(nn.Module):
    """AP Loss as a module.

    Args:
        delta, interpolated, ignore_index, backend: see :func:`ap_loss`.
    """

    def __init__(
        self, delta: float = 1.0, interpolated: bool = True, *, ignore_index: int = -1, backend: str = "auto"
    ) -> None:
        super().__init__()
        self.delta, self.interpolated = delta, interpolated
        self.ignore_index, self.backend = ignore_index, backend

    def forward(
        self,
        logits: Tensor | Sequence[Tensor],
        labels: Tensor | Sequence[Tensor],
        num_positives: int | None = None,
        groups: Tensor | Sequence[Tensor] | None = None,
    ) -> Tensor:
        """The loss of one batch, a scalar; arguments as :func:`ap_loss` takes them."""
        return ap_loss(
            logits,
            labels,
            delta=self.delta,
            interpolated=self.interpolated,
            num_positives=num_positives,
            groups=groups,
            ignore_index=self.ignore_index,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """The arguments, as ``repr`` shows them."""
        names = ("delta", "interpolated", "ignore_index", "backend")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
