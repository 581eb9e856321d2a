"""Assigns anchors to objects: Adaptive Training Sample Selection, in PyTorch.

S. Zhang, C. Chi, Y. Yao, Z. Lei and S. Z. Li, "Bridging the Gap Between Anchor-based and Anchor-free Detection via
Adaptive Training Sample Selection", CVPR 2020 (arXiv:1912.02424). The best published results of aLRP Loss use it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .boxes import iou

__all__ = ["ATSS"]

BACKGROUND = -1
_INSIDE = 0.01  # minimum distance in pixels of an anchor's centre from the edges of the object's box


@dataclass(frozen=True)
class ATSS:
    """Assigns anchors to the objects of one image. Each object has its own threshold, computed from its candidates.

    1. Candidates of an object are, on each level, the ``topk`` anchors with the nearest centres; all anchors if the
       level has fewer.
    2. Its threshold is mean plus standard deviation (unbiased) of the candidates' IoUs with its box. The deviation of
       a single candidate counts as 0.
    3. Its positives are the candidates that reach the threshold and whose centre is more than 0.01 pixels inside its
       box. An anchor of several objects goes to the one with the largest IoU, or to the first of equal ones.

    An object gets no positive if its box contains no centre of its candidates. ``torch.topk`` chooses among equally
    near anchors; the choice is repeatable on one kind of device but may differ between devices.

    The published setting has one square anchor or two at each location, with sides of 8 strides, or of 4 and
    4 * 2**0.5 (aLRP Loss), and ``topk=9``. With more anchors at each location 9 candidates lie at few locations, and
    many anchors that cover an object well become background. The authors' code takes 9 times as many as there are
    anchors at a location; try both (docs/training.md). The rules are those of ``ATSSAssigner`` in MMDetection 3.3,
    except that there an object with a single candidate gets none.

    Args:
        topk: candidates of an object on each level, at least 1.

    Raises:
        TypeError, ValueError: ``topk`` is not an int, or below 1.
    """

    topk: int = 9

    def __post_init__(self) -> None:
        if isinstance(self.topk, bool) or not isinstance(self.topk, int):
            raise TypeError(f"topk: expected an int >= 1, got {type(self.topk).__name__}")
        if self.topk < 1:
            raise ValueError(f"topk: expected an int >= 1, got {self.topk}")

    @torch.no_grad()
    def __call__(
        self, anchors: Tensor | Sequence[Tensor], gt_boxes: Tensor, num_anchors_per_level: Sequence[int] | None = None
    ) -> Tensor:
        """The object of each anchor. The host does not wait for the device.

        Args:
            anchors: boxes (x1, y1, x2, y2) of each level, ``[A_l, 4]`` each; or ``[A, 4]`` of all levels in a row.
            gt_boxes: ``[G, 4]``, the boxes of the image's objects; G may be 0.
            num_anchors_per_level: number of the ``[A, 4]`` anchors of each level; None for one level. Not allowed with
                a sequence of levels.

        Returns:
            ``[A]``, int64: the index of the anchor's object in ``gt_boxes``, or -1 for background. (-2, which
            torchvision's matchers give to ignored anchors, does not occur.)

        Raises:
            TypeError, ValueError: wrong types, shapes, devices or counts, naming the argument.
        """
        boxes, sizes = _check(anchors, gt_boxes, num_anchors_per_level)
        num_objects = gt_boxes.shape[0]
        if num_objects == 0 or boxes.shape[0] == 0:
            return torch.full((boxes.shape[0],), BACKGROUND, dtype=torch.int64, device=boxes.device)
        dtype = torch.promote_types(torch.promote_types(boxes.dtype, gt_boxes.dtype), torch.float32)
        boxes, objects = boxes.to(dtype), gt_boxes.to(dtype)

        centres = (boxes[:, :2] + boxes[:, 2:]) / 2.0
        candidates = _nearest(centres, (objects[:, :2] + objects[:, 2:]) / 2.0, sizes, self.topk)  # [K, G]
        overlaps = iou(boxes[candidates].flatten(0, 1), objects.repeat(len(candidates), 1)).view_as(candidates)
        threshold = overlaps.mean(0)
        if len(candidates) > 1:
            threshold = threshold + overlaps.std(0)
        x, y = centres[candidates].unbind(-1)
        x1, y1, x2, y2 = objects.unbind(-1)
        inside = torch.stack([x - x1, y - y1, x2 - x, y2 - y]).amin(0) > _INSIDE
        positive = (overlaps >= threshold) & inside

        # A column has each anchor at most once, because levels are disjoint, so nothing is written twice.
        claims = overlaps.new_full((boxes.shape[0], num_objects), -1.0)
        claims.scatter_(0, candidates, overlaps.masked_fill(~positive, -1.0))
        largest, matched = claims.max(1)
        return matched.masked_fill(largest < 0, BACKGROUND)


def _nearest(centres: Tensor, object_centres: Tensor, sizes: Sequence[int], topk: int) -> Tensor:
    """The anchors with the centres nearest to that of each object, level after level, ``[K, G]``."""
    found, first = [], 0
    for level in centres.split(list(sizes)):
        # Distances and not their squares: after rounding, fewer squares are equal.
        distances = (level[:, None] - object_centres).square().sum(-1).sqrt()
        found.append(distances.topk(min(topk, len(level)), dim=0, largest=False).indices + first)
        first += len(level)
    return torch.cat(found)


def _check(
    anchors: Tensor | Sequence[Tensor], gt_boxes: Tensor, num_anchors_per_level: Sequence[int] | None
) -> tuple[Tensor, list[int]]:
    """All anchors in a row, and the number of anchors of each level."""
    given: dict[str, object] = {"gt_boxes": gt_boxes, "anchors": anchors}
    if isinstance(anchors, (list, tuple)):
        if num_anchors_per_level is not None:
            raise TypeError(f"num_anchors_per_level: expected None for a list of levels, got {num_anchors_per_level!r}")
        if not anchors:
            raise ValueError("anchors: expected at least one level, got none")
        given = {"gt_boxes": gt_boxes, **{f"anchors[{level}]": boxes for level, boxes in enumerate(anchors)}}
    for name, boxes in given.items():
        if not isinstance(boxes, Tensor):
            raise TypeError(f"{name}: expected a tensor [N, 4], got {type(boxes).__name__}")
        if not boxes.is_floating_point():
            raise TypeError(f"{name}: expected floating-point boxes, got {boxes.dtype}")
        if boxes.ndim != 2 or boxes.shape[1] != 4:
            raise ValueError(f"{name}: expected shape [N, 4], got {list(boxes.shape)}")
        if boxes.device != gt_boxes.device:
            raise ValueError(f"{name}: expected the device of gt_boxes, {gt_boxes.device}, got {boxes.device}")
    if not isinstance(anchors, Tensor):
        return torch.cat(list(anchors)), [len(boxes) for boxes in anchors]
    sizes = [len(anchors)] if num_anchors_per_level is None else list(num_anchors_per_level)
    if sum(sizes) != len(anchors):
        raise ValueError(f"num_anchors_per_level: expected a sum of {len(anchors)} anchors, got {sum(sizes)}")
    return anchors, sizes
