"""The classification part of one of the framework's losses, replaced by a ranking loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.utils.loss import E2ELoss, v8DetectionLoss, v8OBBLoss
from ultralytics.utils.metrics import probiou

from .._criteria import image_of_each, losses_of

__all__ = ["rank"]


def rank(loss: Any, criterion: nn.Module, per_image: bool) -> None:
    """Make a loss of the framework, of one branch or of two, rank its scores; in place.

    Raises:
        TypeError: it is another loss.
    """
    for part in (loss.one2many, loss.one2one) if isinstance(loss, E2ELoss) else (loss,):
        if not isinstance(part, v8DetectionLoss):
            raise TypeError(f"yolo: expected a model with a v8DetectionLoss, got {type(part).__name__}")
        RankedScores(part, criterion, per_image)


class RankedScores:
    """Stands in for two attributes of a loss: ``assigner``, whose result it remembers, and ``bce``.

    The loss first assigns anchors to objects. It then calls ``bce`` and divides the sum of the result by the sum of
    the target scores, at least 1. The assigned anchors are the positives, each at the class of its object.
    """

    def __init__(self, loss: v8DetectionLoss, criterion: nn.Module, per_image: bool) -> None:
        self.assigner, self.rotated = loss.assigner, isinstance(loss, v8OBBLoss)
        self.criterion, self.per_image = criterion, per_image
        loss.assigner, loss.bce = self.assign, self.scaled

    def assign(self, scores: Tensor, boxes: Tensor, *inputs: Tensor, **more: Tensor) -> Any:
        """As the framework's assigner; ``boxes`` [B, A, 4 or 5] are the predicted ones."""
        assigned = self.assigner(scores, boxes, *inputs, **more)
        self.assigned = boxes, assigned
        return assigned

    def scaled(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The ranking loss, multiplied by what the caller divides by; both arguments are [B, A, C]."""
        boxes, (classes, true, scores, assigned, _) = self.assigned
        del self.assigned
        positives = assigned.nonzero(as_tuple=True)
        labels = torch.where(assigned, classes.long(), logits.shape[-1])  # [B, A]

        def pairs() -> tuple[Tensor, Tensor]:
            found = boxes[positives], true[positives].to(boxes.dtype)
            return _boxes_of(probiou(*found)) if self.rotated else found

        groups = image_of_each(labels) if self.per_image else None
        cls, _ = losses_of(self.criterion, logits, labels, len(positives[0]), pairs, groups)
        scaled: Tensor = cls * scores.sum().clamp(min=1)
        return scaled


def _boxes_of(ious: Tensor) -> tuple[Tensor, Tensor]:
    """Upright boxes [P, 4] with these IoUs, for criteria, which take no rotated ones."""
    ious = ious.reshape(-1).clamp(0, 1)
    zero, one = torch.zeros_like(ious), torch.ones_like(ious)
    return torch.stack([zero, zero, ious, one], 1), torch.stack([zero, zero, one, one], 1)
