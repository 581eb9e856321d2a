"""Sort the positives into flat order, and the ends of their ramps into a table, in one launch by counting.

Each positive counts the positives before it, and each end of a ramp counts the ends below it, in O(P^2). Up to some
thousand positives this costs less than the launches of a sort. With groups, everything is sorted by group first.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .grid import lay, shape_of_cells
from .launch import compare, ramp_of
from .layout import Positives, Table
from .ramp import ramp_ends, sort_key

_LAST_GROUP = tl.constexpr(0x7FFFFFFFFFFFFFFF)


class Found(NamedTuple):
    """Positives in any order; or, without numbers, in flat order."""

    indices: Tensor | None
    logits: Tensor
    groups: Tensor | None
    numbers: Tensor | None
    """See ``find.find``; None for positives in flat order."""


class Placed(NamedTuple):
    """What :func:`place` returns."""

    indices: Tensor
    """``[P]`` int64, ascending; the given ones if they were in order."""
    positives: Positives
    """All logits are NaN if their number is not P or a label is out of range."""
    table: Table
    totals: Tensor
    """``[2, 2P + 2]`` int64 zeros for pass 1."""
    num_groups: Tensor | None
    """``[1]`` int64"""


@triton.jit
def fill(table, totals, num_positives, BLOCK_P: tl.constexpr):
    """Write the values that do not depend on the positives: padding of the table, the 0 from which the grid begins,
    zeros of the totals. Each program writes a part."""
    at = tl.program_id(0) * (8 * BLOCK_P) + tl.arange(0, 8 * BLOCK_P)
    tl.store(totals + at, tl.zeros([8 * BLOCK_P], tl.int64), mask=at < 4 * num_positives + 4)
    place = 2 * num_positives + at
    beyond = place <= 4 * num_positives
    dtype: tl.constexpr = table.thresholds.dtype.element_ty
    if table.groups is not None:
        tl.store(table.groups + place, tl.full([8 * BLOCK_P], _LAST_GROUP, tl.int64), mask=beyond)
        beyond = beyond & (place < 4 * num_positives - 1)
    tl.store(table.thresholds + place, tl.full([8 * BLOCK_P], float("nan"), dtype), mask=beyond)
    if tl.program_id(0) == 0:
        tl.store(table.cells, tl.full([], 0, dtype))


@triton.jit(do_not_specialize=["num_positives"])
def place_kernel(
    found,
    index_in_order,
    positives,
    table,
    totals,
    num_groups,
    num_positives,
    ramp,
    BLOCK: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    there = i < num_positives
    dtype: tl.constexpr = positives.logits.dtype.element_ty
    if found.numbers is None:
        index, num_found = i, num_positives
        score = tl.load(found.logits + i, mask=there, other=0)
    else:
        num_found = tl.load(found.numbers)
        mistaken = (num_found != num_positives) | (tl.load(found.numbers + 1) > 0)
        # Empty slots count as positives that come first.
        index = tl.load(found.indices + i, mask=there & (i < num_found), other=0)
        score = tl.load(found.logits + i, mask=there & (i < num_found), other=0)
        score = tl.where(mistaken, float("nan"), score)
    lower, upper = ramp_ends(score, ramp.delta)
    lower_key, upper_key = sort_key(lower)[:, None], sort_key(upper)[:, None]
    earlier_ones = tl.zeros([BLOCK_P, BLOCK], tl.int32)
    below_lower = tl.zeros([BLOCK_P, BLOCK], tl.int32)
    below_upper = tl.zeros([BLOCK_P, BLOCK], tl.int32)
    if found.groups is not None:
        group = tl.load(found.groups + i, mask=there & (i < num_found), other=0)
        earlier_of_group = tl.zeros([BLOCK_P, BLOCK], tl.int32)
        lowest, highest = tl.full([BLOCK], float("inf"), dtype), tl.full([BLOCK], float("-inf"), dtype)
    for first in range(0, num_positives, BLOCK):
        k = first + tl.arange(0, BLOCK)
        other = k[None, :] < num_positives
        taken = (k < num_positives) & (k < num_found)
        value = tl.load(found.logits + k, mask=taken, other=0)
        if found.numbers is None:
            earlier = k[None, :] < i[:, None]
        else:
            value = tl.where(mistaken, float("nan"), value)
            at = tl.load(found.indices + k, mask=taken, other=0)[None, :]
            earlier = (at < index[:, None]) | ((at == index[:, None]) & (k[None, :] < i[:, None]))
            earlier_ones += (other & earlier).to(tl.int32)
        low, up = ramp_ends(value, ramp.delta)
        low_key, up_key = sort_key(low)[None, :], sort_key(up)[None, :]
        # Among equal ends, beginnings of ramps come before ends of ramps.
        before_lower = (low_key < lower_key) | ((low_key == lower_key) & earlier)
        before_upper = (up_key < upper_key) | ((up_key == upper_key) & earlier)
        num_before_lower = before_lower.to(tl.int32) + (up_key < lower_key).to(tl.int32)
        num_before_upper = (low_key <= upper_key).to(tl.int32) + before_upper.to(tl.int32)
        if found.groups is not None:
            other_group = tl.load(found.groups + k, mask=taken, other=0)[None, :]
            same, lower_group = other_group == group[:, None], other_group < group[:, None]
            num_before_lower = tl.where(same, num_before_lower, tl.where(lower_group, 2, 0))
            num_before_upper = tl.where(same, num_before_upper, tl.where(lower_group, 2, 0))
            earlier_of_group += (other & same & earlier).to(tl.int32)
            lowest = tl.minimum(lowest, tl.where((k < num_positives) & (low == low), low, float("inf")))
            last = tl.where(up == up, up, low)
            highest = tl.maximum(highest, tl.where((k < num_positives) & (low == low), last, float("-inf")))
        below_lower += tl.where(other, num_before_lower, 0)
        below_upper += tl.where(other, num_before_upper, 0)
    lower_place, upper_place = tl.sum(below_lower, axis=1), tl.sum(below_upper, axis=1)
    tl.store(table.thresholds + lower_place, lower, mask=there)
    tl.store(table.thresholds + upper_place, upper, mask=there)
    place = i
    if found.numbers is not None:
        place = tl.sum(earlier_ones, axis=1)
        tl.store(index_in_order + place, index, mask=there)
        tl.store(positives.logits + place, score, mask=there)
        if found.groups is not None:
            tl.store(positives.groups + place, group, mask=there)
    tl.store(positives.begin + place, lower_place.to(tl.int64) + 1, mask=there)
    tl.store(positives.end + place, upper_place.to(tl.int64) + 1, mask=there)
    if found.groups is not None:
        tl.store(table.groups + lower_place, group, mask=there)
        tl.store(table.groups + upper_place, group, mask=there)
        # Each group is counted by its first positive.
        firsts = there & (tl.sum(earlier_of_group, axis=1) == 0)
        tl.atomic_add(num_groups, tl.sum(firsts.to(tl.int32)).to(tl.int64), sem="relaxed")
        if tl.program_id(0) == 0:
            end = table.thresholds + 4 * num_positives
            tl.store(end, tl.min(lowest))
            tl.store(end - 1, tl.max(highest), mask=num_positives > 0)
    fill(table, totals, num_positives, BLOCK_P)


def place(found: Found, delta: float, dtype: torch.dtype) -> Placed:
    """Order positives and the ends of their ramps, for a ramp of half width ``delta``; ``dtype`` is that of the scores
    that are to be searched."""
    logits, groups = found.logits, found.groups
    num_pos, device = len(logits), logits.device
    # Separate tensors, so that all have the same alignment for any P; otherwise a launch needs a new specialisation.
    index, begin, end = (torch.empty(num_pos, dtype=torch.int64, device=device) for _ in range(3))
    thresholds = logits.new_empty(4 * num_pos + 1)
    totals = torch.empty(2, 2 * num_pos + 2, dtype=torch.int64, device=device)
    cells = logits.new_empty(shape_of_cells(num_pos, dtype, groups is not None))
    table, positives, num_groups = Table(thresholds, cells), Positives(logits, begin, end, groups), None
    if found.numbers is not None:
        in_order = None if groups is None else torch.empty_like(groups)
        positives = positives._replace(logits=torch.empty_like(logits), groups=in_order)
    elif found.indices is not None:
        index = found.indices
    if groups is not None:
        table = table._replace(groups=groups.new_empty(len(thresholds)))
        num_groups = torch.zeros(1, dtype=torch.int64, device=device)
    compare(
        place_kernel,
        # Without positives the padding of the table must still be written.
        max(1, num_pos),
        logits,
        found=found,
        index_in_order=index,
        positives=positives,
        table=table,
        totals=totals,
        num_groups=num_groups,
        num_positives=num_pos,
        ramp=ramp_of(logits, delta),
    )
    return Placed(index, positives, lay(table, dtype), totals, num_groups)
