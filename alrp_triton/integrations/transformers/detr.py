"""Make a model of the DETR family train with a ranking loss: one call, nothing patched globally.

    model = use_alrp(DeformableDetrForObjectDetection(config))
    outputs = model(pixel_values=pixel_values, labels=labels)
    outputs.loss.backward()

It supports the models with a sigmoid for each class: Conditional DETR, Deformable DETR, DAB-DETR, RT-DETR, RT-DETRv2
and D-FINE (``...ForObjectDetection``, and classes derived from these). The model's own Hungarian matcher still assigns
queries to objects. Only the loss changes, to :class:`DetrRankingLoss`.

The loss becomes ``model.loss_function``, which the framework calls. It is a part of the model: it moves with the model,
and its state is in ``state_dict()`` and in the checkpoints of ``Trainer``. Call ``use_...`` before you load a
checkpoint with that state. ``from_pretrained`` makes a new model with its framework's loss and reports the state as
unexpected. Inference does not change. A second call of any of these functions replaces the loss.
"""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedModel

from ... import ALRPLoss, APLoss, NDCGLoss, RankSortLoss
from .._criteria import check_criterion, check_flag, check_weight
from .loss import DetrRankingLoss
from .outputs import family_of

__all__ = ["restore", "use_alrp", "use_ap", "use_loss", "use_ndcg", "use_rank_sort"]

Model = TypeVar("Model", bound=PreTrainedModel)


def use_loss(model: Model, criterion: nn.Module, *, l1_weight: float | None = None, per_image: bool = False) -> Model:
    """Make a DETR train with a ranking loss.

    It replaces the focal (or varifocal) loss and, if it takes boxes, the GIoU loss, with their weights. The L1 loss of
    the boxes stays: a query has no anchor to start from, and the GIoU of distant boxes has little information.

    Args:
        model: one of the models above; changed in place. Wrap it for distributed training, or give it to ``Trainer``,
            after this call.
        criterion: a module of one of two kinds, with ``logits`` [N, C] and integer ``labels`` [N] (0..C-1 for matched
            queries, C background) of the N queries of all images and supervised outputs. If there is more than one
            ranking it also gets ``groups=``, the ranking of each query [N], and returns the mean over the groups with a
            positive; see :class:`DetrRankingLoss`.

            - With ``criterion.takes_boxes = True``, as ``ALRPLoss`` and ``RankSortLoss``, it is called as
              ``criterion(logits, labels, pred_boxes, target_boxes)``, with the boxes [P, 4] of the P matched queries in
              this order, as (x1, y1, x2, y2) in units of the image's width and height. It returns an object with
              the scalars ``cls`` and ``loc``.
            - Otherwise, as ``APLoss``, ``NDCGLoss`` or a ``RankingLoss`` whose formula needs no extras, it is called as
              ``criterion(logits, labels, num_positives=P)``, P being an int, and returns a scalar.

            The self-balancing period of an ``ALRPLoss`` ends with each call of ``model.loss_function.step_epoch()``
            (see :class:`SelfBalanceCallback`).
        l1_weight: weight of the L1 loss, >= 0; ``None`` for that of the model's config (5 in most models).
        per_image: one ranking for each image instead of one for the batch.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: ``model`` is not one of these models, or another argument has the wrong type.
        ValueError: ``l1_weight`` is negative or not finite.
    """
    _, family = family_of(model)
    check_criterion(criterion)
    if l1_weight is not None:
        check_weight("l1_weight", l1_weight)
    check_flag("per_image", per_image)
    loss = DetrRankingLoss(family, criterion, l1_weight=l1_weight, per_image=per_image)
    # transformers' setter of model.loss_function does this, but torch.nn.Module bypasses it for modules.
    # A new criterion is on the CPU; the model may be on another device.
    model._loss_function = loss.train(model.training).to(next(model.parameters()).device)
    return model


def restore(model: Model) -> Model:
    """Take the loss away again: ``model.loss_function`` is then the framework's own.

    Weights and predictions remain. ``state_dict()`` and the files of ``save_pretrained`` have nothing of this package,
    and pickles load without it. An own ``loss_function`` that the model had before ``use_...`` does not come back.

    Args:
        model: any model of the framework, not wrapped; changed in place. A model without the loss remains as it is.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: ``model`` is not a ``PreTrainedModel``.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: expected a PreTrainedModel, not yet wrapped, got {type(model).__name__}")
    if isinstance(getattr(model, "_loss_function", None), DetrRankingLoss):
        del model._loss_function
    return model


def use_alrp(model: Model, **options: Any) -> Model:
    """:func:`use_loss` with a new ``ALRPLoss()`` (Oksuz et al., NeurIPS 2020)."""
    return use_loss(model, ALRPLoss(), **options)


def use_rank_sort(model: Model, **options: Any) -> Model:
    """:func:`use_loss` with a new ``RankSortLoss()`` (Oksuz et al., ICCV 2021)."""
    return use_loss(model, RankSortLoss(), **options)


def use_ap(model: Model, **options: Any) -> Model:
    """:func:`use_loss` with a new ``APLoss()`` (Chen et al., CVPR 2019)."""
    return use_loss(model, APLoss(), **options)


def use_ndcg(model: Model, **options: Any) -> Model:
    """:func:`use_loss` with a new ``NDCGLoss()``."""
    return use_loss(model, NDCGLoss(), **options)
