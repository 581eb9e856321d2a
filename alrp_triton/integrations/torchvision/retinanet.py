"""RetinaNet: both parts of the loss, or the classification alone, with torchvision's matcher or another assigner.

Inference does not change, and neither do the anchors and the box coder. Matched anchors are positives of their object's
class, unmatched ones background. Anchors between the matcher's thresholds are ignored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.retinanet import RetinaNetHead

from ._parts import DenseHead, Targets, check_part, mix_in

__all__ = ["Assigner", "use_criterion"]

Assigner = Callable[[list[Tensor], Tensor], Tensor]
"""Takes the anchors of each level [A_l, 4] and an image's boxes [G, 4]; returns the object of each anchor [A], -1 for
background and -2 for ignored. An example is :class:`alrp_triton.assigners.ATSS`."""

_SIZES = "num_anchors_per_level"


def use_criterion(model: RetinaNet, criterion: nn.Module, per_image: bool, assigner: Assigner | None) -> None:
    """Give a RetinaNet the criterion, in place; see ``use_loss``."""
    check_part(model, "head", RetinaNetHead)
    if assigner is not None and (isinstance(assigner, type) or not callable(assigner)):
        given = f"the class {assigner.__name__}" if isinstance(assigner, type) else type(assigner).__name__
        raise TypeError(f"assigner: expected a callable such as ATSS(), got {given}")
    mix_in(model.head, RankingRetinaNetHead, criterion, per_image, assigner=assigner)


class RankingRetinaNetHead(DenseHead):
    """Mixin for the class of a model's ``RetinaNetHead``."""

    regression_head: Any  # typed so, since torchvision has no type hints of its own
    ranking_assigner: Assigner | None

    def forward(self, x: list[Tensor]) -> dict[str, Any]:
        """As in ``RetinaNetHead``."""
        outputs: dict[str, Any] = super().forward(x)
        if self.training and self.ranking_assigner is not None:
            # torchvision concatenates all levels for compute_loss, so their sizes are passed with the outputs.
            places = [features.shape[-2] * features.shape[-1] for features in x]
            at_each = outputs["cls_logits"].shape[1] // sum(places)
            outputs = {**outputs, _SIZES: [at_each * number for number in places]}
        return outputs

    def compute_loss(
        self, targets: Targets, head_outputs: dict[str, Any], anchors: list[Tensor], matched_idxs: list[Tensor]
    ) -> dict[str, Tensor]:
        """As in ``RetinaNetHead``."""
        if (assigner := self.ranking_assigner) is not None:
            levels = [list(boxes.split(head_outputs[_SIZES])) for boxes in anchors]
            matched_idxs = [assigner(boxes, target["boxes"]) for boxes, target in zip(levels, targets)]
        return super().compute_loss(targets, head_outputs, anchors, matched_idxs)

    def decode(self, deltas: Tensor, anchors: Tensor) -> Tensor:  # type: ignore[override]
        boxes: Tensor = self.regression_head.box_coder.decode_single(deltas, anchors)
        return boxes

    def kept_losses(self, boxes_trained: bool, *inputs: Any) -> dict[str, Tensor]:  # type: ignore[override]
        return {} if boxes_trained else {"bbox_regression": self.regression_head.compute_loss(*inputs)}
