"""What the heads share: their losses in the configuration, and the positives of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from mmdet.registry import MODELS
from torch import Tensor, nn

from .criteria import RankingCriterion

__all__ = ["RankingHeadMixin", "find_positives", "ignore_unweighted", "split_channels"]


class RankingHeadMixin:
    """A head whose ``loss_cls`` is a ranking loss; to be mixed in front of a head of MMDetection.

    Args:
        loss_cls: configuration of a :class:`~.criteria.RankingCriterion`; ``ALRPLoss`` with its defaults, if None.
        loss_bbox: None where ``loss_cls`` takes the boxes; else the configuration of MMDetection's loss for them.

    Raises:
        TypeError: ``loss_cls`` is no dict or names another kind of loss.
        ValueError: ``loss_bbox`` is given and would not be used, or is missing.
    """

    num_classes: int
    bbox_coder: Any
    loss_cls: RankingCriterion
    loss_bbox: Any
    reg_decoded_bbox: bool

    def __init__(
        self,
        *args: Any,
        loss_cls: Mapping[str, Any] | None = None,
        loss_bbox: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        loss_cls = {"type": "ALRPLoss"} if loss_cls is None else loss_cls
        if not isinstance(loss_cls, Mapping):
            raise TypeError(f"loss_cls: expected a dict with a type, or None, got {type(loss_cls).__name__}")
        criterion = MODELS.build({"use_sigmoid": True, **loss_cls})
        name = type(criterion).__name__
        if not isinstance(criterion, RankingCriterion):
            raise TypeError(f"loss_cls: expected a ranking loss such as ALRPLoss or APLoss, got {name}")
        if criterion.takes_boxes and loss_bbox is not None:
            raise ValueError(f"loss_bbox: expected None, since {name} trains the boxes as well, got {loss_bbox!r}")
        if not criterion.takes_boxes and loss_bbox is None:
            raise ValueError(f"loss_bbox: expected a loss, since {name} is one of the scores alone, got None")
        super().__init__(  # type: ignore[call-arg]
            *args,
            # MMDetection's constructors build both, and dense heads take the number of their scores from use_sigmoid.
            loss_cls={"type": lambda **_: criterion, "use_sigmoid": True},
            loss_bbox={"type": nn.Identity} if loss_bbox is None else loss_bbox,
            **settings,
        )
        if self.loss_cls.takes_boxes:
            self.loss_bbox = None
            # What get_targets then gives are the true boxes themselves.
            self.reg_decoded_bbox = True


def split_channels(levels: list[Tensor], size: int) -> list[Tensor]:
    """Levels ``[B, A * size, H, W]`` as ``[B, H, W, A, size]``, MMDetection's order of the priors; views, no copies."""
    return [level.permute(0, 2, 3, 1).unflatten(-1, (-1, size)) for level in levels]


def ignore_unweighted(labels: Tensor, label_weights: Tensor, ignore_index: int) -> Tensor:
    """Labels with ``ignore_index`` where MMDetection's weight is 0: outside the image, or on an ignored instance."""
    return labels.masked_fill(label_weights == 0, ignore_index)


def find_positives(labels: list[Tensor], num_classes: int) -> list[tuple[Tensor, ...]]:
    """Of each level its positives, as indices into all axes of its labels, in row-major order."""
    return [((level >= 0) & (level < num_classes)).nonzero(as_tuple=True) for level in labels]


def image_of_each(labels: Tensor) -> Tensor:
    """The index of the image of each label ``[B, ...]``; a view of B numbers."""
    images = torch.arange(len(labels), device=labels.device)
    return images.reshape(-1, *[1] * (labels.ndim - 1)).expand_as(labels)
