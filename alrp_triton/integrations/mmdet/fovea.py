"""FoveaBox: points instead of anchors."""

from __future__ import annotations

from typing import Any

import torch
from mmdet.models.dense_heads import FoveaHead
from mmdet.registry import MODELS
from torch import Tensor

from .heads import RankingHeadMixin, find_positives, image_of_each, split_channels

__all__ = ["RankingFoveaHead"]


@MODELS.register_module()
class RankingFoveaHead(RankingHeadMixin, FoveaHead):  # type: ignore[misc]
    """FoveaBox's head with a ranking loss over all levels and images.

    Arguments: see ``FoveaHead`` and :class:`~.heads.RankingHeadMixin`.
    """

    def loss_by_feat(
        self,
        cls_scores: list[Tensor],
        bbox_preds: list[Tensor],
        batch_gt_instances: list[Any],
        batch_img_metas: list[dict[str, Any]],
        batch_gt_instances_ignore: list[Any] | None = None,
    ) -> dict[str, Tensor]:
        """Both parts of the loss of a batch.

        Args:
            cls_scores: logits of each level, ``[B, C, H, W]``.
            bbox_preds: of each level ``[B, 4, H, W]``, the logarithms of the distances from a point to the box's left,
                top, right and bottom side, in the units of the level's ``base_edge_list``.
            batch_gt_instances, batch_img_metas, batch_gt_instances_ignore: as ``FoveaHead.loss_by_feat`` takes them.

        Returns:
            The scalars ``loss_cls`` and ``loss_bbox``.
        """
        sizes = [level.shape[-2:] for level in cls_scores]
        # In float32, also under autocast: half precision is too coarse for coordinates in pixels.
        points = self.prior_generator.grid_priors(sizes, dtype=torch.float32, device=cls_scores[0].device)
        flat_labels, flat_distances = self.get_targets(batch_gt_instances, sizes, points)  # level after level
        counts = [len(cls_scores[0]) * h * w for h, w in sizes]
        labels = [level.reshape(-1, h, w, 1) for level, (h, w) in zip(flat_labels.split(counts), sizes)]
        positives = find_positives(labels, self.num_classes)

        predicted, wanted, centres, edges = [], [], [], []
        for level, index in enumerate(positives):
            height, width = sizes[level]
            logs = split_channels([bbox_preds[level]], 4)[0]
            predicted.append(logs[index].float())
            wanted.append(flat_distances.split(counts)[level].reshape(-1, height, width, 1, 4)[index])
            centres.append(points[level].reshape(height, width, 1, 2)[index[1:]])
            edges.append(centres[-1].new_full((len(centres[-1]), 1), self.base_edge_list[level]))
        pred, target = torch.cat(predicted), torch.cat(wanted)
        place = torch.cat(centres), torch.cat(edges)

        cls, loc = self.loss_cls.head_losses(
            split_channels(cls_scores, self.cls_out_channels),
            labels,
            [image_of_each(level) for level in labels],
            len(pred),
            (_boxes(pred, *place), _boxes(target, *place)),
        )
        if loc is None:
            loc = self.loss_bbox(pred, target, torch.ones_like(target), avg_factor=max(len(pred), 1))
        return {"loss_cls": cls, "loss_bbox": loc}


def _boxes(logs: Tensor, centres: Tensor, edges: Tensor) -> Tensor:
    """Boxes ``[P, 4]`` around points ``[P, 2]``; not clipped to the image, so that one outside of it is pulled back."""
    distances = logs.exp() * edges
    return torch.cat([centres - distances[:, :2], centres + distances[:, 2:]], dim=1)
