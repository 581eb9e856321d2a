"""Pass 2: write the gradient of every logit, level + slope * offset in its bucket; positives have their own
gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .lanes import (
    address,
    address_or_position,
    kinds,
    load,
    load_pair,
    places,
    store,
    within,
)
from .launch import launch, level_of, ramp_of
from .layout import Table, Walk
from .search import NONE, anchor_of, find_bucket, groups_of, is_between, number_below, offset_from


class Own(NamedTuple):
    """The gradients of the positives' own scores."""

    indices: Any
    """``[P]`` int64, flat indices, ascending. Missing positives get an undefined gradient, without out-of-bounds
    reads."""
    gradients: Any
    """``[K, P]`` float64, for each of K scalars."""


class Factors(NamedTuple):
    """The upstream gradients of a loss's scalars; each is a factor of the gradients of its scalar."""

    first: Any
    second: Any
    """None if only the first has a derivative with respect to scores."""


@triton.jit
def own_gradient(own, k, factors, num_own):
    """The gradient of positive k, float64."""
    value = tl.load(own.gradients + k) * tl.load(factors.first).to(tl.float64)
    if factors.second is not None:
        value += tl.load(own.gradients + num_own + k) * tl.load(factors.second).to(tl.float64)
    return value


@triton.jit
def with_positives(value, lane, first_index, own, factors, num_own, highest, BLOCK: tl.constexpr):
    """The values of a tile, with those of its positives. The index of a positive is a scalar, which takes no registers
    for each lane."""
    k = number_below(first_index, own.indices, num_own, highest)
    index = tl.load(own.indices + k, mask=k < num_own, other=NONE)
    while index < first_index + BLOCK:
        gradient = own_gradient(own, k, factors, num_own)
        value = tl.where(lane == (index - first_index).to(tl.int32), gradient.to(value.dtype), value)
        k += 1
        index = tl.load(own.indices + k, mask=k < num_own, other=NONE)
    return value


@triton.jit
def with_scattered_positives(value, positive, index, own, factors, num_own, highest):
    """:func:`with_positives` where flat indices do not follow each other."""
    smallest = tl.min(tl.where(positive, index, NONE))
    while smallest < NONE:
        k = number_below(smallest, own.indices, num_own, highest)
        if tl.load(own.indices + k, mask=k < num_own, other=NONE) == smallest:
            gradient = own_gradient(own, k, factors, num_own)
            value = tl.where(positive & (index == smallest), gradient.to(value.dtype), value)
        smallest = tl.min(tl.where(positive & (index > smallest), index, NONE))
    return value


@triton.jit(do_not_specialize=["num_buckets", "num_own", "highest_own", "ignore_index"])
def write_kernel(
    levels,
    table,
    lines,
    own,
    factors,
    num_buckets,
    num_own,
    highest_own,
    ignore_index,
    ramp,
    BLOCK: tl.constexpr,
):
    # Backwards: what pass 1 read last may still be in the cache.
    level = level_of(levels, tl.num_programs(0) - 1 - tl.program_id(0))
    begin, lane = level.tile.to(tl.int64) * BLOCK, tl.arange(0, BLOCK)
    at = places(levels, level, begin, lane, BLOCK)
    x_at = address_or_position(begin + lane, at, level.logit_steps, levels)
    there = within(begin, lane, level.num_logits, BLOCK)
    score = load(level.logits + x_at, there, table.thresholds.dtype.element_ty)
    counted, positive = kinds(levels, level, begin, lane, at, there, ignore_index, BLOCK)
    positive = there & counted & positive

    anchor, low, high = anchor_of(levels, level, begin, table, num_buckets)
    # One reduction answers two questions; positives are rare.
    found = tl.sum(tl.where(positive, 1 << 16, (~is_between(score, low, high)).to(tl.int32)))
    if found % (1 << 16) > 0:
        group = groups_of(level, address(at, level.group_steps, levels.AXES), there, table)
        bucket, floor = find_bucket(score, group, table, level.logits.dtype.element_ty)
        offset = offset_from(score, floor, ramp)
        line = load_pair(lines + 2 * bucket)
        value = line[0] + line[1] * offset
    else:
        offset = offset_from(score, low, ramp)
        value = tl.load(lines + 2 * anchor) + tl.load(lines + 2 * anchor + 1) * offset
    value *= tl.load(factors.first).to(value.dtype)
    # Unexpected positives keep the gradient of a negative, which is NaN then.
    value = tl.where(counted, value, 0.0)
    if found >> 16 > 0:
        if levels.ROW_MAJOR:
            value = with_positives(value, lane, level.first_index + begin, own, factors, num_own, highest_own, BLOCK)
        else:
            index = level.first_index + address(at, level.index_steps, levels.AXES)
            value = with_scattered_positives(value, positive, index, own, factors, num_own, highest_own)
    g_at = address_or_position(begin + lane, at, level.gradient_steps, levels)
    store(level.gradient + g_at, value, there)


def write(
    walks: Sequence[Walk],
    gradients: Sequence[Tensor],
    table: Table,
    lines: Tensor,
    own: Own,
    factors: Factors,
    delta: float,
    ignore_index: int,
) -> None:
    """Pass 2 over all levels.

    Args:
        walks: the levels.
        gradients: tensors to write, one for each level.
        table: as in pass 1.
        lines: ``[2, 2P + 1]``, level and slope of each bucket, in the dtype of the table; preferably those of a bucket
            are side by side.
        own: gradients of the positives.
        factors: upstream gradients. The first multiplies the gradients of negatives before they are rounded to the
            logits' dtype.
        delta: half width of the ramp.
        ignore_index: label of logits with gradient 0.
    """
    num_own, num_buckets = len(own.indices), len(table.thresholds) // 2 + 1
    arguments = {
        "table": table,
        "lines": lines.t().contiguous(),
        "own": Own(own.indices.contiguous(), own.gradients.contiguous()),
        "factors": factors,
        "num_buckets": num_buckets,
        "num_own": num_own,
        "highest_own": 1 << num_own.bit_length() >> 1,
        "ignore_index": ignore_index,
        "ramp": ramp_of(table.thresholds, delta),
    }
    launch(write_kernel, "write" if table.groups is None else "write_grouped", walks, arguments, gradients)
