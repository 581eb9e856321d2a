"""The linear form in PyTorch operations: both passes stream the logits in pieces, so the workspace is fixed.

Pass 1 counts every logit that is not ignored, including positives, and then subtracts the positives. This is exact
because all sums are integers, and it needs no mask over the classes of an anchor. Pass 2 overwrites the positives last.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..devices import is_asynchronous
from ..inputs import Levels
from ..knots import Table
from ..labels import Piece, equals, group_of_each, pieces, rows_at_once
from ..scans import fraction_bits
from .find import find, local_indices, place_of
from .protocol import Found, Own
from .tables import UNSEEN, Seen, Sums, Tables, TablesByGroup, look_up

# On the CPU a piece and its temporaries stay in the cache; on a GPU it must be large enough to hide the launch
# overhead.
_PIECE, _PIECE_ON_DEVICE = 1 << 17, 1 << 21
# If few scores reach a ramp, one comparison selects them from this many pieces; the other operations run only on them.
_SPAN = 4


class Eager:
    """The passes in PyTorch."""

    def find(self, levels: Levels, num_positives: int | None, name: str) -> Found:
        return find(levels, num_positives, name)

    def count(self, levels: Levels, table: Table, own: Found, totals: Tensor, delta: float, num_logits: int) -> None:
        tables_of = TablesByGroup(table, delta)
        counters: dict[Tables, _Counter] = {}
        scale = 2.0 ** fraction_bits(num_logits)

        def counter(tables: Tables) -> _Counter:
            if tables not in counters:
                counters[tables] = _Counter(tables, scale)
            return counters[tables]

        for tables, (x, y, _, group), picks in _walk(levels, tables_of):
            scores, ignored = x.reshape(-1).to(levels.compute_dtype()), _ignored_rows(y, levels.ignore_index)
            counter(tables).add(scores, ignored, _spread(group, x), picks)
        counter(tables_of.all).take_out(own.logits, own.groups)
        for tables, counted in counters.items():
            found = counted.totals
            totals[:, tables.own] += found[:, 1:-2]
            totals[:, -1] += found[:, -2]

    def write(
        self, levels: Levels, table: Table, lines: Tensor, own: Own, factors: Sequence[Tensor], delta: float
    ) -> list[Tensor]:
        tables_of = TablesByGroup(table, delta)
        # No -0 for any sign of the factor.
        lines = (lines * factors[0].double() + 0.0).to(levels.compute_dtype())
        rows: dict[Tables, Tensor] = {}
        gradients = [torch.empty_like(logits) for logits in levels.logits]
        for tables, (x, y, out, group), picks in _walk(levels, tables_of, gradients):
            if tables not in rows:
                rows[tables] = tables.rows(lines)
            scores = x.reshape(-1).to(levels.compute_dtype())
            in_place = out.dtype == scores.dtype and out.is_contiguous()
            values = out.view(-1) if in_place else torch.empty_like(scores)
            level, slope = rows[tables]
            _evaluate(tables, level, slope, scores, _spread(group, x), picks, values)
            ignored = _ignored_rows(y, levels.ignore_index)
            if ignored is not None:
                values.view(len(ignored), -1).masked_fill_(ignored[:, None], 0)
            if not in_place:
                out.copy_(values.view(out.shape))
        overwrite_positives(gradients, own, factors)
        return gradients


def _walk(
    levels: Levels, tables_of: TablesByGroup, gradients: list[Tensor] | None = None
) -> Iterator[tuple[Tables, Piece, bool]]:
    """All pieces, with their tables, and whether a sample says that few of their scores reach a ramp."""
    for i, (logits, labels, groups) in enumerate(levels.each()):
        out = None if gradients is None else gradients[i]
        if groups is None and not is_asynchronous(logits.device) and logits.is_contiguous() and logits.numel():
            tables, columns = tables_of(None), logits.numel() // labels.numel()
            for span in pieces(logits, labels, _SPAN * rows_at_once(_PIECE, columns) * columns, out):
                if tables.mostly_below(span.logits.reshape(-1)):
                    yield tables, span, True
                else:
                    for piece in pieces(span.logits, span.labels, _PIECE, span.out):
                        yield tables, piece, False
        else:
            size = _PIECE_ON_DEVICE if is_asynchronous(logits.device) else _PIECE
            for piece in pieces(logits, labels, size, out, groups):
                yield tables_of(piece.groups), piece, False


class _Counter:
    """The counts of the buckets of some tables, then of NaN, then of ignored scores."""

    def __init__(self, tables: Tables, scale: float) -> None:
        self.tables, self.scale = tables, scale
        device = tables.floors.device
        self.counts, self.units = (Sums(tables.nan_bucket + 2, device) for _ in range(2))
        self.ones = torch.ones(0, dtype=torch.int64, device=device)

    @property
    def totals(self) -> Tensor:
        """``[2, places]``: counts, and offsets in units."""
        return torch.stack([self.counts.total(), self.units.total()])

    def add(self, scores: Tensor, ignored: Tensor | None, groups: Tensor | None, picks: bool) -> None:
        """Count ``[n]`` scores by their groups ``[n]``; ``ignored`` is for rows."""
        tables = self.tables
        seen = UNSEEN if picks else tables.peek(scores)
        if seen.bucket == 0:
            return
        if seen.bucket is not None and ignored is None:
            self.counts.add_at(seen.bucket, len(scores))
            self.units.add_at(seen.bucket, self._in_units(tables.offset(scores, tables.floors[seen.bucket])).sum())
            return
        if picks or tables.mostly_below(scores):
            few = tables.reaching(scores)
            if len(few) == 0:
                return
            if ignored is not None:
                ignored = look_up(ignored, few.div(len(scores) // len(ignored), rounding_mode="floor"))
            scores, groups = look_up(scores, few), None if groups is None else look_up(groups, few)
            seen = tables.peek(scores)
        bucket, offset = tables.locate(scores, seen, groups)
        if ignored is not None:
            bucket.view(len(ignored), -1).masked_fill_(ignored[:, None], tables.nan_bucket + 1)
        if len(self.ones) < len(bucket):
            self.ones = torch.ones_like(bucket)
        self.counts.add(bucket, self.ones[: len(bucket)])
        self.units.add(bucket, self._in_units(offset))

    def take_out(self, scores: Tensor, groups: Tensor | None) -> None:
        """Undo :meth:`add`."""
        bucket, offset = self.tables.locate(scores, self.tables.peek(scores), groups)
        self.counts.add(bucket, torch.full_like(bucket, -1))
        self.units.add(bucket, -self._in_units(offset))

    def _in_units(self, offset: Tensor) -> Tensor:
        return offset.mul_(self.scale).to(torch.int64)


def _evaluate(
    tables: Tables, level: Tensor, slope: Tensor, scores: Tensor, groups: Tensor | None, picks: bool, values: Tensor
) -> None:
    """Write the piecewise-linear function of scores ``[n]`` to ``values``."""
    seen = UNSEEN if picks else tables.peek(scores)
    if seen.bucket == 0:
        values.fill_(level[0])
    elif seen.bucket is not None:
        offset = tables.offset(scores, tables.floors[seen.bucket])
        torch.addcmul(level[seen.bucket], slope[seen.bucket], offset, out=values)
    elif picks or tables.mostly_below(scores):
        few = tables.reaching(scores)
        values.fill_(level[0])
        if len(few):
            located = torch.empty_like(few, dtype=scores.dtype)
            scores, groups = look_up(scores, few), None if groups is None else look_up(groups, few)
            _interpolate(tables, level, slope, scores, groups, tables.peek(scores), located)
            values.index_copy_(0, few, located)
    else:
        _interpolate(tables, level, slope, scores, groups, seen, values)


def _interpolate(
    tables: Tables, level: Tensor, slope: Tensor, scores: Tensor, groups: Tensor | None, seen: Seen, values: Tensor
) -> None:
    bucket, offset = tables.locate(scores, seen, groups, past_end=0)
    torch.addcmul(look_up(level, bucket), look_up(slope, bucket), offset, out=values)


def overwrite_positives(gradients: list[Tensor], own: Own, factors: Sequence[Tensor]) -> None:
    """Write the positives' own gradients at their flat indices."""
    values = torch.stack([row * factor.double() for row, factor in zip(own.gradients, factors)]).sum(0)
    for gradient, local, inside in local_indices(gradients, own.indices):
        if not is_asynchronous(gradient.device) and not torch.compiler.is_compiling():
            gradient[place_of(local[inside], gradient.shape)] = values[inside].to(gradient.dtype)
        else:
            _overwrite_without_sync(gradient, local, inside, values)


def _overwrite_without_sync(gradient: Tensor, local: Tensor, inside: Tensor, values: Tensor) -> None:
    """Write positives without knowing on the host how many this level has. Those of other levels write the final value
    of element 0 to element 0, so the order of writing does not matter."""
    where = place_of(local, gradient.shape)
    values = values.to(gradient.dtype)
    at_0 = inside & (local == 0)
    first = gradient[(0,) * gradient.dim()]
    first = torch.where(at_0.any(), torch.where(at_0, values, 0).sum(), first).to(gradient.dtype)
    gradient.index_put_(where, torch.where(inside, values, first))


def _ignored_rows(labels: Tensor, ignore_index: int) -> Tensor | None:
    """A mask of the ignored labels; None if there is none and the host may read them."""
    if is_asynchronous(labels.device):
        return equals(labels, ignore_index)
    if len(labels) == 0 or (ignore_index < 0 and bool(labels.amin() >= 0)):
        return None
    ignored = equals(labels, ignore_index)
    return ignored if bool(ignored.any()) else None


def _spread(groups: Tensor | None, logits: Tensor) -> Tensor | None:
    return None if groups is None else group_of_each(groups, *logits.shape)
