"""The passes in loops that Numba compiles for the CPU: each reads a score once and writes one number.

What is done to a score is what :mod:`.eager` does to it, operation by operation, and sums are integers, so results
have the same bits, whatever the number of threads. The threads are Python's own, made for one call: Numba's may not be
used by several callers at once, and do not survive a fork.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..inputs import Levels
from ..knots import Table, bucket_floors, inverse_width
from ..labels import Piece, pieces
from ..scans import fraction_bits
from .eager import Eager, overwrite_positives
from .numba_loops import Array, Runs, Search, count, write
from .protocol import Found, Own
from .tables import grid_over

_Result = TypeVar("_Result")

# Logits that a thread takes at once; fewer where they are copied: a copy then stays in the cache, and PyTorch does not
# share it out among threads of its own.
_PIECE, _COPIED_PIECE = 1 << 17, 1 << 15
# Logits for which another thread is worth its start.
_PER_THREAD = 1 << 16
# Logits of one group that follow each other, at least, on average, where a run of the loops is worth its start.
_RUN = 128
# Cells of the grids of all groups, about, and of each at least.
_CELLS, _FEWEST_CELLS = 1 << 16, 8
# Ids of groups, at most, of which each has a place in a table.
_MOST_IDS = 1 << 20


class Compiled(Eager):
    """The passes in compiled loops."""

    def count(self, levels: Levels, table: Table, own: Found, totals: Tensor, delta: float, num_logits: int) -> None:
        tables = Tables(table, delta)
        scale = tables.number(2.0 ** fraction_bits(num_logits))

        def work(turns: Iterator[_Turn]) -> Array:
            sums = np.zeros((len(tables.buckets), 2), np.int64)
            for turn in turns:
                count(*tables.arguments(turn, levels.ignore_index), scale, sums, 1)
            return sums

        sums = np.sum(_share_out(levels, None, work), axis=0)
        runs, none = tables.runs(own.groups, len(own.logits)), np.empty(0, np.bool_)
        count(own.logits.detach().contiguous().numpy(), none, runs, tables.search, scale, sums, -1)
        counted = np.zeros((totals.shape[1], 2), np.int64)
        # Of bucket 0 nothing is known; only NaN may be at several places.
        of_nan = len(counted) - 1
        known = (tables.buckets > 0) & (tables.buckets < of_nan)
        counted[tables.buckets[known]] = sums[known]
        counted[of_nan] = sums[tables.buckets == of_nan].sum(0)
        totals[:, 1:] += torch.from_numpy(counted).T[:, 1:]

    def write(
        self, levels: Levels, table: Table, lines: Tensor, own: Own, factors: Sequence[Tensor], delta: float
    ) -> list[Tensor]:
        tables, dtype = Tables(table, delta), levels.compute_dtype()
        of_buckets = (lines * factors[0].double() + 0.0).detach().to(dtype).T.numpy()
        of_places = np.concatenate([of_buckets, of_buckets[:1]])[tables.buckets]
        gradients = [torch.empty_like(logits) for logits in levels.logits]

        def work(turns: Iterator[_Turn]) -> None:
            for turn in turns:
                out, num = turn.piece.out, turn.piece.logits.numel()
                values = out.view(-1) if turn.in_place else torch.empty(num, dtype=dtype)
                write(*tables.arguments(turn, levels.ignore_index), of_places, values.numpy())
                if not turn.in_place:
                    out.copy_(values.view(out.shape))

        _share_out(levels, gradients, work)
        overwrite_positives(gradients, own, factors)
        return gradients


class Tables:
    """What the loops look up, in the dtype in which scores are compared."""

    def __init__(self, table: Table, delta: float) -> None:
        num_thresholds = table.num_thresholds()
        thresholds = table.thresholds[:num_thresholds].numpy()
        self.number = number = thresholds.dtype.type
        # The last ranking is that of groups without thresholds.
        self.ids, ranking, num_rankings = np.zeros(0, np.int64), np.zeros(num_thresholds, np.int64), 1
        if table.groups is not None:
            self.ids, ranking = np.unique(table.groups[:num_thresholds].numpy(), return_inverse=True)
            num_rankings = len(self.ids) + 1
        # By id, from one below the lowest to one above the highest; None if there are too many.
        self.lowest, self.highest = 0, 0
        self.of_ids: Array | None = None
        if len(self.ids):
            self.lowest, self.highest = int(self.ids[0]) - 1, int(self.ids[-1]) + 1
        if self.highest - self.lowest < _MOST_IDS and max(-self.lowest, self.highest) < 1 << 62:
            self.of_ids = np.full(self.highest - self.lowest + 1, len(self.ids), np.int32)
            self.of_ids[self.ids - self.lowest] = np.arange(len(self.ids))
        sizes = np.bincount(ranking, minlength=num_rankings)
        last = (sizes + 2).cumsum() - 1
        place = np.arange(num_thresholds) + 2 * ranking
        #: The bucket of each place.
        self.buckets = np.zeros(last[-1] + 1, np.int64)
        self.buckets[place + 1] = 1 + np.arange(num_thresholds)
        self.buckets[last] = num_thresholds + 1
        next_threshold = np.full(last[-1] + 2, number(np.nan))
        next_threshold[place] = thresholds
        # NaN are last in their ranking, and no score reaches them.
        known = thresholds == thresholds
        low, cells_per_unit, cells = grid_over(torch.from_numpy(np.sort(thresholds[known]))) or (0.0, 0.0, 1)
        of_each = min(cells, max(_CELLS // num_rankings, _FEWEST_CELLS))
        low, cells_per_unit = number(low), number(cells_per_unit * (of_each / cells))
        with np.errstate(invalid="ignore", over="ignore"):
            cell = np.fmin(np.fmax((thresholds - low) * cells_per_unit, number(0)), number(of_each - 1))
        cell = cell[known].astype(np.int64) + of_each * ranking[known]
        in_cell = np.bincount(cell, minlength=num_rankings * of_each).reshape(num_rankings, of_each)
        before = in_cell.cumsum(1) - in_cell + (last - sizes - 1)[:, None]
        floors = np.append(bucket_floors(table.thresholds[:num_thresholds]).numpy(), -np.finfo(number).max)
        self.search = Search(
            next_threshold,
            np.append(before.ravel(), last[-1] + 1).astype(np.int32),
            floors[self.buckets],
            np.int32(of_each),
            low,
            cells_per_unit,
            number(inverse_width(delta)),
            np.finfo(number).max,
            number(1),
        )

    def runs(self, groups: Tensor | None, rows: int, columns: int = 1) -> Runs:
        """The rankings of logits ``[rows, columns]``, one row after the other, of these groups."""
        num = rows * columns
        if groups is None or num == 0:
            return Runs(np.array([num]), np.zeros((1, 1), np.int32))
        *outer, inner = groups.stride() or (0,)
        if not any(outer) and (inner == 0 or groups.numel() == num):
            # The same from row to row.
            row = groups.reshape(-1)[:1] if inner == 0 else groups[(0,) * len(outer)]
            return Runs(np.array([num]), self._rankings(row)[None])
        ids = groups.reshape(-1).numpy()
        ends, each = np.append((ids[1:] != ids[:-1]).nonzero()[0] + 1, len(ids)), num // len(ids)
        rankings = self._rankings(torch.from_numpy(ids[ends - 1]))
        if num >= _RUN * len(ends):
            return Runs(ends * each, rankings[:, None])
        return Runs(np.array([num]), np.repeat(rankings, np.diff(ends, prepend=0) * each)[None])

    def _rankings(self, groups: Tensor) -> Array:
        if self.of_ids is not None:
            return self.of_ids[np.clip(groups.numpy().astype(np.int64), self.lowest, self.highest) - self.lowest]
        found = np.searchsorted(self.ids, groups.numpy())
        found[np.append(self.ids, 0)[found] != groups.numpy()] = len(self.ids)
        return found.astype(np.int32)

    def arguments(self, turn: _Turn, ignore_index: int) -> tuple[Array, Array, Runs, Search]:
        """What the loops take of a piece."""
        x, y, _, groups = turn.piece
        ignored = y.numpy() == ignore_index
        scores = x.reshape(-1).to(torch.from_numpy(self.search.floors).dtype).contiguous().numpy()
        ignored = np.repeat(ignored, x.shape[1]) if ignored.any() else np.empty(0, np.bool_)
        return scores, ignored, self.runs(groups, *x.shape), self.search


class _Turn(NamedTuple):
    """A piece, and how it is taken."""

    piece: Piece
    in_place: bool
    """Whether its tensors can be read and written as they are."""


def _turns(levels: Levels, gradients: list[Tensor] | None) -> Iterator[_Turn]:
    """All pieces, with the tensors to be written."""
    for i, (logits, labels, groups) in enumerate(levels.each()):
        out = None if gradients is None else gradients[i]
        tensors = [logits, labels] if out is None else [logits, labels, out]
        as_it_is = logits.dtype == levels.compute_dtype() and all(tensor.is_contiguous() for tensor in tensors)
        size = _PIECE if as_it_is else _COPIED_PIECE
        for piece in pieces(logits.detach(), labels, size, out, groups):
            yield _Turn(piece, as_it_is)


def _share_out(
    levels: Levels, gradients: list[Tensor] | None, work: Callable[[Iterator[_Turn]], _Result]
) -> list[_Result]:
    """What ``work`` returns on each of as many threads as PyTorch uses, but no more than are worth it; together they
    take all pieces. Whatever one of them raises, this raises."""
    turns, lock = _turns(levels, gradients), threading.Lock()

    def next_turn() -> _Turn | None:
        with lock:
            return next(turns, None)

    def run(_: int = 0) -> _Result:
        # Settings of PyTorch are a thread's own; in this mode any tensor can be written, and nothing is recorded.
        with torch.inference_mode():
            return work(iter(next_turn, None))

    num_threads = min(torch.get_num_threads(), levels.num_logits() // _PER_THREAD)
    if num_threads < 2:
        return [run()]
    with ThreadPoolExecutor(num_threads) as pool:
        return list(pool.map(run, range(num_threads)))
