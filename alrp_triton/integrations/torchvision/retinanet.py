"""RetinaNet: both parts of the loss, or the classification alone, with torchvision's matcher or another assigner.

Inference does not change, and neither do the anchors and the box coder. Matched anchors are positives of their object's
class, unmatched ones background, those between the matcher's thresholds ignored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.retinanet import RetinaNetHead

from ._dense import DenseHead
from ._parts import mix_in

__all__ = ["Assigner", "use_criterion"]

Assigner = Callable[[list[Tensor], Tensor], Tensor]
"""Of the anchors of each level [A_l, 4] and an image's boxes [G, 4]: the object of each anchor [A], -1 for background
and -2 for ignored; such as :class:`alrp_triton.assigners.ATSS`."""

_SIZES = "num_anchors_per_level"


def use_criterion(
    model: RetinaNet, criterion: nn.Module, per_image: bool, *, boxes: bool, assigner: Assigner | None = None
) -> None:
    """Give a RetinaNet the criterion, in place; see ``use_alrp`` and ``use_classification_loss``."""
    if not isinstance(model.head, RetinaNetHead):
        raise TypeError(f"model.head must be a torchvision RetinaNetHead; got {type(model.head).__qualname__}")
    if assigner is not None and not callable(assigner):
        raise TypeError(f"assigner must be callable, such as ATSS(); got {type(assigner).__qualname__}")
    mix_in(model.head, RankingRetinaNetHead, criterion, per_image)
    model.head.ranking_takes_boxes, model.head.ranking_assigner = boxes, assigner


class RankingRetinaNetHead(DenseHead):
    """What is added to the class of a model's ``RetinaNetHead``."""

    regression_head: Any  # typed so, since torchvision has no type hints of its own
    ranking_assigner: Assigner | None

    def forward(self, x: list[Tensor]) -> dict[str, Any]:
        """As in ``RetinaNetHead``; in training with what an assigner has to know besides, which levels there are."""
        outputs: dict[str, Any] = super().forward(x)
        if self.training and self.ranking_assigner is not None:
            places = [features.shape[-2] * features.shape[-1] for features in x]
            at_each = outputs["cls_logits"].shape[1] // sum(places)
            outputs = {**outputs, _SIZES: [at_each * number for number in places]}
        return outputs

    def compute_loss(
        self,
        targets: list[dict[str, Tensor]],
        head_outputs: dict[str, Any],
        anchors: list[Tensor],
        matched_idxs: list[Tensor],
    ) -> dict[str, Tensor]:
        """As in ``RetinaNetHead``."""
        if (assigner := self.ranking_assigner) is not None:
            sizes = head_outputs[_SIZES]
            matched_idxs = [
                assigner(list(boxes.split(sizes)), target["boxes"]) for boxes, target in zip(anchors, targets)
            ]
        return super().compute_loss(targets, head_outputs, anchors, matched_idxs)

    def decode(self, deltas: Tensor, anchors: Tensor) -> Tensor:
        boxes: Tensor = self.regression_head.box_coder.decode_single(deltas, anchors)
        return boxes

    def kept_losses(
        self,
        targets: list[dict[str, Tensor]],
        head_outputs: dict[str, Tensor],
        anchors: list[Tensor],
        matched_idxs: list[Tensor],
    ) -> dict[str, Tensor]:
        if self.ranking_takes_boxes:
            return {}
        return {"bbox_regression": self.regression_head.compute_loss(targets, head_outputs, anchors, matched_idxs)}
