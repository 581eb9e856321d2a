"""How a loop is compiled, what the loops over logits look up, and the loops over labels and groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numba
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
_Loop = TypeVar("_Loop", bound=Callable[..., Any])

# Labels looked at together.
_BLOCK = 2048
CROWD = 8
"""Thresholds in a cell of the grid, at the most, that are tried one after the other."""


class Search(NamedTuple):
    """What buckets are found by; numbers have the scores' dtype."""

    thresholds: Array
    """``[2P + 1]`` sorted, by group first; the last is NaN."""
    floors: Array
    """``[2P + 2]``, see ``knots.bucket_floors``; the last is the lowest number."""
    grid: Array
    """``[cells]`` int32, the number k of thresholds in lower cells, or ~k for a cell with more than :data:`CROWD`;
    ``[0]`` for none. Only where there are no groups."""
    low: Any
    """Where the grid begins."""
    cells_per_unit: Any
    inverse_width: Any
    """1 / (2 delta), or 0."""


def compiled(**options: Any) -> Callable[[_Loop], _Loop]:
    """Compile at the first call and keep the machine code on disk, where there is a folder for it."""

    def compile_(function: _Loop) -> _Loop:
        try:
            loop: _Loop = numba.njit(nogil=True, cache=True, **options)(function)
        except RuntimeError:  # neither the package's folder nor the user's can be written
            loop = numba.njit(nogil=True, **options)(function)
        return loop

    return compile_


@compiled()
def fill_grid(thresholds: Array, low: Any, cells_per_unit: Any, grid: Array) -> None:
    """Write the grid of :class:`Search`, for sorted thresholds, in which NaN are last."""
    last, lowest, num_filled = thresholds.dtype.type(len(grid) - 1), thresholds.dtype.type(0), 0
    for k in range(len(thresholds)):
        place = (thresholds[k] - low) * cells_per_unit
        place = place if place > lowest else lowest
        cell = np.int64(place) if place < last and thresholds[k] == thresholds[k] else len(grid) - 1
        while num_filled <= cell:
            grid[num_filled] = k
            num_filled += 1
    for cell in range(num_filled, len(grid)):
        grid[cell] = len(thresholds)
    for cell in range(len(grid)):
        over = grid[cell + 1] if cell + 1 < len(grid) else len(thresholds)
        if over - grid[cell] > CROWD:
            grid[cell] = ~grid[cell]


@compiled()
def mark(labels: Array, ignore_index: Any, ignored: Array) -> bool:
    """Write whether each label is ignored to uint8 of the same length; returns whether any is."""
    any_ignored = 0
    for i in range(len(labels)):
        ignored[i] = labels[i] == ignore_index
        any_ignored |= ignored[i]
    return any_ignored != 0


@compiled()
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
            for k in range(num_found):
                found[k] = before[k]
        for i in range(len(block)):
            label = np.int64(block[i])
            ignored = label == ignore_index
            if label == background or ignored:
                continue
            positive = 0 <= label < columns if per_class else label == 1
            found[num_found] = (begin + i) * columns + (label if per_class else 0)
            num_found += np.int64(positive)
            invalid |= not positive
    return found[:num_found], invalid


@compiled()
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
            runs[run, 1], runs[run, 2] = starts[place], starts[place + 1]
        run += 1
    return runs
