"""Pass 1 of the linear form: every negative into its bucket. A count, and a sum of offsets in fixed point.

All accumulation is in 64-bit integers, so the order in which tiles and atomics arrive changes nothing. Two things
keep atomics off each other's toes: scores below the first threshold, most of them late in training, send none; and
each tile sums the bucket of its first score, which early in training is nearly everyone's, before sending one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .levels import launch, level_of, make_level
from .search import find_bucket, make_table, offset_in_bucket, reaches_any
from .walk import Walk, elements_of, indices, is_negative, load, load_groups, on_device_of, steps_to

# Of a sum over a tile that holds a count, of at most 2^12, above units, of at most 2^36 each.
_UNIT_BITS = tl.constexpr(50)
_ONE_MORE = tl.constexpr(1 << 50)


@triton.jit
def first_of(there, lane, bucket, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    """The bucket of the first lane that is there, by one reduction; some bucket where none is."""
    if BLOCK << STEPS < 1 << 31:
        key = tl.where(there, (lane << STEPS) | bucket, (BLOCK << STEPS) - 1)
    else:
        key = tl.where(there, (lane.to(tl.int64) << STEPS) | bucket, (BLOCK << STEPS) - 1)
    return (tl.min(key) & ((1 << STEPS) - 1)).to(tl.int32)


@triton.jit(do_not_specialize=["ignore_index"])
def bucket_kernel(
    tile,
    logits,
    labels,
    groups,
    num_logits,
    size0,
    size1,
    size2,
    x_step0,
    x_step1,
    x_step2,
    x_step3,
    y_step0,
    y_step1,
    y_step2,
    y_step3,
    z_step0,
    z_step1,
    z_step2,
    z_step3,
    thresholds,
    threshold_groups,
    floors,
    totals,
    num_buckets,
    scale,
    ignore_index,
    AXES: tl.constexpr,
    CLASSES: tl.constexpr,
    FLAT: tl.constexpr,
    INVERSE_WIDTH: tl.constexpr,
    LARGEST: tl.constexpr,
    STEPS: tl.constexpr,
    GROUPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # In a launch over one level, a program's number is that of its tile.
    if tile is None:
        tile = tl.program_id(0)
    begin = tile.to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    i0, i1, i2, i3 = indices(begin, lane, size0, size1, size2, AXES, CLASSES)
    x_at = elements_of(begin + lane, i0, i1, i2, i3, x_step0, x_step1, x_step2, x_step3, AXES, FLAT)
    if CLASSES > 0:
        # Rows' labels take no step from class to class.
        y_step0 = 0
    y_at = steps_to(i0, i1, i2, i3, y_step0, y_step1, y_step2, y_step3, AXES)
    there = begin + lane < num_logits
    score = load(logits + x_at, there, floors.dtype.element_ty)
    label = tl.load(labels + y_at, mask=there, other=0)
    counted = there & is_negative(label, i0, ignore_index, CLASSES)

    # One look for two questions; of NaN there are few.
    reaches = counted & reaches_any(score, thresholds, STEPS, GROUPED)
    nan = counted & (score != score)
    interest = tl.max(tl.where(nan, 2, reaches.to(tl.int32)))
    if interest > 1:
        tl.atomic_add(totals + num_buckets, tl.sum(nan.to(tl.int32)).to(tl.int64), sem="relaxed")
    if interest > 0:
        z_at = steps_to(i0, i1, i2, i3, z_step0, z_step1, z_step2, z_step3, AXES)
        group = load_groups(groups, z_at, there, GROUPED)
        bucket = find_bucket(score, group, thresholds, threshold_groups, STEPS, GROUPED)
        if GROUPED:
            # What reaches a ramp of another group only.
            reaches = reaches & (bucket > 0)
        offset = offset_in_bucket(score, bucket, floors, INVERSE_WIDTH, LARGEST)
        units = (offset * scale).to(tl.int64)
        # The bucket of the first score that reaches a ramp stands for the crowd.
        crowd = first_of(reaches, lane, bucket, STEPS, BLOCK)
        alone = reaches & (bucket != crowd)
        tl.atomic_add(totals + bucket, tl.full([BLOCK], 1, tl.int64), mask=alone, sem="relaxed")
        tl.atomic_add(totals + num_buckets + 1 + bucket, units, mask=alone, sem="relaxed")
        # Count and units in one sum. Without a crowd its bucket may lie beyond the totals.
        both = tl.sum(tl.where(reaches & (bucket == crowd), units + _ONE_MORE, 0))
        count = both >> _UNIT_BITS
        tl.atomic_add(totals + crowd, count, mask=count > 0, sem="relaxed")
        units_of_crowd = both - (count << _UNIT_BITS)
        tl.atomic_add(totals + num_buckets + 1 + crowd, units_of_crowd, mask=count > 0, sem="relaxed")


@triton.jit(do_not_specialize=["ignore_index"])
def bucket_levels_kernel(
    walks,
    thresholds,
    threshold_groups,
    floors,
    totals,
    num_buckets,
    scale,
    ignore_index,
    POINTERS: tl.constexpr,
    ARGUMENTS: tl.constexpr,
    UNIT: tl.constexpr,
    AXES: tl.constexpr,
    CLASSES: tl.constexpr,
    FLAT: tl.constexpr,
    INVERSE_WIDTH: tl.constexpr,
    LARGEST: tl.constexpr,
    STEPS: tl.constexpr,
    GROUPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    bucket_kernel(
        *level_of(tl.program_id(0), walks, POINTERS, ARGUMENTS, UNIT),
        thresholds,
        threshold_groups,
        floors,
        totals,
        num_buckets,
        scale,
        ignore_index,
        AXES,
        CLASSES,
        FLAT,
        INVERSE_WIDTH,
        LARGEST,
        STEPS,
        GROUPED,
        BLOCK,
    )


def count_into_buckets(
    walks: list[Walk],
    thresholds: Tensor,
    floors: Tensor,
    inverse_width: float,
    scale: float,
    ignore_index: int,
    threshold_groups: Tensor | None = None,
    totals: Tensor | None = None,
) -> Tensor:
    """Pass 1 over all levels.

    Args:
        walks: the levels.
        thresholds: ``[2P]`` sorted knots, float32 or float64; NaN, which no score reaches, after all others. Without
            groups there may be more NaN already, up to the next power of two above 2P.
        floors: ``[2P + 1]`` finite lower ends of the buckets, same dtype.
        inverse_width: 1 / (2 delta), 0 for delta = 0.
        scale: units of the fixed point in 1.
        ignore_index: label of what is not counted.
        threshold_groups: ``[2P]`` int64, for walks with groups: the group of each threshold, ascending; thresholds are
            then sorted within each group. A score counts in its own group's buckets alone.
        totals: contiguous zeros to be added to and returned, where there are some already.

    Returns:
        ``[2, 2P + 2]`` int64: counts and offsets in units; the last column counts NaN. Bucket 0 is left at 0.
    """
    kernel = "buckets" if threshold_groups is None else "buckets_grouped"
    table = make_table(thresholds, threshold_groups, len(floors) - 1)
    if totals is None:
        totals = torch.zeros(2, len(floors) + 1, dtype=torch.int64, device=thresholds.device)

    levels = [
        make_level({"logits": walk.logits, "labels": walk.labels, "groups": walk.groups}, walk.arguments("x", "y", "z"))
        for walk in walks
    ]
    with on_device_of(thresholds):
        launch(
            kernel,
            (bucket_kernel, bucket_levels_kernel),
            levels,
            lambda: {"totals": torch.zeros_like(totals)},
            {
                **table.arguments(),
                "floors": floors,
                "totals": totals,
                "num_buckets": len(floors),
                "scale": scale,
                "ignore_index": ignore_index,
                "INVERSE_WIDTH": inverse_width,
                "LARGEST": torch.finfo(floors.dtype).max,
            },
        )
    return totals
