"""The detector with a ranking loss: from MONAI's outputs and targets to the losses of a dense head, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from monai.apps.detection.networks.retinanet_detector import RetinaNetDetector
from monai.data import MetaTensor
from torch import Tensor

from ..torchvision._parts import DenseHead, Targets

__all__ = ["RankingDetector", "check_detector", "plain", "plain_targets"]


class RankingDetector(DenseHead):
    """Mixin for the class of a ``RetinaNetDetector``."""

    cls_key: str
    box_reg_key: str
    target_box_key: str
    target_label_key: str
    box_coder: Any
    compute_anchor_matched_idxs: Any
    compute_box_loss: Any

    def compute_loss(  # type: ignore[override]
        self, head_outputs: dict[str, Tensor], targets: Targets, anchors: list[Tensor], sizes: Sequence[int]
    ) -> dict[str, Tensor]:
        """As in ``RetinaNetDetector``."""
        outputs = {"cls_logits": head_outputs[self.cls_key], "bbox_regression": head_outputs[self.box_reg_key]}
        outputs, anchors = {name: plain(value) for name, value in outputs.items()}, [plain(each) for each in anchors]
        targets = [{key: plain(value) for key, value in target.items()} for target in targets]
        matched = self.compute_anchor_matched_idxs(anchors, targets, sizes)
        own = plain_targets(self, targets, outputs["cls_logits"].device)
        losses = super().compute_loss(own, outputs, anchors, matched)
        return {self.cls_key: losses["classification"], self.box_reg_key: losses["bbox_regression"]}

    def decode(self, deltas: Tensor, anchors: Tensor) -> Tensor:  # type: ignore[override]
        boxes: Tensor = self.box_coder.decode_single(deltas, anchors)
        return boxes

    def kept_losses(  # type: ignore[override]
        self, boxes_trained: bool, targets: Targets, outputs: dict[str, Tensor], *matched: Any
    ) -> dict[str, Tensor]:
        if boxes_trained:
            return {}
        deltas = outputs["bbox_regression"]
        keys = {"boxes": self.target_box_key, "labels": self.target_label_key}
        named = [{keys[name]: value for name, value in target.items()} for target in targets]
        # Without objects MONAI's loss is a constant; with this zero every parameter has a gradient.
        return {"bbox_regression": self.compute_box_loss(deltas, named, *matched).to(deltas) + deltas[:0].sum()}


def check_detector(detector: object) -> None:
    if not isinstance(detector, RetinaNetDetector):
        raise TypeError(f"detector: expected MONAI's RetinaNetDetector, got {type(detector).__name__}")


def plain(values: Any) -> Any:
    """Without MONAI's metadata, which MetaTensors pass on to whatever is computed of them."""
    return values.as_tensor() if isinstance(values, MetaTensor) else values


def plain_targets(detector: Any, targets: Targets, device: Any) -> Targets:
    """Plain tensors by this package's names, boxes at least in float32."""
    boxes = [plain(target[detector.target_box_key]).to(device) for target in targets]
    labels = [plain(target[detector.target_label_key]).to(device) for target in targets]
    wide = [each.to(torch.promote_types(each.dtype, torch.float32)) for each in boxes]
    return [{"boxes": each, "labels": of_each} for each, of_each in zip(wide, labels)]
