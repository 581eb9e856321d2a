"""The losses that are compared. Each is a criterion for ``use_loss`` of the torchvision integration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet

from alrp_triton import ALRPLoss, ALRPLossOutput, APLoss, NDCGLoss, RankSortLoss, SelfBalance
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


class ScoreWeighted(ALRPLoss):
    """aLRP Loss with the boxes of Rank & Sort Loss: their errors weighted by scores, scaled to the ranking part."""

    def forward(self, logits: Tensor, labels: Tensor, pred_boxes: Tensor, target_boxes: Tensor) -> ALRPLossOutput:  # type: ignore[override]
        """As of ``ALRPLoss``."""
        cls, loc, rank = super().forward(logits, labels, pred_boxes, target_boxes)
        positive = (labels >= 0) & (labels < logits.shape[-1])
        scores = logits.detach()[positive].amax(-1).sigmoid()
        errors = box_error(pred_boxes, target_boxes, self.box_error, 0.0)
        mean = (errors * scores).sum() / scores.sum().clamp(min=1e-10)
        return ALRPLossOutput(cls, 0 * loc + mean * (cls / mean.clamp(min=1e-10)).detach(), rank)


class WarmUp(nn.Module):
    """A plain loss that becomes a ranking loss over the first iterations.

    Args:
        plain, ranking: criteria that take boxes.
        steps: iterations until only ``ranking`` is left.
    """

    takes_boxes = True

    def __init__(self, plain: nn.Module, ranking: nn.Module, steps: int) -> None:
        super().__init__()
        self.plain, self.ranking, self.steps, self.step = plain, ranking, steps, 0

    def forward(self, *given: Tensor) -> ALRPLossOutput:
        """As of ``ALRPLoss``."""
        loss = self.ranking(*given)
        share = self.step / self.steps
        self.step += self.training
        if share >= 1:
            return ALRPLossOutput(*loss)
        plain = self.plain(*given)
        mixed = [(1 - share) * x + share * y for x, y in zip(plain[:2], loss[:2])]
        return ALRPLossOutput(mixed[0], mixed[1], loss.rank)


@dataclass(frozen=True)
class Contender:
    """A loss.

    Args:
        title: as tables call it.
        criterion: makes a new one.
        anchors: at each location.
        assigner: None for torchvision's matcher (an IoU of 0.5 is positive, below 0.4 negative).
        per_image: whether each image is a ranking.
        rate_of: the contender whose learning rate is taken; None to search one.
    """

    title: str
    criterion: Callable[[], nn.Module]
    anchors: Anchors = NINE
    assigner: ATSS | None = None
    per_image: bool = False
    rate_of: str | None = None

    def prepare(self, model: RetinaNet) -> nn.Module:
        """Put the loss into a detector; returns its criterion."""
        criterion = self.criterion()
        use_loss(model, criterion, assigner=self.assigner, per_image=self.per_image)
        return criterion


def _variant(title: str, criterion: Callable[[], nn.Module], **options: Any) -> Contender:
    return Contender(f"aLRP Loss, {title}", criterion, rate_of="alrp", **options)


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
    # Variants of aLRP Loss, at its learning rate.
    "alrp-smooth": _variant("smooth loc_ranking", lambda: ALRPLoss(loc_ranking="smooth")),
    "alrp-delta-0.5": _variant("delta 0.5", lambda: ALRPLoss(delta=0.5)),
    "alrp-delta-2": _variant("delta 2", lambda: ALRPLoss(delta=2.0)),
    **{
        f"alrp-{kind}": _variant(f"{name} errors", lambda kind=kind: ALRPLoss(box_error=kind))  # type: ignore[misc]
        for kind, name in (("iou", "IoU"), ("diou", "DIoU"), ("ciou", "CIoU"))
    },
    "alrp-per-image": _variant("a ranking for each image", ALRPLoss, per_image=True),
    "alrp-ratios": _variant("weight by quotients", lambda: ALRPLoss(self_balance=SelfBalance(average="ratios"))),
    "alrp-period-1": _variant("balanced in each iteration", lambda: ALRPLoss(self_balance=SelfBalance(period=1))),
    "alrp-period-10": _variant(
        "self-balancing by 10 iterations", lambda: ALRPLoss(self_balance=SelfBalance(period=10))
    ),
    "alrp-first-5": _variant("first weight 5", lambda: ALRPLoss(self_balance=SelfBalance(5.0))),
    "alrp-weight-5": _variant("constant weight 5", lambda: ALRPLoss(self_balance=5.0)),
    "alrp-warm-up": _variant(
        "50 iterations from focal loss", lambda: WarmUp(WithBoxes(EachLogit(focal)), ALRPLoss(), 50)
    ),
    "alrp-score-weighted": _variant("score-weighted boxes", ScoreWeighted),
    "alrp-atss-nine": _variant("ATSS, nine anchors", ALRPLoss, assigner=ATSS()),
    "alrp-atss-nine-81": _variant("ATSS, nine anchors, topk 81", ALRPLoss, assigner=ATSS(81)),
    "alrp-one": _variant("one anchor", ALRPLoss, anchors=ONE),
}
