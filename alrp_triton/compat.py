"""The signatures of published code. An existing head needs only another import line.

Replace the head's ``from ... import aLRPLoss`` by ``from alrp_triton.compat import aLRPLoss``, and likewise:

| names | published with |
| --- | --- |
| ``aLRPLoss``, ``APLoss`` | aLRP Loss, Oksuz et al., NeurIPS 2020 |
| ``RankSort`` | Rank & Sort Loss, Oksuz et al., ICCV 2021 |
| ``BucketedAPLoss``, ``BucketedRankSort`` | Bucketed losses, Yavuz et al., ECCV 2024, without the error of buckets |
| ``RankLoss``, ``SortLoss`` | RankED, edges in images, Cetinkaya et al., CVPR 2024 |

All take ``logits`` of any floating-point dtype and ``targets`` of the same shape, on any device. They are exact and
deterministic, and have no loop over positives. Without positives each loss is a scalar 0, attached to the graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .engine.operators import find
from .engine.passes import choose
from .losses import alrp_loss, ap_loss, rank_sort_loss

__all__ = ["APLoss", "BucketedAPLoss", "BucketedRankSort", "RankLoss", "RankSort", "SortLoss", "aLRPLoss"]

_EPS = 1e-10


class aLRPLoss:
    """aLRP Loss with the interface of the authors' heads, on one flat tensor; any device, exact and deterministic."""

    @staticmethod
    def apply(
        logits: Tensor, targets: Tensor, regression_losses: Tensor, delta: float = 1.0, eps: float = 1e-5
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Classification component, ranks, and the order in which the head sorts its localisation errors.

        Args:
            logits: ``[M]`` scores, any floating-point dtype.
            targets: ``[M]``, integer or floating-point; 1 positive, 0 negative, anything else ignored.
            regression_losses: ``[P]`` localisation errors of the positives in flat order; constants here.
            delta: half width of the ramp, >= 0.
            eps: a positive with at most this many false positives sends no score gradient.

        Returns:
            ``(cls_loss, rank, order)``: the scalar whose backward gives the error-driven score gradient; the rank of
            each positive ``[P]`` in flat order; and ``[P]`` int64, the positives in ascending order of score, equal
            ones in flat order on any device. Without positives the loss is a scalar 0, attached to the graph.

        Raises:
            TypeError, ValueError: as :func:`alrp_triton.alrp_loss`.
        """
        labels = _labels(logits, targets, regression_losses=regression_losses)
        cls, _, rank = alrp_loss(logits, labels, regression_losses.detach(), delta=delta, eps=eps)
        backend = choose("auto", logits.device)
        in_order, name = True, "regression_losses"
        _, pos_logits, *_ = find([logits.detach()], [labels], [], -1, len(rank), in_order, name, backend)
        return cls, rank, pos_logits.argsort(stable=True)


class APLoss:
    """AP Loss as published with aLRP Loss: with interpolated precision."""

    @staticmethod
    def apply(logits: Tensor, targets: Tensor, delta: float = 1.0) -> Tensor:
        """One minus the average precision, a scalar.

        Args:
            logits: scores of any shape.
            targets: of the same shape; 1 positive, 0 negative, anything else ignored.
            delta: half width of the ramp, >= 0.

        Raises:
            TypeError, ValueError: as :func:`alrp_triton.ap_loss`.
        """
        return ap_loss(logits, _labels(logits, targets), delta=delta)


class RankSort:
    """Rank & Sort Loss as published: the gradient of both errors is that of the first."""

    @staticmethod
    def apply(logits: Tensor, targets: Tensor, delta_RS: float = 0.5, eps: float = _EPS) -> tuple[Tensor, Tensor]:
        """Ranking and sorting error, scalars. The first one's backward gives the gradient of their sum; the second is a
        constant.

        Args:
            logits: scores of any shape.
            targets: of the same shape; a positive has its IoU, above 0; 0 negative, anything below ignored.
            delta_RS: half width of the ramp, >= 0.
            eps: as published, 1e-10.

        Raises:
            TypeError, ValueError: as :func:`alrp_triton.rank_sort_loss`, and for another ``eps``.
        """
        _check_eps(eps)
        labels = _labels(logits, targets, of_quality=True)
        ranking, sorting = rank_sort_loss(logits, labels, _qualities(logits, targets), delta=delta_RS)
        return ranking + (sorting - sorting.detach()), sorting.detach()


class BucketedAPLoss(APLoss):
    """:class:`APLoss` under the name of its bucketed form, whose positives have any target above 0."""

    @staticmethod
    def apply(logits: Tensor, targets: Tensor, delta: float = 1.0) -> Tensor:
        """As :meth:`APLoss.apply`."""
        return ap_loss(logits, _labels(logits, targets, of_quality=True), delta=delta)


class BucketedRankSort(RankSort):
    """:class:`RankSort` under the name of its bucketed form."""


class RankLoss:
    """The ranking half of RankED: every pixel of an edge above all others."""

    @staticmethod
    def apply(
        logits: Tensor, targets: Tensor, nms_grad: object = 1, delta: float = 0.1, eps: float = _EPS, split: int = 4
    ) -> Tensor:
        """Mean ranking error, a scalar.

        Args:
            logits: scores of any shape.
            targets: of the same shape; above 0 the certainty of an edge, and 0 elsewhere.
            nms_grad, split: not used; the published code does not use the first, and splits its work by the second.
            delta: half width of the ramp, >= 0.
            eps: as published, 1e-10.

        Raises:
            TypeError, ValueError: as :meth:`RankSort.apply`.
        """
        _check_eps(eps)
        labels = _labels(logits, targets, of_quality=True)
        return rank_sort_loss(logits, labels, _qualities(logits, targets), delta=delta).ranking


class SortLoss:
    """The sorting half of RankED: pixels of an edge in the order of their certainty."""

    @staticmethod
    def apply(
        logits: Tensor, targets: Tensor, nms_grad: object = 1, delta: float = 0.1, eps: float = _EPS, split: int = 4
    ) -> Tensor:
        """Mean sorting error, a scalar. Its backward gives twice the error-driven gradient, as published.

        Args:
            logits, targets, nms_grad, delta, eps, split: see :meth:`RankLoss.apply`.

        Raises:
            TypeError, ValueError: as :meth:`RankSort.apply`.
        """
        _check_eps(eps)
        labels = _labels(logits, targets, of_quality=True)
        sorting = rank_sort_loss(logits, labels, _qualities(logits, targets), delta=delta).sorting
        return sorting + (sorting - sorting.detach())


def _labels(logits: Tensor, targets: Tensor, of_quality: bool = False, **more: Tensor) -> Tensor:
    """Labels int8 of the logits: 1, 0, and -1 for what the published code leaves out. ``of_quality`` says whether any
    target above 0 is a positive, else 1 alone is."""
    for name, value in {"logits": logits, "targets": targets, **more}.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if targets.shape != logits.shape:
        raise ValueError(f"targets: expected the shape of logits, {list(logits.shape)}, got {list(targets.shape)}")
    positive = targets > 0 if of_quality else targets == 1
    return torch.where(positive, 1, torch.where(targets == 0, 0, -1)).to(torch.int8)


def _qualities(logits: Tensor, targets: Tensor) -> Tensor:
    """The targets of the positives ``[P]``; on a GPU the host waits for their number, as in the published code."""
    found = targets[targets > 0]
    return found if found.is_floating_point() else found.to(torch.float32)


def _check_eps(eps: float) -> None:
    if eps != _EPS:
        raise ValueError(f"eps: expected {_EPS}, as published, got {eps}")
