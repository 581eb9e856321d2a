"""What is compared: each setting trains the same network with another loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.models.detection import RetinaNet
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

from alrp_triton import ALRPLoss, SelfBalance
from alrp_triton.assigners import ATSS
from alrp_triton.integrations.torchvision import use_ap, use_loss
from alrp_triton.integrations.torchvision.retinanet import Assigner

from ..training.contenders import EachLogit, ScoreLoss, cross_entropy, focal

# The paper's self-balancing weight lasts an epoch of 3665 iterations out of 100 epochs. Here a run is 400 iterations,
# a sixteenth of it is 25. The average is that of the authors' code, see examples/digits/losses.py.
PERIOD = 25
INITIAL_WEIGHT = 50.0


@dataclass(frozen=True)
class Setting:
    """A row of a table.

    Args:
        title: as the tables call it.
        prepare: puts the loss into a detector.
        learning_rate_of: the setting whose learning rate is taken over; None where one is searched.
    """

    title: str
    prepare: Callable[[RetinaNet], RetinaNet]
    learning_rate_of: str | None = None


def _score_loss(loss: ScoreLoss) -> Callable[[RetinaNet], RetinaNet]:
    return lambda model: use_loss(model, EachLogit(loss))


def _alrp(
    box_error: str, self_balance: float | None, assigner: Assigner | None = None
) -> Callable[[RetinaNet], RetinaNet]:
    """aLRP Loss whose localisation part has the constant weight ``self_balance``; None: self-balancing."""

    def prepare(model: RetinaNet) -> RetinaNet:
        balance = SelfBalance(INITIAL_WEIGHT, PERIOD, "means") if self_balance is None else self_balance
        return use_loss(model, ALRPLoss(box_error=box_error, self_balance=balance), assigner=assigner)

    return prepare


def _balanced_from(initial: float) -> Callable[[RetinaNet], RetinaNet]:
    return lambda model: use_loss(model, ALRPLoss(self_balance=SelfBalance(initial, PERIOD, "means")))


def no_ignored(anchors: list[Tensor], boxes: Tensor) -> Tensor:
    """torchvision's matcher, with background in place of what it ignores."""
    together = torch.cat(anchors)
    if not len(boxes):
        return torch.full((len(together),), Matcher.BELOW_LOW_THRESHOLD, device=together.device)
    found: Tensor = Matcher(0.5, 0.5, allow_low_quality_matches=True)(box_iou(boxes, together))
    return found


ASSIGNERS = (
    ("no-ignored", "matcher, nothing ignored", no_ignored),
    ("atss-27", "ATSS, 27 candidates", ATSS(27)),
)
ALRP = "alrp-giou-sb"  # the setting that tables 3 to 5 vary

SETTINGS = {
    "cross-entropy": Setting("cross entropy, L1", _score_loss(cross_entropy)),
    "focal": Setting("focal loss, L1", _score_loss(focal)),
    "ap": Setting("AP Loss, L1", use_ap),
    "alrp-iou": Setting("aLRP Loss, IoU", _alrp("iou", 1.0)),
    "alrp-iou-sb": Setting("+ self-balancing", _alrp("iou", None)),
    ALRP: Setting("+ GIoU", _alrp("giou", None)),
    "alrp-giou-sb-atss": Setting("+ ATSS", _alrp("giou", None, ATSS())),
    **{f"assigned-{name}": Setting(title, _alrp("giou", None, assigner), ALRP) for name, title, assigner in ASSIGNERS},
    **{f"constant-{w}": Setting(f"constant, {w}", _alrp("giou", float(w)), ALRP) for w in (1, 5, 25)},
    **{f"initial-{w}": Setting(str(w), _balanced_from(float(w)), ALRP) for w in (1, 100)},
}

# Numbered as in the paper.
TABLES = {
    2: ("cross-entropy", "focal", "ap", "alrp-iou", "alrp-iou-sb", ALRP, "alrp-giou-sb-atss"),
    3: ("constant-1", "constant-5", "constant-25", ALRP),
    4: ("initial-1", ALRP, "initial-100"),
    # Not of the paper.
    6: (ALRP, "assigned-no-ignored", "alrp-giou-sb-atss", "assigned-atss-27"),
}
# Rows of table 2 that are also trained longer, at the learning rate of the shorter runs.
LONG, LONGER = ("ap", ALRP), 3
LEARNING_RATES = (2e-3, 4e-3, 8e-3)
"""Where the search begins; it goes on by factors of 2 while the best is at an end."""
