"""aLRP Loss for torchvision's RetinaNet: one call on an existing model, nothing patched globally.

    model = use_alrp(retinanet_resnet50_fpn(num_classes=91))
    losses = model(images, targets)  # {"classification": ..., "bbox_regression": ...}
    sum(losses.values()).backward()

The assignment of anchors to objects, the anchors and the box coder remain the model's own.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.retinanet import RetinaNetHead

from .. import ALRPLoss

__all__ = ["use_alrp"]


def use_alrp(model: RetinaNet, criterion: nn.Module | None = None) -> RetinaNet:
    """Make an existing RetinaNet train with aLRP Loss (Oksuz et al., NeurIPS 2020).

    In training mode ``model(images, targets)`` goes on returning the scalars ``"classification"`` and
    ``"bbox_regression"``; now they are the two components of aLRP Loss over the whole batch, the latter multiplied by
    the self-balancing weight, and their sum is the loss to minimise. Inference does not change. Anchors are assigned
    by the model's own matcher: matched ones are positives of their object's class, unmatched ones background, those
    between the thresholds ignored.

    The criterion becomes the submodule ``model.head.alrp_criterion``: it moves with the model, and its state (the
    self-balancing weight) is part of ``state_dict()``. So load pretrained weights before this call. A second call
    replaces the criterion. Deep copies and pickles of the model keep aLRP, each with a criterion of its own.

    Args:
        model: a torchvision ``RetinaNet``; changed in place. Wrap it for distributed training after this call.
        criterion: a module called as ``criterion(logits, labels, pred_boxes, target_boxes)``, with ``logits``
            [B, A, C], integer ``labels`` [B, A] (0..C-1 positive, C background, ``criterion.ignore_index`` or else -1
            ignored) and, for the P positives in row-major order, boxes [P, 4] as (x1, y1, x2, y2) in pixels of the
            resized images; it returns an object with the scalars ``cls`` and ``loc``. ``None`` means ``ALRPLoss()``,
            whose ``self_balance.step_epoch()`` is to be called after each epoch.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: ``model`` is not a RetinaNet with a ``RetinaNetHead``, or ``criterion`` is not a module.
    """
    if not isinstance(model, RetinaNet):
        raise TypeError(f"model must be a torchvision RetinaNet, not yet wrapped; got {type(model).__qualname__}")
    if not isinstance(model.head, RetinaNetHead):
        raise TypeError(f"model.head must be a torchvision RetinaNetHead; got {type(model.head).__qualname__}")
    if criterion is None:
        criterion = ALRPLoss()
    elif not isinstance(criterion, nn.Module):
        raise TypeError(f"criterion must be a torch.nn.Module or None; got {type(criterion).__qualname__}")

    if not isinstance(model.head, _ALRPHead):
        model.head.__class__ = _with_alrp(type(model.head))  # type: ignore[arg-type]
    # A default criterion starts on the CPU; the model may already live elsewhere.
    model.head.alrp_criterion = criterion.to(next(model.head.parameters()).device)
    return model


class _ALRPHead(nn.Module):
    """Mixed into the class of one head instance by :func:`use_alrp`.

    Changing the instance's class, rather than hanging a bound method on it, keeps ``self`` right wherever the head is
    copied or replicated. Only pickling needs help, because the combined class has no importable name.
    """

    regression_head: Any  # typed so, since torchvision has no type hints of its own
    alrp_criterion: nn.Module

    def compute_loss(
        self,
        targets: list[dict[str, Tensor]],
        head_outputs: dict[str, Tensor],
        anchors: list[Tensor],
        matched_idxs: list[Tensor],
    ) -> dict[str, Tensor]:
        """The two components of the loss; arguments as in ``RetinaNetHead.compute_loss``."""
        logits, deltas = head_outputs["cls_logits"], head_outputs["bbox_regression"]  # [B, A, C], [B, A, 4]
        gt_labels = torch.cat([target["labels"] for target in targets])  # [G]
        gt_boxes = torch.cat([target["boxes"] for target in targets])  # [G, 4]
        matched = torch.stack(matched_idxs)  # [B, A], an index into the image's own objects or a Matcher code

        positives = torch.nonzero(matched >= 0, as_tuple=True)  # row-major, the order in which alrp_loss counts
        counts = torch.tensor([len(target["boxes"]) for target in targets], device=matched.device)
        first = counts.cumsum(0) - counts  # where each image's objects begin among all G
        objects = matched[positives] + first[positives[0]]  # [P]

        ignored = getattr(self.alrp_criterion, "ignore_index", -1)
        labels = torch.where(matched == Matcher.BETWEEN_THRESHOLDS, ignored, logits.shape[-1])
        labels[positives] = gt_labels[objects].to(labels.dtype)
        # Under autocast the deltas are half precision, too coarse for pixel coordinates: decode as the boxes are.
        pred_boxes = self.regression_head.box_coder.decode_single(
            deltas[positives].to(gt_boxes.dtype), torch.stack(anchors)[positives]
        )
        loss = self.alrp_criterion(logits, labels, pred_boxes, gt_boxes[objects])
        return {"classification": loss.cls, "bbox_regression": loss.loc}

    def __reduce__(self) -> tuple[Any, ...]:
        return _new_head, (type(self).__bases__[1],), self.__dict__


@cache
def _with_alrp(base: type) -> type:
    """``base`` with the loss of :class:`_ALRPHead`; the same class for the same base, as a class statement gives."""
    return type(f"ALRP{base.__name__}", (_ALRPHead, base), {"__module__": __name__})


def _new_head(base: type) -> RetinaNetHead:
    """An empty head for ``pickle`` and ``copy`` to fill."""
    return object.__new__(_with_alrp(base))
