"""FoveaBox: points instead of anchors."""

from __future__ import annotations

from typing import Any

import torch
from mmdet.models.dense_heads import FoveaHead
from mmdet.registry import MODELS
from torch import Tensor

from .._criteria import image_of_each
from .heads import RankingHeadMixin, find_positives, split_channels

__all__ = ["RankingFoveaHead"]


@MODELS.register_module()
class RankingFoveaHead(RankingHeadMixin, FoveaHead):  # type: ignore[misc]
    """FoveaBox's head with a ranking loss over all levels and images.

    Arguments: see ``FoveaHead`` and :class:`~.heads.RankingHeadMixin`.
    """

    def loss_by_feat(
        self, cls_scores: list[Tensor], bbox_preds: list[Tensor], batch_gt_instances: list[Any], *_: Any, **options: Any
    ) -> dict[str, Tensor]:
        """The scalars ``loss_cls`` and ``loss_bbox`` of a batch; arguments as ``FoveaHead.loss_by_feat``.

        ``bbox_preds``, ``[B, 4, H, W]`` of each level, are the logarithms of the distances from a point to the box's
        left, top, right and bottom side, in the units of the level's ``base_edge_list``.
        """
        batch, sizes = len(cls_scores[0]), [level.shape[-2:] for level in cls_scores]
        # In float32 also under autocast: half precision is too coarse for coordinates in pixels.
        points = self.prior_generator.grid_priors(sizes, dtype=torch.float32, device=cls_scores[0].device)
        all_labels, all_targets = self.get_targets(batch_gt_instances, sizes, points)  # level after level
        counts = [batch * len(level) for level in points]
        labels = [level.reshape(-1, h, w, 1) for level, (h, w) in zip(all_labels.split(counts), sizes)]
        (index,) = find_positives([all_labels], self.num_classes)[0]
        pred = torch.cat([level.flatten(0, 3) for level in split_channels(bbox_preds, 4)])[index].float()
        target = all_targets[index]

        centres = torch.cat([level.repeat(batch, 1) for level in points])[index]
        edges = [centres.new_full((count, 1), edge) for count, edge in zip(counts, self.base_edge_list)]
        place = centres, torch.cat(edges)[index]
        return self.ranking_losses(
            split_channels(cls_scores, self.cls_out_channels),
            labels,
            [image_of_each(level) for level in labels],
            (_boxes(pred, *place), _boxes(target, *place)),
            lambda: self.loss_bbox(pred, target, torch.ones_like(target), avg_factor=max(len(pred), 1)),
        )


def _boxes(logs: Tensor, centres: Tensor, edges: Tensor) -> Tensor:
    """Boxes ``[P, 4]`` around points ``[P, 2]``; not clipped to the image, so that a box outside it gets a gradient."""
    distances = logs.exp() * edges
    return torch.cat([centres - distances[:, :2], centres + distances[:, 2:]], dim=1)
