"""The second stage of Faster R-CNN, with sigmoid scores."""

from __future__ import annotations

from typing import Any

import torch
from mmdet.models.roi_heads.bbox_heads import Shared2FCBBoxHead
from mmdet.registry import MODELS
from mmdet.structures.bbox import get_box_tensor
from torch import Tensor

from .._criteria import takes_boxes
from .heads import RankingHeadMixin, find_positives, ignore_unweighted

__all__ = ["RankingBBoxMixin", "RankingShared2FCBBoxHead"]


class RankingBBoxMixin(RankingHeadMixin):
    """A ranking loss for the regions of all images; mix it in before a subclass of MMDetection's ``BBoxHead``.

    The head has one logit for each class and none for the background. Scores are sigmoids in training and inference, by
    MMDetection's protocol for losses with their own activation. Arguments and errors: see
    :class:`~.heads.RankingHeadMixin`; the head must have both a classification and a regression branch.
    """

    # MMDetection's properties of these names ask the loss, which has no such attributes because of the dense heads.
    custom_cls_channels = True
    custom_activation = True

    reg_class_agnostic: bool

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        for name in ("with_cls", "with_reg"):
            if not getattr(self, name):
                raise ValueError(f"{name}: expected True for a head that ranks and locates regions, got False")

    def _get_targets_single(
        self, pos_priors: Tensor, neg_priors: Tensor, pos_gt_bboxes: Tensor, *more: Any, **options: Any
    ) -> Any:
        # Under autocast MMDetection's proposals are half precision, and it would round true boxes to that.
        dtype = torch.promote_types(pos_priors.dtype, torch.float32)
        arguments = (boxes.to(dtype) for boxes in (pos_priors, neg_priors, pos_gt_bboxes))
        return super()._get_targets_single(*arguments, *more, **options)  # type: ignore[misc]

    def loss(
        self,
        cls_score: Tensor,
        bbox_pred: Tensor,
        rois: Tensor,
        labels: Tensor,
        label_weights: Tensor,
        bbox_targets: Tensor,
        bbox_weights: Tensor,
        reduction_override: str | None = None,
    ) -> dict[str, Tensor]:
        """The scalars ``loss_cls`` and ``loss_bbox`` of all N regions; arguments as in ``BBoxHead.loss``.

        ``cls_score`` are logits ``[N, C]``, ``labels`` class indices ``[N]``, C for background.

        Raises:
            ValueError: ``reduction_override`` is given with a criterion that takes boxes, which has no other reduction.
        """
        if takes_boxes(self.loss_cls) and reduction_override is not None:
            name = type(self.loss_cls).__name__
            raise ValueError(f"reduction_override: expected None for {name}, got {reduction_override!r}")
        labels = ignore_unweighted(labels, label_weights, self.loss_cls.ignore_index)
        (index,) = find_positives([labels], self.num_classes)[0]
        column = labels.new_zeros(len(index)) if self.reg_class_agnostic else labels[index]
        # Under autocast both may be half precision, which is too coarse for coordinates in pixels.
        deltas = bbox_pred.unflatten(1, (-1, 4))[index, column].to(bbox_targets.dtype)
        pred_boxes, true = deltas, bbox_targets[index]
        if self.reg_decoded_bbox:
            pred_boxes = get_box_tensor(self.bbox_coder.decode(rois[index, 1:].to(bbox_targets.dtype), deltas))
        reduction = {"avg_factor": max(len(labels), 1), "reduction_override": reduction_override}
        return self.ranking_losses(
            cls_score,
            labels,
            rois[:, 0].long(),
            (pred_boxes, true),
            lambda: self.loss_bbox(pred_boxes, true, bbox_weights[index], **reduction),
        )


@MODELS.register_module()
class RankingShared2FCBBoxHead(RankingBBoxMixin, Shared2FCBBoxHead):  # type: ignore[misc]
    """The second stage with two fully connected layers, and a ranking loss.

    The paper trains it on all proposals (``sampler=dict(type="PseudoSampler")``). Arguments: see
    ``Shared2FCBBoxHead`` and :class:`~.heads.RankingHeadMixin`.
    """
