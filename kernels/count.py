"""Pass 1: for each bucket count its negatives, and sum their offsets in fixed point.

All sums are 64-bit integers, so the order of tiles and atomics does not matter. If all scores of a tile lie in one
bucket, as early in training, there is no search, and one sum; in bucket 0, as late in training, there is nothing to
add. Otherwise each tile sums the bucket of its first score that reaches a ramp, and sends one atomic for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .lanes import (
    add_each,
    address,
    address_of_label,
    address_or_position,
    is_positive,
    load,
    places,
    takes_part,
    within,
)
from .launch import launch, level_of, ramp_of
from .layout import Table, Walk
from .search import anchor_of, find_bucket, groups_of, is_between, offset_in_bucket

# A sum over a tile holds a count of at most 2^12 above units of at most 2^36 each.
_UNIT_BITS = tl.constexpr(50)
_ONE_MORE = tl.constexpr(1 << 50)


@triton.jit
def first_of(there, lane, bucket, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    """The bucket of the first active lane, by one reduction; any bucket if no lane is active."""
    if BLOCK << STEPS < 1 << 31:
        key = tl.where(there, (lane << STEPS) | bucket, (BLOCK << STEPS) - 1)
    else:
        key = tl.where(there, (lane.to(tl.int64) << STEPS) | bucket, (BLOCK << STEPS) - 1)
    return (tl.min(key) & ((1 << STEPS) - 1)).to(tl.int32)


@triton.jit
def add_to(totals, bucket, both, num_buckets):
    """Add a count and units in one sum. If the count is 0, the bucket may lie beyond the totals."""
    count = both >> _UNIT_BITS
    tl.atomic_add(totals + bucket, count, mask=count > 0, sem="relaxed")
    tl.atomic_add(totals + num_buckets + 1 + bucket, both - (count << _UNIT_BITS), mask=count > 0, sem="relaxed")


@triton.jit(do_not_specialize=["num_buckets", "ignore_index"])
def count_kernel(
    levels, table, totals, num_buckets, scale, ignore_index, ramp, STEPS: tl.constexpr, BLOCK: tl.constexpr
):
    level = level_of(levels)
    begin, lane = level.tile.to(tl.int64) * BLOCK, tl.arange(0, BLOCK)
    at = places(levels, level, begin, lane)
    x_at = address_or_position(begin + lane, at, level.logit_steps, levels)
    there = within(begin, lane, level.num_logits, BLOCK)
    score = load(level.logits + x_at, there, table.floors.dtype.element_ty)
    label = tl.load(level.labels + address_of_label(at, levels, level), mask=there, other=0)
    counted = there & takes_part(label, ignore_index, levels.CLASSES) & ~is_positive(label, at[0], levels.CLASSES)

    anchor, low, high = anchor_of(levels, level, begin, table, num_buckets, STEPS)
    # One reduction answers two questions; NaN are rare.
    beside = counted & ~is_between(score, low, high)
    nan = counted & (score != score)
    interest = tl.max(tl.where(nan, 2, beside.to(tl.int32)))
    if interest > 1:
        tl.atomic_add(totals + num_buckets, tl.sum(nan.to(tl.int32)).to(tl.int64), sem="relaxed")
    if interest > 0:
        group = groups_of(level, address(at, level.group_steps, levels.AXES), there, table)
        bucket = find_bucket(score, group, table, STEPS)
        reaches = counted & (bucket > 0)
        units = (offset_in_bucket(score, bucket, table, ramp) * scale).to(tl.int64)
        # Use the bucket of the first score that reaches a ramp as the most frequent one.
        crowd = first_of(reaches, lane, bucket, STEPS, BLOCK)
        alone = reaches & (bucket != crowd)
        add_each(totals + bucket, tl.full([BLOCK], 1, tl.int64), alone, BLOCK)
        add_each(totals + num_buckets + 1 + bucket, units, alone, BLOCK)
        add_to(totals, crowd, tl.sum(tl.where(reaches & (bucket == crowd), units + _ONE_MORE, 0)), num_buckets)
    elif anchor > 0:
        units = (offset_in_bucket(score, anchor, table, ramp) * scale).to(tl.int64)
        add_to(totals, anchor, tl.sum(tl.where(counted, units + _ONE_MORE, 0)), num_buckets)


def count(walks: Sequence[Walk], table: Table, totals: Tensor, delta: float, scale: float, ignore_index: int) -> None:
    """Pass 1 over all levels.

    Args:
        walks: the levels. With groups, a score counts only in the buckets of its group.
        table: of the positives' ramps.
        totals: ``[2, 2P + 2]`` int64, contiguous, to which is added: the number of negatives in each bucket, and the
            sum of their offsets in units; in the last column the number of NaN, and nothing. Bucket 0 is left out.
        delta: half width of the ramp.
        scale: units of the fixed point in 1.
        ignore_index: label of logits that are not counted.
    """
    num_buckets = len(table.floors)
    arguments = {
        "table": table,
        "totals": totals,
        "num_buckets": num_buckets,
        "scale": scale,
        "ignore_index": ignore_index,
        "ramp": ramp_of(table.floors, delta),
        "STEPS": (num_buckets - 1).bit_length(),
    }
    launch(count_kernel, "count" if table.groups is None else "count_grouped", walks, arguments)
