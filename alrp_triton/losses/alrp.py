"""aLRP Loss: average Localisation-Recall-Precision error.

K. Oksuz, B. C. Cam, E. Akbas and S. Kalkan, "A Ranking-based, Balanced Loss Function Unifying Classification and
Localisation in Object Detection", NeurIPS 2020. Equation numbers are the paper's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import reference
from ..boxes import BoxError, box_error, check_box_error
from ..engine import Evaluated, Ranking, Statistics, check_inputs
from ..engine.processes import among_processes, outside_graphs, processes_of, telling_failure
from .framework import Criterion, Definition, Exact, Loss, evaluate
from .monitor import statistics
from .outputs import ALRPLossOutput
from .self_balance import SelfBalance

if TYPE_CHECKING:  # not everywhere there
    from torch.distributed import ProcessGroup

LOC_RANKINGS = ("sorted", "smooth")
# Stands for a new SelfBalance(); all losses would share one in the signature.
_NEW: Any = object()


def lrp_error(ranking: Statistics, loc_errors: Tensor) -> Tensor:
    """l(i), the LRP error at positive i (equation 10), ``[P]``: a formula for :mod:`alrp_triton.framework`."""
    return (ranking.num_false_positives + loc_errors + ranking.sums_above(loc_errors)) / ranking.rank


def lrp_target(ranking: Statistics, loc_errors: Tensor) -> Tensor:
    """l*(i), the error that is left if nothing is above i (equation 13), ``[P]``."""
    return loc_errors / ranking.rank


def lrp_excess(ranking: Statistics, loc_errors: Tensor) -> Tensor:
    """l(i) - l*(i), in which i's own error cancels; i sends it to its false positives (equation 14), ``[P]``."""
    return (ranking.num_false_positives + ranking.sums_above(loc_errors)) / ranking.rank


def loc_weights(ranking: Ranking, loc_ranking: str) -> Tensor:
    """The derivative of ``loc``, which is linear in the errors. E_k counts for k itself and for each positive below k,
    each time divided by the rank of that positive; ``[P]``."""
    each = ranking.share / ranking.rank
    if loc_ranking == "smooth":
        return each + ranking.sums_received(each)
    return ranking.sums_sorted_received(each)


def _evaluate(ranking: Ranking, loc_errors: Tensor, loc_ranking: str) -> Evaluated:
    with torch.no_grad():
        cls = ranking.num_false_positives / ranking.rank * ranking.share
        sent = lrp_excess(ranking, loc_errors) * ranking.share
        weights = loc_weights(ranking, loc_ranking)
        return Evaluated((cls, loc_errors * weights), sent, loc_errors, weights)


def _reference(
    logits: Tensor, labels: Tensor, values: dict[str, Tensor], eps: float, loc_ranking: str, **settings: Any
) -> Exact:
    result = reference.alrp(logits, labels, values["loc_errors"], eps=eps, loc_ranking=loc_ranking, **settings)
    # The weights may not show a NaN in the logits.
    loc = (values["loc_errors"].double() * result.grad_loc_errors).sum() + 0 * result.loc
    nothing = torch.zeros_like(result.grad_logits)
    of_values = {"loc_errors": result.grad_loc_errors}
    return Exact((result.cls, loc), (result.grad_logits, nothing), of_values, result.rank)


@among_processes
def alrp_loss(
    logits: Tensor | Sequence[Tensor],
    labels: Tensor | Sequence[Tensor],
    loc_errors: Tensor,
    *,
    delta: float = 1.0,
    eps: float = 1e-5,
    loc_ranking: str = "sorted",
    groups: Tensor | Sequence[Tensor] | str | None = None,
    ignore_index: int = -1,
    backend: str = "auto",
    process_group: ProcessGroup | bool | None = None,
) -> ALRPLossOutput:
    r"""aLRP Loss (equation 9), exact, in O(M log P) time for M logits and P positives.

    With the ramp H(x) = clamp(x / (2 delta) + 1/2, 0, 1), N_FP(i) the sum of H(n_j - p_i) over negatives j, and
    rank(i) = 1 + sum_{k != i} H(p_k - p_i) + N_FP(i), both over all levels and images of the call:

        cls = mean_i N_FP(i) / rank(i)
        loc = mean_i (E_i + sum of E_k over the positives k above i) / rank(i)

    Args:
        logits: scores before the sigmoid: ``[..., C]`` or ``[M]``, float16, bfloat16, float32 or float64, any
            strides; or a sequence of such tensors (feature-pyramid levels), ranked together without being concatenated.
        labels: tensor(s) like ``logits``: of the same shape (1 positive, 0 negative, ``ignore_index`` ignored), of an
            integer dtype, bool, or floats of exactly these values, which each call copies as integers; or integers
            without the last axis (a class index 0..C-1, C for background, ``ignore_index`` ignored).
        loc_errors: ``[P]``, >= 0: localisation error of each positive, in the flat (row-major, level after level)
            order of the positives; :func:`alrp_triton.at_positives` picks them from errors of all anchors.
        delta: half width of the ramp, from 1e-30 to 1e30, or 0 for the step H(x) = [x >= 0]; the only hyperparameter.
        eps: a positive with at most this many false positives sends no score gradient.
        loc_ranking: which positives are above i in ``loc``: ``"sorted"``, those that precede it in descending order
            (the authors' code), or ``"smooth"``, each k != i by H(p_k - p_i) (equation 11).
        groups: ``"image"``, ``"class"`` or ``"image_class"``, of logits ``[B, ..., C]``; or integer tensor(s) with the
            ranking of each logit, or of each row: of the shape of ``logits``, or without the last axis; any integers.
            Each group is a separate ranking, and the loss is the mean over the groups that have a positive. None for
            one ranking of all.
        ignore_index: the label of ignored logits.
        backend: ``"auto"`` (triton on a GPU and numba on a CPU if they are installed, otherwise torch), ``"torch"``,
            ``"numba"``, ``"triton"``, ``"pairwise"`` or ``"reference"``.
        process_group: a ``torch.distributed`` process group, or True for the default one: rank the logits of all its
            processes together, exactly as in one call with the logits of all, process after process. All must call with
            the same settings; a process may have no positives, negatives, or logits. ``cls`` and ``loc`` are then those
            of all, the same in each process, and ``rank`` has this process's positives. Gradients are multiplied by the
            number of processes, so that the mean that DistributedDataParallel takes is the gradient of the whole. Not
            with ``"reference"``. None for this process alone.

    Returns:
        ``ALRPLossOutput(cls, loc, rank)``. Float64 for float64 logits, else float32; score gradients have the logits'
        dtype. Without positives both components are 0 and attached to the graph. A NaN in logits that are not ignored,
        or in ``loc_errors``, makes everything NaN.

    Raises:
        TypeError, ValueError: for a wrong type, shape, device, dtype or value, naming the argument. A wrong number of
            ``loc_errors`` or a label out of range raises on the CPU; on a GPU it makes the loss NaN, or raises with the
            environment variable ``ALRP_TRITON_DEBUG=1``.
        RuntimeError: if differentiated twice with respect to the logits; within ``torch.func.vmap``, ``grad`` and
            similar transforms, and in forward-mode differentiation, saying what to use instead.

    Warns:
        UserWarning: with ``ALRP_TRITON_DEBUG=1``, of logits that look like probabilities, and of labels that are all
            ignored.
    """
    loss = _alrp(logits, labels, loc_errors, delta, eps, loc_ranking, groups, ignore_index, backend, process_group)
    return ALRPLossOutput(*loss.scalars, loss.rank)


def _alrp(
    logits: Tensor | Sequence[Tensor],
    labels: Tensor | Sequence[Tensor],
    loc_errors: Tensor,
    delta: float,
    eps: float,
    loc_ranking: str,
    groups: Tensor | Sequence[Tensor] | str | None,
    ignore_index: int,
    backend: str,
    process_group: Any,
    name: str = "loc_errors",
) -> Loss:
    levels = check_inputs(
        logits,
        labels,
        delta=delta,
        ignore_index=ignore_index,
        groups=groups,
        per_positive={name: loc_errors},
        eps=eps,
        process_group=process_group,
    )
    if loc_ranking not in LOC_RANKINGS:
        raise ValueError(f"loc_ranking: expected one of {LOC_RANKINGS}, got {loc_ranking!r}")
    definition = Definition(
        partial(_evaluate, loc_ranking=loc_ranking),
        partial(_reference, eps=eps, loc_ranking=loc_ranking),
        eps,
        in_kernels=f"alrp_{loc_ranking}",
    )
    values = {"loc_errors": loc_errors}
    return evaluate(definition, levels, values, loc_errors.shape[0], delta=delta, backend=backend, name=name)


class ALRPLoss(Criterion):
    """aLRP Loss on logits and boxes, with self-balancing of its two components.

    Args:
        delta: half width of the ramp, see :func:`alrp_loss`.
        tau: the IoU from which a box counts as localised, in [0, 1): errors are divided by 1 - tau. The paper takes 0.5
            for dense heads and second stages, 0.7 for proposal heads.
        box_error: ``"iou"``, ``"giou"``, ``"diou"``, ``"ciou"``, or a callable of predicted and target boxes that
            returns the ``[P]`` localisation errors, see :func:`alrp_triton.boxes.box_error`.
        self_balance: a :class:`SelfBalance`, a constant weight >= 0 for the localisation component, or None for 1. By
            default a new ``SelfBalance()``; call its ``step_epoch()`` after each epoch.
        eps, loc_ranking, ignore_index, backend, process_group: see :func:`alrp_loss`. With ``process_group`` the
            self-balancing weight is common to all its processes.
        monitor: see :attr:`stats`.

    Raises:
        TypeError, ValueError: naming the argument; wrong values of those of :func:`alrp_loss` raise in ``forward``.
    """

    takes_boxes = True

    def __init__(
        self,
        delta: float = 1.0,
        tau: float = 0.5,
        box_error: BoxError = "giou",
        self_balance: SelfBalance | float | None = _NEW,
        *,
        eps: float = 1e-5,
        loc_ranking: str = "sorted",
        ignore_index: int = -1,
        backend: str = "auto",
        process_group: ProcessGroup | bool | None = None,
        monitor: bool = False,
    ) -> None:
        if self_balance is _NEW:
            self_balance = SelfBalance()
        if isinstance(self_balance, bool) or not isinstance(self_balance, (SelfBalance, int, float, type(None))):
            raise TypeError(
                f"self_balance: expected a SelfBalance, a number or None, got {type(self_balance).__name__}"
            )
        if isinstance(self_balance, (int, float)) and not 0 <= self_balance < math.inf:
            raise ValueError(f"self_balance: expected a finite weight >= 0, got {self_balance}")
        check_box_error(box_error, tau)
        super().__init__(
            delta=delta,
            tau=tau,
            box_error=box_error,
            self_balance=self_balance,
            eps=eps,
            loc_ranking=loc_ranking,
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
    ) -> ALRPLossOutput:
        """The loss of one batch.

        Args:
            logits, labels, groups: see :func:`alrp_loss`.
            pred_boxes: ``[P, 4]`` predicted boxes (x1, y1, x2, y2) of the positives, in their flat order; or
                ``[P, 6]`` in volumes, see ``alrp_triton.boxes``.
            target_boxes: ground-truth boxes of the positives, of the same shape.

        Returns:
            ``ALRPLossOutput``; ``loc`` is multiplied by the self-balancing weight. Train on ``total``.
        """
        processes, balance = processes_of(self.process_group), self.self_balance
        with telling_failure(processes):
            errors = box_error(pred_boxes, target_boxes, self.box_error, self.tau)
            settings = self.delta, self.eps, self.loc_ranking, groups, self.ignore_index, self.backend, processes
            loss = _alrp(logits, labels, errors, *settings, "pred_boxes")
        self._look_once(loss, (pred_boxes, target_boxes))
        cls, loc = loss.scalars
        # Another process may have positives; if none has, there is no ratio to count.
        has_positives = errors.shape[0] > 0 or processes is not None
        weight = balance(cls, loc, has_positives) if isinstance(balance, SelfBalance) else balance
        if weight is not None:
            loc = loc * weight
        if self.monitor:
            found = loss.ranked()
            self.stats = statistics(found, cls, better=-1, loc=loc, weight=1.0 if weight is None else weight)
        return ALRPLossOutput(cls, loc, loss.rank)
