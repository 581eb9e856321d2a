"""The calls that make an RF-DETR rank, and that take the loss away again."""

from __future__ import annotations

from typing import Any, TypeVar

from rfdetr.models.criterion import SetCriterion
from torch import nn

from ... import ALRPLoss, APLoss, NDCGLoss, RankSortLoss
from .. import detr

__all__ = ["restore", "use_alrp", "use_ap", "use_loss", "use_ndcg", "use_rank_sort"]

Module = TypeVar("Module", bound=nn.Module)


def use_loss(model: Module, ranking: nn.Module, *, per_image: bool = False) -> Module:
    """Make an RF-DETR train with a ranking loss.

    It replaces the classification loss (``loss_ce``) and, if it takes boxes, the GIoU loss.

    Args:
        model: an ``RFDETRModelModule``, before ``fit``, or its ``criterion``, a ``SetCriterion``; changed in place. Not
            an ``RFDETR``, whose ``train`` makes a criterion of its own.
        ranking, per_image: as for :func:`alrp_triton.integrations.detr.use_loss`. The self-balancing period of an
            ``ALRPLoss`` ends with each call of ``criterion.step_epoch()`` (see :class:`RankingCallback`).

    Returns:
        ``model`` itself.

    Raises:
        TypeError: ``model`` is none of these, or another argument has the wrong type.
        ValueError: it is a model with keypoints, which trains on sums that are divided by numbers of objects later, so
            that a ranking loss would have another weight.
    """
    criterion = _criterion_of(model)
    if "keypoints" in criterion.losses:
        raise ValueError("model: expected one of detection or segmentation, got one with keypoints")
    detr.use_loss(criterion, ranking, per_image=per_image)
    return model


def restore(model: Module) -> Module:
    """Take the loss away again, so that class, terms, weights and ``state_dict()`` are RF-DETR's own.

    Args:
        model: as for :func:`use_loss`; changed in place. One without the loss remains as it is.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: ``model`` is none of these.
    """
    detr.restore(_criterion_of(model))
    return model


def use_alrp(model: Module, **options: Any) -> Module:
    """:func:`use_loss` with a new ``ALRPLoss()`` (Oksuz et al., NeurIPS 2020)."""
    return use_loss(model, ALRPLoss(), **options)


def use_rank_sort(model: Module, **options: Any) -> Module:
    """:func:`use_loss` with a new ``RankSortLoss()`` (Oksuz et al., ICCV 2021)."""
    return use_loss(model, RankSortLoss(), **options)


def use_ap(model: Module, **options: Any) -> Module:
    """:func:`use_loss` with a new ``APLoss()`` (Chen et al., CVPR 2019)."""
    return use_loss(model, APLoss(), **options)


def use_ndcg(model: Module, **options: Any) -> Module:
    """:func:`use_loss` with a new ``NDCGLoss()``."""
    return use_loss(model, NDCGLoss(), **options)


def _criterion_of(model: object) -> SetCriterion:
    criterion = model if isinstance(model, SetCriterion) else getattr(model, "criterion", None)
    if not isinstance(criterion, SetCriterion):
        wanted = "an RFDETRModelModule or its SetCriterion"
        raise TypeError(f"model: expected {wanted}, got {type(model).__name__}")
    return criterion
