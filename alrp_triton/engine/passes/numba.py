"""The linear form in loops that Numba compiles for the CPU: each pass reads a score once and writes one number.

Threads take pieces of the logits in turns. Sums are integers, private to a thread until the end, so that neither their
number nor who took which piece changes a bit; and what is done to a score is what :mod:`.torch` does to it, operation
by operation, so that results equal its results. The threads are Python's own, made for one call: Numba's may not be
used by several callers at once, and do not survive a fork.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..inputs import Levels
from ..knots import Table, inverse_width
from ..labels import Piece, pieces
from . import numba_loops, numba_tables
from .eager import Eager, overwrite_positives
from .find import find
from .numba_tables import Array
from .protocol import Found, Own
from .tables import grid_over

# Logits that a thread takes at once; fewer where they are copied, which then stays in the cache, and which PyTorch
# would share out among threads of its own if they were more.
_PIECE, _COPIED_PIECE = 1 << 17, 1 << 15
# Logits of one group that follow each other, at least, where the loops are faster: each run is a search of its own.
_RUN = 16
# Logits for which another thread is worth its start.
_PER_THREAD = 1 << 16


class Compiled(Eager):
    """The passes in compiled loops."""

    def find(self, levels: Levels, num_positives: int | None, ignore_index: int, name: str) -> Found:
        return find(levels, num_positives, ignore_index, name, positions)

    def count(
        self, levels: Levels, table: Table, own: Found, totals: Tensor, delta: float, ignore_index: int, scale: float
    ) -> None:
        if _alternate(levels):
            super().count(levels, table, own, totals, delta, ignore_index, scale)
            return
        tables = _Tables(table, delta)
        of_threads: list[Array] = []
        scale = tables.number(scale)

        def add(scores: Array, ignored: Array, columns: int, runs: Array, sums: Array) -> None:
            numba_loops.count(scores, ignored, columns, runs, tables.search, scale, sums)

        def work(turns: Iterator[_Turn]) -> None:
            sums, flat = tables.empty_sums(), _Flat(levels.compute_dtype, ignore_index, tables)
            of_threads.append(sums)
            for piece, _ in turns:
                add(*flat(piece), sums)

        _share_out(levels, None, work)
        taken_out, runs = tables.empty_sums(), tables.runs(len(own.logits), own.groups)
        add(own.logits.detach().contiguous().numpy(), np.empty(0, np.uint8), 1, runs, taken_out)
        totals += tables.spread(sum(of_threads) - taken_out)

    def write(
        self,
        levels: Levels,
        table: Table,
        lines: Tensor,
        own: Own,
        factors: Sequence[Tensor],
        delta: float,
        ignore_index: int,
    ) -> list[Tensor]:
        if _alternate(levels):
            return super().write(levels, table, lines, own, factors, delta, ignore_index)
        tables = _Tables(table, delta)
        lines = (lines * factors[0].double() + 0.0).detach()[:, tables.buckets].to(levels.compute_dtype)
        of_buckets = lines.T.contiguous().numpy()
        gradients = [torch.empty_like(logits) for logits in levels.logits]

        def work(turns: Iterator[_Turn]) -> None:
            flat = _Flat(levels.compute_dtype, ignore_index, tables)
            for piece, in_place in turns:
                arguments = flat(piece)
                values = piece.out.view(-1) if in_place else torch.empty(len(arguments[0]), dtype=levels.compute_dtype)
                numba_loops.write(*arguments, tables.search, of_buckets, values.numpy())
                if not in_place:
                    piece.out.copy_(values.view(piece.out.shape))

        _share_out(levels, gradients, work)
        overwrite_positives(gradients, own, factors)
        return gradients


def positions(labels: Tensor, columns: int, per_class: bool, ignore_index: int) -> tuple[Tensor, bool]:
    """See ``labels.positions``."""
    background, limits = columns if per_class else 0, torch.iinfo(labels.dtype)
    y = labels.contiguous().numpy()
    if not limits.min <= ignore_index <= limits.max:
        ignore_index = background
    of_dtype = y.dtype.type(background) if background <= limits.max else np.int64(background)
    found, invalid = numba_tables.find(y, of_dtype, columns, per_class, ignore_index)
    return torch.from_numpy(found), invalid


def _alternate(levels: Levels) -> bool:
    """Whether groups change from logit to logit, as those of classes do, from a look at a row of each level."""
    for logits, _, groups in levels.each():
        if groups is not None and groups.dim() == logits.dim() and groups.numel():
            row = groups[(0,) * (groups.dim() - 1)][: 64 * _RUN]
            if int((row[1:] != row[:-1]).sum()) * _RUN > len(row):
                return True
    return False


class _Tables:
    """What the loops look up, in the dtype in which scores are compared.

    Of thresholds that are equal all but the last bound no bucket that holds anything. They are left out, since in half
    precision they are many, and a search among them is slow.
    """

    def __init__(self, table: Table, delta: float) -> None:
        num_thresholds = len(table.floors) - 1
        thresholds = table.thresholds[:num_thresholds]
        groups = None if table.groups is None else table.groups[:num_thresholds]
        last = thresholds.new_ones(len(thresholds), dtype=torch.bool)
        last[:-1] = thresholds[1:] != thresholds[:-1]
        if groups is not None:
            last[:-1] |= groups[1:] != groups[:-1]
        # The buckets that may hold anything, among all.
        self.buckets = F.pad(last.nonzero().squeeze(1) + 1, (1, 0))
        self.num_thresholds = len(thresholds)
        floors, thresholds = table.floors[self.buckets].numpy(), thresholds[last]
        self.number = floors.dtype.type
        grid, low, cells_per_unit = np.empty(0, np.int32), 0.0, 0.0
        if groups is not None:
            self.ids, first = np.unique(groups[last].numpy(), return_index=True)
            self.starts = np.append(first, len(thresholds)).astype(np.int64)
        else:
            cells = grid_over(thresholds)
            if cells is not None:
                low, cells_per_unit, grid = cells.low, cells.cells_per_unit, np.empty(cells.cells, np.int32)
                numba_tables.fill_grid(thresholds.numpy(), self.number(low), self.number(cells_per_unit), grid)
        self.search = numba_tables.Search(
            np.append(thresholds.numpy(), self.number(np.nan)),
            np.append(floors, -np.finfo(self.number).max),
            grid,
            self.number(low),
            self.number(cells_per_unit),
            self.number(inverse_width(delta)),
        )

    def runs(self, num: int, groups: Tensor | None) -> Array:
        """Of ``num`` scores and their groups, each for as many scores as it takes; see ``numba_tables.runs_of``."""
        if groups is None:
            return np.array([[num, 0, len(self.search.thresholds) - 1]])
        of_each = groups.reshape(-1).long().contiguous().numpy()
        return numba_tables.runs_of(of_each, num // max(1, len(of_each)), self.ids, self.starts)

    def empty_sums(self) -> Array:
        """As ``numba_loops.count`` takes them."""
        return np.zeros((len(self.search.floors), 2), np.int64)

    def spread(self, sums: Array) -> Tensor:
        """``[2, 2P + 2]`` int64, those of all buckets, without bucket 0."""
        totals = torch.zeros(2, self.num_thresholds + 2, dtype=torch.int64)
        found = torch.from_numpy(sums.T)
        totals[:, self.buckets[1:]], totals[:, -1] = found[:, 1:-1], found[:, -1]
        return totals


class _Flat:
    """Pieces as the loops take them; one for each thread."""

    def __init__(self, dtype: torch.dtype, ignore_index: int, tables: _Tables) -> None:
        self.dtype, self.ignore_index, self.tables = dtype, ignore_index, tables
        self.ignored = self.none = np.empty(0, np.uint8)

    def __call__(self, piece: Piece) -> tuple[Array, Array, int, Array]:
        """Scores, which are ignored, scores that share a label, runs of one group."""
        x, y, _, groups = piece
        scores = x.reshape(-1).to(self.dtype).contiguous().numpy()
        return scores, self._ignored(y), x.shape[1], self.tables.runs(len(scores), groups)

    def _ignored(self, labels: Tensor) -> Array:
        limits = torch.iinfo(labels.dtype)
        if not limits.min <= self.ignore_index <= limits.max:
            return self.none
        if len(self.ignored) < len(labels):
            self.ignored = np.empty(len(labels), np.uint8)
        ignored, y = self.ignored[: len(labels)], labels.contiguous().numpy()
        return ignored if numba_tables.mark(y, y.dtype.type(self.ignore_index), ignored) else self.none


_Turn = tuple[Piece, bool]


def _turns(levels: Levels, gradients: list[Tensor] | None) -> Iterator[_Turn]:
    """All pieces, with the tensors to be written, and whether those can be written in place."""
    for i, (logits, labels, groups) in enumerate(levels.each()):
        out = None if gradients is None else gradients[i]
        tensors = [logits, labels] if out is None else [logits, labels, out]
        as_it_is = logits.dtype == levels.compute_dtype and all(tensor.is_contiguous() for tensor in tensors)
        size = _PIECE if as_it_is and groups is None else _COPIED_PIECE
        for piece in pieces(logits.detach(), labels, size, out, groups):
            yield piece, as_it_is


def _share_out(levels: Levels, gradients: list[Tensor] | None, work: Callable[[Iterator[_Turn]], None]) -> None:
    """Call ``work`` on as many threads as PyTorch uses, but no more than are worth it; their turns are all pieces.

    Whatever one of them raises, this raises.
    """
    turns, lock, errors = _turns(levels, gradients), threading.Lock(), list[BaseException]()

    def own() -> Iterator[_Turn]:
        while not errors:
            with lock:
                turn = next(turns, None)
            if turn is None:
                return
            yield turn

    def run() -> None:
        try:
            # Settings of PyTorch are a thread's own; in this mode any tensor can be written, and nothing is recorded.
            with torch.inference_mode():
                work(own())
        except BaseException as error:
            errors.append(error)

    num_threads = min(torch.get_num_threads(), levels.num_logits // _PER_THREAD)
    threads = [threading.Thread(target=run, daemon=True) for _ in range(num_threads - 1)]
    for thread in threads:
        thread.start()
    run()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
