"""What both passes in plain torch look up for a score: its bucket, and its offset in it."""

from __future__ import annotations

import math
from bisect import bisect_right
from typing import NamedTuple

import torch
from torch import Tensor

from ..devices import is_asynchronous
from ..knots import bucket_floors, inverse_width
from .lookup import look_up
from .search import BucketSearch, GroupedSearch

# Scores of a piece that are looked at, and the part of them below all ramps that makes it pay to leave those out.
_SAMPLE, _MOSTLY_BELOW = 256, 0.6


class Seen(NamedTuple):
    """What a look at a piece's extremes tells; on a GPU nobody looks."""

    bucket: int | None
    """The bucket that holds all scores, where one does and all are finite. Early in training that is the rule, and late
    in training many pieces lie below all ramps."""
    finite: bool
    nan: bool


UNSEEN = Seen(None, False, True)
"""What is known of scores that nobody has looked at."""


class Tables:
    """The buckets of one group, or, with ``threshold_groups``, of all. Buckets are numbered within the tables.

    Args:
        thresholds: ``[n]`` sorted knots, float32 or float64.
        delta: half width of the ramp.
        threshold_groups: ``[n]`` int64, sorted: scores are then located by their groups, too.
        first: the place of ``thresholds[0]`` among those of all groups.
    """

    def __init__(
        self, thresholds: Tensor, delta: float, threshold_groups: Tensor | None = None, first: int = 0
    ) -> None:
        self.search = (
            BucketSearch(thresholds) if threshold_groups is None else GroupedSearch(thresholds, threshold_groups)
        )
        self.floors = bucket_floors(thresholds)
        self.nan_bucket = len(thresholds) + 1
        self.own = slice(first + 1, first + 1 + len(thresholds))
        self.largest = torch.finfo(thresholds.dtype).max
        self.inverse_width = inverse_width(delta)
        # For bisection by single scores; the NaN at the top stand above all.
        may_look = not is_asynchronous(thresholds.device)
        self.sorted = [t for t in thresholds.tolist() if t == t] if threshold_groups is None and may_look else None
        self.lowest = (
            float(thresholds.masked_fill(thresholds.isnan(), math.inf).amin())
            if may_look and len(thresholds)
            else math.inf
        )

    def peek(self, scores: Tensor) -> Seen:
        """Look at the extremes of a piece."""
        if is_asynchronous(scores.device) or len(scores) == 0:
            return UNSEEN
        low, high = (float(extreme) for extreme in scores.aminmax())
        if not -self.largest <= low <= high <= self.largest:
            return Seen(None, False, not low <= high)
        if self.sorted is None:
            return Seen(None, True, False)
        bucket = bisect_right(self.sorted, low)
        return Seen(bucket if bucket == bisect_right(self.sorted, high) else None, True, False)

    def mostly_below(self, scores: Tensor) -> bool:
        """Whether scores of any dtype that are below all thresholds are the rule, from a look at some of them; on a GPU
        nobody looks."""
        if is_asynchronous(scores.device):
            return False
        # In steps of an odd number, so that they meet all classes.
        sample = scores[:: len(scores) // _SAMPLE | 1].to(self.floors.dtype)
        return int((sample < self.lowest).sum()) >= _MOSTLY_BELOW * len(sample)

    def reaching(self, scores: Tensor) -> Tensor:
        """Indices of the scores that are not below all thresholds, NaN among them: ``[few]`` int64."""
        return (scores < self.lowest).logical_not_().nonzero().squeeze(1)

    def offset(self, finite: Tensor, floor: Tensor) -> Tensor:
        """Offsets in [0, 1] of finite scores from the floors of their buckets."""
        if not self.inverse_width:
            return torch.zeros_like(finite)
        return torch.sub(finite, floor).mul_(self.inverse_width).clamp_(max=1)

    def locate(
        self, scores: Tensor, seen: Seen, groups: Tensor | None, past_end: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Buckets and offsets of scores ``[n]`` in groups ``[n]``; NaN goes to bucket ``past_end``, by default one past
        the last. Offsets in bucket 0 mean nothing."""
        if seen.finite:
            bucket = self.search(scores, groups)
            return bucket, self.offset(scores, look_up(self.floors, bucket))
        nan = scores.isnan() if seen.nan else None
        if nan is not None:
            scores = scores.masked_fill(nan, 0)
        bucket = self.search(scores, groups)
        offset = self.offset(scores.clamp(-self.largest, self.largest), look_up(self.floors, bucket))
        if nan is not None:
            bucket = bucket.masked_fill(nan, self.nan_bucket if past_end is None else past_end)
        return bucket, offset

    def rows(self, of_all: Tensor) -> Tensor:
        """The columns of these tables' buckets, ``[K, n + 1]``, from those of all groups, ``[K, 2P + 1]``."""
        return torch.cat([of_all[:, :1], of_all[:, self.own]], dim=1)


class TablesByGroup:
    """The tables to use for a piece of the logits."""

    def __init__(self, thresholds: Tensor, threshold_groups: Tensor | None, delta: float) -> None:
        self.thresholds, self.threshold_groups, self.delta = thresholds, threshold_groups, delta
        self.all = Tables(thresholds, delta, threshold_groups)
        self.known: dict[int, Tables] = {}

    def __call__(self, groups: Tensor | None) -> Tables:
        """Those of the piece's one group, where it has one and the host may look; else those of all groups."""
        if groups is None or self.threshold_groups is None or is_asynchronous(groups.device):
            return self.all
        for axis, step in enumerate(groups.stride()):
            if step == 0:
                groups = groups.narrow(axis, 0, 1)
        low, high = (int(extreme) for extreme in groups.aminmax())
        if low != high:
            return self.all
        if low not in self.known:
            begin, end = (int(torch.searchsorted(self.threshold_groups, low, right=right)) for right in (False, True))
            self.known[low] = Tables(self.thresholds[begin:end], self.delta, first=begin)
        return self.known[low]
