"""The compiled loops: each goes over one flat piece of the logits once, without Python's lock.

All thresholds of a piece's groups stand in one sorted table; a run of logits of one group sees the range
``begin <= b <= end`` of it, without groups the whole. Bucket ``begin`` is what lies below all of the range.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
_Loop = TypeVar("_Loop", bound=Callable[..., Any])

# Scores looked at together: one comparison each tells whether all lie in one bucket. Shorter runs are not worth that.
_BLOCK, _SHORTEST = 512, 32
# Where more than one in so many lies below all thresholds, the others are copied and looked at by themselves.
_FEW = 4
CROWD = 8
"""Thresholds in a cell of the grid, at the most, that are tried one after the other."""


def _compiled(**options: Any) -> Callable[[_Loop], _Loop]:
    """Compile at the first call and keep the machine code on disk, where there is a folder for it."""

    def compiled(function: _Loop) -> _Loop:
        try:
            loop: _Loop = numba.njit(nogil=True, cache=True, **options)(function)
        except RuntimeError:  # neither the package's folder nor the user's can be written
            loop = numba.njit(nogil=True, **options)(function)
        return loop

    return compiled


@_compiled()
def mark(labels: Array, ignore_index: Any, ignored: Array) -> bool:
    """Write whether each label is ignored to uint8 of the same length; returns whether any is."""
    any_ignored = 0
    for i in range(len(labels)):
        ignored[i] = labels[i] == ignore_index
        any_ignored |= ignored[i]
    return any_ignored != 0


@_compiled()
def _locate(
    block: Array,
    thresholds: Array,
    begin: int,
    end: int,
    grid: Array,
    low: Any,
    cells_per_unit: Any,
    of_nan: int,
    buckets: Array,
) -> None:
    """Write ``begin`` plus how many of ``thresholds[begin:end]`` lie at or below each score, but 0 where none does; and
    ``of_nan`` for NaN."""
    if len(grid) == 0:
        for i in range(len(block)):
            buckets[i] = begin
        # All scores take the same steps, none of which is a branch.
        length = end - begin
        while length > 0:
            step = np.int32((length + 1) >> 1)
            for i in range(len(block)):
                reached = thresholds[np.uint32(buckets[i] + step - 1)] <= block[i]
                buckets[i] += step if reached else np.int32(0)
            length -= step
        for i in range(len(block)):
            bucket = buckets[i] if buckets[i] > begin else 0
            buckets[i] = bucket if block[i] == block[i] else of_nan
        return
    # Cells are told by the operations that made the grid, in the same precision; see ``search.BucketSearch``.
    last, lowest_place = block.dtype.type(len(grid) - 1), block.dtype.type(0)
    for i in range(len(block)):
        place = (block[i] - low) * cells_per_unit
        place = place if place > lowest_place else lowest_place
        buckets[i] = np.int32(place if place < last else last)
    for i in range(len(block)):
        x, bucket = block[i], grid[np.uint32(buckets[i])]
        if bucket < 0:
            bucket, over = np.int32(~bucket), np.int32(end)
            while bucket < over:
                half = np.int32((bucket + over) >> 1)
                if thresholds[np.uint32(half)] <= x:
                    bucket = np.int32(half + 1)
                else:
                    over = half
        else:
            # The first step without a branch: whether it is taken is anybody's guess, further ones are rare. They end
            # at the cell's end, if not before, since what follows lies above; NaN stands behind the last threshold.
            bucket = np.int32(bucket + np.int32(thresholds[np.uint32(bucket)] <= x))
            while thresholds[np.uint32(bucket)] <= x:
                bucket = np.int32(bucket + 1)
        buckets[i] = bucket if x == x else np.int32(of_nan)


@_compiled()
def _offset(x: Any, floor: Any, inverse_width: Any, one: Any) -> Any:
    """Of a finite score from the floor of its bucket, in [0, 1]."""
    return min((x - floor) * inverse_width, one)


@_compiled(fastmath={"contract"})
def _line(level: Any, slope: Any, offset: Any) -> Any:
    """Rounded once on CPUs that can, as torch.addcmul is there."""
    return level + slope * offset


@_compiled()
def _finite(x: Any, largest: Any) -> Any:
    return min(x if x > -largest else -largest, largest)  # NaN, too, is at the floor of its bucket


@_compiled()
def _bounds(bucket: int, thresholds: Array, begin: int, end: int, largest: Any) -> tuple[Any, Any]:
    """What the finite scores of a bucket lie in: ``low <= x < high``."""
    low, high = -largest, thresholds.dtype.type(np.inf)
    if bucket > begin and thresholds[bucket - 1] > low:
        low = thresholds[bucket - 1]
    if bucket < end and thresholds[bucket] == thresholds[bucket]:
        high = thresholds[bucket]
    return low, high


@_compiled()
def _peek(block: Array, lowest: Any, low: Any, high: Any) -> tuple[int, int]:
    """How many scores lie below ``lowest``, and how many between the other two. Written so that it becomes some eight
    or sixteen comparisons in one instruction."""
    num_below = num_inside = np.int32(0)
    for i in range(len(block)):
        num_below += np.int32(block[i] < lowest)
        num_inside += np.int32((block[i] >= low) & (block[i] < high))
    return num_below, num_inside


@_compiled()
def _leave_out(block: Array, lowest: Any, ignored: Array, first: int, columns: int, kept: Array, where: Array) -> int:
    """Copy what is neither below all thresholds nor ignored, and its places; returns how many that are."""
    num_kept = 0
    for i in range(len(block)):
        kept[np.uint32(num_kept)], where[np.uint32(num_kept)] = block[i], i
        keeps = not block[i] < lowest
        if len(ignored) > 0:
            keeps &= ignored[(first + i) // columns] == 0
        num_kept += np.int64(keeps)
    return num_kept


@_compiled()
def _any(ignored: Array, begin: int, end: int) -> bool:
    found = 0
    for one in ignored[begin:end]:
        found |= one
    return found != 0


@_compiled()
def _lowest(thresholds: Array, begin: int, end: int) -> Any:
    """What finite scores are in no bucket but the first below."""
    return thresholds[begin] if begin < end else thresholds.dtype.type(np.inf)


@_compiled()
def _end_of_run(groups: Array, span: int, at: int, length: int) -> int:
    """Where the run of one group that ``at`` lies in ends."""
    place = at // span
    group = groups[place]
    while place < len(groups) and groups[place] == group:
        place += 1
    return min(place * span, length)


@_compiled()
def _range_of(group: int, ids: Array, starts: Array) -> tuple[int, int]:
    """Where the thresholds of a group begin and end; an empty range for one that has none."""
    place = np.searchsorted(ids, group)
    if place < len(ids) and ids[place] == group:
        return starts[place], starts[place + 1]
    return 0, 0


@_compiled()
def count(
    scores: Array,
    ignored: Array,
    columns: int,
    groups: Array,
    span: int,
    thresholds: Array,
    floors: Array,
    ids: Array,
    starts: Array,
    grid: Array,
    low: Any,
    cells_per_unit: Any,
    inverse_width: Any,
    scale: Any,
    sums: Array,
) -> None:
    """Add the scores of one piece to ``sums``.

    Args:
        scores: ``[n]`` float32 or float64, as are thresholds, floors and the numbers from ``low`` to ``scale``.
        ignored: ``[n / columns]`` uint8; ``[0]`` where none is.
        columns: scores that share a label.
        groups: ``[n / span]`` int64; ``[0]`` where all are ranked together.
        span: consecutive scores that share a group.
        thresholds: ``[2P + 1]`` sorted, by group first; the last is NaN.
        floors: ``[2P + 2]``, see ``knots.bucket_floors``; the last is the lowest number.
        ids: ``[G]`` int64, the groups that have thresholds, ascending.
        starts: ``[G + 1]`` int64, where those of each begin.
        grid: ``[cells]`` int32, the number k of thresholds in lower cells, or ~k for a cell with more than
            :data:`CROWD`; ``[0]`` for none. Only where there are no groups.
        low, cells_per_unit: the grid's.
        inverse_width: 1 / (2 delta), or 0.
        scale: units of fixed point to 1.
        sums: ``[2P + 2, 2]`` int64: number of scores in each bucket, and their offsets in units; of bucket 0 whatever
            has been met; last, the number of NaN, and 0.
    """
    largest = np.finfo(scores.dtype).max
    one, of_nan, at = scores.dtype.type(1), len(thresholds), 0
    begin, end, run_end = 0, len(thresholds) - 1, len(scores)
    group, known = np.int64(0), False
    lowest = _lowest(thresholds, begin, end)
    inside, inside_low, inside_high = begin, -largest, lowest
    kept = np.empty(_BLOCK, scores.dtype)
    where, buckets = np.empty(_BLOCK, np.int32), np.empty(_BLOCK, np.int32)
    while at < len(scores):
        if len(groups):
            run_end = _end_of_run(groups, span, at, len(scores))
            if not known or groups[at // span] != group:
                group, known = groups[at // span], True
                begin, end = _range_of(group, ids, starts)
                lowest = _lowest(thresholds, begin, end)
                inside, inside_low, inside_high = begin, -largest, lowest
        while at < run_end:
            block = scores[at : min(at + _BLOCK, run_end)]
            first, at = at, at + len(block)
            skips = len(ignored) > 0 and _any(ignored, first // columns, (at - 1) // columns + 1)
            num_below = num_inside = 0
            if not skips and len(block) >= _SHORTEST:
                num_below, num_inside = _peek(block, lowest, inside_low, inside_high)
                if num_below == len(block):
                    continue
                if num_inside == len(block) and inside > begin:
                    units = np.int64(0)
                    if inverse_width > 0:
                        floor = floors[inside]
                        for i in range(len(block)):
                            units += np.int64(_offset(block[i], floor, inverse_width, one) * scale)
                    sums[inside, 0] += len(block)
                    sums[inside, 1] += units
                    continue
            if skips or num_below > len(block) // _FEW:
                rest = kept[: _leave_out(block, lowest, ignored if skips else ignored[:0], first, columns, kept, where)]
                if len(rest) == 0:
                    continue
                block = rest
            _locate(block, thresholds, begin, end, grid, low, cells_per_unit, of_nan, buckets)
            if buckets[0] != of_nan:
                inside = max(begin, buckets[0])
                inside_low, inside_high = _bounds(inside, thresholds, begin, end, largest)
            for i in range(len(block)):
                bucket = np.uint32(buckets[i])
                sums[bucket, 0] += 1
                if inverse_width > 0:
                    offset = _offset(_finite(block[i], largest), floors[bucket], inverse_width, one)
                    sums[bucket, 1] += np.int64(offset * scale)


@_compiled()
def write(
    scores: Array,
    ignored: Array,
    columns: int,
    groups: Array,
    span: int,
    thresholds: Array,
    floors: Array,
    ids: Array,
    starts: Array,
    grid: Array,
    low: Any,
    cells_per_unit: Any,
    inverse_width: Any,
    lines: Array,
    out: Array,
) -> None:
    """Write the gradient of each score of one piece, 0 for what is ignored.

    Args:
        scores, ignored, columns, groups, span, thresholds, floors, ids, starts, grid, low, cells_per_unit,
            inverse_width: as :func:`count` takes them.
        lines: ``[2P + 1, 2]``, level and slope of each bucket.
        out: ``[n]``
    """
    largest = np.finfo(scores.dtype).max
    zero, one, at = scores.dtype.type(0), scores.dtype.type(1), 0
    begin, end, run_end = 0, len(thresholds) - 1, len(scores)
    group, known = np.int64(0), False
    level_below = lines[0, 0]
    lowest = _lowest(thresholds, begin, end)
    inside, inside_low, inside_high = begin, -largest, lowest
    kept, values = np.empty(_BLOCK, scores.dtype), np.empty(_BLOCK, scores.dtype)
    where, buckets = np.empty(_BLOCK, np.int32), np.empty(_BLOCK, np.int32)
    while at < len(scores):
        if len(groups):
            run_end = _end_of_run(groups, span, at, len(scores))
            if not known or groups[at // span] != group:
                group, known = groups[at // span], True
                begin, end = _range_of(group, ids, starts)
                lowest = _lowest(thresholds, begin, end)
                inside, inside_low, inside_high = begin, -largest, lowest
        while at < run_end:
            block = scores[at : min(at + _BLOCK, run_end)]
            part = out[at : at + len(block)]
            first, at = at, at + len(block)
            num_below = num_inside = 0
            if len(block) >= _SHORTEST:
                num_below, num_inside = _peek(block, lowest, inside_low, inside_high)
            if num_below == len(block):
                part[:] = level_below
            elif num_inside == len(block) and inside > begin:
                floor, level, slope = floors[inside], lines[inside, 0], lines[inside, 1]
                for i in range(len(block)):
                    offset = _offset(block[i], floor, inverse_width, one) if inverse_width > 0 else zero
                    part[i] = _line(level, slope, offset)
            else:
                picks = num_below > len(block) // _FEW
                some = part
                if picks:
                    part[:] = level_below
                    block = kept[: _leave_out(block, lowest, ignored[:0], first, columns, kept, where)]
                    some = values[: len(block)]
                _locate(block, thresholds, begin, end, grid, low, cells_per_unit, 0, buckets)
                inside = max(begin, buckets[0])
                inside_low, inside_high = _bounds(inside, thresholds, begin, end, largest)
                for i in range(len(block)):
                    bucket, offset = np.uint32(buckets[i]), zero
                    if inverse_width > 0:
                        offset = _offset(_finite(block[i], largest), floors[bucket], inverse_width, one)
                    some[i] = _line(lines[bucket, 0], lines[bucket, 1], offset)
                if picks:
                    for i in range(len(block)):
                        part[np.uint32(where[i])] = some[i]
            if len(ignored) > 0 and _any(ignored, first // columns, (at - 1) // columns + 1):
                for i in range(len(part)):
                    if ignored[(first + i) // columns]:
                        part[i] = zero
