"""The passes in loops that Numba compiles for the CPU: each reads a score once and writes one number.

What is done to a score is what :mod:`.eager` does to it, operation by operation, and sums are integers, so results
have the same bits, whatever the number of threads. The threads are Python's own, made for one call: Numba's may not be
used by several callers at once, and do not survive a fork.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..inputs import Levels
from ..knots import Table, bucket_floors, inverse_width
from ..labels import Piece, pieces
from ..scans import fraction_bits
from .eager import Eager, overwrite_positives
from .numba_loops import Array, Search, count, write
from .protocol import Found, Own
from .tables import grid_over

_Result = TypeVar("_Result")

# Logits that a thread takes at once; fewer where they are copied: a copy then stays in the cache, and PyTorch does not
# share it out among threads of its own.
_PIECE, _COPIED_PIECE = 1 << 17, 1 << 15
# Logits for which another thread is worth its start.
_PER_THREAD = 1 << 16
# Logits of one group that follow each other, at least, where the loops are faster than PyTorch.
_RUN = 16
# Entries at most of a table of groups.
_MOST_ENTRIES = 1 << 22


class Compiled(Eager):
    """The passes in compiled loops."""

    def count(self, levels: Levels, table: Table, own: Found, totals: Tensor, delta: float, num_logits: int) -> None:
        tables = _tables_for(levels, table, delta)
        if tables is None:
            return super().count(levels, table, own, totals, delta, num_logits)
        scale = tables.number(2.0 ** fraction_bits(num_logits))

        def work(turns: Iterator[_Turn]) -> Array:
            sums = np.zeros((tables.buckets.size, 2), np.int64)
            for turn in turns:
                count(*tables.arguments(turn, levels.ignore_index), scale, sums, 1)
            return sums

        sums = np.sum(_share_out(levels, None, work), axis=0)
        runs, none = tables.runs(own.groups, len(own.logits)), np.empty(0, np.bool_)
        count(own.logits.detach().contiguous().numpy(), none, runs, tables.search, scale, sums, -1)
        counted = np.zeros((totals.shape[1], 2), np.int64)
        met = sums[:, 0].nonzero()[0]
        np.add.at(counted, tables.buckets.ravel()[met], sums[met])
        totals[:, 1:] += torch.from_numpy(counted).T[:, 1:]

    def write(
        self, levels: Levels, table: Table, lines: Tensor, own: Own, factors: Sequence[Tensor], delta: float
    ) -> list[Tensor]:
        tables = _tables_for(levels, table, delta)
        if tables is None:
            return super().write(levels, table, lines, own, factors, delta)
        dtype = levels.compute_dtype()
        of_buckets = (lines * factors[0].double() + 0.0).detach().to(dtype).T.numpy()
        of_places = np.concatenate([of_buckets, of_buckets[:1]])[tables.buckets.ravel()]
        gradients = [torch.empty_like(logits) for logits in levels.logits]

        def work(turns: Iterator[_Turn]) -> None:
            for turn in turns:
                out, num = turn.piece.out, turn.piece.logits.numel()
                values = out.view(-1) if turn.in_place else torch.empty(num, dtype=dtype)
                write(*tables.arguments(turn, levels.ignore_index), of_places, values.numpy())
                if turn.by_column:
                    values = values.view(turn.piece.logits.shape[::-1]).t()
                if not turn.in_place:
                    out.copy_(values if out.shape == values.shape else values.reshape(out.shape))

        _share_out(levels, gradients, work)
        overwrite_positives(gradients, own, factors)
        return gradients


def _tables_for(levels: Levels, table: Table, delta: float) -> Tables | None:
    """None if PyTorch is faster, or if the tables would be too large."""
    if _alternate(levels):
        return None
    tables = Tables(table, delta)
    return None if tables.too_large else tables


def _by_column(logits: Tensor, labels: Tensor, groups: Tensor | None) -> bool:
    """Whether each column has a group of its own, as classes have, perhaps another in each image; labels are then those
    of rows."""
    return (
        groups is not None
        and groups.dim() == logits.dim() > max(1, labels.dim())
        and groups.stride(-1) != 0
        and not any(groups.stride()[1:-1])
        and logits.numel() >= _RUN * logits.shape[-1] * (logits.shape[0] if groups.stride(0) else 1)
    )


def _alternate(levels: Levels) -> bool:
    """Whether groups change from logit to logit, but not by columns, from a look at a row of each level. PyTorch is
    faster then."""
    for logits, labels, groups in levels.each():
        if _by_column(logits, labels, groups):
            continue
        if groups is not None and groups.dim() == logits.dim() and groups.numel():
            row = groups[(0,) * (groups.dim() - 1)][: 64 * _RUN]
            if int((row[1:] != row[:-1]).sum()) * _RUN > len(row):
                return True
    return False


class Tables:
    """What the loops look up, in the dtype in which scores are compared."""

    def __init__(self, table: Table, delta: float) -> None:
        num_thresholds = table.num_thresholds()
        thresholds = table.thresholds[:num_thresholds].numpy()
        self.number = number = thresholds.dtype.type
        reached = thresholds == thresholds
        different, place = np.unique(thresholds[reached], return_inverse=True)
        self.ids, row = np.zeros(0, np.int64), np.zeros(num_thresholds, np.int64)
        if table.groups is not None:
            self.ids, row = np.unique(table.groups[:num_thresholds].numpy(), return_inverse=True)
        shape = len(self.ids) + 1, len(different) + 2
        self.too_large = shape[0] > 1 and shape[0] * shape[1] > _MOST_ENTRIES
        if self.too_large:
            return
        # The bucket of each place. Last of the rows, groups without thresholds; last of the columns, NaN.
        self.buckets = np.zeros(shape, np.int64)
        self.buckets[row[reached], place + 1] = 1 + np.arange(num_thresholds)[reached]
        np.maximum.accumulate(self.buckets, axis=1, out=self.buckets)
        self.buckets[:, -1] = num_thresholds + 1
        low, cells_per_unit, cells = grid_over(torch.from_numpy(different)) or (0.0, 0.0, 1)
        low, cells_per_unit = number(low), number(cells_per_unit)
        with np.errstate(invalid="ignore", over="ignore"):
            cell = np.fmin(np.fmax((different - low) * cells_per_unit, number(0)), number(cells - 1)).astype(np.int64)
        grid = np.append(0, np.bincount(cell, minlength=cells).cumsum()).astype(np.int32)
        lowest = np.append(different, number(np.inf))[(self.buckets == 0).sum(1) - 1]
        self.search = Search(
            np.append(different, number(np.nan)),
            grid,
            lowest,
            low,
            cells_per_unit,
            np.append(bucket_floors(table.thresholds[:num_thresholds]).numpy(), -np.finfo(number).max)[
                self.buckets.ravel()
            ],
            number(inverse_width(delta)),
            np.finfo(number).max,
            number(1),
        )

    def runs(self, groups: Tensor | None, num: int) -> Array:
        """``[R, 2]`` int64: where each run of one group among ``num`` scores ends, and the row of that group."""
        if groups is None:
            return np.array([[num, 0]])
        ids = groups.reshape(-1).numpy()
        ends = np.append((ids[1:] != ids[:-1]).nonzero()[0] + 1, len(ids))[: len(ids)]
        of_runs = ids[ends - 1]
        row = np.searchsorted(self.ids, of_runs)
        row[np.append(self.ids, 0)[row] != of_runs] = len(self.ids)
        return np.stack([ends * (num // max(1, len(ids))), row], axis=1)

    def arguments(self, turn: _Turn, ignore_index: int) -> tuple[Array, Array, Array, Search]:
        """What the loops take of a piece; column by column, if each has a group of its own."""
        x, y, _, groups = turn.piece
        ignored = (y.numpy() == ignore_index)[:, None]
        if turn.by_column and groups is not None:
            x, ignored, groups = x.t(), ignored.T, groups[(0,) * (groups.dim() - 1)]
        scores = x.reshape(-1).to(torch.from_numpy(self.search.floors).dtype).contiguous().numpy()
        ignored = np.broadcast_to(ignored, x.shape).reshape(-1) if ignored.any() else np.empty(0, np.bool_)
        return scores, ignored, self.runs(groups, len(scores)), self.search


class _Turn(NamedTuple):
    """A piece, and how it is taken."""

    piece: Piece
    in_place: bool
    """Whether its tensors can be read and written as they are."""
    by_column: bool
    """Whether each column is a run of one group."""


def _turns(levels: Levels, gradients: list[Tensor] | None) -> Iterator[_Turn]:
    """All pieces, with the tensors to be written."""
    for i, (logits, labels, groups) in enumerate(levels.each()):
        out = None if gradients is None else gradients[i]
        tensors = [logits, labels] if out is None else [logits, labels, out]
        as_it_is = logits.dtype == levels.compute_dtype() and all(tensor.is_contiguous() for tensor in tensors)
        by_column = _by_column(logits, labels, groups)
        as_it_is = as_it_is and not by_column
        size = _PIECE if as_it_is else _COPIED_PIECE
        level: Any = logits.detach(), labels, logits if out is None else out, groups
        # Images of groups of their own come one by one.
        parts = zip(*level) if by_column and groups is not None and groups.stride(0) else [level]
        for x, y, written, of_each in parts:
            for piece in pieces(x, y, size, written, of_each):
                yield _Turn(piece, as_it_is, by_column)


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
