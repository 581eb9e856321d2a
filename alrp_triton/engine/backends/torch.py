"""The linear form in plain torch: both passes stream the logits in pieces, so the workspace is fixed.

Pass 1 counts every logit that is not ignored, positives included, and then takes the positives out again, exactly,
since all sums are integers; so no mask over the classes of an anchor is ever made. Pass 2 overwrites the positives
last.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..inputs import Levels, waits_for_nothing
from ..knots import Ramps
from ..labels import equals, group_of_each, pieces
from ..positives import local_indices
from .factors import combine
from .lookup import Sums, look_up
from .tables import Tables, TablesByGroup

# On the CPU a piece and its temporaries stay in the cache; on a GPU it must be large enough to hide the launches.
_PIECE, _PIECE_ON_DEVICE = 1 << 17, 1 << 21


def count_negatives(
    levels: Levels,
    ramps: Ramps,
    pos_logits: Tensor,
    pos_groups: Tensor | None,
    ignore_index: int,
    scale: float,
) -> Tensor:
    """Pass 1: ``[2, 2P + 2]`` int64; for each bucket its number of negatives, and the sum of their offsets from its
    floor in units of 2 delta, in fixed point with ``scale`` units to 1. The last column counts NaN."""
    tables_of = TablesByGroup(ramps.thresholds, ramps.groups, ramps.delta)
    counters: dict[Tables, _Counter] = {}

    def counter(tables: Tables) -> _Counter:
        if tables not in counters:
            counters[tables] = _Counter(tables, scale)
        return counters[tables]

    for logits, labels, groups in levels.each():
        for x, y, _, group in pieces(logits, labels, _piece_size(logits.device), groups=groups):
            scores, ignored = x.reshape(-1).to(levels.compute_dtype), _ignored_rows(y, ignore_index)
            counter(tables_of(group)).add(scores, ignored, _spread(group, x))
    counter(tables_of.all).take_out(pos_logits, pos_groups)
    totals = torch.zeros(2, len(ramps.thresholds) + 2, dtype=torch.int64, device=ramps.thresholds.device)
    for tables, counted in counters.items():
        found = counted.totals
        totals[:, tables.own] += found[:, 1:-2]
        totals[:, -1] += found[:, -2]
    return totals


class _Counter:
    """What has been counted into the buckets of some tables; after those, NaN; last, what is ignored."""

    def __init__(self, tables: Tables, scale: float) -> None:
        self.tables, self.scale = tables, scale
        device = tables.floors.device
        self.counts, self.units = (Sums(tables.nan_bucket + 2, device) for _ in range(2))
        self.ones = torch.ones(0, dtype=torch.int64, device=device)

    @property
    def totals(self) -> Tensor:
        """``[2, places]``: counts, and offsets in units."""
        return torch.stack([self.counts.total(), self.units.total()])

    def add(self, scores: Tensor, ignored: Tensor | None, groups: Tensor | None) -> None:
        """Count ``[n]`` scores, ``[rows]`` of which may be ignored, by their groups ``[n]``."""
        tables = self.tables
        seen = tables.peek(scores)
        if seen.bucket == 0:
            return
        if seen.bucket is not None and ignored is None:
            self.counts.add_at(seen.bucket, len(scores))
            self.units.add_at(seen.bucket, self._in_units(tables.offset(scores, tables.floors[seen.bucket])).sum())
            return
        few = tables.reaching(scores)
        if few is not None:
            if len(few) == 0:
                return
            if ignored is not None:
                ignored = look_up(ignored, few.div(len(scores) // len(ignored), rounding_mode="floor"))
            scores, groups = look_up(scores, few), None if groups is None else look_up(groups, few)
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


def write_gradient(
    levels: Levels,
    ramps: Ramps,
    coefficients: Tensor,
    pos_index: Tensor,
    pos_gradient: Tensor,
    ignore_index: int,
    grad_output: Tensor,
) -> list[Tensor]:
    """Pass 2: the gradient of every logit, in the logits' dtype and layout.

    Args:
        levels: the logits and labels.
        ramps: those of the positives.
        coefficients: ``[K, 2, 2P + 1]`` level and slope of each bucket, see ``knots.ramp_coefficients``, for each of K
            values.
        pos_index: ``[P]`` flat indices of the positives.
        pos_gradient: ``[K, P]`` their gradients.
        ignore_index: label of what gets a zero.
        grad_output: ``[K]``, by which each value's tables are multiplied before they are summed and rounded.
    """
    tables_of = TablesByGroup(ramps.thresholds, ramps.groups, ramps.delta)
    coefficients = combine(coefficients, grad_output).to(levels.compute_dtype)
    rows: dict[Tables, Tensor] = {}
    gradients = [torch.empty_like(logits) for logits in levels.logits]
    for (logits, labels, groups), gradient in zip(levels.each(), gradients):
        for x, y, out, group in pieces(logits, labels, _piece_size(logits.device), gradient, groups):
            scores = x.reshape(-1).to(levels.compute_dtype)
            tables = tables_of(group)
            if tables not in rows:
                rows[tables] = tables.rows(coefficients)
            level, slope = rows[tables]
            seen = tables.peek(scores)
            if seen.bucket == 0:
                value = level[0].expand(len(scores)).clone()
            elif seen.bucket is not None:
                offset = tables.offset(scores, tables.floors[seen.bucket])
                value = torch.addcmul(level[seen.bucket], slope[seen.bucket], offset)
            else:
                few, each = tables.reaching(scores), _spread(group, x)
                if few is not None:
                    value = level[0].expand(len(scores)).clone()
                    scores, each = look_up(scores, few), None if each is None else look_up(each, few)
                bucket, offset = tables.locate(scores, seen, each, past_end=0)
                located = torch.addcmul(look_up(level, bucket), look_up(slope, bucket), offset)
                value = located if few is None else value.scatter_(0, few, located)
            ignored = _ignored_rows(y, ignore_index)
            if ignored is not None:
                value.view(len(ignored), -1).masked_fill_(ignored[:, None], 0)
            out.copy_(value.view(out.shape))
    overwrite_positives(gradients, pos_index, combine(pos_gradient, grad_output))
    return gradients


def overwrite_positives(gradients: list[Tensor], pos_index: Tensor, pos_gradient: Tensor) -> None:
    """Write the positives' own gradients ``[P]`` at flat indices ``[P]``."""
    for gradient, local, inside in local_indices(gradients, pos_index):
        if not waits_for_nothing(gradient.device):
            gradient[torch.unravel_index(local[inside], gradient.shape)] = pos_gradient[inside].to(gradient.dtype)
        else:
            _overwrite_without_sync(gradient, local, inside, pos_gradient)


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
    """Which labels are ignored; None where none is, if one may look."""
    if waits_for_nothing(labels.device):
        return equals(labels, ignore_index)
    if len(labels) == 0 or (ignore_index < 0 and bool(labels.amin() >= 0)):
        return None
    ignored = equals(labels, ignore_index)
    return ignored if bool(ignored.any()) else None


def _spread(groups: Tensor | None, logits: Tensor) -> Tensor | None:
    return None if groups is None else group_of_each(groups, *logits.shape)
