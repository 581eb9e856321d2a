"""Device code of both passes: bucket and offset of a score. See ``layout.Table``."""

from __future__ import annotations

import triton
import triton.language as tl

from .lanes import load
from .ramp import largest

# Larger than all indices.
NONE = tl.constexpr(0x7FFFFFFFFFFFFFFF)


@triton.jit
def find_bucket(score, group, table, STEPS: tl.constexpr):
    """The number of thresholds at or below each score. With groups, the number before or at it in the order of the
    table, but 0 if none of them is of the score's group. 0 for NaN."""
    bucket = tl.zeros_like(score).to(tl.int32)
    for step in tl.static_range(STEPS):
        half = 1 << (STEPS - 1 - step)
        reached = score >= tl.load(table.thresholds + bucket + (half - 1))
        if table.groups is not None:
            other = tl.load(table.groups + bucket + (half - 1))
            reached = (other < group) | ((other == group) & reached)
        bucket += tl.where(reached, half, 0)
    if table.groups is not None:
        own = tl.load(table.groups + bucket - 1, mask=bucket > 0, other=0)
        bucket = tl.where(own == group, bucket, 0)
    return bucket


@triton.jit
def anchor_of(levels, level, begin, table, num_buckets, STEPS: tl.constexpr):
    """A bucket in which many scores of a tile may lie, with its ends: that of the first score. It is bucket 0 with
    groups, up to the lowest threshold of all, and where the first score is costly to find."""
    # With groups the lowest threshold of all is in the last place.
    lowest = 2 * (num_buckets - 1) if table.groups is not None else 0
    high = tl.load(table.thresholds + lowest)
    bucket, low = 0, tl.zeros_like(high) - float("inf")
    if table.groups is None and levels.FLAT:
        first = load(level.logits + begin, begin < level.num_logits, high.dtype)
        if first >= high:
            bucket = find_bucket(first, 0, table, STEPS)
            low, high = tl.load(table.thresholds + bucket - 1), tl.load(table.thresholds + bucket)
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
def offset_in_bucket(score, bucket, table, ramp):
    """(score - floor) / (2 delta), at most 1. Infinities count as the largest finite number, as in the floors."""
    if ramp.inverse_width == 0:
        return tl.zeros_like(score)
    else:
        limit: tl.constexpr = largest(score.dtype)
        finite = tl.minimum(tl.maximum(score, -limit), limit)
        return tl.minimum((finite - tl.load(table.floors + bucket)) * ramp.inverse_width, 1.0)
