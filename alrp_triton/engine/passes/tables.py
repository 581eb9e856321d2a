"""Bucket and offset of each score, for the passes in PyTorch operations.

On the CPU, PyTorch distributes the rows of a matrix over its threads, but processes a vector on one thread. So vectors
are folded into one row per thread. The sums are integers, so they have the same bits for any number of rows.
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

# Cells of the grid: few cells hold more than one knot, and the grid of some thousand knots stays in the cache.
_CELLS, _CELLS_PER_KNOT, _MOST_CELLS = 1 << 15, 2, 1 << 20
# Largest number of entries of a table of groups.
_MOST_ENTRIES = 1 << 20
# Scores of a piece that are sampled, and the share below all ramps from which selecting the others is faster.
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
        # A thread of autograd may have another number of threads than the thread that made the sums.
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
    """A grid of cells of equal width."""

    low: float
    cells_per_unit: float
    cells: int


def grid_over(thresholds: Tensor) -> Grid | None:
    """A grid over the range of sorted thresholds; None if it is not finite or there are too many."""
    finite = thresholds[thresholds.isfinite()]
    limits = torch.finfo(thresholds.dtype)
    # Buckets are counted in the thresholds' dtype, because a CPU compares fastest into the same dtype.
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

    A binary search takes log2(2P) dependent steps, most of them branches that a CPU mispredicts. So on a CPU a uniform
    grid over the thresholds' range comes first. The map from scores to cells is monotone in floating point: thresholds
    in lower cells are at or below the score, those in higher cells are above it, and only those of its own cell are
    compared.
    """

    def __init__(self, thresholds: Tensor) -> None:
        self.thresholds = thresholds
        self.grid = None if is_asynchronous(thresholds.device) else grid_over(thresholds)
        if self.grid is None:
            return
        cells = self._cells(thresholds.masked_fill(thresholds.isnan(), torch.inf))
        # On one thread: PyTorch's other threads would spin while they wait for work.
        in_cell = cells.bincount(minlength=self.grid.cells)
        self.first = F.pad(in_cell.cumsum(0)[:-1], (1, 0)).to(thresholds.dtype)
        crowd = int(in_cell.max())
        # Steps of a binary search in the thresholds of one cell.
        self.steps = [1 << k for k in reversed(range(crowd.bit_length()))]
        padded = F.pad(thresholds, (0, sum(self.steps)), value=torch.nan)
        self.probes = [padded[step - 1 :] for step in self.steps]

    def __call__(self, scores: Tensor, groups: Tensor | None = None) -> Tensor:
        """``[n]`` scores other than NaN to ``[n]`` int64 buckets; groups are not used."""
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
    """int64 of floats below 2^31; on a CPU the conversion through int32 is twice as fast."""
    return whole.int().long()


class GroupedSearch:
    """Counts, for each score, the thresholds of lower groups and those of its own group at or below it; 0 if its own
    group has none at or below it.

    Let the number of a value be the number of thresholds of all groups at or below it. A threshold is at or below a
    score if and only if its number is at most that of the score. So the search uses group and number in one integer. On
    the CPU the host may read the number of groups, and a table has the results for all numbers unless it is too large.
    """

    def __init__(self, thresholds: Tensor, threshold_groups: Tensor) -> None:
        self.groups = threshold_groups
        self.regardless = BucketSearch(thresholds.sort().values)
        # NaN are above all scores.
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
        # One more row of zeros, for groups without thresholds.
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
    """The result of reading a piece's extremes; on a GPU they are not read."""

    bucket: int | None
    """The bucket that holds all scores, if there is one and all are finite. This is usual early in training; late in
    training many pieces lie below all ramps."""
    finite: bool
    nan: bool


UNSEEN = Seen(None, False, True)
"""The default for scores that are not read."""


class Tables:
    """The buckets of one group, or, with ``threshold_groups``, of all groups. Buckets are numbered within the tables.

    Args:
        thresholds: ``[n]`` sorted knots, float32 or float64.
        delta: half width of the ramp.
        threshold_groups: ``[n]`` int64, sorted; the search then also uses the groups of the scores.
        first: the index of ``thresholds[0]`` among the thresholds of all groups.
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
        # For bisection by single scores; the NaN at the top are above all.
        may_look = not is_asynchronous(thresholds.device)
        self.sorted = [t for t in thresholds.tolist() if t == t] if threshold_groups is None and may_look else None
        self.lowest = (
            float(thresholds.masked_fill(thresholds.isnan(), math.inf).amin())
            if may_look and len(thresholds)
            else math.inf
        )

    def peek(self, scores: Tensor) -> Seen:
        """Read the extremes of a piece."""
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
        """Whether most scores, of any dtype, are below all thresholds, from a sample; False on a GPU."""
        if is_asynchronous(scores.device):
            return False
        # With an odd step, so that the sample has all classes.
        sample = scores[:: len(scores) // _SAMPLE | 1].to(self.floors.dtype)
        return int((sample < self.lowest).sum()) >= _MOSTLY_BELOW * len(sample)

    def reaching(self, scores: Tensor) -> Tensor:
        """Indices of the scores that are not below all thresholds, including NaN: ``[few]`` int64."""
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
        the last. Offsets in bucket 0 have no meaning."""
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
    """The tables for each piece of the logits."""

    def __init__(self, table: Table, delta: float) -> None:
        num_thresholds = table.num_thresholds()
        self.thresholds, self.delta = table.thresholds[:num_thresholds], delta
        self.threshold_groups = None if table.groups is None else table.groups[:num_thresholds]
        self.all = Tables(self.thresholds, delta, self.threshold_groups)
        self.known: dict[int, Tables] = {}

    def __call__(self, groups: Tensor | None) -> Tables:
        """Those of the piece's group, if it has only one and the host may read it; otherwise those of all groups."""
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
