"""The second stage of Faster R-CNN, with sigmoid scores."""

from __future__ import annotations

from typing import Any

import torch
from mmdet.models.roi_heads.bbox_heads import Shared2FCBBoxHead
from mmdet.registry import MODELS
from mmdet.structures.bbox import get_box_tensor
from torch import Tensor

from .heads import RankingHeadMixin, find_positives, ignore_unweighted

__all__ = ["RankingBBoxMixin", "RankingShared2FCBBoxHead"]


class RankingBBoxMixin(RankingHeadMixin):
    """A ranking loss for the regions of all images; to be mixed in front of a subclass of MMDetection's ``BBoxHead``.

    The head has one logit for each class and none for the background. Scores are sigmoids, in training and inference:
    MMDetection's protocol for losses with an activation of their own. Arguments and errors: see
    :class:`~.heads.RankingHeadMixin`; the head must have both a classification and a regression branch.
    """

    # Instead of the properties of that name, which ask the loss: dense heads do not follow this protocol.
    custom_cls_channels = True
    custom_activation = True

    reg_class_agnostic: bool

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        for name in ("with_cls", "with_reg"):
            if not getattr(self, name):
                raise ValueError(f"{name}: expected True, since regions are ranked and located by one head, got False")

    def _get_targets_single(
        self, pos_priors: Tensor, neg_priors: Tensor, pos_gt_bboxes: Tensor, *more: Any, **options: Any
    ) -> Any:
        # Under autocast MMDetection's proposals are half precision, and true boxes would be rounded to that.
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
        """Both parts of the loss of all N regions.

        Args:
            cls_score: logits ``[N, C]``.
            bbox_pred: deltas, ``[N, 4]`` if ``reg_class_agnostic``, else ``[N, C * 4]``.
            rois: ``[N, 5]``: index of the image, box.
            labels: ``[N]`` class indices, C for background.
            label_weights, bbox_targets, bbox_weights: ``[N]``, ``[N, 4]`` and ``[N, 4]``, as ``BBoxHead`` makes them.
            reduction_override: None for a criterion that takes boxes; else for the head's ``loss_bbox``.

        Returns:
            The scalars ``loss_cls`` and ``loss_bbox``.

        Raises:
            ValueError: ``reduction_override`` with a criterion that takes boxes, which has no other reduction.
        """
        if self.loss_cls.takes_boxes and reduction_override is not None:
            raise ValueError(
                f"reduction_override: expected None, since {type(self.loss_cls).__name__} ranks all regions together, "
                f"got {reduction_override!r}"
            )
        labels = ignore_unweighted(labels, label_weights, self.loss_cls.ignore_index)
        (index,) = find_positives([labels], self.num_classes)[0]
        column = labels.new_zeros(len(index)) if self.reg_class_agnostic else labels[index]
        # Under autocast both may be half precision, too coarse for coordinates in pixels.
        deltas = bbox_pred.unflatten(1, (-1, 4))[index, column].to(bbox_targets.dtype)
        pred_boxes = deltas
        if self.reg_decoded_bbox:
            pred_boxes = get_box_tensor(self.bbox_coder.decode(rois[index, 1:].to(bbox_targets.dtype), deltas))
        cls, loc = self.loss_cls.head_losses(
            cls_score, labels, rois[:, 0].long(), len(index), (pred_boxes, bbox_targets[index])
        )
        if loc is None:
            loc = self.loss_bbox(
                pred_boxes,
                bbox_targets[index],
                bbox_weights[index],
                avg_factor=max(len(labels), 1),
                reduction_override=reduction_override,
            )
        return {"loss_cls": cls, "loss_bbox": loc}


@MODELS.register_module()
class RankingShared2FCBBoxHead(RankingBBoxMixin, Shared2FCBBoxHead):  # type: ignore[misc]
    """The second stage with two fully connected layers, and a ranking loss.

    The paper trains it on all proposals (``sampler=dict(type="PseudoSampler")``). Arguments: see
    ``Shared2FCBBoxHead`` and :class:`~.heads.RankingHeadMixin`.
    """
