"""Rank & Sort Loss: positives above negatives, and among the positives those of higher IoU above the others.

K. Oksuz, B. C. Cam, E. Akbas and S. Kalkan, "Rank & Sort Loss for Object Detection and Instance Segmentation", ICCV
2021. Equation numbers are the paper's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import boxes, reference
from ..boxes import BoxError, box_error, check_box_error
from ..engine import Levels, Ranking, check_inputs
from ..engine.fused import can_fuse, fused_loss
from ..engine.inputs import compute_dtype
from ..engine.knots import ramp_at_0
from ..engine.operators import highest_in_row
from ..engine.processes import among_processes, outside_graphs, processes_of, telling_failure
from ..engine.sorting import sorting_order, sorting_received, sorting_sums
from ..engine.sums import total
from . import exact

if TYPE_CHECKING:  # not everywhere there
    from torch.distributed import ProcessGroup

# What adds up to less than this sends no gradient, as in the published code.
_EPS = 1e-10


class RankSortOutput(NamedTuple):
    """The two errors of Rank & Sort Loss, scalars. ``ranking + sorting`` is the loss."""

    ranking: Tensor
    """How far negatives stand above positives."""
    sorting: Tensor
    """How far positives of lower IoU stand above those of higher IoU."""


class RankSortLossOutput(NamedTuple):
    """What :class:`RankSortLoss` returns, scalars. ``cls + loc`` is the loss."""

    ranking: Tensor
    sorting: Tensor
    loc: Tensor
    """Localisation loss, multiplied by the weight that makes it as large as the other two together."""

    @property
    def cls(self) -> Tensor:
        """Classification component: ``ranking + sorting``."""
        return self.ranking + self.sorting


@among_processes
def rank_sort_loss(
    logits: Tensor | Sequence[Tensor],
    labels: Tensor | Sequence[Tensor],
    ious: Tensor,
    *,
    delta: float = 0.5,
    groups: Tensor | Sequence[Tensor] | None = None,
    ignore_index: int = -1,
    backend: str = "auto",
    group: ProcessGroup | bool | None = None,
) -> RankSortOutput:
    r"""Rank & Sort Loss, exact, in O(M log P + P^2) time for M logits and P positives.

    Here rank+(i) is the sum of H(p_k - p_i) over all positives, i itself included with H(0): 1/2, or 1 for ``delta=0``,
    as published. With N_FP(i) the sum of H(n_j - p_i) over the negatives and t the IoUs (equations 7 and 8)::

        ranking = mean_i N_FP(i) / (rank+(i) + N_FP(i))
        sorting = mean_i (a(i) - a*(i))

    where a(i) is the mean of 1 - t_k over all positives weighted by H(p_k - p_i), and a*(i) the same over those with
    t_k >= t_i. Positive i sends its ranking error to its false positives, and its sorting error to the positives of
    lower IoU above it.

    Args:
        logits, labels, groups, ignore_index, backend, group: see :func:`alrp_loss`.
        ious: ``[P]``, usually in [0, 1]: of each positive with its object, in the flat order of the positives. Taken as
            constants, and compared in float32 unless the logits are float64. A positive of IoU 0 remains a positive.
        delta: half width of the ramp, from 1e-30 to 1e30, or 0 for the step.

    Returns:
        ``RankSortOutput(ranking, sorting)``: float64 for float64 logits, else float32. Differentiating both together
        costs one pass over the logits.

    Raises:
        TypeError, ValueError, RuntimeError: see :func:`alrp_loss`.
    """
    levels = _check(logits, labels, ious, delta, groups, ignore_index, group)
    return _rank_sort(levels, ious, delta, ignore_index, backend)[0]


def _check(
    logits: Tensor | Sequence[Tensor],
    labels: Tensor | Sequence[Tensor],
    ious: Tensor,
    delta: float,
    groups: Tensor | Sequence[Tensor] | None,
    ignore_index: int,
    group: ProcessGroup | bool | None,
) -> Levels:
    return check_inputs(
        logits,
        labels,
        delta=delta,
        ignore_index=ignore_index,
        groups=groups,
        per_positive={"ious": ious},
        group=group,
    )


def _rank_sort(
    levels: Levels, ious: Tensor, delta: float, ignore_index: int, backend: str
) -> tuple[RankSortOutput, Tensor, Ranking | None]:
    """The loss, the flat indices of this process's positives, and the ranking if it was made step by step."""
    dtype = compute_dtype(levels.logits[0].dtype)
    backend = levels.choose_backend(backend)
    if backend == "reference":
        flat = exact.flatten(levels, ignore_index, ious.shape[0], "ious")
        result = reference.rank_sort(*flat[:2], ious.detach().to(dtype), delta=delta, groups=flat[2])
        values = torch.stack([result.ranking, result.sorting])
        ranked, ordered = exact.attach(values, levels, torch.stack([result.grad_ranking, result.grad_sorting])).unbind()
        pos_index = (flat[1] == 1).nonzero().squeeze(1)
        return RankSortOutput(ranked.to(dtype), ordered.to(dtype)), pos_index, None

    num_positives, values = ious.shape[0], ious.detach().to(dtype)
    if can_fuse(levels, num_positives, backend):
        ranked, ordered, _, pos_index = fused_loss(
            "rank_sort", levels, num_positives, values, delta=delta, ignore_index=ignore_index, eps=_EPS, name="ious"
        )
        return RankSortOutput(ranked, ordered), pos_index, None
    ranking = Ranking(
        levels,
        num_positives,
        delta=delta,
        ignore_index=ignore_index,
        backend=backend,
        values=(values,),
        name="ious",
    )
    (values,) = ranking.values
    with torch.no_grad():
        share, itself = ranking.share, ramp_at_0(ranking.delta)
        error = ranking.num_false_positives / (ranking.rank - (1 - itself))
        sent, weights = ranking.sent(error * share, _EPS)

        order = sorting_order(ranking.steps.pos_logits, values, ranking.pos_groups)
        groups = None if ranking.pos_groups is None else ranking.pos_groups[order]
        arguments = ranking.steps.pos_logits[order], values[order], groups
        rank, above, target_rank, target_above, missorted = sorting_sums(*arguments, ranking.delta, backend)
        sorting_error = (above / rank - target_above / target_rank) * share[order]
        sends = missorted > _EPS
        sorting_sent = torch.where(sends, sorting_error, 0.0)
        sorting_weights = torch.where(sends, sorting_sent / missorted, 0.0)
        received = sorting_received(*arguments, sorting_weights, ranking.delta, backend)
        sorted_gradient = torch.empty_like(received).index_copy(0, order, received - sorting_sent)

        totals = torch.stack([total(error * share), total(sorting_error)]) + ranking.poison
    ranked, ordered = ranking.attach(
        totals,
        torch.stack([-sent, sorted_gradient]),
        torch.stack([weights, torch.zeros_like(weights)]),
    ).unbind()
    return RankSortOutput(ranked.to(dtype), ordered.to(dtype)), ranking.pos_index, ranking


class RankSortLoss(nn.Module):
    """Rank & Sort Loss on logits and boxes.

    The localisation loss is the mean error of the positives' boxes, weighted by the highest score of each one's row,
    and then by ``(ranking + sorting) / loc`` of the same batch, as its authors publish it: no state, no hyperparameter.

    Args:
        delta: half width of the ramp, see :func:`rank_sort_loss`.
        box_error: ``"iou"``, ``"giou"``, ``"diou"``, ``"ciou"``, or a callable of predicted and target boxes that
            returns ``[P]`` errors, see :func:`alrp_triton.boxes.box_error`. Its scale does not matter.
        self_balance: whether to weight the localisation loss by that ratio.
        ignore_index, backend, group: see :func:`alrp_loss`.
    """

    def __init__(
        self,
        delta: float = 0.5,
        box_error: BoxError = "giou",
        self_balance: bool = True,
        *,
        ignore_index: int = -1,
        backend: str = "auto",
        group: ProcessGroup | bool | None = None,
    ) -> None:
        super().__init__()
        check_box_error(box_error, 0.0)
        if not isinstance(self_balance, bool):
            raise TypeError(f"self_balance: expected a bool, got {type(self_balance).__name__}")
        self.delta, self.box_error, self.self_balance = delta, box_error, self_balance
        self.ignore_index, self.backend, self.group = ignore_index, backend, group

    @outside_graphs
    def forward(
        self,
        logits: Tensor | Sequence[Tensor],
        labels: Tensor | Sequence[Tensor],
        pred_boxes: Tensor,
        target_boxes: Tensor,
        groups: Tensor | Sequence[Tensor] | None = None,
    ) -> RankSortLossOutput:
        """The loss of one batch.

        Args:
            logits, labels, groups: see :func:`rank_sort_loss`.
            pred_boxes: ``[P, 4]`` predicted boxes (x1, y1, x2, y2) of the positives, in their flat order.
            target_boxes: ``[P, 4]`` ground-truth boxes of the positives.

        Returns:
            ``RankSortLossOutput(ranking, sorting, loc)``; train on ``cls + loc``, the sum of the three.
        """
        processes: Any = processes_of(self.group)
        with telling_failure(processes):
            errors = box_error(pred_boxes, target_boxes, self.box_error, 0.0)
            ious = boxes.iou(pred_boxes.detach(), target_boxes.detach())
            levels = _check(logits, labels, ious, self.delta, groups, self.ignore_index, processes)
            (ranking, sorting), pos_index, ranked = _rank_sort(
                levels, ious, self.delta, self.ignore_index, self.backend
            )
        detached = [level.detach() for level in levels.logits]
        scores = highest_in_row(detached, levels.labels, pos_index, self.ignore_index).sigmoid().to(errors.dtype)
        if ranked is not None:
            errors, scores = ranked.gather(errors, scores)
        weight = scores.sum()
        loc = (errors * scores).sum() / weight.masked_fill(weight < _EPS, 1.0)
        if self.self_balance:
            # Where there is nothing to balance, neither is there a ratio.
            nothing = loc.detach() == 0
            loc = loc * ((ranking + sorting).detach() / loc.detach().masked_fill(nothing, 1.0))
        return RankSortLossOutput(ranking, sorting, loc.to(ranking.dtype))

    def extra_repr(self) -> str:
        """The arguments, as ``repr`` shows them."""
        names = ["delta", "box_error", "self_balance", "ignore_index", "backend"]
        if self.group is not None:
            names.append("group")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
