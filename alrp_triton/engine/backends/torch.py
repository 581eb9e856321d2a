"""The linear form in plain torch: both passes stream the logits in pieces, so the workspace is fixed.

Pass 1 counts every logit that is not ignored, positives included, and then takes the positives out again, exactly,
since all sums are integers; so no mask over the classes of an anchor is ever made. Pass 2 overwrites the positives
last.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import NamedTuple

import torch
from torch import Tensor

from ..inputs import Levels, waits_for_nothing
from ..knots import bucket_floors
from ..labels import equals, pieces
from ..positives import local_indices
from .search import BucketSearch

# On the CPU a piece and its temporaries stay in the cache; on a GPU it must be large enough to hide the launches.
_PIECE, _PIECE_ON_DEVICE = 1 << 17, 1 << 21


def count_negatives(
    levels: Levels, thresholds: Tensor, pos_logits: Tensor, delta: float, ignore_index: int, scale: float
) -> Tensor:
    """Pass 1: ``[2, 2P + 2]`` int64; for each bucket its number of negatives, and the sum of their offsets from its
    floor in units of 2 delta, in fixed point with ``scale`` units to 1. The last column counts NaN."""
    tables = _Tables(thresholds, delta)
    totals = torch.zeros(2, tables.nan_bucket + 2, dtype=torch.int64, device=thresholds.device)
    one = torch.ones(1, dtype=torch.int64, device=thresholds.device)

    def add(scores: Tensor, ignored: Tensor | None, count: Tensor) -> None:
        seen = tables.peek(scores)
        if seen.bucket == 0:
            return
        if seen.bucket is not None and ignored is None:
            units = tables.offset(scores, tables.floors[seen.bucket]).mul_(scale).to(torch.int64)
            totals[0, seen.bucket] += count[0] * len(scores)
            totals[1, seen.bucket] += count[0] * units.sum()
            return
        bucket, offset = tables.locate(scores, seen)
        bucket = bucket.long()
        if ignored is not None:
            bucket.view(len(ignored), -1).masked_fill_(ignored[:, None], tables.nan_bucket + 1)
        totals[0].scatter_add_(0, bucket, count.expand_as(bucket))
        totals[1].scatter_add_(0, bucket, offset.mul_(scale).to(torch.int64).mul_(count))

    for logits, labels in zip(*levels):
        for x, y, _ in pieces(logits, labels, _piece_size(logits.device)):
            add(x.reshape(-1).to(levels.compute_dtype), _ignored_rows(y, ignore_index), one)
    add(pos_logits, None, -one)
    return totals[:, :-1].contiguous()


def write_gradient(
    levels: Levels,
    thresholds: Tensor,
    coefficients: Tensor,
    pos_index: Tensor,
    pos_gradient: Tensor,
    delta: float,
    ignore_index: int,
) -> list[Tensor]:
    """Pass 2: the gradient of every logit, in the logits' dtype and layout.

    Args:
        levels: the logits and labels.
        thresholds: ``[2P]`` sorted knots.
        coefficients: ``[2, 2P + 1]`` level and slope of each bucket, see ``knots.ramp_coefficients``.
        pos_index: ``[P]`` flat indices of the positives.
        pos_gradient: ``[P]`` their gradients.
        delta: half width of the ramp.
        ignore_index: label of what gets a zero.
    """
    tables = _Tables(thresholds, delta)
    level, slope = coefficients.to(levels.compute_dtype)
    gradients = [torch.empty_like(logits) for logits in levels.logits]
    for logits, labels, gradient in zip(*levels, gradients):
        for x, y, out in pieces(logits, labels, _piece_size(logits.device), gradient):
            scores = x.reshape(-1).to(levels.compute_dtype)
            seen = tables.peek(scores)
            if seen.bucket == 0:
                value = level[0].expand(len(scores)).clone()
            elif seen.bucket is not None:
                offset = tables.offset(scores, tables.floors[seen.bucket])
                value = torch.addcmul(level[seen.bucket], slope[seen.bucket], offset)
            else:
                bucket, offset = tables.locate(scores, seen, past_end=0)
                value = torch.addcmul(level.index_select(0, bucket), slope.index_select(0, bucket), offset)
            ignored = _ignored_rows(y, ignore_index)
            if ignored is not None:
                value.view(len(ignored), -1).masked_fill_(ignored[:, None], 0)
            out.copy_(value.view(out.shape))
    for gradient, local, inside in local_indices(gradients, pos_index):
        if not waits_for_nothing(gradient.device):
            gradient[torch.unravel_index(local[inside], gradient.shape)] = pos_gradient[inside].to(gradient.dtype)
        else:
            _overwrite_without_sync(gradient, local, inside, pos_gradient)
    return gradients


def _overwrite_without_sync(gradient: Tensor, local: Tensor, inside: Tensor, values: Tensor) -> None:
    """Write positives whose number in this level the host does not know. Those of other levels all go to element 0,
    with the value it is to have in any case, so that the order of writing does not matter."""
    where = torch.unravel_index(local, gradient.shape)
    values = values.to(gradient.dtype)
    at_0 = inside & (local == 0)
    first = gradient[(0,) * gradient.dim()]
    first = torch.where(at_0.any(), torch.where(at_0, values, 0).sum(), first).to(gradient.dtype)
    gradient.index_put_(where, torch.where(inside, values, first))


def _piece_size(device: torch.device) -> int:
    return _PIECE_ON_DEVICE if waits_for_nothing(device) else _PIECE


def _ignored_rows(labels: Tensor, ignore_index: int) -> Tensor | None:
    ignored = equals(labels, ignore_index)
    return ignored if waits_for_nothing(ignored.device) or bool(ignored.any()) else None


class _Seen(NamedTuple):
    """What a look at a piece's extremes tells; on a GPU nobody looks."""

    bucket: int | None
    """The bucket that holds all scores, where one does and all are finite. Early in training that is the rule, and late
    in training many pieces lie below all ramps."""
    finite: bool
    nan: bool


class _Tables:
    """What both passes look up for a score: its bucket, and its offset from the bucket's floor in units of 2 delta."""

    def __init__(self, thresholds: Tensor, delta: float) -> None:
        self.search = BucketSearch(thresholds)
        self.floors = bucket_floors(thresholds)
        self.nan_bucket = len(thresholds) + 1
        self.largest = torch.finfo(thresholds.dtype).max
        self.inverse_width = 0.5 / delta if delta > 0 else 0.0
        # For bisection by single scores; the NaN at the top stand above all.
        self.sorted = None if waits_for_nothing(thresholds.device) else [t for t in thresholds.tolist() if t == t]

    def peek(self, scores: Tensor) -> _Seen:
        """Look at the extremes of a piece."""
        if self.sorted is None or len(scores) == 0:
            return _Seen(None, False, True)
        low, high = (float(extreme) for extreme in scores.aminmax())
        if not -self.largest <= low <= high <= self.largest:
            return _Seen(None, False, not low <= high)
        bucket = bisect_right(self.sorted, low)
        return _Seen(bucket if bucket == bisect_right(self.sorted, high) else None, True, False)

    def offset(self, finite: Tensor, floor: Tensor) -> Tensor:
        """Offsets in [0, 1] of finite scores from the floors of their buckets."""
        if not self.inverse_width:
            return torch.zeros_like(finite)
        return torch.sub(finite, floor).mul_(self.inverse_width).clamp_(max=1)

    def locate(self, scores: Tensor, seen: _Seen, past_end: int | None = None) -> tuple[Tensor, Tensor]:
        """Buckets and offsets of scores; NaN goes to bucket ``past_end``, by default one past the last."""
        if seen.finite:
            bucket = self.search(scores)
            return bucket, self.offset(scores, self.floors.index_select(0, bucket))
        nan = scores.isnan() if seen.nan else None
        if nan is not None:
            scores = scores.masked_fill(nan, 0)
        bucket = self.search(scores)
        offset = self.offset(scores.clamp(-self.largest, self.largest), self.floors.index_select(0, bucket))
        if nan is not None:
            bucket = bucket.masked_fill(nan, self.nan_bucket if past_end is None else past_end)
        return bucket, offset
