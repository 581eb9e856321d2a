"""Heads with anchors: RetinaNet, ATSS and the proposal head.

MMDetection calls a head's losses level by level. A ranking needs all levels at once, so these heads override
``loss_by_feat``. Forward passes, assignment and prediction are MMDetection's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from mmdet.models.dense_heads import ATSSHead, RetinaHead, RPNHead
from mmdet.models.task_modules.assigners import ATSSAssigner
from mmdet.registry import MODELS
from mmdet.structures.bbox import get_box_tensor
from mmdet.utils import reduce_mean
from torch import Tensor, nn

from .._criteria import image_of_each
from .heads import RankingHeadMixin, find_positives, ignore_unweighted, split_channels

__all__ = ["RankingATSSHead", "RankingAnchorMixin", "RankingRPNHead", "RankingRetinaHead"]


class AnchorTargets(NamedTuple):
    """A batch's targets. Levels are ``[B, H, W, A]``; the P positives come level after level, in row-major order."""

    labels: list[Tensor]
    """Class indices, ``num_classes`` for background; ignored ones marked."""
    positives: list[tuple[Tensor, ...]]
    """For each level the indices of its positives."""
    priors: Tensor
    """Anchors of the positives ``[P, 4]``."""
    boxes: Tensor
    """Their targets ``[P, 4]``: true boxes if the head's ``reg_decoded_bbox`` is set, otherwise deltas."""
    weights: Tensor
    """Their weights ``[P, 4]``."""
    avg_factor: float
    """MMDetection's divisor of sums over the positives."""

    def at_positives(self, levels: list[Tensor]) -> Tensor:
        """From predictions ``[B, H, W, A, n]`` of each level, those of the positives, ``[P, n]``."""
        return torch.cat([level[index] for level, index in zip(levels, self.positives)])


class RankingAnchorMixin(RankingHeadMixin):
    """A ranking loss for a head with anchors; mix it in before a subclass of MMDetection's ``AnchorHead``.

    Arguments and errors: see :class:`~.heads.RankingHeadMixin`.
    """

    cls_out_channels: int

    def loss_by_feat(
        self, cls_scores: list[Tensor], bbox_preds: list[Tensor], *batch: Any, **options: Any
    ) -> dict[str, Tensor]:
        """The scalars ``loss_cls`` and ``loss_bbox`` of a batch; arguments as ``AnchorHead.loss_by_feat``."""
        return self.anchor_losses(cls_scores, bbox_preds, self.anchor_targets(cls_scores, *batch, **options))

    def anchor_targets(
        self,
        cls_scores: list[Tensor],
        batch_gt_instances: list[Any],
        batch_img_metas: list[dict[str, Any]],
        batch_gt_instances_ignore: list[Any] | None = None,
    ) -> AnchorTargets:
        """The targets of the batch by the head's own assigner and sampler."""
        sizes = [level.shape[-2:] for level in cls_scores]
        anchors, valid = self.get_anchors(sizes, batch_img_metas, device=cls_scores[0].device)  # type: ignore[attr-defined]
        priors = [get_box_tensor(level) for level in anchors[0]]  # those of all images
        targets = self.get_targets(  # type: ignore[attr-defined]
            anchors, valid, batch_gt_instances, batch_img_metas, batch_gt_instances_ignore=batch_gt_instances_ignore
        )
        labels, label_weights, boxes, weights, avg_factor = targets[-5:]  # ATSS has the anchors in front
        # From [B, H * W * A, ...] to [B, H, W, A, ...].
        shapes = [(h, w, -1) for h, w in sizes]
        labels = [
            ignore_unweighted(level, weight, self.loss_cls.ignore_index).unflatten(1, shape)
            for level, weight, shape in zip(labels, label_weights, shapes)
        ]
        positives = find_positives(labels, self.num_classes)
        return AnchorTargets(
            labels,
            positives,
            torch.cat([p.unflatten(0, shape)[index[1:]] for p, shape, index in zip(priors, shapes, positives)]),
            torch.cat([b.unflatten(1, shape)[index] for b, shape, index in zip(boxes, shapes, positives)]),
            torch.cat([w.unflatten(1, shape)[index] for w, shape, index in zip(weights, shapes, positives)]),
            avg_factor,
        )

    def anchor_losses(
        self, cls_scores: list[Tensor], bbox_preds: list[Tensor], targets: AnchorTargets
    ) -> dict[str, Tensor]:
        """The loss of these predictions for these targets."""
        # Under autocast deltas may be half precision, which is too coarse for coordinates in pixels.
        deltas = targets.at_positives(split_channels(bbox_preds, 4)).to(targets.priors.dtype)
        pred_boxes = deltas
        if self.reg_decoded_bbox:
            pred_boxes = get_box_tensor(self.bbox_coder.decode(targets.priors, deltas))
        return self.ranking_losses(
            split_channels(cls_scores, self.cls_out_channels),
            targets.labels,
            [image_of_each(level) for level in targets.labels],
            (pred_boxes, targets.boxes),
            lambda: self.box_loss(pred_boxes, targets),
        )

    def box_loss(self, pred_boxes: Tensor, targets: AnchorTargets) -> Tensor:
        """The head's own localisation loss of all positives, for a criterion on scores alone."""
        loss: Tensor = self.loss_bbox(pred_boxes, targets.boxes, targets.weights, avg_factor=targets.avg_factor)
        return loss


@MODELS.register_module()
class RankingRetinaHead(RankingAnchorMixin, RetinaHead):  # type: ignore[misc]
    """RetinaNet's head with a ranking loss.

    Also takes the assigner ``ATSSAssigner``, as "aLRP Loss (ATSS)" in the paper: RetinaNet with one square anchor per
    scale and ATSS's assignment, without its centre-ness. Arguments: see ``RetinaHead`` and
    :class:`~.heads.RankingHeadMixin`.
    """

    # Only ATSSHead of MMDetection gives ATSSAssigner the sizes of the levels, so these are its methods.
    get_num_level_anchors_inside = ATSSHead.get_num_level_anchors_inside

    def get_targets(self, *args: Any, **options: Any) -> Any:
        """As ``AnchorHead.get_targets``."""
        by_level = isinstance(self.assigner, ATSSAssigner)
        return ATSSHead.get_targets(self, *args, **options) if by_level else super().get_targets(*args, **options)

    def _get_targets_single(self, *args: Any, **options: Any) -> Any:
        if isinstance(self.assigner, ATSSAssigner):
            return ATSSHead._get_targets_single(self, *args, **options)
        return super()._get_targets_single(*args, **options)


@MODELS.register_module()
class RankingRPNHead(RankingAnchorMixin, RPNHead):  # type: ignore[misc]
    """The proposal head of Faster R-CNN with a ranking loss.

    The paper trains it without sampling (``sampler=dict(type="PseudoSampler")``), with a weight of 0.2 and tau = 0.7,
    which is also the IoU from which an anchor is a positive here. Arguments: see ``RPNHead`` and
    :class:`~.heads.RankingHeadMixin`.
    """

    def loss_by_feat(self, *args: Any, **options: Any) -> dict[str, Tensor]:
        """The scalars ``loss_rpn_cls`` and ``loss_rpn_bbox``; see :meth:`RankingAnchorMixin.loss_by_feat`."""
        losses = super().loss_by_feat(*args, **options)
        return {"loss_rpn_cls": losses["loss_cls"], "loss_rpn_bbox": losses["loss_bbox"]}


@MODELS.register_module()
class RankingATSSHead(RankingAnchorMixin, ATSSHead):  # type: ignore[misc]
    """ATSS's head with a ranking loss.

    Args:
        loss_centerness: configuration of the loss of the centre-ness. With None, the default, the head has no
            centre-ness: with a ranking loss that takes boxes the score itself shows how well a box fits, and detections
            are ranked only by the score.
        settings: see ``ATSSHead`` and :class:`~.heads.RankingHeadMixin`.
    """

    loss_centerness: Any

    def __init__(self, *args: Any, loss_centerness: Mapping[str, Any] | None = None, **settings: Any) -> None:
        built = {"type": nn.Identity} if loss_centerness is None else loss_centerness
        super().__init__(*args, loss_centerness=built, **settings)
        if loss_centerness is None:
            self.loss_centerness = None
            # MMDetection's forward always calls it. Without parameters, no gradient is missing.
            self.atss_centerness = nn.Identity()

    def forward(self, x: tuple[Tensor, ...]) -> tuple[list[Tensor], ...]:
        """Logits, deltas and, if the head has it, centre-ness of each level ``[B, A * n, H, W]``."""
        outputs: tuple[list[Tensor], ...] = super().forward(x)
        return outputs[:2] if self.loss_centerness is None else outputs

    def loss_by_feat(
        self, cls_scores: list[Tensor], bbox_preds: list[Tensor], *batch: Any, **options: Any
    ) -> dict[str, Tensor]:
        """The scalars ``loss_cls``, ``loss_bbox`` and, with centre-ness, ``loss_centerness``.

        Arguments as in ``AnchorHead.loss_by_feat``, after the results of :meth:`forward`.
        """
        if self.loss_centerness is None:
            return super().loss_by_feat(cls_scores, bbox_preds, *batch, **options)
        centernesses, *batch = batch  # type: ignore[assignment]
        targets = self.anchor_targets(cls_scores, *batch, **options)
        losses = self.anchor_losses(cls_scores, bbox_preds, targets)
        logits = targets.at_positives(split_channels(centernesses, 1)).squeeze(1)
        # Every process contributes to the mean, also without positives.
        avg_factor = reduce_mean(logits.new_tensor(targets.avg_factor, dtype=torch.float32)).item()
        if len(logits):
            centerness = self.centerness_target(targets.priors, targets.boxes)
            losses["loss_centerness"] = self.loss_centerness(logits, centerness, avg_factor=avg_factor)
        else:
            losses["loss_centerness"] = logits.sum()
        return losses

    def box_loss(self, pred_boxes: Tensor, targets: AnchorTargets) -> Tensor:
        """ATSS's own loss, weighted by the centre-ness."""
        if len(pred_boxes):
            weights = self.centerness_target(targets.priors, targets.boxes)
            loss = self.loss_bbox(pred_boxes, targets.boxes, weight=weights, avg_factor=1.0)
            total = weights.sum()
        else:
            loss, total = pred_boxes.sum(), pred_boxes.new_zeros(())
        mean: Tensor = loss / reduce_mean(total).clamp(min=1)
        return mean
