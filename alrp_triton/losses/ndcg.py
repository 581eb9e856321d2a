"""NDCG Loss: one minus the normalised discounted cumulative gain, each positive being of relevance 1.

The gain and its discount are those of K. Jarvelin and J. Kekalainen, "Cumulated gain-based evaluation of IR
techniques", ACM TOIS 2002; the loss and its gradient follow from Definition 1 and Algorithm 1 of Oksuz et al.,
NeurIPS 2020.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import reference
from ..engine import Evaluated, Ranking, Statistics
from ..engine.scans import prefix_sums
from .framework import Definition, Exact, Loss, ScoreLoss, score_loss

if TYPE_CHECKING:  # not everywhere there
    from torch.distributed import ProcessGroup


def ideal_gain(ranking: Statistics) -> Tensor:
    """Z = sum over r = 1..P of 1 / log2(1 + r), the largest gain that P positives can have; ``[P]``."""
    longest = ranking.num_positives.shape[0]
    places = torch.arange(2, longest + 2, dtype=torch.float64, device=ranking.num_positives.device)
    return prefix_sums(1 / places.log2()[None])[0][ranking.num_positives.long()]


def ndcg_error(ranking: Statistics) -> Tensor:
    """l(i) = Z/P - 1 / log2(1 + rank(i)), ``[P]``."""
    return ideal_gain(ranking) / ranking.num_positives - 1 / (1 + ranking.rank).log2()


def ndcg_target(ranking: Statistics) -> Tensor:
    """l*(i) = Z/P - 1 / log2(1 + rank+(i)): the error that is left if no negative is above i; ``[P]``."""
    return ideal_gain(ranking) / ranking.num_positives - 1 / (1 + ranking.rank_positive).log2()


def ndcg_excess(ranking: Statistics) -> Tensor:
    """l(i) - l*(i), without a difference of two logarithms, which would lose a small N_FP(i); ``[P]``."""
    behind, rank = 1 + ranking.rank_positive, 1 + ranking.rank
    return (ranking.num_false_positives / behind).log1p() / math.log(2) / (behind.log2() * rank.log2())


@torch.no_grad()
def _evaluate(ranking: Ranking) -> Evaluated:
    # Z replaces P.
    share = ranking.share * ranking.num_positives / ideal_gain(ranking)
    return Evaluated((ndcg_error(ranking) * share,), ndcg_excess(ranking) * share)


def _reference(logits: Tensor, labels: Tensor, values: dict[str, Tensor], **settings: Any) -> Exact:
    result = reference.ndcg(logits, labels, **settings)
    return Exact((result.value,), (result.grad_logits,))


_DEFINITION = Definition(_evaluate, _reference, in_kernels="ndcg")


def _ndcg(logits: Any, labels: Any, **arguments: Any) -> Loss:
    return score_loss(logits, labels, _DEFINITION, **arguments)


def ndcg_loss(
    logits: Tensor | Sequence[Tensor],
    labels: Tensor | Sequence[Tensor],
    *,
    delta: float = 1.0,
    num_positives: int | None = None,
    groups: Tensor | Sequence[Tensor] | str | None = None,
    ignore_index: int = -1,
    backend: str = "auto",
    process_group: ProcessGroup | bool | None = None,
) -> Tensor:
    r"""NDCG Loss, exact, in O(M log P) time for M logits and P positives.

    With ``rank(i)`` and ``rank+(i)`` of :func:`ap_loss`:

        loss = 1 - sum_i 1 / log2(1 + rank(i)) / Z,    Z = sum_{r = 1..P} 1 / log2(1 + r)

    The gradient is error-driven: each positive sends ``(1 / log2(1 + rank+(i)) - 1 / log2(1 + rank(i))) / Z``, the gain
    that it loses by its false positives, to these. The loss that remains if no negative is above a positive has no
    gradient. It is 0 for ``delta=0`` without ties; otherwise it comes from the smoothed ranks of positives closer than
    delta.

    Args:
        logits, labels, groups, ignore_index, backend, process_group: see :func:`alrp_loss`.
        delta: half width of the ramp, from 1e-30 to 1e30, or 0 for the step.
        num_positives: see :func:`ap_loss`.

    Returns:
        A scalar: float64 for float64 logits, else float32. 0, attached to the graph, without positives.

    Raises:
        TypeError, ValueError, RuntimeError: see :func:`alrp_loss`.
    """
    return _ndcg(
        logits,
        labels,
        delta=delta,
        num_positives=num_positives,
        groups=groups,
        ignore_index=ignore_index,
        backend=backend,
        process_group=process_group,
    ).scalars[0]


class NDCGLoss(ScoreLoss):
    """NDCG Loss as a module.

    Args:
        delta, ignore_index, backend, process_group: see :func:`ndcg_loss`.
        monitor: see :attr:`stats`.
    """

    function = _ndcg

    def __init__(
        self,
        delta: float = 1.0,
        *,
        ignore_index: int = -1,
        backend: str = "auto",
        process_group: ProcessGroup | bool | None = None,
        monitor: bool = False,
    ) -> None:
        super().__init__(
            delta=delta, ignore_index=ignore_index, backend=backend, process_group=process_group, monitor=monitor
        )
