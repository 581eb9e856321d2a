"""Ranking losses for torchvision's RetinaNet: one call on an existing model, nothing patched globally.

    model = use_alrp(retinanet_resnet50_fpn(num_classes=91))
    losses = model(images, targets)  # {"classification": ..., "bbox_regression": ...}
    sum(losses.values()).backward()

:func:`use_alrp` and :func:`use_rank_sort` replace both parts of the loss; :func:`use_ap`, :func:`use_ndcg` and
:func:`use_classification_loss` the classification part alone, and the regression part stays the model's own.

In training mode ``model(images, targets)`` goes on returning these two scalars, whose sum is the loss to minimise.
Inference does not change. Neither do the anchors, the box coder, or the matcher that assigns anchors to objects:
matched anchors are positives of their object's class, unmatched ones background, those between the thresholds ignored.

The criterion becomes the submodule ``model.head.ranking_criterion``: it moves with the model, and what state it has is
part of ``state_dict()``. So load pretrained weights before the call. A second call, of the same function or another,
replaces the criterion. Deep copies and pickles of the model keep the loss, each with a criterion of its own.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.retinanet import RetinaNetHead

from ... import ALRPLoss, APLoss, NDCGLoss, RankSortLoss
from ...framework import RankingLoss

__all__ = ["use_alrp", "use_ap", "use_classification_loss", "use_ndcg", "use_rank_sort"]


def use_alrp(model: RetinaNet, criterion: nn.Module | None = None, *, per_image: bool = False) -> RetinaNet:
    """Make an existing RetinaNet train with aLRP Loss (Oksuz et al., NeurIPS 2020), or another that takes boxes.

    Args:
        model: a torchvision ``RetinaNet``; changed in place. Wrap it for distributed training after this call.
        criterion: a module called as ``criterion(logits, labels, pred_boxes, target_boxes)``, with ``logits``
            [B, A, C], integer ``labels`` [B, A] (0..C-1 positive, C background, ``criterion.ignore_index`` or else -1
            ignored) and, for the P positives in row-major order, boxes [P, 4] as (x1, y1, x2, y2) in pixels of the
            resized images; it returns an object with the scalars ``cls`` and ``loc``. ``None`` means ``ALRPLoss()``,
            whose ``self_balance.step_epoch()`` is to be called after each epoch.
        per_image: one ranking for each image instead of one for the batch: the criterion is also given
            ``groups=``, the image of each anchor [B, A], a view of B numbers.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: ``model`` is not a RetinaNet with a ``RetinaNetHead``, ``criterion`` is not a module or one of this
            package on scores alone, or ``per_image`` is not a bool.
    """
    return _use(model, ALRPLoss() if criterion is None else criterion, per_image, boxes=True)


def use_rank_sort(model: RetinaNet, criterion: nn.Module | None = None, *, per_image: bool = False) -> RetinaNet:
    """Make an existing RetinaNet train with Rank & Sort Loss (Oksuz et al., ICCV 2021).

    ``"classification"`` is the sum of its ranking and its sorting error.

    Args:
        model: see :func:`use_alrp`.
        criterion: see :func:`use_alrp`; ``None`` means ``RankSortLoss()``.
        per_image: see :func:`use_alrp`. The box part remains a mean over the positives of the batch.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: as in :func:`use_alrp`.
    """
    return _use(model, RankSortLoss() if criterion is None else criterion, per_image, boxes=True)


def use_ap(model: RetinaNet, criterion: nn.Module | None = None, *, per_image: bool = False) -> RetinaNet:
    """Make the classification of an existing RetinaNet train with AP Loss (Chen et al., CVPR 2019).

    Args:
        model: see :func:`use_alrp`.
        criterion: see :func:`use_classification_loss`; ``None`` means ``APLoss()``.
        per_image: see :func:`use_alrp`.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: as in :func:`use_classification_loss`.
    """
    return _use(model, APLoss() if criterion is None else criterion, per_image, boxes=False)


def use_ndcg(model: RetinaNet, criterion: nn.Module | None = None, *, per_image: bool = False) -> RetinaNet:
    """Make the classification of an existing RetinaNet train with NDCG Loss.

    Args:
        model: see :func:`use_alrp`.
        criterion: see :func:`use_classification_loss`; ``None`` means ``NDCGLoss()``.
        per_image: see :func:`use_alrp`.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: as in :func:`use_classification_loss`.
    """
    return _use(model, NDCGLoss() if criterion is None else criterion, per_image, boxes=False)


def use_classification_loss(model: RetinaNet, criterion: nn.Module, *, per_image: bool = False) -> RetinaNet:
    """Make the classification of an existing RetinaNet train with a loss on scores, such as one of your own formula.

    ``"bbox_regression"`` remains the model's own, in value and gradient.

    Args:
        model: see :func:`use_alrp`.
        criterion: a module called as ``criterion(logits, labels, num_positives=P)``, which returns a scalar, such as
            ``framework.RankingLoss(error)`` where the formula needs no extras; ``logits`` and ``labels`` as in
            :func:`use_alrp`. P is an int, so that the criterion need not wait for the device to count.
        per_image: see :func:`use_alrp`.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: ``model`` is not a RetinaNet with a ``RetinaNetHead``, ``criterion`` is not a module or one of this
            package that takes boxes, or ``per_image`` is not a bool.
    """
    return _use(model, criterion, per_image, boxes=False)


def _use(model: RetinaNet, criterion: nn.Module, per_image: bool, *, boxes: bool) -> RetinaNet:
    if not isinstance(model, RetinaNet):
        raise TypeError(f"model must be a torchvision RetinaNet, not yet wrapped; got {type(model).__qualname__}")
    if not isinstance(model.head, RetinaNetHead):
        raise TypeError(f"model.head must be a torchvision RetinaNetHead; got {type(model.head).__qualname__}")
    if not isinstance(criterion, nn.Module):
        raise TypeError(f"criterion must be a torch.nn.Module; got {type(criterion).__qualname__}")
    unsuitable = (APLoss, NDCGLoss, RankingLoss) if boxes else (ALRPLoss, RankSortLoss)
    if type(criterion).forward in [loss.forward for loss in unsuitable]:  # one of your own may derive from them
        wanted = "boxes: pass it to use_classification_loss" if boxes else "scores alone: pass it to use_alrp"
        raise TypeError(f"criterion must be a loss on {wanted}; got {type(criterion).__qualname__}")
    if not isinstance(per_image, bool):
        raise TypeError(f"per_image must be a bool; got {type(per_image).__qualname__}")

    head = model.head
    if not isinstance(head, _RankingHead):
        head.__class__ = _with_ranking(type(head))  # type: ignore[arg-type]
    # A default criterion starts on the CPU; the model may already live elsewhere.
    head.ranking_criterion = criterion.to(next(head.parameters()).device)
    head.ranking_takes_boxes, head.ranking_per_image = boxes, per_image
    return model


class _RankingHead(nn.Module):
    """Mixed into the class of one head instance by :func:`_use`.

    Changing the instance's class, rather than hanging a bound method on it, keeps ``self`` right wherever the head is
    copied or replicated. Only pickling needs help, because the combined class has no importable name.
    """

    regression_head: Any  # typed so, since torchvision has no type hints of its own
    ranking_criterion: nn.Module
    ranking_takes_boxes: bool
    ranking_per_image: bool

    def compute_loss(
        self,
        targets: list[dict[str, Tensor]],
        head_outputs: dict[str, Tensor],
        anchors: list[Tensor],
        matched_idxs: list[Tensor],
    ) -> dict[str, Tensor]:
        """The two parts of the loss; arguments as in ``RetinaNetHead.compute_loss``."""
        logits, deltas = head_outputs["cls_logits"], head_outputs["bbox_regression"]  # [B, A, C], [B, A, 4]
        gt_labels = torch.cat([target["labels"] for target in targets])  # [G]
        matched = torch.stack(matched_idxs)  # [B, A], an index into the image's own objects or a Matcher code

        positives = torch.nonzero(matched >= 0, as_tuple=True)  # row-major, the order in which the losses count
        counts = torch.tensor([len(target["boxes"]) for target in targets], device=matched.device)
        first = counts.cumsum(0) - counts  # where each image's objects begin among all G
        objects = matched[positives] + first[positives[0]]  # [P]

        ignored = getattr(self.ranking_criterion, "ignore_index", -1)
        labels = torch.where(matched == Matcher.BETWEEN_THRESHOLDS, ignored, logits.shape[-1])
        labels[positives] = gt_labels[objects].to(labels.dtype)
        options: dict[str, Tensor] = {}
        if self.ranking_per_image:
            options["groups"] = torch.arange(len(matched), device=matched.device)[:, None].expand_as(matched)

        if not self.ranking_takes_boxes:
            cls = self.ranking_criterion(logits, labels, num_positives=len(objects), **options)
            loc = self.regression_head.compute_loss(targets, head_outputs, anchors, matched_idxs)
            return {"classification": cls, "bbox_regression": loc}

        gt_boxes = torch.cat([target["boxes"] for target in targets])  # [G, 4]
        # Under autocast the deltas are half precision, too coarse for pixel coordinates: decode as the boxes are.
        pred_boxes = self.regression_head.box_coder.decode_single(
            deltas[positives].to(gt_boxes.dtype), torch.stack(anchors)[positives]
        )
        loss = self.ranking_criterion(logits, labels, pred_boxes, gt_boxes[objects], **options)
        return {"classification": loss.cls, "bbox_regression": loss.loc}

    def __reduce__(self) -> tuple[Any, ...]:
        return _new_head, (type(self).__bases__[1],), self.__dict__


@cache
def _with_ranking(base: type) -> type:
    """``base`` with the loss of :class:`_RankingHead`; the same class for the same base, as a class statement gives."""
    return type(f"Ranking{base.__name__}", (_RankingHead, base), {"__module__": __name__})


def _new_head(base: type) -> RetinaNetHead:
    """An empty head for ``pickle`` and ``copy`` to fill."""
    return object.__new__(_with_ranking(base))
