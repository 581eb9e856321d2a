"""What the passes in plain torch look up for a score: its bucket, and its offset in it.

On the CPU, PyTorch shares the rows of a matrix out among its threads, but leaves a vector to one of them. So vectors
are folded into as many rows as there are threads. What is summed is integers, so that the rows' sums add up to the same
bits whatever their number.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..devices import is_asynchronous
from ..knots import Table, bucket_floors, buckets_of, inverse_width

# Cells of the grid: enough that few hold more than one knot, few enough that those of some thousand stay in the cache.
_CELLS, _CELLS_PER_KNOT, _MOST_CELLS = 1 << 15, 2, 1 << 20
# Entries at most of a table of groups.
_MOST_ENTRIES = 1 << 20
# Scores of a piece that are looked at, and the part of them below all ramps that makes it pay to leave those out.
_SAMPLE, _MOSTLY_BELOW = 256, 0.6


def _rows(index: Tensor) -> int:
    threads = torch.get_num_threads() if not is_asynchronous(index.device) else 1
    return threads if len(index) % threads == 0 else 1


def look_up(table: Tensor, index: Tensor) -> Tensor:
    """``table[index]`` for ``[n]`` int64."""
    if is_asynchronous(index.device):
        return table.index_select(0, index)
    rows = _rows(index)
    return torch.gather(table.expand(rows, -1), 1, index.view(rows, -1)).view(-1)


class Sums:
    """Integers summed into places: ``[places]`` int64, starting at 0."""

    def __init__(self, places: int, device: torch.device) -> None:
        rows = torch.get_num_threads() if not is_asynchronous(device) else 1
        self._by_row = torch.zeros(rows, places, dtype=torch.int64, device=device)

    def add(self, place: Tensor, values: Tensor) -> None:
        """Add ``[n]`` int64 values at ``[n]`` int64 places."""
        # A thread of autograd may have another number of threads than the one that made the sums.
        rows = min(_rows(place), len(self._by_row))
        rows = rows if len(place) % rows == 0 else 1
        self._by_row[:rows].scatter_add_(1, place.view(rows, -1), values.view(rows, -1))

    def add_at(self, place: int, value: Tensor | int) -> None:
        """Add one number at one place."""
        self._by_row[0, place] += value

    def total(self) -> Tensor:
        """``[places]``"""
        return self._by_row.sum(0)


class Grid(NamedTuple):
    """Where cells of equal width lie."""

    low: float
    cells_per_unit: float
    cells: int


def grid_over(thresholds: Tensor) -> Grid | None:
    """Over the range of sorted thresholds; None where that is not finite or they are too many."""
    finite = thresholds[thresholds.isfinite()]
    limits = torch.finfo(thresholds.dtype)
    # Buckets are counted in the thresholds' dtype, whose comparisons a CPU does fastest where they result in it.
    if len(finite) == 0 or len(thresholds) >= min(1 / limits.eps, 1 << 31):
        return None
    low = float(finite[0])
    extent = float(finite[-1]) - low
    if not extent < math.inf:
        return None
    cells = min(max(_CELLS, _CELLS_PER_KNOT * len(thresholds)), _MOST_CELLS)
    return Grid(low, min(cells / extent, limits.max) if extent > 0 else 1.0, cells)


class BucketSearch:
    """Counts, for each score, the thresholds at or below it.

    A binary search takes log2(2P) dependent steps, most of them branches that a CPU mispredicts. There a uniform grid
    over the thresholds' range comes first: the map from scores to cells is monotone in floating point, so all
    thresholds in lower cells lie at or below the score, all in higher cells above it, and only those of its own cell
    are compared.
    """

    def __init__(self, thresholds: Tensor) -> None:
        self.thresholds = thresholds
        self.grid = None if is_asynchronous(thresholds.device) else grid_over(thresholds)
        if self.grid is None:
            return
        cells = self._cells(thresholds.masked_fill(thresholds.isnan(), torch.inf))
        # By one thread each: others of PyTorch would wait for more work, at the cost of who has some.
        in_cell = cells.bincount(minlength=self.grid.cells)
        self.first = F.pad(in_cell.cumsum(0)[:-1], (1, 0)).to(thresholds.dtype)
        crowd = int(in_cell.max())
        # Steps of a binary search among the thresholds of one cell.
        self.steps = [1 << k for k in reversed(range(crowd.bit_length()))]
        padded = F.pad(thresholds, (0, sum(self.steps)), value=torch.nan)
        self.probes = [padded[step - 1 :] for step in self.steps]

    def __call__(self, scores: Tensor, groups: Tensor | None = None) -> Tensor:
        """``[n]`` scores other than NaN to ``[n]`` int64 buckets; whatever their groups."""
        if self.grid is None:
            return buckets_of(scores, self.thresholds)
        bucket = look_up(self.first, self._cells(scores))
        for step, probe in zip(self.steps, self.probes):
            bucket.add_(look_up(probe, _as_index(bucket)).le_(scores), alpha=step)
        return _as_index(bucket)

    def _cells(self, scores: Tensor) -> Tensor:
        assert self.grid is not None
        return _as_index((scores - self.grid.low).mul_(self.grid.cells_per_unit).clamp_(0, self.grid.cells - 1))


def _as_index(whole: Tensor) -> Tensor:
    """int64 of floats below 2^31: a CPU is twice as fast by way of int32."""
    return whole.int().long()


class GroupedSearch:
    """Counts, for each score, the thresholds of lower groups and those of its own group at or below it; 0 where the
    latter are none.

    A threshold is at or below a score just if the number of thresholds of any group at or below it is at most that of
    the score. So the search by group and score is one by group and such a number, in one integer. On the CPU, where one
    may look how many groups there are, the answers for all numbers stand in a table, unless it would be too large.
    """

    def __init__(self, thresholds: Tensor, threshold_groups: Tensor) -> None:
        self.groups = threshold_groups
        self.regardless = BucketSearch(thresholds.sort().values)
        # NaN stand above all scores.
        self.radix = len(thresholds) + 2
        number = self.regardless(thresholds.masked_fill(thresholds.isnan(), 0))
        number = number.masked_fill(thresholds.isnan(), self.radix - 1)
        self.keys = torch.searchsorted(threshold_groups, threshold_groups) * self.radix + number
        self.table: Tensor | None = None
        if not is_asynchronous(thresholds.device) and len(thresholds):
            self._tabulate()

    def _tabulate(self) -> None:
        distinct = self.groups.unique_consecutive()
        self.low, self.high = int(distinct[0]) - 1, int(distinct[-1]) + 1
        # One row more, of zeros, for the groups that have no thresholds.
        at_the_end_of_int64 = max(-self.low, self.high) > 1 << 62
        if at_the_end_of_int64 or max((len(distinct) + 1) * self.radix, self.high - self.low + 1) > _MOST_ENTRIES:
            return
        first = torch.searchsorted(self.groups, distinct)[:, None]
        numbers = torch.arange(self.radix)
        bucket = torch.searchsorted(self.keys, first * self.radix + numbers, right=True)
        rows = torch.where(bucket > first, bucket, 0)
        self.table = F.pad(rows, (0, 0, 0, 1)).view(-1)
        self.row = torch.full((self.high - self.low + 1,), len(distinct) * self.radix)
        self.row[distinct - self.low] = torch.arange(len(distinct)) * self.radix

    def __call__(self, scores: Tensor, groups: Tensor | None = None) -> Tensor:
        """``[n]`` scores other than NaN and their groups to ``[n]`` int64 buckets."""
        assert groups is not None
        if len(self.groups) == 0:
            return torch.zeros(scores.shape, dtype=torch.int64, device=scores.device)
        number, groups = self.regardless(scores), groups.long()
        if self.table is not None:
            row = look_up(self.row, groups.clamp(self.low, self.high).sub_(self.low))
            return look_up(self.table, row.add_(number))
        first = torch.searchsorted(self.groups, groups.contiguous())
        there = self.groups[first.clamp(max=len(self.groups) - 1)] == groups
        bucket = torch.searchsorted(self.keys, first * self.radix + number, right=True)
        return torch.where(there & (bucket > first), bucket, 0)


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

    def __init__(self, table: Table, delta: float) -> None:
        num_thresholds = len(table.floors) - 1
        self.thresholds, self.delta = table.thresholds[:num_thresholds], delta
        self.threshold_groups = None if table.groups is None else table.groups[:num_thresholds]
        self.all = Tables(self.thresholds, delta, self.threshold_groups)
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
