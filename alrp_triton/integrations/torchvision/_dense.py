"""The loss of a head that scores every anchor, or point, of all levels: RetinaNet's and FCOS's."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.models.detection._utils import Matcher

from ._parts import RankingPart, image_of_each

__all__ = ["DenseHead"]


class DenseHead(RankingPart):
    """Ranks the scores of all levels and images together; a subclass says how boxes are decoded and what else stays."""

    ranking_takes_boxes: bool

    def decode(self, deltas: Tensor, anchors: Tensor) -> Tensor:
        """Boxes [P, 4] of the deltas and anchors [P, 4] of positives."""
        raise NotImplementedError

    def kept_losses(
        self,
        targets: list[dict[str, Tensor]],
        head_outputs: dict[str, Tensor],
        anchors: list[Tensor],
        matched_idxs: list[Tensor],
    ) -> dict[str, Tensor]:
        """The parts of the loss that remain the model's own, by name."""
        raise NotImplementedError

    def compute_loss(
        self,
        targets: list[dict[str, Tensor]],
        head_outputs: dict[str, Tensor],
        anchors: list[Tensor],
        matched_idxs: list[Tensor],
    ) -> dict[str, Tensor]:
        """The parts of the loss; arguments as in torchvision's heads."""
        logits, deltas = head_outputs["cls_logits"], head_outputs["bbox_regression"]  # [B, A, C], [B, A, 4]
        gt_labels = torch.cat([target["labels"] for target in targets])  # [G]
        matched = torch.stack(matched_idxs)  # [B, A], an index into the image's own objects or a Matcher code

        positives = torch.nonzero(matched >= 0, as_tuple=True)  # row-major, the order in which the losses count
        counts = torch.tensor([len(target["boxes"]) for target in targets], device=matched.device)
        first = counts.cumsum(0) - counts  # where each image's objects begin among all G
        objects = matched[positives] + first[positives[0]]  # [P]

        ignored = getattr(self.ranking_criterion, "ignore_index", -1)
        labels = torch.where(matched == Matcher.BETWEEN_THRESHOLDS, ignored, logits.shape[-1])
        labels[positives] = gt_labels[objects].to(labels.dtype)
        options = self.ranking_options(image_of_each(matched))
        if self.ranking_takes_boxes:
            gt_boxes = torch.cat([target["boxes"] for target in targets])  # [G, 4]
            # Under autocast the deltas are half precision, too coarse for pixel coordinates: decode as the boxes are.
            pred_boxes = self.decode(deltas[positives].to(gt_boxes.dtype), torch.stack(anchors)[positives])
            loss = self.ranking_criterion(logits, labels, pred_boxes, gt_boxes[objects], **options)
            losses = {"classification": loss.cls, "bbox_regression": loss.loc}
        else:
            cls = self.ranking_criterion(logits, labels, num_positives=len(objects), **options)
            losses = {"classification": cls}
        return {**losses, **self.kept_losses(targets, head_outputs, anchors, matched_idxs)}
