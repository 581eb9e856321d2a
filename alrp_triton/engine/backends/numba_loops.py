"""The compiled loops: each goes over one flat piece of the logits once, without Python's lock.

All thresholds of a piece's groups stand in one sorted table; a run of logits of one group sees the range
``begin <= b <= end`` of it, without groups the whole. Bucket ``begin`` is what lies below all of the range.

Within a run both loops go block by block, and most blocks need no search: late in training nearly all scores lie below
all thresholds, so that those that do not are picked out first; early in training one bucket holds all.
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
# While they do, a block stays in the innermost cache; otherwise a longer one hides what each starts with.
_BLOCK, _LONG_BLOCK, _SHORTEST = 2048, 8192, 32
# Where more than one in so many lies below all thresholds, the others are copied and looked at by themselves.
_FEW = 4
# What a look at a block may say instead of how many of its scores reach a threshold.
_MANY, _TOGETHER = -1, -2
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
def find(labels: Array, background: Any, columns: int, per_class: bool, ignore_index: int) -> tuple[Array, bool]:
    """Flat positions of the positives, and whether any label is out of range; see ``labels.positions``. Most stretches
    are all background, and are skipped.

    Args:
        labels: ``[n]`` integers.
        background: the label of a negative, in the labels' dtype where that can hold it.
        columns: C, or 1 for labels of single logits.
        per_class: whether a label is the class of a row.
        ignore_index: within the labels' range, or the background.
    """
    found, num_found, invalid = np.empty(0, np.int64), 0, False
    for begin in range(0, len(labels), _BLOCK):
        block, differ = labels[begin : begin + _BLOCK], 0
        for i in range(len(block)):
            differ |= block[i] != background
        if not differ:
            continue
        if len(found) < num_found + len(block):
            found, before = np.empty(2 * (num_found + len(block)), np.int64), found
            found[:num_found] = before[:num_found]
        for i in range(len(block)):
            label = np.int64(block[i])
            if label in (background, ignore_index):
                continue
            positive = 0 <= label < columns if per_class else label == 1
            found[num_found] = (begin + i) * columns + (label if per_class else 0)
            num_found += np.int64(positive)
            invalid |= not positive
    return found[:num_found], invalid


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
    """What the finite scores of a bucket lie in: ``low <= x < high``; nothing for bucket ``begin``."""
    low, high = -largest, thresholds.dtype.type(np.inf)
    if bucket <= begin:
        return high, low
    if thresholds[bucket - 1] > low:
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
def _scratch(scores: Array) -> tuple[Array, Array, Array, Array, Array]:
    """Room for what is picked out of a block: whether each score reaches a threshold, eight of them in a word; words in
    which one does; places, scores and buckets of those that do."""
    words, hits = np.zeros(_LONG_BLOCK // 8, np.uint64), np.empty(_LONG_BLOCK // 8, np.int32)
    where, buckets = np.empty(_LONG_BLOCK, np.int32), np.empty(_LONG_BLOCK, np.int32)
    return words, hits, where, np.empty(_LONG_BLOCK, scores.dtype), buckets


@_compiled()
def _pick(block: Array, lowest: Any, words: Array, hits: Array, where: Array, kept: Array) -> int:
    """Copy the scores that are not below ``lowest``, NaN among them, and write their places; returns how many they are.
    Without a branch, and first by eights: few of those have any."""
    reaches = words.view(np.uint8)
    for i in range(len(block)):
        reaches[i] = not block[i] < lowest
    num_words = (len(block) + 7) >> 3
    for i in range(len(block), 8 * num_words):
        reaches[i] = 0
    num_hits = num_picked = 0
    for k in range(num_words):
        hits[np.uint32(num_hits)] = k
        num_hits += np.int64(words[k] != 0)
    for k in range(num_hits):
        first = np.int32(hits[k] << 3)
        for i in range(8):
            where[np.uint32(num_picked)] = first + i
            kept[np.uint32(num_picked)] = block[np.uint32(first + i)]
            num_picked += np.int64(reaches[np.uint32(first + i)])
    return num_picked


@_compiled()
def _look(block: Array, lowest: Any, low: Any, high: Any, words: Array, hits: Array, where: Array, kept: Array) -> int:
    """:func:`_pick` where it pays; else ``_TOGETHER`` if all scores lie between ``low`` and ``high``, or ``_MANY``."""
    if len(block) < _SHORTEST:
        return _MANY
    num_below, num_together = _peek(block, lowest, low, high)
    if num_below == len(block):
        return 0
    if num_together == len(block):
        return _TOGETHER
    return _pick(block, lowest, words, hits, where, kept) if num_below > len(block) // _FEW else _MANY


@_compiled()
def _any(ignored: Array, begin: int, end: int) -> bool:
    found = 0
    for one in ignored[begin:end]:
        found |= one
    return found != 0


@_compiled()
def _leave_out(kept: Array, where: Array, ignored: Array, first: int, columns: int) -> int:
    """Of the scores at some places keep those that are not ignored; returns how many they are."""
    num_kept = 0
    for k in range(len(where)):
        kept[num_kept] = kept[k]
        num_kept += np.int64(ignored[(first + where[k]) // columns] == 0)
    return num_kept


@_compiled()
def _lowest(thresholds: Array, begin: int, end: int) -> Any:
    """What finite scores are in no bucket but the first below."""
    return thresholds[begin] if begin < end else thresholds.dtype.type(np.inf)


@_compiled()
def runs_of(groups: Array, span: int, ids: Array, starts: Array) -> Array:
    """Runs of one group: ``[R, 3]`` int64, where each ends, and where the thresholds of its group begin and end; an
    empty range for a group that has none.

    Args:
        groups: ``[n / span]`` int64.
        span: consecutive scores that share a group.
        ids: ``[G]`` int64, the groups that have thresholds, ascending.
        starts: ``[G + 1]`` int64, where those of each begin.
    """
    num_runs = min(1, len(groups))
    for k in range(1, len(groups)):
        num_runs += groups[k] != groups[k - 1]
    runs, run = np.zeros((num_runs, 3), np.int64), 0
    for k in range(len(groups)):
        if k + 1 < len(groups) and groups[k + 1] == groups[k]:
            continue
        runs[run, 0], place = (k + 1) * span, np.searchsorted(ids, groups[k])
        if place < len(ids) and ids[place] == groups[k]:
            runs[run, 1:] = starts[place : place + 2]
        run += 1
    return runs


@_compiled()
def count(
    scores: Array,
    ignored: Array,
    columns: int,
    runs: Array,
    thresholds: Array,
    floors: Array,
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
        runs: ``[R, 3]`` int64, see :func:`runs_of`.
        thresholds: ``[2P + 1]`` sorted, by group first; the last is NaN.
        floors: ``[2P + 2]``, see ``knots.bucket_floors``; the last is the lowest number.
        grid: ``[cells]`` int32, the number k of thresholds in lower cells, or ~k for a cell with more than
            :data:`CROWD`; ``[0]`` for none. Only where there are no groups.
        low, cells_per_unit: the grid's.
        inverse_width: 1 / (2 delta), or 0.
        scale: units of fixed point to 1.
        sums: ``[2P + 2, 2]`` int64: number of scores in each bucket, and their offsets in units; of bucket 0 whatever
            has been met; last, the number of NaN, and 0.
    """
    largest, infinity = np.finfo(scores.dtype).max, scores.dtype.type(np.inf)
    one, of_nan, at = scores.dtype.type(1), len(thresholds), 0
    words, hits, where, kept, buckets = _scratch(scores)
    for run in range(len(runs)):
        run_end, begin, end = runs[run]
        lowest, together, above, below = _lowest(thresholds, begin, end), begin, infinity, -infinity
        size = _BLOCK
        while at < run_end:
            block = scores[at : min(at + size, run_end)]
            first, at = at, at + len(block)
            if len(ignored) > 0 and _any(ignored, first // columns, (at - 1) // columns + 1):
                num = _pick(block, lowest, words, hits, where, kept)
                num = _leave_out(kept, where[:num], ignored, first, columns)
            else:
                num = _look(block, lowest, above, below, words, hits, where, kept)
            size = _BLOCK if num == _TOGETHER else _LONG_BLOCK
            if num == 0:
                continue
            if num == _TOGETHER:
                units, floor = np.int64(0), floors[together]
                if inverse_width > 0:
                    for i in range(len(block)):
                        units += np.int64(_offset(block[i], floor, inverse_width, one) * scale)
                sums[together, 0] += len(block)
                sums[together, 1] += units
                continue
            if num != _MANY:
                block = kept[:num]
            _locate(block, thresholds, begin, end, grid, low, cells_per_unit, of_nan, buckets)
            if buckets[0] != of_nan:
                together = max(begin, buckets[0])
                above, below = _bounds(together, thresholds, begin, end, largest)
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
    runs: Array,
    thresholds: Array,
    floors: Array,
    grid: Array,
    low: Any,
    cells_per_unit: Any,
    inverse_width: Any,
    lines: Array,
    out: Array,
) -> None:
    """Write the gradient of each score of one piece, 0 for what is ignored.

    Args:
        scores, ignored, columns, runs, thresholds, floors, grid, low, cells_per_unit, inverse_width: as :func:`count`
            takes them.
        lines: ``[2P + 1, 2]``, level and slope of each bucket.
        out: ``[n]``
    """
    largest, infinity = np.finfo(scores.dtype).max, scores.dtype.type(np.inf)
    zero, one, at = scores.dtype.type(0), scores.dtype.type(1), 0
    words, hits, where, kept, buckets = _scratch(scores)
    for run in range(len(runs)):
        run_end, begin, end = runs[run]
        lowest, together, above, below = _lowest(thresholds, begin, end), begin, infinity, -infinity
        size = _BLOCK
        while at < run_end:
            block = scores[at : min(at + size, run_end)]
            part = out[at : at + len(block)]
            first, at = at, at + len(block)
            num = _look(block, lowest, above, below, words, hits, where, kept)
            size = _BLOCK if num == _TOGETHER else _LONG_BLOCK
            if num >= 0:
                part[:] = lines[0, 0]
                block = kept[:num]
            if num == _TOGETHER:
                floor, level, slope = floors[together], lines[together, 0], lines[together, 1]
                for i in range(len(block)):
                    offset = _offset(block[i], floor, inverse_width, one) if inverse_width > 0 else zero
                    part[i] = _line(level, slope, offset)
            elif len(block) > 0:
                _locate(block, thresholds, begin, end, grid, low, cells_per_unit, 0, buckets)
                together = max(begin, buckets[0])
                above, below = _bounds(together, thresholds, begin, end, largest)
                for i in range(len(block)):
                    bucket, offset = np.uint32(buckets[i]), zero
                    if inverse_width > 0:
                        offset = _offset(_finite(block[i], largest), floors[bucket], inverse_width, one)
                    value = _line(lines[bucket, 0], lines[bucket, 1], offset)
                    if num == _MANY:
                        part[i] = value
                    else:
                        part[np.uint32(where[i])] = value
            if len(ignored) > 0 and _any(ignored, first // columns, (at - 1) // columns + 1):
                for i in range(len(part)):
                    if ignored[(first + i) // columns]:
                        part[i] = zero
