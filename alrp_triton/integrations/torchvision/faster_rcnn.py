"""Faster R-CNN: both stages by ranking, as published with aLRP Loss.

What changes in training, in either stage: nothing is sampled, so that all anchors and all proposals that the matcher
does not ignore take part; scores are ranked instead of going through a sigmoid or softmax; and boxes are trained
decoded, by the criterion's errors (GIoU by default), instead of by their deltas. The proposal network takes tau = 0.7,
the IoU from which its matcher calls an anchor a positive, and its loss a weight of 0.20. The second stage sees the
proposals as they come: the boxes of the objects are not added to them.

In training and inference, scores of the second stage are sigmoids of their own for each class instead of a softmax. The
predictor's column 0, torchvision's background, is in neither; it stays so that pretrained weights fit. Everything else,
anchors, matchers, numbers of proposals, box coders and thresholds, remains the model's.

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

from .._criteria import check_criterion
from ._parts import RankingPart, image_of_each, mix_in

__all__ = ["RPN_WEIGHT", "use_criterion"]

RPN_WEIGHT = 0.20


def use_criterion(
    model: FasterRCNN,
    criterion: nn.Module,
    per_image: bool,
    *,
    boxes: bool,
    rpn_criterion: nn.Module | None = None,
    rpn_weight: float | None = None,
) -> None:
    """Give both stages of a Faster R-CNN their criteria, in place; see ``use_alrp``."""
    if not boxes:
        raise TypeError("model must be a RetinaNet or an FCOS for a loss on scores alone; got a FasterRCNN")
    for name, wanted in (("rpn", RegionProposalNetwork), ("roi_heads", RoIHeads)):
        if not isinstance(getattr(model, name), wanted):
            got = type(getattr(model, name)).__qualname__
            raise TypeError(f"model.{name} must be a torchvision {wanted.__name__}; got {got}")
    if model.roi_heads.has_mask() or model.roi_heads.has_keypoint():
        raise TypeError(f"model must have neither masks nor keypoints; got {type(model).__qualname__}")
    rpn_criterion = check_criterion(rpn_criterion, boxes=True, name="rpn_criterion")
    if rpn_criterion is criterion:
        raise ValueError("rpn_criterion must be another module than criterion: each stage balances itself")
    rpn_weight = RPN_WEIGHT if rpn_weight is None else rpn_weight
    if isinstance(rpn_weight, bool) or not isinstance(rpn_weight, (int, float)):
        raise TypeError(f"rpn_weight must be a number; got {type(rpn_weight).__qualname__}")
    if not 0 <= rpn_weight < float("inf"):
        raise ValueError(f"rpn_weight must be finite and at least 0; got {rpn_weight}")
    mix_in(model.rpn, RankingRPN, rpn_criterion, per_image)
    mix_in(model.roi_heads, RankingRoIHeads, criterion, per_image)
    model.rpn.ranking_weight = float(rpn_weight)


class _Assignment(list[Tensor]):
    """The labels [A] of each image, with what else the loss has to know of the anchors."""

    def __init__(self, labels: list[Tensor], anchors: list[Tensor], matched_gt_boxes: list[Tensor]) -> None:
        super().__init__(labels)
        self.anchors, self.matched_gt_boxes = anchors, matched_gt_boxes


class RankingRPN(RankingPart):
    """What is added to the class of a model's ``RegionProposalNetwork``."""

    box_coder: Any  # typed so, since torchvision has no type hints of its own
    ranking_weight: float

    def assign_targets_to_anchors(
        self, anchors: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """As in ``RegionProposalNetwork``, which hands the labels on to :meth:`compute_loss`."""
        labels, matched = super().assign_targets_to_anchors(anchors, targets)  # type: ignore[misc]
        return _Assignment(labels, anchors, matched), matched

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: _Assignment, regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Both parts of the loss, weighted; arguments as in ``RegionProposalNetwork``, all anchors of all images."""
        codes = torch.stack(list(labels))  # [B, A]: 1 for an object, 0 for background, -1 for neither
        positives = torch.nonzero(codes == 1, as_tuple=True)
        ignored = getattr(self.ranking_criterion, "ignore_index", -1)
        classes = torch.where(codes < 0, ignored, 1 - codes.to(torch.int64))  # one class, 0; background is 1
        gt_boxes = torch.stack(labels.matched_gt_boxes)[positives]
        pred_boxes = self.box_coder.decode_single(
            pred_bbox_deltas.view(*codes.shape, 4)[positives].to(gt_boxes.dtype), torch.stack(labels.anchors)[positives]
        )
        loss = self.ranking_criterion(
            objectness.view(*codes.shape, 1),
            classes,
            pred_boxes,
            gt_boxes,
            **self.ranking_options(image_of_each(classes)),
        )
        return self.ranking_weight * loss.cls, self.ranking_weight * loss.loc


class RankingRoIHeads(RankingPart):
    """What is added to the class of a model's ``RoIHeads``."""

    # Typed so, since torchvision has no type hints of its own.
    box_coder: Any
    box_roi_pool: Any
    box_head: Any
    box_predictor: Any
    select_training_samples: Any
    score_thresh: float
    nms_thresh: float
    detections_per_img: int

    def add_gt_proposals(self, proposals: list[Tensor], gt_boxes: list[Tensor]) -> list[Tensor]:
        """The proposals as they are."""
        return list(proposals)

    def subsample(self, labels: list[Tensor]) -> list[Tensor]:
        """All proposals that are not ignored."""
        return [torch.where(label >= 0)[0] for label in labels]

    def assign_targets_to_proposals(
        self, proposals: list[Tensor], gt_boxes: list[Tensor], gt_labels: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """As in ``RoIHeads``, whose matcher refuses images without proposals: here there is nothing to match."""
        boxes = [b if len(p) else b[:0] for p, b in zip(proposals, gt_boxes)]
        matched, labels = super().assign_targets_to_proposals(proposals, boxes, gt_labels)  # type: ignore[misc]
        return matched, labels

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """As in ``RoIHeads``: detections, or in training the parts of the loss."""
        if not self.training:
            detections, losses = super().forward(features, proposals, image_shapes, targets)
            return detections, losses
        if targets is None:
            raise ValueError("targets must be given in training; got None")
        proposals, matched, labels, _ = self.select_training_samples(proposals, targets)
        rows = self.box_head(self.box_roi_pool(features, proposals, image_shapes))
        class_logits, deltas = self.box_predictor(rows)  # [N, 1 + C], [N, 4 (1 + C)]
        # Targets as they were given: the proposals, whose dtype torchvision converts them to, may be half precision.
        gt_boxes = [target["boxes"] for target in targets]
        loss = self._loss(class_logits, deltas, proposals, torch.cat(labels), gt_boxes, matched)
        return [], {"loss_classifier": loss.cls, "loss_box_reg": loss.loc}

    def _loss(
        self,
        class_logits: Tensor,
        deltas: Tensor,
        proposals: list[Tensor],
        labels: Tensor,
        gt_boxes: list[Tensor],
        matched: list[Tensor],
    ) -> Any:
        """Of all proposals of the batch [N]; labels are torchvision's, 0 for background."""
        images = torch.cat([torch.full_like(index, image) for image, index in enumerate(matched)])  # [N]
        (positives,) = torch.nonzero(labels > 0, as_tuple=True)
        counts = torch.tensor([len(boxes) for boxes in gt_boxes], device=labels.device)
        first = counts.cumsum(0) - counts  # where each image's objects begin among all
        objects = torch.cat(matched)[positives] + first[images[positives]]
        boxes = torch.cat(gt_boxes)
        own = deltas.view(*class_logits.shape, 4)[positives, labels[positives]]  # those of the object's class
        pred_boxes = self.box_coder.decode_single(own.to(boxes.dtype), torch.cat(proposals)[positives].to(boxes.dtype))
        logits = class_logits[:, 1:]
        classes = torch.where(labels > 0, labels - 1, logits.shape[1])
        return self.ranking_criterion(logits, classes, pred_boxes, boxes[objects], **self.ranking_options(images))

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
        # Not in half precision, in which the best scores would be equal.
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
