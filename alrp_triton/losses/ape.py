"""APE Loss, adaptive pairwise error: AP Loss whose pairs include positives of lower IoU.

D. Xu, J. Deng and W. Li, "Revisiting AP Loss for Dense Object Detection: Adaptive Ranking Pair Selection", CVPR 2022.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import reference
from ..engine import Evaluated, Ranking
from ..engine.operators import sort_by_value
from ..engine.processes import among_processes
from .framework import Definition, Exact
from .outputs import RankSortOutput
from .rank_sort import RankSortLoss, rank_by_quality, ranking_error

if TYPE_CHECKING:  # not everywhere there
    from torch.distributed import ProcessGroup

# Sums below this send no gradient, as in Rank & Sort Loss.
_EPS = 1e-10


@among_processes
def ape_loss(
    logits: Tensor | Sequence[Tensor],
    labels: Tensor | Sequence[Tensor],
    ious: Tensor,
    *,
    delta: float = 0.5,
    groups: Tensor | Sequence[Tensor] | str | None = None,
    ignore_index: int = -1,
    backend: str = "auto",
    process_group: ProcessGroup | bool | None = None,
) -> RankSortOutput:
    r"""APE Loss, exact, in the time of :func:`rank_sort_loss`.

    With rank(i) the sum of H(s_j - p_i) over all logits, positive i itself included with H(0), N_FP(i) its part of the
    negatives and t the IoUs:

        ranking = mean_i t_i N_FP(i) / rank(i)
        sorting = mean_i t_i (sum of H(p_k - p_i) over the positives k with t_k < t_i) / rank(i)

    Positive i sends each term to the logit that causes it. The paper's distance is a sigmoid of the difference of two
    scores; here it is the ramp H, which makes the loss linear in M, and which the paper's ablation found as good:
    ``delta`` 0.5 and 1 are in the place of its lambda 8 and 4. The mean is over all positives, where the authors' code
    leaves out those without an error.

    Args:
        logits, labels, groups, ignore_index, backend, process_group: see :func:`alrp_loss`.
        ious: ``[P]``, see :func:`rank_sort_loss`.
        delta: half width of the ramp, from 1e-30 to 1e30, or 0 for the step.

    Returns:
        ``RankSortOutput(ranking, sorting)``: float64 for float64 logits, else float32; train on ``total``.

    Raises:
        TypeError, ValueError, RuntimeError: see :func:`alrp_loss`.
    """
    settings = delta, groups, ignore_index, backend, process_group
    return RankSortOutput(*rank_by_quality(_DEFINITION, logits, labels, ious, *settings).scalars)


@torch.no_grad()
def _evaluate(ranking: Ranking, ious: Tensor) -> Evaluated:
    placed, share = ranking.counted.placed, ranking.share * ious
    error = ranking_error(ranking) * share
    values, ranks = ious.to(placed.logits.dtype), ranking.rank - (1 - ranking.height_at_0)
    sorting = sort_by_value(placed.logits, values, placed.groups, share, ranking.counted.delta, _EPS, ranks)
    return Evaluated((error, sorting[0]), error, sorting=sorting[1])


def _reference(logits: Tensor, labels: Tensor, values: dict[str, Tensor], **settings: Any) -> Exact:
    result = reference.ape(logits, labels, values["ious"], **settings)
    return Exact((result.ranking, result.sorting), (result.grad_ranking, result.grad_sorting))


_DEFINITION = Definition(_evaluate, _reference, _EPS, in_kernels="ape")


class APELoss(RankSortLoss):
    """APE Loss on logits and boxes. Arguments, results and the localisation loss are those of :class:`RankSortLoss`;
    the paper takes twice the GIoU loss of the boxes with a constant weight instead."""

    _definition = _DEFINITION
