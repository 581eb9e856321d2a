"""Find the bucket of every score."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..devices import is_asynchronous
from ..knots import buckets_of
from .lookup import look_up

# Cells of the grid: enough that few hold more than one knot, few enough that those of some thousand stay in the cache.
_CELLS, _CELLS_PER_KNOT, _MOST_CELLS = 1 << 15, 2, 1 << 20
# Entries at most of a table of groups.
_TABLE = 1 << 20


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
        if at_the_end_of_int64 or max((len(distinct) + 1) * self.radix, self.high - self.low + 1) > _TABLE:
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
