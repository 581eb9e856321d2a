"""The loops that Numba compiles: each goes over one flat piece of the logits once, without Python's lock.

Most blocks of scores need no search: late in training nearly all scores lie below all thresholds, so those that do not
are picked out first; early in training all of a block lie between the same two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numba
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
_Loop = TypeVar("_Loop", bound=Callable[..., Any])

# Scores looked at together.
_BLOCK = 2048
# What a look at a block may say instead of how many of its scores reach a threshold.
_MANY, _TOGETHER = -1, -2


class Search(NamedTuple):
    """What buckets are found by; numbers have the scores' dtype."""

    thresholds: Array
    """``[D + 1]`` the different thresholds of all groups, sorted; the last is NaN."""
    grid: Array
    """``[cells + 1]`` int32: how many thresholds lie in lower cells; see :class:`.tables.BucketSearch`."""
    lowest: Array
    """``[G + 1]`` the lowest threshold of each group, or inf."""
    low: Any
    """Where the grid begins."""
    cells_per_unit: Any
    floors: Array
    """``[places]``, see ``knots.bucket_floors``. The place of a score is the row of its group times ``D + 2``, plus the
    number of thresholds at or below it, or D + 1 for NaN."""
    inverse_width: Any
    """1 / (2 delta), or 0."""
    largest: Any
    one: Any


def compiled(**options: Any) -> Callable[[_Loop], _Loop]:
    """Compile at the first call and keep the machine code on disk, where there is a folder for it."""

    def compile_(function: _Loop) -> _Loop:
        try:
            loop: _Loop = numba.njit(nogil=True, cache=True, **options)(function)
        except RuntimeError:  # neither the package's folder nor the user's can be written
            loop = numba.njit(nogil=True, **options)(function)
        return loop

    return compile_


class _Room(NamedTuple):
    """Space for one block: ``picked`` says whether a score must be looked up. For picked scores, ``where`` holds their
    index in the block, ``kept`` a copy, and ``places`` the place in the tables."""

    picked: Array
    where: Array
    kept: Array
    places: Array


@compiled()
def _room(scores: Array) -> _Room:
    picked, where, places = np.empty(_BLOCK, np.bool_), np.empty(_BLOCK, np.int32), np.empty(_BLOCK, np.int32)
    return _Room(picked, where, np.empty(_BLOCK, scores.dtype), places)


@compiled()
def _look(block: Array, ignored: Array, lowest: Any, low: Any, high: Any, room: _Room) -> int:
    """Copies the scores that reach a threshold and are not ignored, if they are few; returns their number. Otherwise
    returns ``_TOGETHER`` if all scores lie between ``low`` and ``high``, else ``_MANY``."""
    num_below = num_together = np.int32(0)
    for i in range(len(block)):
        num_below += np.int32(block[i] < lowest)
        num_together += np.int32((block[i] >= low) & (block[i] < high))
    if num_below == len(block):
        return 0
    if len(ignored) == 0:
        if num_together == len(block):
            return _TOGETHER
        if num_below <= len(block) // 4:
            return _MANY
    picked, where, kept, num_picked = room.picked, room.where, room.kept, 0
    for i in range(len(block)):
        picked[i] = not block[i] < lowest
    for i in range(len(ignored)):
        picked[i] &= not ignored[i]
    # Eight scores at a time: most eights have none to pick. Without branches.
    words, hits, num_hits = picked.view(np.uint64), room.places, 0
    for word in range((len(block) + 7) // 8):
        hits[np.uint32(num_hits)] = 8 * word
        num_hits += np.int64(words[word] != 0)
    for hit in hits[:num_hits]:
        for i in range(hit, min(hit + 8, len(block))):
            where[np.uint32(num_picked)] = i
            kept[np.uint32(num_picked)] = block[i]
            num_picked += np.int64(picked[i])
    return num_picked


@compiled()
def _locate(block: Array, begin: int, search: Search, room: _Room) -> Any:
    """Write the place of each score, in the row that begins at ``begin``; returns how many thresholds lie at or below
    the first score."""
    thresholds, grid, places = search.thresholds, search.grid, room.places
    # The same operations, in the same precision, have made the grid.
    last, lowest = block.dtype.type(len(grid) - 2), block.dtype.type(0)
    for i in range(len(block)):
        cell = (block[i] - search.low) * search.cells_per_unit
        cell = cell if cell > lowest else lowest
        places[i] = np.int32(cell if cell < last else last)
    for i in range(len(block)):
        x, cell = block[i], np.uint32(places[i])
        # The first step has no branch, because a CPU cannot predict it. Further steps are rare.
        number = grid[cell]
        number = np.int32(number + np.int32(thresholds[np.uint32(number)] <= x))
        if thresholds[np.uint32(number)] <= x:
            over = grid[cell + np.uint32(1)]
            while number < over:
                half = np.int32((number + over) >> 1)
                if thresholds[np.uint32(half)] <= x:
                    number = np.int32(half + 1)
                else:
                    over = half
        places[i] = number
    first, of_nan = places[0], np.int32(len(thresholds))
    for i in range(len(block)):
        places[i] = np.int32(begin) + (places[i] if block[i] == block[i] else of_nan)
    return first


@compiled()
def _offset(x: Any, floor: Any, search: Search) -> Any:
    """Of a score from the floor of its bucket, in [0, 1]; of NaN something finite."""
    x = min(x if x > -search.largest else -search.largest, search.largest)
    return min((x - floor) * search.inverse_width, search.one) if search.inverse_width > 0 else search.inverse_width


@compiled()
def _bounds(number: int, thresholds: Array, largest: Any) -> tuple[Any, Any]:
    """What finite scores lie in that reach so many thresholds: ``low <= x < high``; nothing where there are none."""
    above = thresholds[number] if thresholds[number] == thresholds[number] else thresholds.dtype.type(np.inf)
    return (max(-largest, thresholds[number - 1]), above) if number > 0 else (above, -largest)


@compiled(fastmath={"contract"})
def _line(level: Any, slope: Any, offset: Any) -> Any:
    """Rounded once on CPUs that can, as torch.addcmul is there."""
    return level + slope * offset


@compiled()
def count(scores: Array, ignored: Array, runs: Array, search: Search, scale: Any, sums: Array, step: int) -> None:
    """Add the scores of one piece to ``sums``.

    Args:
        scores: ``[n]`` float32 or float64, as are the numbers of ``search``, and ``scale``.
        ignored: ``[n]`` bool; ``[0]`` where none is.
        runs: ``[R, 2]``, see :meth:`.numba.Tables.runs`.
        search: of the thresholds.
        scale: units of fixed point to 1.
        sums: ``[places, 2]`` int64: number of scores at each place, and their offsets in units; of bucket 0 whatever
            has been met.
        step: 1, or -1 to take them out again.
    """
    room, at, width = _room(scores), 0, len(search.thresholds) + 1
    for run in range(len(runs)):
        end, row, number, high = runs[run, 0], runs[run, 1] * width, 0, search.lowest[runs[run, 1]]
        low = lowest = high
        while at < end:
            block, skip = scores[at : min(at + _BLOCK, end)], ignored[at : min(at + _BLOCK, end)]
            at += len(block)
            num = _look(block, skip, lowest, low, high, room)
            if num == _TOGETHER:
                place, units = np.uint32(row + number), np.int64(0)
                floor = search.floors[place]
                for i in range(len(block)):
                    units += np.int64(_offset(block[i], floor, search) * scale)
                sums[place, 0] += step * len(block)
                sums[place, 1] += step * units
            elif num != 0:
                block = room.kept[:num] if num > 0 else block
                number = _locate(block, row, search, room)
                low, high = _bounds(number, search.thresholds, search.largest)
                for i in range(len(block)):
                    place = np.uint32(room.places[i])
                    sums[place, 0] += step
                    sums[place, 1] += step * np.int64(_offset(block[i], search.floors[place], search) * scale)


@compiled()
def write(scores: Array, ignored: Array, runs: Array, search: Search, lines: Array, out: Array) -> None:
    """Write the gradient of each score of one piece, 0 for what is ignored.

    Args:
        scores, ignored, runs, search: as :func:`count` takes them.
        lines: ``[places, 2]``, level and slope.
        out: ``[n]``
    """
    room, at, width = _room(scores), 0, len(search.thresholds) + 1
    for run in range(len(runs)):
        end, row, number, high = runs[run, 0], runs[run, 1] * width, 0, search.lowest[runs[run, 1]]
        low = lowest = high
        while at < end:
            block, part = scores[at : min(at + _BLOCK, end)], out[at : min(at + _BLOCK, end)]
            at += len(block)
            num = _look(block, ignored[:0], lowest, low, high, room)
            if num == _TOGETHER:
                place = np.uint32(row + number)
                floor, level, slope = search.floors[place], lines[place, 0], lines[place, 1]
                for i in range(len(block)):
                    part[i] = _line(level, slope, _offset(block[i], floor, search))
                continue
            if num != _MANY:
                part[:] = lines[0, 0]
                block = room.kept[:num]
            if len(block) > 0:
                number = _locate(block, row, search, room)
                low, high = _bounds(number, search.thresholds, search.largest)
            for i in range(len(block)):
                place = np.uint32(room.places[i])
                value = _line(lines[place, 0], lines[place, 1], _offset(block[i], search.floors[place], search))
                if num == _MANY:
                    part[i] = value
                else:
                    part[np.uint32(room.where[i])] = value
    for i in range(len(ignored)):
        if ignored[i]:
            out[i] = 0
