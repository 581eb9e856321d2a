"""Make a model of the DETR family train with a ranking loss: one call, nothing patched globally.

    model = use_alrp(DeformableDetrForObjectDetection(config))
    outputs = model(pixel_values=pixel_values, labels=labels)
    outputs.loss.backward()

Supported are the models with a sigmoid for each class: Conditional DETR, Deformable DETR, DAB-DETR, RT-DETR, RT-DETRv2
and D-FINE (``...ForObjectDetection``, and classes derived from these). The model's own Hungarian matcher goes on
assigning queries to objects; what changes is the loss that the assignment is given to, :class:`DetrRankingLoss`.

It becomes ``model.loss_function``, where the framework looks for a loss, as a part of the model: it moves with it, its
state is in ``state_dict()`` and so in the checkpoints of ``Trainer``. Call ``use_...`` before a checkpoint with that
state is loaded; ``from_pretrained`` makes a new model, which has its framework's loss again and reports the state as
unexpected. Inference does not change. A second call, of the same function or another, replaces the loss.
"""

from __future__ import annotations

import copy
import math
from typing import TypeVar

from torch import nn
from transformers import PreTrainedModel

from ... import ALRPLoss, APLoss, NDCGLoss, RankSortLoss
from .._criteria import check_criterion
from .loss import DetrRankingLoss
from .outputs import FAMILIES, Family

__all__ = ["use_alrp", "use_ap", "use_classification_loss", "use_ndcg", "use_rank_sort"]

Model = TypeVar("Model", bound=PreTrainedModel)


def use_alrp(
    model: Model, criterion: nn.Module | None = None, *, l1_weight: float | None = None, per_image: bool = False
) -> Model:
    """Make a DETR train with aLRP Loss (Oksuz et al., NeurIPS 2020), or another that takes boxes.

    It takes the place of the focal (or varifocal) loss and of the GIoU loss, both with their weights. The L1 loss of
    the boxes stays: a query has no anchor to start from, and a GIoU of boxes far apart says little about where to go.

    Args:
        model: a model that the module's description names; changed in place. Wrap it for distributed training, or
            give it to ``Trainer``, after this call.
        criterion: a module called as ``criterion(logits, labels, pred_boxes, target_boxes)``, with ``logits``
            [B, Q, C], integer ``labels`` [B, Q] (0..C-1 for matched queries, C background) and, for the P matched
            queries in row-major order, boxes [P, 4] as (x1, y1, x2, y2) in units of the image's width and height; it
            returns an object with the scalars ``cls`` and ``loc``. ``None`` means ``ALRPLoss()``, whose self-balancing
            period ends with each call of ``model.loss_function.step_epoch()`` (see :class:`SelfBalanceCallback`).
            Of each supervised layer but the last the loss is a copy of it, see :class:`DetrRankingLoss`.
        l1_weight: weight of the L1 loss, >= 0; ``None`` for that of the model's config (5 in most).
        per_image: one ranking for each image instead of one for the batch: the criterion is also given ``groups=``,
            the image of each query [B, Q].

    Returns:
        ``model`` itself.

    Raises:
        TypeError: ``model`` is not one of these models, ``criterion`` is not a module or one of this package on scores
            alone, ``l1_weight`` is not a number, or ``per_image`` is not a bool.
        ValueError: ``l1_weight`` is negative or not finite.
    """
    return _use(model, ALRPLoss() if criterion is None else criterion, l1_weight, per_image, boxes=True)


def use_rank_sort(
    model: Model, criterion: nn.Module | None = None, *, l1_weight: float | None = None, per_image: bool = False
) -> Model:
    """Make a DETR train with Rank & Sort Loss (Oksuz et al., ICCV 2021); it replaces what :func:`use_alrp` does.

    Args:
        model, l1_weight, per_image: see :func:`use_alrp`.
        criterion: see :func:`use_alrp`; ``None`` means ``RankSortLoss()``.

    Returns:
        ``model`` itself.

    Raises:
        TypeError, ValueError: as in :func:`use_alrp`.
    """
    return _use(model, RankSortLoss() if criterion is None else criterion, l1_weight, per_image, boxes=True)


def use_ap(model: Model, criterion: nn.Module | None = None, *, per_image: bool = False) -> Model:
    """Make the classification of a DETR train with AP Loss (Chen et al., CVPR 2019).

    Args:
        model, per_image: see :func:`use_alrp`.
        criterion: see :func:`use_classification_loss`; ``None`` means ``APLoss()``.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: as in :func:`use_classification_loss`.
    """
    return _use(model, APLoss() if criterion is None else criterion, None, per_image, boxes=False)


def use_ndcg(model: Model, criterion: nn.Module | None = None, *, per_image: bool = False) -> Model:
    """Make the classification of a DETR train with NDCG Loss.

    Args:
        model, per_image: see :func:`use_alrp`.
        criterion: see :func:`use_classification_loss`; ``None`` means ``NDCGLoss()``.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: as in :func:`use_classification_loss`.
    """
    return _use(model, NDCGLoss() if criterion is None else criterion, None, per_image, boxes=False)


def use_classification_loss(model: Model, criterion: nn.Module, *, per_image: bool = False) -> Model:
    """Make the classification of a DETR train with a loss on scores, such as one of your own formula.

    The L1 and GIoU losses remain the model's own, in value, weight and gradient.

    Args:
        model, per_image: see :func:`use_alrp`.
        criterion: a module called as ``criterion(logits, labels, num_positives=P)``, which returns a scalar, such as
            ``framework.RankingLoss(error)`` where the formula needs no extras; ``logits`` and ``labels`` as in
            :func:`use_alrp`. P is an int, so that the criterion need not wait for the device to count.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: ``model`` is not one of these models, ``criterion`` is not a module or one of this package that
            takes boxes, or ``per_image`` is not a bool.
    """
    return _use(model, criterion, None, per_image, boxes=False)


def _use(model: Model, criterion: nn.Module, l1_weight: float | None, per_image: bool, *, boxes: bool) -> Model:
    family = _family_of(model)
    check_criterion(criterion, boxes=boxes)
    if l1_weight is not None and (isinstance(l1_weight, bool) or not isinstance(l1_weight, (int, float))):
        raise TypeError(f"l1_weight must be a number or None; got {type(l1_weight).__qualname__}")
    if l1_weight is not None and not 0 <= l1_weight < math.inf:
        raise ValueError(f"l1_weight must be a finite number >= 0; got {l1_weight}")
    if not isinstance(per_image, bool):
        raise TypeError(f"per_image must be a bool; got {type(per_image).__qualname__}")

    copies = [copy.deepcopy(criterion) for _ in range(family.supervised_outputs(model.config) - 1)]
    loss = DetrRankingLoss(family, [criterion, *copies], takes_boxes=boxes, l1_weight=l1_weight, per_image=per_image)
    # What the setter of model.loss_function does; an assignment to that name would not reach it, because
    # torch.nn.Module takes any module that is assigned for a submodule of this name, which nothing would look at.
    # A default criterion starts on the CPU; the model may already live elsewhere.
    model._loss_function = loss.train(model.training).to(next(model.parameters()).device)
    return model


def _family_of(model: PreTrainedModel) -> Family:
    if isinstance(model, PreTrainedModel):
        for base in type(model).__mro__:
            if base.__name__ in FAMILIES:
                return FAMILIES[base.__name__]
    supported = ", ".join(FAMILIES)
    raise TypeError(f"model must be one of {supported}, not yet wrapped; got {type(model).__qualname__}")
