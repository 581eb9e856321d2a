"""Rank & Sort Loss: positives above negatives, and among the positives those of higher IoU above the others.

K. Oksuz, B. C. Cam, E. Akbas and S. Kalkan, "Rank & Sort Loss for Object Detection and Instance Segmentation", ICCV
2021. Equation numbers are the paper's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import boxes, reference
from ..boxes import BoxError, box_error, check_box_error
from ..engine import Evaluated, Ranking, check_inputs, doubts
from ..engine.operators import highest_in_row, sort_by_value
from ..engine.processes import among_processes, outside_graphs, processes_of, telling_failure
from ..engine.scans import prefix_sums
from .framework import Criterion, Definition, Exact, Loss, evaluate
from .monitor import statistics
from .outputs import RankSortLossOutput, RankSortOutput

if TYPE_CHECKING:  # not everywhere there
    from torch.distributed import ProcessGroup

# Sums below this send no gradient, as in the published code.
_EPS = 1e-10


@among_processes
def rank_sort_loss(
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
    r"""Rank & Sort Loss, exact, in O(M log P + P log^2 P) time for M logits and P positives. A GPU compares all pairs
    of up to 4096 positives, and with groups of any number.

    Here rank+(i) is the sum of H(p_k - p_i) over all positives, including i with H(0), which is 1/2, or 1 for
    ``delta=0``, as published. With N_FP(i) the sum of H(n_j - p_i) over the negatives and t the IoUs (equations 7 and
    8):

        ranking = mean_i N_FP(i) / (rank+(i) + N_FP(i))
        sorting = mean_i (a(i) - a*(i))

    where a(i) is the mean of 1 - t_k over all positives weighted by H(p_k - p_i), and a*(i) the same over those with
    t_k >= t_i. Positive i sends its ranking error to its false positives, and its sorting error to the positives of
    lower IoU above it.

    Args:
        logits, labels, groups, ignore_index, backend, process_group: see :func:`alrp_loss`.
        ious: ``[P]``, usually in [0, 1]: the IoU of each positive with its object, in the flat order of the positives.
            They are constants, and compared in float32 unless the logits are float64. A positive with IoU 0 is still a
            positive. With ``ALRP_TRITON_DEBUG=1`` IoUs above 1 raise ``ValueError``.
        delta: half width of the ramp, from 1e-30 to 1e30, or 0 for the step.

    Returns:
        ``RankSortOutput(ranking, sorting)``: float64 for float64 logits, else float32. Differentiating both together
        costs one pass over the logits.

    Raises:
        TypeError, ValueError, RuntimeError: see :func:`alrp_loss`.
    """
    loss = rank_by_quality(_DEFINITION, logits, labels, ious, delta, groups, ignore_index, backend, process_group)
    return RankSortOutput(*loss.scalars)


def ranking_error(ranking: Ranking) -> Tensor:
    """N_FP(i) / rank(i), where rank+(i) includes i itself by H(0) (equation 7); ``[P]``."""
    return ranking.num_false_positives / (ranking.rank - (1 - ranking.height_at_0))


def _evaluate(ranking: Ranking, ious: Tensor) -> Evaluated:
    with torch.no_grad():
        error = ranking_error(ranking) * ranking.share
        placed = ranking.counted.placed
        values = ious.to(placed.logits.dtype)
        sorting = sort_by_value(placed.logits, values, placed.groups, ranking.share, ranking.counted.delta, _EPS)
        return Evaluated((error, sorting[0]), error, sorting=sorting[1])


def _reference(logits: Tensor, labels: Tensor, values: dict[str, Tensor], **settings: Any) -> Exact:
    result = reference.rank_sort(logits, labels, values["ious"], **settings)
    return Exact((result.ranking, result.sorting), (result.grad_ranking, result.grad_sorting))


_DEFINITION = Definition(_evaluate, _reference, _EPS, in_kernels="rank_sort")


def rank_by_quality(
    definition: Definition,
    logits: Tensor | Sequence[Tensor],
    labels: Tensor | Sequence[Tensor],
    ious: Tensor,
    delta: float,
    groups: Tensor | Sequence[Tensor] | str | None,
    ignore_index: int,
    backend: str,
    process_group: Any,
    name: str = "ious",
) -> Loss:
    """A loss of two errors whose formula takes the IoUs of the positives."""
    levels = check_inputs(
        logits,
        labels,
        delta=delta,
        ignore_index=ignore_index,
        groups=groups,
        per_positive={name: ious},
        process_group=process_group,
    )
    # A little more may be rounding.
    if doubts.asked() and bool((ious > 1.01).any()):
        raise ValueError(f"ious: expected IoUs, at most 1, got {float(ious.detach().max()):g}")
    # IoUs are constants, compared in the dtype of the scores.
    values = {"ious": ious.detach().to(levels.compute_dtype())}
    return evaluate(definition, levels, values, ious.shape[0], delta=delta, backend=backend, name=name)


class RankSortLoss(Criterion):
    """Rank & Sort Loss on logits and boxes.

    The localisation loss is the mean error of the positives' boxes, weighted by the highest score of each one's row,
    and then by ``(ranking + sorting) / loc`` of the same batch, as published. It has no state and no hyperparameter.
    With groups it is the mean over the groups of these means; the ratio is that of the whole call.

    Args:
        delta: half width of the ramp, see :func:`rank_sort_loss`.
        box_error: ``"iou"``, ``"giou"``, ``"diou"``, ``"ciou"``, or a callable of predicted and target boxes that
            returns ``[P]`` errors, see :func:`alrp_triton.boxes.box_error`. Its scale does not matter.
        self_balance: whether to weight the localisation loss by that ratio.
        ignore_index, backend, process_group: see :func:`alrp_loss`.
        monitor: see :attr:`stats`.
    """

    takes_boxes = True
    _definition = _DEFINITION

    def __init__(
        self,
        delta: float = 0.5,
        box_error: BoxError = "giou",
        self_balance: bool = True,
        *,
        ignore_index: int = -1,
        backend: str = "auto",
        process_group: ProcessGroup | bool | None = None,
        monitor: bool = False,
    ) -> None:
        check_box_error(box_error, 0.0)
        if not isinstance(self_balance, bool):
            raise TypeError(f"self_balance: expected a bool, got {type(self_balance).__name__}")
        super().__init__(
            delta=delta,
            box_error=box_error,
            self_balance=self_balance,
            ignore_index=ignore_index,
            backend=backend,
            process_group=process_group,
            monitor=monitor,
        )

    @outside_graphs
    def forward(
        self,
        logits: Tensor | Sequence[Tensor],
        labels: Tensor | Sequence[Tensor],
        pred_boxes: Tensor,
        target_boxes: Tensor,
        groups: Tensor | Sequence[Tensor] | str | None = None,
    ) -> RankSortLossOutput:
        """The loss of one batch.

        Args:
            logits, labels, groups: see :func:`rank_sort_loss`.
            pred_boxes: ``[P, 4]`` predicted boxes (x1, y1, x2, y2) of the positives, in their flat order; or
                ``[P, 6]`` in volumes, see ``alrp_triton.boxes``.
            target_boxes: ground-truth boxes of the positives, of the same shape.

        Returns:
            ``RankSortLossOutput(ranking, sorting, loc)``; train on ``total``, the sum of the three.
        """
        processes = processes_of(self.process_group)
        with telling_failure(processes):
            errors = box_error(pred_boxes, target_boxes, self.box_error, 0.0)
            ious = boxes.iou(pred_boxes.detach(), target_boxes.detach())
            settings = self.delta, groups, self.ignore_index, self.backend, processes
            loss = rank_by_quality(self._definition, logits, labels, ious, *settings, "pred_boxes")
        self._look_once(loss, (pred_boxes, target_boxes))
        (ranking, sorting), levels = loss.scalars, loss.levels
        detached = [level.detach() for level in levels.logits]
        scores = highest_in_row(detached, levels.labels, levels.ignore_index, loss.indices).sigmoid().to(errors.dtype)
        errors, scores = loss.gather(errors, scores)
        loc = (errors * _shares(scores, loss.groups)).sum()
        weight: Tensor | float = 1.0
        if self.self_balance:
            # Without a loss to balance there is no ratio.
            nothing = loc.detach() == 0
            weight = (ranking + sorting).detach() / loc.detach().masked_fill(nothing, 1.0)
            loc = loc * weight
        output = RankSortLossOutput(ranking, sorting, loc.to(ranking.dtype))
        if self.monitor:
            self.stats = statistics(loss.ranked(), output.cls, better=1, loc=output.loc, weight=weight)
        return output


def _shares(scores: Tensor, groups: Tensor | None) -> Tensor:
    """The weight of each positive in the mean over the groups of the means weighted by scores, ``[P]``."""
    if groups is None:
        return _quotients(scores, scores.sum())
    ordered, order = groups.sort(stable=True)
    # Differences of float64 sums are exact enough for numbers below 1, and take fewer launches than scans.
    before = prefix_sums(scores[order].double()[None])[0]
    sums = before[torch.searchsorted(ordered, groups, right=True)] - before[torch.searchsorted(ordered, groups)]
    num_groups = (ordered[1:] != ordered[:-1]).sum() + 1
    return _quotients(scores, sums.to(scores.dtype)) / num_groups


def _quotients(scores: Tensor, sums: Tensor) -> Tensor:
    return scores / sums.masked_fill(sums < _EPS, 1.0)
