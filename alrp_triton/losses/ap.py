"""AP Loss: one minus the average precision.

K. Chen, J. Li, W. Lin, J. See, J. Wang, L. Duan, Z. Chen, C. He and J. Zou, "Towards Accurate One-Stage Object
Detection with AP-Loss", CVPR 2019; with the smoothed step of Oksuz et al., NeurIPS 2020, as an instance of their
framework.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import reference
from ..engine import Evaluated, Ranking, Statistics
from .framework import Definition, Exact, Loss, ScoreLoss, score_loss

if TYPE_CHECKING:  # not everywhere there
    from torch.distributed import ProcessGroup


def ap_error(ranking: Statistics, interpolated: bool) -> Tensor:
    """l(i): one minus the precision at positive i, or one minus the largest among i and the positives below it;
    ``[P]``."""
    error = ranking.num_false_positives / ranking.rank
    return -ranking.running_max(-error) if interpolated else error


@torch.no_grad()
def _evaluate(ranking: Ranking, interpolated: bool) -> Evaluated:
    # The target is 0, so a positive sends its whole error.
    error = ap_error(ranking, interpolated) * ranking.share
    return Evaluated((error,), error)


def _reference(logits: Tensor, labels: Tensor, values: dict[str, Tensor], **settings: Any) -> Exact:
    result = reference.ap(logits, labels, **settings)
    return Exact((result.value,), (result.grad_logits,))


_DEFINITIONS = {
    interpolated: Definition(
        partial(_evaluate, interpolated=interpolated),
        partial(_reference, interpolated=interpolated),
        in_kernels="ap_interpolated" if interpolated else "ap",
    )
    for interpolated in (True, False)
}


def _ap(logits: Any, labels: Any, *, interpolated: bool, **arguments: Any) -> Loss:
    if not isinstance(interpolated, bool):
        raise TypeError(f"interpolated: expected a bool, got {type(interpolated).__name__}")
    return score_loss(logits, labels, _DEFINITIONS[interpolated], **arguments)


def ap_loss(
    logits: Tensor | Sequence[Tensor],
    labels: Tensor | Sequence[Tensor],
    *,
    delta: float = 1.0,
    interpolated: bool = True,
    num_positives: int | None = None,
    groups: Tensor | Sequence[Tensor] | str | None = None,
    ignore_index: int = -1,
    backend: str = "auto",
    process_group: ProcessGroup | bool | None = None,
) -> Tensor:
    r"""AP Loss, exact, in O(M log P) time for M logits and P positives.

    With ``rank+(i) = 1 + sum_{k != i} H(p_k - p_i)``, ``rank(i) = rank+(i) + sum_j H(n_j - p_i)`` and the ramp H of
    :func:`alrp_loss`, the precision at positive i is ``rank+(i) / rank(i)``, and the loss is one minus its mean. The
    gradient is error-driven: each positive sends one minus its precision to its false positives.

    Args:
        logits, labels, groups, ignore_index, backend, process_group: see :func:`alrp_loss`.
        delta: half width of the ramp, from 1e-30 to 1e30, or 0 for the step.
        interpolated: use the largest precision among i and the positives below it as the precision at i, as in the
            published code and the AP of detection benchmarks.
        num_positives: P, if the caller knows it. Otherwise the positives are counted; the host waits for a GPU, and
            ``torch.compile(fullgraph=True)`` and ``torch.export`` raise.

    Returns:
        A scalar: float64 for float64 logits, else float32. 0, attached to the graph, without positives.

    Raises:
        TypeError, ValueError, RuntimeError: see :func:`alrp_loss`.
    """
    return _ap(
        logits,
        labels,
        interpolated=interpolated,
        delta=delta,
        num_positives=num_positives,
        groups=groups,
        ignore_index=ignore_index,
        backend=backend,
        process_group=process_group,
    ).scalars[0]


class APLoss(ScoreLoss):
    """AP Loss as a module.

    Args:
        delta, interpolated, ignore_index, backend, process_group: see :func:`ap_loss`.
        monitor: see :attr:`stats`.
    """

    function = _ap

    def __init__(
        self,
        delta: float = 1.0,
        interpolated: bool = True,
        *,
        ignore_index: int = -1,
        backend: str = "auto",
        process_group: ProcessGroup | bool | None = None,
        monitor: bool = False,
    ) -> None:
        super().__init__(
            delta=delta,
            interpolated=interpolated,
            ignore_index=ignore_index,
            backend=backend,
            process_group=process_group,
            monitor=monitor,
        )
