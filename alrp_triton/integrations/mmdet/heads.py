"""Common parts of the heads: their losses in the configuration, and the positives of a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mmdet.registry import MODELS
from torch import Tensor, nn

from .._criteria import losses_of, takes_boxes
from .criteria import RankingCriterion

__all__ = ["RankingHeadMixin", "find_positives", "ignore_unweighted", "split_channels"]


class RankingHeadMixin:
    """A head whose ``loss_cls`` is a ranking loss; mix it in before a head of MMDetection.

    Args:
        loss_cls: configuration of a :class:`~.criteria.RankingCriterion`; ``ALRPLoss`` with its defaults if None.
        loss_bbox: None if ``loss_cls`` takes the boxes, otherwise the configuration of MMDetection's loss for them.

    Raises:
        TypeError: ``loss_cls`` is not a dict, or names another kind of loss.
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
        boxes_trained = takes_boxes(criterion)
        if boxes_trained and loss_bbox is not None:
            raise ValueError(f"loss_bbox: expected None, since {name} trains the boxes as well, got {loss_bbox!r}")
        if not boxes_trained and loss_bbox is None:
            raise ValueError(f"loss_bbox: expected a loss, since {name} is one of the scores alone, got None")
        super().__init__(  # type: ignore[call-arg]
            *args,
            # MMDetection's constructors build both losses and read use_sigmoid, so they get built losses.
            loss_cls={"type": lambda **_: criterion, "use_sigmoid": True},
            loss_bbox={"type": nn.Identity} if loss_bbox is None else loss_bbox,
            **settings,
        )
        if boxes_trained:
            self.loss_bbox = None
            # MMDetection's get_targets then returns the true boxes.
            self.reg_decoded_bbox = True

    def ranking_losses(
        self,
        logits: Tensor | Sequence[Tensor],
        labels: Tensor | Sequence[Tensor],
        images: Tensor | Sequence[Tensor],
        boxes: tuple[Tensor, Tensor],
        own_box_loss: Callable[[], Tensor],
    ) -> dict[str, Tensor]:
        """``loss_cls`` and ``loss_bbox`` of a batch.

        Args:
            logits: ``[..., C]``, or a list of the levels.
            labels: class indices ``[...]``, C for background, ``ignore_index`` ignored.
            images: the image of each row, ``[...]``.
            boxes: predicted and true boxes of the positives, ``[P, 4]`` each.
            own_box_loss: the head's own loss of the boxes, for a criterion on scores alone.
        """
        criterion, weight = self.loss_cls, self.loss_cls.loss_weight
        groups = images if criterion.per_image else None
        cls, loc = losses_of(criterion, logits, labels, len(boxes[0]), lambda: boxes, groups)
        return {"loss_cls": weight * cls, "loss_bbox": own_box_loss() if loc is None else weight * loc}


def split_channels(levels: list[Tensor], size: int) -> list[Tensor]:
    """Levels ``[B, A * size, H, W]`` as ``[B, H, W, A, size]``, MMDetection's order of the priors; views, no copies."""
    return [level.permute(0, 2, 3, 1).unflatten(-1, (-1, size)) for level in levels]


def ignore_unweighted(labels: Tensor, label_weights: Tensor, ignore_index: int) -> Tensor:
    """Labels with ``ignore_index`` where MMDetection's weight is 0: outside the image, or on an ignored instance."""
    return labels.masked_fill(label_weights == 0, ignore_index)


def find_positives(labels: list[Tensor], num_classes: int) -> list[tuple[Tensor, ...]]:
    """The positives of each level, as indices into all axes of its labels, in row-major order."""
    return [((level >= 0) & (level < num_classes)).nonzero(as_tuple=True) for level in labels]
