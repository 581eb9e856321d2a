"""The compiled loops: each goes over one flat piece of the logits once, without Python's lock.

All thresholds of a piece's groups stand in one sorted table; a run of logits of one group sees the range
``begin <= b <= end`` of it, without groups the whole. Bucket ``begin`` is what lies below all of the range.

Within a run both loops go block by block, and most blocks need no search: late in training nearly all scores lie below
all thresholds, so that those that do not are picked out first; early in training one bucket holds all.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .numba_tables import Array, Search, compiled

# Scores looked at together: one comparison each tells whether all lie in one bucket. Shorter runs are not worth that.
# While they do, a block stays in the innermost cache; otherwise a longer one hides what each starts with.
_BLOCK, _LONG_BLOCK, _SHORTEST = 1024, 8192, 32
# Where more than one in so many lies below all thresholds, the others are copied and looked at by themselves.
_FEW = 4
# What a look at a block may say instead of how many of its scores reach a threshold.
_MANY, _TOGETHER = -1, -2


class _Room(NamedTuple):
    """Room for what is picked out of a block: whether each score reaches a threshold, eight of them in a word; words in
    which one does; places, scores and buckets of those that do."""

    words: Array
    hits: Array
    where: Array
    kept: Array
    buckets: Array


@compiled()
def _locate(block: Array, search: Search, begin: int, end: int, of_nan: int, buckets: Array) -> None:
    """Write ``begin`` plus how many of ``thresholds[begin:end]`` lie at or below each score, but 0 where none does; and
    ``of_nan`` for NaN."""
    thresholds, grid = search.thresholds, search.grid
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
    # Cells are told by the operations that made the grid, in the same precision; see ``numba_tables.fill_grid``.
    last, lowest_place = block.dtype.type(len(grid) - 1), block.dtype.type(0)
    for i in range(len(block)):
        place = (block[i] - search.low) * search.cells_per_unit
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


@compiled()
def _offset(x: Any, floor: Any, inverse_width: Any, one: Any) -> Any:
    """Of a finite score from the floor of its bucket, in [0, 1]."""
    return min((x - floor) * inverse_width, one)


@compiled(fastmath={"contract"})
def _line(level: Any, slope: Any, offset: Any) -> Any:
    """Rounded once on CPUs that can, as torch.addcmul is there."""
    return level + slope * offset


@compiled()
def _finite(x: Any, largest: Any) -> Any:
    return min(x if x > -largest else -largest, largest)  # NaN, too, is at the floor of its bucket


@compiled()
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


@compiled()
def _peek(block: Array, lowest: Any, low: Any, high: Any) -> tuple[int, int]:
    """How many scores lie below ``lowest``, and how many between the other two. Written so that it becomes some eight
    or sixteen comparisons in one instruction."""
    num_below = num_inside = np.int32(0)
    for i in range(len(block)):
        num_below += np.int32(block[i] < lowest)
        num_inside += np.int32((block[i] >= low) & (block[i] < high))
    return num_below, num_inside


@compiled()
def _room(scores: Array) -> _Room:
    words, hits = np.zeros(_LONG_BLOCK // 8, np.uint64), np.empty(_LONG_BLOCK // 8, np.int32)
    where, buckets = np.empty(_LONG_BLOCK, np.int32), np.empty(_LONG_BLOCK, np.int32)
    return _Room(words, hits, where, np.empty(_LONG_BLOCK, scores.dtype), buckets)


@compiled()
def _pick(block: Array, lowest: Any, room: _Room) -> int:
    """Copy the scores that are not below ``lowest``, NaN among them, and write their places; returns how many they are.
    Without a branch, and first by eights: few of those have any."""
    words, hits, where, kept = room.words, room.hits, room.where, room.kept
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


@compiled()
def _look(block: Array, lowest: Any, low: Any, high: Any, room: _Room) -> int:
    """:func:`_pick` where it pays; else ``_TOGETHER`` if all scores lie between ``low`` and ``high``, or ``_MANY``."""
    if len(block) < _SHORTEST:
        return _MANY
    num_below, num_together = _peek(block, lowest, low, high)
    if num_below == len(block):
        return 0
    if num_together == len(block):
        return _TOGETHER
    return _pick(block, lowest, room) if num_below > len(block) // _FEW else _MANY


@compiled()
def _any(ignored: Array, begin: int, end: int) -> bool:
    found = 0
    for one in ignored[begin:end]:
        found |= one
    return found != 0


@compiled()
def _leave_out(room: _Room, num_picked: int, ignored: Array, first: int, columns: int) -> int:
    """Of the scores that were picked keep those that are not ignored; returns how many they are."""
    num_kept = 0
    for k in range(num_picked):
        room.kept[num_kept] = room.kept[k]
        num_kept += np.int64(ignored[(first + room.where[k]) // columns] == 0)
    return num_kept


@compiled()
def _lowest(thresholds: Array, begin: int, end: int) -> Any:
    """What finite scores are in no bucket but the first below."""
    return thresholds[begin] if begin < end else thresholds.dtype.type(np.inf)


@compiled()
def count(scores: Array, ignored: Array, columns: int, runs: Array, search: Search, scale: Any, sums: Array) -> None:
    """Add the scores of one piece to ``sums``.

    Args:
        scores: ``[n]`` float32 or float64, as are the numbers of ``search``, and ``scale``.
        ignored: ``[n / columns]`` uint8; ``[0]`` where none is.
        columns: scores that share a label.
        runs: ``[R, 3]`` int64, see ``numba_tables.runs_of``.
        search: of the thresholds.
        scale: units of fixed point to 1.
        sums: ``[2P + 2, 2]`` int64: number of scores in each bucket, and their offsets in units; of bucket 0 whatever
            has been met; last, the number of NaN, and 0.
    """
    largest, infinity = np.finfo(scores.dtype).max, scores.dtype.type(np.inf)
    one, at = scores.dtype.type(1), 0
    room, thresholds, floors, inverse_width = _room(scores), search.thresholds, search.floors, search.inverse_width
    kept, buckets, of_nan = room.kept, room.buckets, len(search.thresholds)
    for run in range(len(runs)):
        run_end, begin, end = runs[run, 0], runs[run, 1], runs[run, 2]
        lowest, together, above, below = _lowest(thresholds, begin, end), begin, infinity, -infinity
        size = _BLOCK
        while at < run_end:
            block = scores[at : min(at + size, run_end)]
            first, at = at, at + len(block)
            if len(ignored) > 0 and _any(ignored, first // columns, (at - 1) // columns + 1):
                num = _leave_out(room, _pick(block, lowest, room), ignored, first, columns)
            else:
                num = _look(block, lowest, above, below, room)
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
            _locate(block, search, begin, end, of_nan, buckets)
            if buckets[0] != of_nan:
                together = max(begin, buckets[0])
                above, below = _bounds(together, thresholds, begin, end, largest)
            for i in range(len(block)):
                bucket = np.uint32(buckets[i])
                sums[bucket, 0] += 1
                if inverse_width > 0:
                    offset = _offset(_finite(block[i], largest), floors[bucket], inverse_width, one)
                    sums[bucket, 1] += np.int64(offset * scale)


@compiled()
def write(scores: Array, ignored: Array, columns: int, runs: Array, search: Search, lines: Array, out: Array) -> None:
    """Write the gradient of each score of one piece, 0 for what is ignored.

    Args:
        scores, ignored, columns, runs, search: as :func:`count` takes them.
        lines: ``[2P + 1, 2]``, level and slope of each bucket.
        out: ``[n]``
    """
    largest, infinity = np.finfo(scores.dtype).max, scores.dtype.type(np.inf)
    zero, one, at = scores.dtype.type(0), scores.dtype.type(1), 0
    room, thresholds, floors, inverse_width = _room(scores), search.thresholds, search.floors, search.inverse_width
    kept, buckets = room.kept, room.buckets
    for run in range(len(runs)):
        run_end, begin, end = runs[run, 0], runs[run, 1], runs[run, 2]
        lowest, together, above, below = _lowest(thresholds, begin, end), begin, infinity, -infinity
        size = _BLOCK
        while at < run_end:
            block = scores[at : min(at + size, run_end)]
            part = out[at : at + len(block)]
            first, at = at, at + len(block)
            num = _look(block, lowest, above, below, room)
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
                _locate(block, search, begin, end, 0, buckets)
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
                        part[np.uint32(room.where[i])] = value
            if len(ignored) > 0 and _any(ignored, first // columns, (at - 1) // columns + 1):
                for i in range(len(part)):
                    if ignored[(first + i) // columns]:
                        part[i] = zero
