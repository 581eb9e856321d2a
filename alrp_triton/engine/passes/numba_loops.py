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
# Neighbours, at least, of which each keeps its place while blocks lie between the same thresholds.
_PERIOD = 256
# What a look at a block may say instead of how many of its scores reach a threshold.
_MANY, _TOGETHER = -1, -2


class Search(NamedTuple):
    """What places are found by; numbers have the scores' dtype.

    Each ranking has places of its own, one after the other: one below its thresholds, one from each threshold on, and
    one for NaN.
    """

    thresholds: Array
    """``[places + 1]`` at each place the threshold at which the next one begins, or NaN."""
    grid: Array
    """``[G * cells + 1]`` int32: for each cell of each ranking the place below the thresholds of this cell."""
    floors: Array
    """``[places]``, see ``knots.bucket_floors``."""
    cells: Any
    """How many cells a ranking has, int32."""
    low: Any
    """Where they begin."""
    cells_per_unit: Any
    inverse_width: Any
    """1 / (2 delta), or 0."""
    largest: Any
    one: Any


class Runs(NamedTuple):
    """The rankings of scores in R runs: score i of a run is of ``rankings[run, i % period]``."""

    ends: Array
    """``[R]`` int64"""
    rankings: Array
    """``[R, period]`` int32"""


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
    """Space for one block."""

    begin: Array
    """The first cell of each score's ranking."""
    picked: Array
    """Whether a score must be looked up."""
    where: Array
    """Of each picked score: its index in the block, a copy, the first cell of its ranking."""
    kept: Array
    kept_begin: Array
    places: Array
    """Of each score that is looked up."""
    common: Array
    """Of each score of a period, while they are the same from period to period: its place, and what depends on it."""
    floor: Array
    level: Array
    slope: Array
    units: Array


@compiled()
def _room(scores: Array) -> _Room:
    integers, floats = np.empty((5, _BLOCK), np.int32), np.empty((4, _BLOCK), scores.dtype)
    picked, units = np.empty(_BLOCK, np.bool_), np.empty(_BLOCK, np.int64)
    begin, where, kept_begin, places, common = integers[0], integers[1], integers[2], integers[3], integers[4]
    return _Room(begin, picked, where, floats[0], kept_begin, places, common, floats[1], floats[2], floats[3], units)


@compiled()
def _periods(num: int) -> tuple[int, int]:
    """How many neighbours have places that may be the same further on, and the scores of a block."""
    if num == 1:
        return 1, _BLOCK
    together = num * max(1, _PERIOD // num)
    return (together, _BLOCK // together * together) if num <= _BLOCK else (0, _BLOCK)


@compiled()
def _begin(rankings: Array, first: int, num: int, search: Search, room: _Room) -> Any:
    """Write the first cells of scores from ``first`` on; returns the lowest threshold of their rankings, or inf."""
    at, period, lowest = first % len(rankings), len(rankings), search.floors.dtype.type(np.inf)
    for i in range(num):
        cell = rankings[at] * search.cells
        room.begin[i] = cell
        at = at + 1 if at + 1 < period else 0
        if i < period:
            threshold = search.thresholds[search.grid[cell]]
            lowest = min(lowest, threshold) if threshold == threshold else lowest
    return lowest


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
            room.kept_begin[np.uint32(num_picked)] = room.begin[i]
            num_picked += np.int64(picked[i])
    return num_picked


@compiled()
def _locate(block: Array, begin: Array, search: Search, places: Array) -> None:
    """Write the place of each score; the cells of its ranking begin at ``begin``."""
    thresholds, grid = search.thresholds, search.grid
    # The same operations, in the same precision, have made the grid.
    last, lowest = block.dtype.type(search.cells - 1), block.dtype.type(0)
    for i in range(len(block)):
        cell = (block[i] - search.low) * search.cells_per_unit
        cell = cell if cell > lowest else lowest
        places[i] = begin[i] + np.int32(cell if cell < last else last)
    for i in range(len(block)):
        x, cell = block[i], np.uint32(places[i])
        # The first step has no branch, because a CPU cannot predict it. Further steps are rare.
        place = grid[cell]
        place = np.int32(place + np.int32(thresholds[np.uint32(place)] <= x))
        if thresholds[np.uint32(place)] <= x:
            over = grid[cell + np.uint32(1)]
            while place < over:
                half = np.int32((place + over) >> 1)
                if thresholds[np.uint32(half)] <= x:
                    place = np.int32(half + 1)
                else:
                    over = half
        places[i] = place
    num_nan = np.int32(0)
    for i in range(len(block)):
        num_nan += np.int32(block[i] != block[i])
    if num_nan > 0:
        for i in range(len(block)):
            if block[i] != block[i]:  # the last place of its ranking
                places[i] = grid[np.uint32(begin[i] + search.cells)] - 1


@compiled()
def _keep(block: Array, search: Search, room: _Room) -> tuple[Any, Any]:
    """Keep the places of these scores, the first of a block, as common ones; returns what finite scores share them:
    ``low <= x < high``."""
    low, high = -search.largest, search.floors.dtype.type(np.inf)
    for i in range(len(block)):
        place = room.places[i]
        # Below the first threshold of a ranking there is none.
        below, above = search.thresholds[place - 1], search.thresholds[place]
        low = below if below > low else low
        high = above if above < high else high
        # NaN have no neighbours.
        high = high if block[i] == block[i] else low
        room.common[i], room.floor[i] = place, search.floors[place]
    return low, high


@compiled()
def _offset(x: Any, floor: Any, search: Search) -> Any:
    """Of a score from the floor of its bucket, in [0, 1]; of NaN something finite."""
    x = min(x if x > -search.largest else -search.largest, search.largest)
    return min((x - floor) * search.inverse_width, search.one) if search.inverse_width > 0 else search.inverse_width


@compiled(fastmath={"contract"})
def _line(level: Any, slope: Any, offset: Any) -> Any:
    """Rounded once on CPUs that can, as torch.addcmul is there."""
    return level + slope * offset


@compiled()
def count(scores: Array, ignored: Array, runs: Runs, search: Search, scale: Any, sums: Array, step: int) -> None:
    """Add the scores of one piece to ``sums``.

    Args:
        scores: ``[n]`` float32 or float64, as are the numbers of ``search``, and ``scale``.
        ignored: ``[n]`` bool; ``[0]`` where none is.
        runs: of the scores.
        search: of the thresholds.
        scale: units of fixed point to 1.
        sums: ``[places, 2]`` int64: number of scores at each place, and their offsets in units; of the lowest place of
            a ranking whatever has been met.
        step: 1, or -1 to take them out again.
    """
    room, at, units = _room(scores), 0, np.int64(0)
    for run in range(len(runs.ends)):
        first, end, rankings = at, runs.ends[run], runs.rankings[run]
        together, size = _periods(len(rankings))
        lowest = low = high = search.floors.dtype.type(0)
        while at < end:
            block, skip = scores[at : min(at + size, end)], ignored[at : min(at + size, end)]
            if at == first or together == 0:
                lowest = _begin(rankings, at - first, len(block), search, room)
            at += len(block)
            num = _look(block, skip, lowest, low, high, room)
            if num == _TOGETHER and together == 1:
                units, floor, place = np.int64(0), room.floor[0], room.common[0]
                for i in range(len(block)):
                    units += np.int64(_offset(block[i], floor, search) * scale)
                sums[place, 0] += step * len(block)
                sums[place, 1] += step * units
            elif num == _TOGETHER:
                floors, of_each = room.floor[:together], room.units[:together]
                of_each[:] = 0
                for begin in range(0, len(block), together):
                    part = block[begin : begin + together]
                    for i in range(len(part)):
                        of_each[i] += np.int64(_offset(part[i], floors[i], search) * scale)
                for i in range(together):
                    sums[room.common[i], 0] += step * ((len(block) + together - 1 - i) // together)
                    sums[room.common[i], 1] += step * of_each[i]
            elif num != 0:
                block, begins = (room.kept[:num], room.kept_begin) if num > 0 else (block, room.begin)
                _locate(block, begins, search, room.places)
                for i in range(len(block)):
                    place = np.uint32(room.places[i])
                    sums[place, 0] += step
                    sums[place, 1] += step * np.int64(_offset(block[i], search.floors[place], search) * scale)
                if num == _MANY and len(block) >= together > 0:
                    low, high = _keep(block[:together], search, room)


@compiled()
def write(scores: Array, ignored: Array, runs: Runs, search: Search, lines: Array, out: Array) -> None:
    """Write the gradient of each score of one piece, 0 for what is ignored.

    Args:
        scores, ignored, runs, search: as :func:`count` takes them.
        lines: ``[places, 2]``, level and slope.
        out: ``[n]``
    """
    room, at = _room(scores), 0
    for run in range(len(runs.ends)):
        first, end, rankings = at, runs.ends[run], runs.rankings[run]
        together, size = _periods(len(rankings))
        lowest = low = high = search.floors.dtype.type(0)
        while at < end:
            block, part = scores[at : min(at + size, end)], out[at : min(at + size, end)]
            if at == first or together == 0:
                lowest = _begin(rankings, at - first, len(block), search, room)
            at += len(block)
            num = _look(block, ignored[:0], lowest, low, high, room)
            if num == _TOGETHER and together == 1:
                floor, level, slope = room.floor[0], room.level[0], room.slope[0]
                for i in range(len(block)):
                    part[i] = _line(level, slope, _offset(block[i], floor, search))
                continue
            if num == _TOGETHER:
                for begin in range(0, len(block), together):
                    period, written = block[begin : begin + together], part[begin : begin + together]
                    for i in range(len(period)):
                        written[i] = _line(room.level[i], room.slope[i], _offset(period[i], room.floor[i], search))
                continue
            begins = room.begin
            if num != _MANY:
                part[:] = lines[0, 0]
                block, begins = room.kept[:num], room.kept_begin
            _locate(block, begins, search, room.places)
            for i in range(len(block)):
                place = np.uint32(room.places[i])
                value = _line(lines[place, 0], lines[place, 1], _offset(block[i], search.floors[place], search))
                if num == _MANY:
                    part[i] = value
                else:
                    part[np.uint32(room.where[i])] = value
            if num == _MANY and len(block) >= together > 0:
                low, high = _keep(block[:together], search, room)
                for i in range(together):
                    room.level[i], room.slope[i] = lines[room.common[i], 0], lines[room.common[i], 1]
    for i in range(len(ignored)):
        if ignored[i]:
            out[i] = 0
