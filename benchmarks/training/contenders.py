"""The losses that are compared. Each is a criterion for ``use_loss`` of the torchvision integration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet

from alrp_triton import ALRPLoss, ALRPLossOutput, APLoss, NDCGLoss, RankSortLoss
from alrp_triton.assigners import ATSS
from alrp_triton.boxes import box_error, iou
from alrp_triton.integrations.torchvision import use_loss

from .detector import NINE, ONE, Anchors

ScoreLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Takes logits, targets (1 for the class of a positive, otherwise 0) and qualities (the targets times the IoUs of the
positives' boxes), of one shape; returns a loss for each logit."""


def cross_entropy(logits: Tensor, targets: Tensor, qualities: Tensor) -> Tensor:
    """Binary cross entropy."""
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none")


def focal(logits: Tensor, targets: Tensor, qualities: Tensor) -> Tensor:
    """Focal loss (Lin et al., arXiv:1708.02002) with alpha = 0.25 and gamma = 2."""
    losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    distance = (targets - logits.sigmoid()).abs()
    return (0.25 * targets + 0.75 * (1 - targets)) * distance.square() * losses


def quality_focal(logits: Tensor, targets: Tensor, qualities: Tensor) -> Tensor:
    """Quality focal loss (Li et al., arXiv:2006.04388) with beta = 2."""
    losses = F.binary_cross_entropy_with_logits(logits, qualities, reduction="none")
    return (qualities - logits.sigmoid()).square() * losses


def varifocal(logits: Tensor, targets: Tensor, qualities: Tensor) -> Tensor:
    """Varifocal loss (Zhang et al., arXiv:2008.13367) with alpha = 0.75 and gamma = 2."""
    losses = F.binary_cross_entropy_with_logits(logits, qualities, reduction="none")
    weights = torch.where(targets > 0, qualities, 0.75 * logits.sigmoid().square())
    return weights.detach() * losses


class EachLogit(nn.Module):
    """A loss of each logit by itself, summed over what is not ignored and divided by the number of positives."""

    ignore_index = -1

    def __init__(self, loss: ScoreLoss) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, logits: Tensor, labels: Tensor, num_positives: int, ious: Tensor | None = None) -> Tensor:
        """``logits`` [..., C], ``labels`` [...] as of this package's losses, ``ious`` [P]; a scalar."""
        num_classes = logits.shape[-1]
        ignored = (labels == self.ignore_index)[..., None]
        targets = F.one_hot(labels.clamp(min=0), num_classes + 1)[..., :num_classes].masked_fill(ignored, 0)
        targets = targets.to(logits.dtype)
        qualities = targets
        if ious is not None:
            qualities = targets.masked_scatter(targets > 0, ious.to(targets.dtype))
        losses = self.loss(logits, targets, qualities).masked_fill(ignored, 0.0)
        return losses.sum() / max(num_positives, 1)


class WithBoxes(nn.Module):
    """A criterion on scores, with a GIoU loss of the boxes: the mean of 1 - GIoU over the positives, times 2, which is
    the weight in MMDetection's ATSS and GFL.

    Args:
        criterion: on scores.
        by_quality: whether it takes the IoUs of the positives' boxes.
    """

    takes_boxes = True

    def __init__(self, criterion: nn.Module, by_quality: bool = False) -> None:
        super().__init__()
        self.criterion, self.by_quality = criterion, by_quality

    def forward(self, logits: Tensor, labels: Tensor, pred_boxes: Tensor, target_boxes: Tensor) -> ALRPLossOutput:
        """As of ``ALRPLoss``; without ranks."""
        num_positives = len(pred_boxes)
        options = {"ious": iou(pred_boxes.detach(), target_boxes)} if self.by_quality else {}
        cls = self.criterion(logits, labels, num_positives=num_positives, **options)
        # Errors are halves, so that they lie in 0..1.
        errors = box_error(pred_boxes, target_boxes, "giou", 0.0)
        return ALRPLossOutput(cls, 4.0 * errors.sum() / max(num_positives, 1), logits.new_empty(0))


@dataclass(frozen=True)
class Contender:
    """A loss.

    Args:
        title: as tables call it.
        criterion: makes a new one.
        anchors: at each location.
        assigner: None for torchvision's matcher (an IoU of 0.5 is positive, below 0.4 negative).
    """

    title: str
    criterion: Callable[[], nn.Module]
    anchors: Anchors = NINE
    assigner: ATSS | None = None

    def prepare(self, model: RetinaNet) -> nn.Module:
        """Put the loss into a detector; returns its criterion."""
        criterion = self.criterion()
        use_loss(model, criterion, assigner=self.assigner)
        return criterion


CONTENDERS = {
    "focal-l1": Contender("focal loss, L1", lambda: EachLogit(focal)),
    "focal": Contender("focal loss, GIoU", lambda: WithBoxes(EachLogit(focal))),
    "cross-entropy": Contender("cross entropy, GIoU", lambda: WithBoxes(EachLogit(cross_entropy))),
    "quality-focal": Contender("quality focal loss, GIoU", lambda: WithBoxes(EachLogit(quality_focal), True)),
    "varifocal": Contender("varifocal loss, GIoU", lambda: WithBoxes(EachLogit(varifocal), True)),
    "ap": Contender("AP Loss, GIoU", lambda: WithBoxes(APLoss())),
    "ndcg": Contender("NDCG Loss, GIoU", lambda: WithBoxes(NDCGLoss())),
    "rank-sort": Contender("Rank & Sort Loss", RankSortLoss),
    "alrp": Contender("aLRP Loss", ALRPLoss),
    "alrp-unbalanced": Contender("aLRP Loss, no self-balancing", lambda: ALRPLoss(self_balance=None)),
    "focal-atss": Contender("focal loss, GIoU, ATSS", lambda: WithBoxes(EachLogit(focal)), ONE, ATSS()),
    "rank-sort-atss": Contender("Rank & Sort Loss, ATSS", RankSortLoss, ONE, ATSS()),
    "alrp-atss": Contender("aLRP Loss, ATSS", ALRPLoss, ONE, ATSS()),
}
