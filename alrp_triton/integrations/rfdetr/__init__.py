"""Ranking losses for RF-DETR: one call on its Lightning module, or one callback of its trainer.

    module = use_rank_sort(RFDETRModelModule(model_config, train_config))
    build_trainer(train_config, model_config).fit(module, RFDETRDataModule(model_config, train_config))

All decoder layers, the encoder and, in training, the groups of queries are ranked in one call, each as a group of its
own. RF-DETR's matcher, box and mask terms and their weights remain; :mod:`~..detr` describes the criterion.
:func:`calibrate` makes scores probabilities, so that the threshold of ``predict`` works again.
"""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

try:
    import pytorch_lightning  # noqa: F401
    from rfdetr.models.criterion import SetCriterion
except ImportError as error:
    raise ImportError(
        "alrp_triton.integrations.rfdetr needs RF-DETR with what it trains with: pip install 'alrp-triton[rfdetr]'"
    ) from error

from ... import ALRPLoss, APLoss, NDCGLoss, RankSortLoss
from .. import detr
from ._calibrate import CalibrationReport, calibrate, collect, thresholds
from .callback import RankingCallback

__all__ = [
    "CalibrationReport",
    "RankingCallback",
    "calibrate",
    "collect",
    "restore",
    "thresholds",
    "use_alrp",
    "use_ap",
    "use_loss",
    "use_ndcg",
    "use_rank_sort",
]

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
