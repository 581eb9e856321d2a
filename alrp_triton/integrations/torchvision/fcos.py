"""FCOS: both parts of the loss, or the classification alone; the centre-ness branch is kept or dropped.

The points of all levels and images are ranked together. FCOS itself chooses the positives: the points near the centre
of an object of the level's size. The others are background; no point is ignored.

Centre-ness reduces the scores of badly placed boxes. aLRP and Rank & Sort Loss train the scores to do this themselves.
``"keep"`` trains the branch by its own binary cross-entropy; the score of a detection is the square root of centre-ness
times class probability. ``"drop"`` removes the loss of the branch and freezes its parameters. At inference the
centre-ness is then 1, so the score is the square root of the class probability, and detections are ranked only by the
class scores. ``model.score_thresh`` applies to this root.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS
from torchvision.models.detection.fcos import FCOSHead

from ._parts import DenseHead, Targets, check_part, mix_in

__all__ = ["use_criterion"]

_CENTERNESS = ("keep", "drop")
_SURE = 100.0  # its sigmoid is 1 in every dtype


def use_criterion(model: FCOS, criterion: nn.Module, per_image: bool, centerness: str | None) -> None:
    """Give an FCOS the criterion, in place; see ``use_loss``."""
    check_part(model, "head", FCOSHead)
    centerness = "keep" if centerness is None else centerness
    if centerness not in _CENTERNESS:
        raise ValueError(f"centerness: expected one of {_CENTERNESS}, got {centerness!r}")
    if isinstance(model.head, RankingFCOSHead):  # by an earlier call
        model.head.unfreeze()
    branch = dict(model.head.regression_head.bbox_ctrness.named_parameters())
    # DistributedDataParallel waits for the gradient of each parameter that is not frozen.
    frozen = [name for name, value in branch.items() if value.requires_grad and centerness == "drop"]
    for name in frozen:
        branch[name].requires_grad_(False)
    mix_in(model.head, RankingFCOSHead, criterion, per_image, centerness=centerness, frozen=tuple(frozen))


class RankingFCOSHead(DenseHead):
    """Mixin for the class of a model's ``FCOSHead``."""

    # Typed so, since torchvision has no type hints of its own.
    box_coder: Any
    regression_head: Any
    ranking_centerness: str
    ranking_frozen: tuple[str, ...]

    def forward(self, x: list[Tensor]) -> dict[str, Tensor]:
        """As in ``FCOSHead``; a dropped centre-ness is 1 at inference, the sigmoid of infinity."""
        outputs: dict[str, Tensor] = super().forward(x)
        if self.ranking_centerness == "drop" and not self.training:
            outputs = {**outputs, "bbox_ctrness": torch.full_like(outputs["bbox_ctrness"], torch.inf)}
        return outputs

    def unfreeze(self) -> None:
        branch = dict(self.regression_head.bbox_ctrness.named_parameters())
        for name in self.ranking_frozen:
            branch[name].requires_grad_()

    @torch.no_grad()
    def set_stock_weights(self) -> None:
        """A dropped centre-ness of 1 comes from the branch itself, which is no longer frozen."""
        self.unfreeze()
        if self.ranking_centerness == "drop":
            branch = self.regression_head.bbox_ctrness
            branch.weight.zero_()
            branch.bias.fill_(_SURE)

    def decode(self, deltas: Tensor, anchors: Tensor) -> Tensor:  # type: ignore[override]
        boxes: Tensor = self.box_coder.decode(deltas, anchors)
        return boxes

    def kept_losses(  # type: ignore[override]
        self, boxes_trained: bool, targets: Targets, head_outputs: dict[str, Tensor], *assignment: Any
    ) -> dict[str, Tensor]:
        kept = [] if boxes_trained else ["bbox_regression"]
        if self.ranking_centerness == "keep":
            kept.append("bbox_ctrness")
        if not kept:
            return {}
        # torchvision's FCOS computes its three parts at once. Its focal loss is not needed and gets only one class.
        outputs = {**head_outputs, "cls_logits": head_outputs["cls_logits"][..., :1].detach()}
        single = [{**target, "labels": torch.zeros_like(target["labels"], dtype=torch.int64)} for target in targets]
        own = super(DenseHead, self).compute_loss(single, outputs, *assignment)  # type: ignore[misc]
        return {name: own[name] for name in kept}
