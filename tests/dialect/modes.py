"""A small detector with any loss of the family, for tests of the ways in which PyTorch runs a training step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from alrp_triton import ALRPLoss, RankSortLoss, SelfBalance, alrp_loss, ap_loss, ndcg_loss, rank_sort_loss
from alrp_triton.boxes import box_error, iou
from alrp_triton.framework import ranking_loss

from .family import weighted_error

CLASSES, CHANNELS = 4, 8
Losses = tuple[Tensor, ...]


class Batch(NamedTuple):
    """What a step is given: two levels of features, and what is to be found in them."""

    features: list[Tensor]
    labels: list[Tensor]
    rows: Tensor
    """``[P]`` int64: rows of the positives, over both levels."""
    targets: Tensor
    """``[P, 4]``."""
    groups: list[Tensor] | None = None


def make_batch(sizes: tuple[int, int] = (20, 13), num_pos: int = 5, seed: int = 0, images: int = 0) -> Batch:
    """Random features, some rows ignored; of so many images, or of one ranking."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(sizes)
    order = torch.randperm(total, generator=generator)
    rows = order[:num_pos].sort().values
    labels = torch.full((total,), CLASSES)
    labels[order[-3:]] = -1
    labels[rows] = torch.randint(CLASSES, (num_pos,), generator=generator)
    corners = torch.rand(num_pos, 2, generator=generator)
    features = torch.randn(total, CHANNELS, generator=generator)
    groups = list((torch.arange(total) % images).split(sizes)) if images else None
    return Batch(
        list(features.split(sizes)), list(labels.split(sizes)), rows, torch.cat([corners, corners + 1], 1), groups
    )


def _alrp(logits: Any, labels: Any, boxes: Tensor, targets: Tensor, **more: Any) -> Losses:
    # Of which PyTorch 2.6 cannot compile a slice.
    cls, loc, _ = alrp_loss(logits, labels, box_error(boxes, targets, "giou", 0.5), **more)
    return cls, loc


def _rank_sort(logits: Any, labels: Any, boxes: Tensor, targets: Tensor, **more: Any) -> Losses:
    return tuple(rank_sort_loss(logits, labels, iou(boxes.detach(), targets), **more))


def _own(logits: Any, labels: Any, boxes: Tensor, targets: Tensor, **more: Any) -> Losses:
    errors = box_error(boxes, targets, "giou", 0.5)
    return (ranking_loss(logits, labels, weighted_error, extras={"weights": errors}, **more),)


def _score(function: Callable[..., Tensor]) -> Callable[..., Losses]:
    def scored(logits: Any, labels: Any, boxes: Tensor, targets: Tensor, **more: Any) -> Losses:
        return (function(logits, labels, num_positives=targets.shape[0], **more),)

    return scored


FUNCTIONS = {
    "alrp_loss": _alrp,
    "ap_loss": _score(ap_loss),
    "ndcg_loss": _score(ndcg_loss),
    "rank_sort_loss": _rank_sort,
    "ranking_loss": _own,
}
MODULES = ("ALRPLoss", "RankSortLoss")
CRITERIA = (*FUNCTIONS, *MODULES)
by_criterion = pytest.mark.parametrize("member", CRITERIA)


class Criterion(nn.Module):
    """A member of the family by name: a tuple of scalars, from logits, labels, boxes and targets."""

    def __init__(self, member: str, **settings: Any) -> None:
        super().__init__()
        self.member, self.settings = member, settings
        if member == "ALRPLoss":
            self.module: nn.Module | None = ALRPLoss(self_balance=SelfBalance(period=2), **settings)
        else:
            self.module = RankSortLoss(**settings) if member == "RankSortLoss" else None

    def forward(self, logits: Any, labels: Any, boxes: Tensor, targets: Tensor, groups: Any = None) -> Losses:
        if self.module is None:
            return FUNCTIONS[self.member](logits, labels, boxes, targets, groups=groups, **self.settings)
        output = self.module(logits, labels, boxes, targets, groups)
        return output.cls, output.loc


class Detector(nn.Module):
    """Scores and boxes of each row by one linear map each, and the loss: a tuple of scalars."""

    def __init__(self, member: str, **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.score, self.box = nn.Linear(CHANNELS, CLASSES), nn.Linear(CHANNELS, 4)
        self.criterion = Criterion(member, **settings)

    def forward(
        self,
        features: Sequence[Tensor],
        labels: Sequence[Tensor],
        rows: Tensor,
        targets: Tensor,
        groups: Sequence[Tensor] | None = None,
    ) -> Losses:
        logits = [self.score(level) for level in features]
        found = torch.cat([self.box(level) for level in features])[rows].to(targets.dtype)
        boxes = torch.cat([found[:, :2], found[:, :2] + found[:, 2:].sigmoid() + 0.5], dim=1)
        losses: Losses = self.criterion(logits, labels, boxes, targets, groups)
        return losses

    def state(self) -> list[Tensor]:
        """Gradients of the parameters that have one, then parameters and buffers."""
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        return [tensor.detach().clone() for tensor in (*gradients, *self.parameters(), *self.buffers())]


def step(model: nn.Module, batch: Batch, call: Callable[..., Losses] | None = None) -> list[Tensor]:
    """Losses of a batch, whose gradients are added to the model's; ``call`` runs in the model's place."""
    losses = (model if call is None else call)(*batch)
    sum(losses).backward()  # type: ignore[union-attr]
    return [loss.detach() for loss in losses]
