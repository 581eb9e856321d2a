"""Faster R-CNN: both stages by ranking, as published with aLRP Loss.

In training, both stages change in the same way. There is no sampling: all anchors and proposals are used that the
matcher does not ignore. Scores are ranked, without sigmoid or softmax. The criterion's errors (GIoU by default) train
decoded boxes, not deltas. As published, the proposal network has tau = 0.7, the IoU from which its matcher makes an
anchor a positive, and its loss has a weight of 0.20. The boxes of the objects are not added to the proposals of the
second stage.

In training and inference, the second stage has a sigmoid for each class instead of a softmax. Both ignore the
predictor's column 0, torchvision's background; it stays so that pretrained weights fit. Anchors, matchers, numbers of
proposals, box coders and thresholds are those of the model.

Source: K. Oksuz et al., NeurIPS 2020 (aLRP Loss), and the configuration of the authors' Faster R-CNN.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import boxes as box_ops

from .._criteria import check_weight, image_of_each, takes_boxes
from ._parts import RankingPart, Targets, check_labels, check_part, first_objects, mix_in

__all__ = ["RankingRoIHeads", "class_layer", "use_criterion"]

_RPN_WEIGHT = 0.20


def use_criterion(
    model: FasterRCNN, criterion: nn.Module, per_image: bool, rpn_criterion: nn.Module | None, rpn_weight: float | None
) -> None:
    """Give both stages of a Faster R-CNN their criteria, in place; see ``use_loss``."""
    check_part(model, "rpn", RegionProposalNetwork)
    check_part(model, "roi_heads", RoIHeads)
    if model.roi_heads.has_mask() or model.roi_heads.has_keypoint():
        raise TypeError(f"model: expected neither masks nor keypoints, got a {type(model).__name__}")
    for name, each in (("criterion", criterion), ("rpn_criterion", rpn_criterion)):
        if not isinstance(each, nn.Module) or not takes_boxes(each):
            wanted = "a module that takes boxes, such as ALRPLoss(), for a FasterRCNN"
            raise TypeError(f"{name}: expected {wanted}, got {type(each).__name__}")
    if rpn_criterion is criterion:
        raise ValueError("rpn_criterion: expected another module than criterion, got the same")
    rpn_weight = _RPN_WEIGHT if rpn_weight is None else rpn_weight
    check_weight("rpn_weight", rpn_weight)
    mix_in(model.rpn, RankingRPN, rpn_criterion, per_image, weight=float(rpn_weight))  # type: ignore[arg-type]
    mix_in(model.roi_heads, RankingRoIHeads, criterion, per_image)


def class_layer(roi_heads: nn.Module) -> nn.Linear:
    """The layer of a predictor that gives the logits of the background and of all classes, [N, 1 + C].

    Raises:
        TypeError: the predictor is not built as torchvision's.
    """
    layer = getattr(roi_heads.box_predictor, "cls_score", None)
    if not isinstance(layer, nn.Linear):
        wanted, got = "a predictor with an nn.Linear cls_score", type(roi_heads.box_predictor).__name__
        raise TypeError(f"model.roi_heads.box_predictor: expected {wanted}, got {got}")
    return layer


class RankingRPN(RankingPart):
    """Mixin for the class of a model's ``RegionProposalNetwork``."""

    box_coder: Any  # typed so, since torchvision has no type hints of its own
    ranking_weight: float

    def assign_targets_to_anchors(self, anchors: list[Tensor], targets: Targets) -> tuple[Any, list[Tensor]]:
        """As in ``RegionProposalNetwork``, with more data than the labels for :meth:`compute_loss`."""
        labels, matched = super().assign_targets_to_anchors(anchors, targets)  # type: ignore[misc]
        # torchvision does not pass anchors and true boxes to compute_loss, so they are passed with the labels.
        return (labels, anchors, matched), matched

    def compute_loss(self, objectness: Tensor, deltas: Tensor, assignment: Any, _: Any) -> tuple[Tensor, Any]:
        """Both parts of the loss, weighted; arguments as in ``RegionProposalNetwork``, all anchors of all images."""
        codes, anchors, true = (torch.stack(each) for each in assignment)
        positives = torch.nonzero(codes == 1, as_tuple=True)  # [B, A]: 0 is background, -1 neither
        labels = torch.where(codes < 0, self.ranking_ignored, 1 - codes.to(torch.int64))  # one class, 0

        def boxes() -> tuple[Tensor, Tensor]:
            at_positives = deltas.view(*codes.shape, 4)[positives].to(true.dtype), anchors[positives]
            return self.box_coder.decode_single(*at_positives), true[positives]

        logits = objectness.view(*codes.shape, 1)
        cls, loc = self.ranking_losses(logits, labels, len(positives[0]), boxes, image_of_each(labels))
        return self.ranking_weight * cls, self.ranking_weight * loc  # type: ignore[operator]


class RankingRoIHeads(RankingPart):
    """Mixin for the class of a model's ``RoIHeads``."""

    # Typed so, since torchvision has no type hints of its own.
    box_coder: Any
    box_roi_pool: Any
    box_head: Any
    box_predictor: Any
    select_training_samples: Any
    score_thresh: float
    nms_thresh: float
    detections_per_img: int

    @torch.no_grad()
    def set_stock_weights(self) -> None:
        """The background's logit is 0: the softmax over it and one more logit is the sigmoid of the latter."""
        layer = class_layer(self)
        layer.weight[0] = 0
        if layer.bias is not None:
            layer.bias[0] = 0

    def add_gt_proposals(self, proposals: list[Tensor], gt_boxes: list[Tensor]) -> list[Tensor]:
        """Return the proposals without additions."""
        return list(proposals)

    def subsample(self, labels: list[Tensor]) -> list[Tensor]:
        """All proposals that are not ignored."""
        return [torch.where(label >= 0)[0] for label in labels]

    def assign_targets_to_proposals(
        self, proposals: list[Tensor], gt_boxes: list[Tensor], gt_labels: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """As in ``RoIHeads``."""
        # torchvision's matcher refuses images with objects but no proposals; here there is nothing to match.
        boxes = [b if len(p) else b[:0] for p, b in zip(proposals, gt_boxes)]
        matched, labels = super().assign_targets_to_proposals(proposals, boxes, gt_labels)  # type: ignore[misc]
        return matched, labels

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: Targets | None = None,
    ) -> Any:
        """As in ``RoIHeads``: detections, or in training the parts of the loss."""
        # torchvision has no hook here: its forward calls a function for the loss.
        if not self.training or targets is None:
            return super().forward(features, proposals, image_shapes, targets)
        proposals, matched, label_list, _ = self.select_training_samples(proposals, targets)
        rows = self.box_head(self.box_roi_pool(features, proposals, image_shapes))
        class_logits, deltas = self.box_predictor(rows)  # [N, 1 + C], [N, 4 (1 + C)]
        check_labels(targets, class_logits.shape[1])
        labels = torch.cat(label_list)  # [N], 0 for background
        images = torch.cat([torch.full_like(index, image) for image, index in enumerate(matched)])  # [N]
        (positives,) = torch.nonzero(labels > 0, as_tuple=True)
        logits = class_logits[:, 1:]

        def boxes() -> tuple[Tensor, Tensor]:
            # Use the original targets: torchvision converts them to the dtype of proposals, which may be half
            # precision.
            gt_boxes = torch.cat([target["boxes"] for target in targets])
            objects = torch.cat(matched)[positives] + first_objects(targets)[images[positives]]
            own = deltas.view(*class_logits.shape, 4)[positives, labels[positives]]  # those of the object's class
            at_positives = own.to(gt_boxes.dtype), torch.cat(proposals)[positives].to(gt_boxes.dtype)
            return self.box_coder.decode_single(*at_positives), gt_boxes[objects]

        classes = torch.where(labels > 0, labels - 1, logits.shape[1])
        cls, loc = self.ranking_losses(logits, classes, len(positives), boxes, images)
        return [], {"loss_classifier": cls, "loss_box_reg": loc}

    def postprocess_detections(
        self,
        class_logits: Tensor,
        box_regression: Tensor,
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Boxes, scores and labels of each image; arguments and thresholds as in ``RoIHeads``."""
        sizes = [len(boxes) for boxes in proposals]
        all_boxes = self.box_coder.decode(box_regression, proposals)[:, 1:]  # [N, C, 4]
        # Not in half precision: the best scores would be equal.
        all_scores = class_logits[:, 1:].to(torch.promote_types(class_logits.dtype, torch.float32)).sigmoid()
        kept: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
        for boxes, scores, shape in zip(all_boxes.split(sizes), all_scores.split(sizes), image_shapes):
            places, columns = torch.nonzero(scores > self.score_thresh, as_tuple=True)
            found = box_ops.clip_boxes_to_image(boxes[places, columns], shape)
            large = box_ops.remove_small_boxes(found, min_size=1e-2)
            found, columns, values = found[large], columns[large], scores[places, columns][large]
            best = box_ops.batched_nms(found, values, columns, self.nms_thresh)[: self.detections_per_img]
            for results, result in zip(kept, (found, values, columns + 1)):
                results.append(result[best])
        return kept
