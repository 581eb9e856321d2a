"""Device code of both passes: bucket and offset of a score. See ``layout.Table`` and :mod:`.grid`."""

from __future__ import annotations

import triton
import triton.language as tl

from .grid import cell_of, index_of_value, integer_at, is_below, rounds_in_numbers, row_of
from .lanes import load, load_pair
from .shared import number_before, threshold_at

# Larger than all indices.
NONE = tl.constexpr(0x7FFFFFFFFFFFFFFF)


@triton.jit
def find_bucket(score, group, table, KIND: tl.constexpr, SHARED: tl.constexpr = False):
    """The number of thresholds at or below each score, and the bucket's lower end, -inf for bucket 0. With groups the
    number is that of thresholds before or at the score in the order of the table, but 0 if none of them is of the
    score's group; the lower end has no meaning then. 0 for NaN. ``KIND`` is the dtype of the logits, and ``SHARED`` is
    whether shared memory has the table (:mod:`.shared`)."""
    if table.groups is None and KIND.primitive_bitwidth == 16:
        of_value, floor = load_pair(table.cells + 2 * index_of_value(score, KIND))
        return of_value.to(tl.int32, bitcast=True), floor
    rounds = integer_at(table.cells, 0)
    if table.groups is not None:
        if integer_at(table.cells, 4) > 0:
            bucket, floor = bucket_in_group(score, group, table, rounds)
        else:
            bucket, floor = bucket_in_pairs(score, group, table, rounds)
    else:
        cell = cell_of(score, tl.load(table.cells + 1), tl.load(table.cells + 2), tl.load(table.cells + 3))
        if SHARED:
            bucket = number_before(cell)
            step = 1 << rounds_in_numbers(rounds) >> 1
            while step > 0:
                bucket += tl.where(score >= threshold_at(bucket + step), step, 0)
                step = step >> 1
            floor = threshold_at(bucket)
        else:
            bucket, floor = bucket_in_row(score, cell, table)
            step = 1 << rounds >> 1
            while step > 0:
                other = tl.load(table.thresholds + (step - 1) + bucket)
                floor = tl.where(score >= other, other, floor)
                bucket += tl.where(score >= other, step, 0)
                step = step >> 1
    return bucket, floor


@triton.jit
def bucket_in_row(score, cell, table):
    """:func:`find_bucket` up to the six thresholds beside the number of a cell."""
    bucket, floor, t0, t1, t2, t3, t4, t5 = row_of(table.cells, cell)
    # A binary search in seven thresholds, of which none reaches the last.
    in_upper = score >= t3
    second = tl.where(in_upper, t5, t1)
    over_second = score >= second
    third = tl.where(in_upper, tl.where(over_second, float("nan"), t4), tl.where(over_second, t2, t0))
    over_third = score >= third
    bucket += tl.where(in_upper, 4, 0) + tl.where(over_second, 2, 0) + tl.where(over_third, 1, 0)
    floor = tl.where(over_third, third, tl.where(over_second, second, tl.where(in_upper, t3, floor)))
    return bucket, floor


@triton.jit
def bucket_in_group(score, group, table, rounds):
    """:func:`find_bucket` where each group has cells of its own."""
    slot = group - tl.load(table.groups)
    there = is_below(slot, integer_at(table.cells, 5))
    slot = tl.where(there, slot.to(tl.int32), 0)
    cell = cell_of(score, tl.load(table.cells + 1), tl.load(table.cells + 2), tl.load(table.cells + 3))
    bucket, floor = bucket_in_row(score, cell + slot * integer_at(table.cells, 4), table)
    step = 1 << rounds >> 1
    while step > 0:
        other = tl.load(table.thresholds + (step - 1) + bucket)
        of_group = tl.load(table.groups + (step - 1) + bucket) - tl.load(table.groups) == slot
        reached = (score >= other) & of_group
        floor = tl.where(reached, other, floor)
        bucket += tl.where(reached, step, 0)
        step = step >> 1
    # NaN says that no threshold of the group lies below the score.
    return tl.where((floor == floor) & there, bucket, 0), floor


@triton.jit
def bucket_in_pairs(score, group, table, rounds):
    """:func:`find_bucket` by a search that compares both groups and thresholds."""
    bucket = tl.zeros_like(score).to(tl.int32)
    step = 1 << rounds >> 1
    while step > 0:
        other = tl.load(table.groups + (step - 1) + bucket)
        reached = score >= tl.load(table.thresholds + (step - 1) + bucket)
        bucket += tl.where((other < group) | ((other == group) & reached), step, 0)
        step = step >> 1
    own = tl.load(table.groups + bucket - 1, mask=bucket > 0, other=0) == group
    bucket = tl.where(own, bucket, 0)
    return bucket, tl.load(table.thresholds + bucket - 1, mask=bucket > 0, other=float("-inf"))


@triton.jit
def anchor_of(levels, level, begin, table, num_buckets, SHARED: tl.constexpr = False):
    """A bucket in which many scores of a tile may lie, with its ends: that of the first score. It is bucket 0 with
    groups, up to the lowest threshold of all, and where the first score is costly to find."""
    # With groups the lowest threshold of all is in the last place.
    lowest = 2 * (num_buckets - 1) if table.groups is not None else 0
    high = tl.load(table.thresholds + lowest)
    bucket, low = 0, tl.zeros_like(high) - float("inf")
    if table.groups is None and levels.FLAT:
        first = load(level.logits + begin, begin < level.num_logits, high.dtype)
        if first >= high:
            bucket, low = find_bucket(first, 0, table, level.logits.dtype.element_ty, SHARED)
            high = tl.load(table.thresholds + bucket)
    return bucket, low, high


@triton.jit
def is_between(score, low, high):
    """Whether scores lie in a bucket with these ends; never NaN. A NaN as the upper end is above all."""
    return (score >= low) & ~(score >= high)


@triton.jit
def groups_of(level, at, mask, table):
    """The 64-bit groups of logits; without groups the value has no meaning."""
    if table.groups is not None:
        return tl.load(level.groups + at, mask=mask, other=0).to(tl.int64)
    else:
        return at


@triton.jit
def number_below(value, ascending, length, highest):
    """The number of integers of a table below a scalar. ``highest`` is the largest power of two up to ``length``; 0 for
    an empty table."""
    below = highest * 0
    step = highest
    while step > 0:
        reached = below + step
        other = tl.load(ascending + (reached - 1), mask=reached <= length, other=NONE)
        below = tl.where(other < value, reached, below)
        step = step // 2
    return below


@triton.jit
def offset_from(score, floor, ramp):
    """(score - floor) / (2 delta), at most 1; 0 for equal infinities and NaN."""
    if ramp.inverse_width == 0:
        return tl.zeros_like(score)
    elif ramp.saturate:
        return tl.inline_asm_elementwise(
            "mul.rn.sat.f32 $0, $1, $2;",
            "=f,f,f",
            [score - floor, tl.zeros_like(score) + ramp.inverse_width],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        offset = (score - floor) * ramp.inverse_width
        return tl.where(offset > 0, tl.minimum(offset, 1.0), 0.0)
