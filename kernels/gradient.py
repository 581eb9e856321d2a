"""Pass 2 of the linear form: every logit's gradient, level + slope * offset of its bucket; for positives, their own."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .levels import launch, level_of, make_level
from .search import NONE, find_bucket, make_table, number_below, offset_in_bucket, reaches_any
from .walk import Walk, elements_of, indices, is_negative, is_positive, load, load_groups, on_device_of, steps_to, store


@triton.jit
def with_positives(
    value, lane, first_index, pos_index, pos_gradient, pos_factor, num_positives, highest, BLOCK: tl.constexpr
):
    """A tile's values, with those of the positives that are in it; the place of each is a scalar, which takes no
    registers of its own."""
    k = number_below(first_index, pos_index, num_positives, highest)
    index = tl.load(pos_index + k, mask=k < num_positives, other=NONE)
    while index < first_index + BLOCK:
        own = tl.load(pos_gradient + k)
        if pos_factor is not None:
            own *= tl.load(pos_factor).to(tl.float64)
        value = tl.where(lane == (index - first_index).to(tl.int32), own.to(value.dtype), value)
        k += 1
        index = tl.load(pos_index + k, mask=k < num_positives, other=NONE)
    return value


@triton.jit(do_not_specialize=["first_index", "num_positives", "highest", "ignore_index"])
def gradient_kernel(
    tile,
    logits,
    labels,
    gradient,
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
    g_step0,
    g_step1,
    g_step2,
    g_step3,
    z_step0,
    z_step1,
    z_step2,
    z_step3,
    first_index,
    thresholds,
    threshold_groups,
    floors,
    levels,
    slopes,
    pos_index,
    pos_gradient,
    factor,
    pos_factor,
    num_positives,
    highest,
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
    g_at = elements_of(begin + lane, i0, i1, i2, i3, g_step0, g_step1, g_step2, g_step3, AXES, FLAT)
    there = begin + lane < num_logits
    score = load(logits + x_at, there, floors.dtype.element_ty)
    label = tl.load(labels + y_at, mask=there, other=0)
    negative = is_negative(label, i0, ignore_index, CLASSES)
    positive = is_positive(label, i0, ignore_index, CLASSES)

    # One look for two questions; of positives there are few.
    reaches = reaches_any(score, thresholds, STEPS, GROUPED)
    interest = tl.max(tl.where(there & positive, 2, reaches.to(tl.int32)))
    value = tl.zeros_like(score) + tl.load(levels)
    if interest > 0:
        z_at = steps_to(i0, i1, i2, i3, z_step0, z_step1, z_step2, z_step3, AXES)
        group = load_groups(groups, z_at, there, GROUPED)
        bucket = find_bucket(score, group, thresholds, threshold_groups, STEPS, GROUPED)
        offset = offset_in_bucket(score, bucket, floors, INVERSE_WIDTH, LARGEST)
        value = tl.load(levels + bucket) + tl.load(slopes + bucket) * offset
    if factor is not None:
        value *= tl.load(factor).to(value.dtype)
    # Positives that are not among the expected ones keep what a negative gets, which then is NaN.
    value = tl.where(negative | positive, value, 0.0)
    if interest > 1:
        value = with_positives(
            value, lane, first_index + begin, pos_index, pos_gradient, pos_factor, num_positives, highest, BLOCK
        )
    store(gradient + g_at, value, there)


@triton.jit(do_not_specialize=["num_positives", "highest", "ignore_index"])
def gradient_levels_kernel(
    walks,
    thresholds,
    threshold_groups,
    floors,
    levels,
    slopes,
    pos_index,
    pos_gradient,
    factor,
    pos_factor,
    num_positives,
    highest,
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
    gradient_kernel(
        *level_of(tl.program_id(0), walks, POINTERS, ARGUMENTS, UNIT),
        thresholds,
        threshold_groups,
        floors,
        levels,
        slopes,
        pos_index,
        pos_gradient,
        factor,
        pos_factor,
        num_positives,
        highest,
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


@triton.jit
def combine_kernel(rows, factors, sums, num_rows, length, BLOCK: tl.constexpr):
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for row in range(0, num_rows):
        value = tl.load(rows + row * length + lane, mask=lane < length, other=0)
        total += value * tl.load(factors + row).to(tl.float64)
    tl.store(sums + lane, total.to(sums.dtype.element_ty), mask=lane < length)


def combine(rows: Tensor, factors: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum of ``rows`` ``[K, ...]`` float64, each times its factor (``[K]``, any floats), rounded once to ``dtype``.
    One launch."""
    rows, factors = rows.contiguous(), factors.contiguous()
    sums = torch.empty(rows.shape[1:], dtype=dtype, device=rows.device)
    if sums.numel():
        with on_device_of(rows):
            combine_kernel[(triton.cdiv(sums.numel(), 256),)](
                rows, factors, sums, len(rows), sums.numel(), BLOCK=256, num_warps=4
            )
    return sums


def write_linear_gradient(
    walks: list[Walk],
    thresholds: Tensor,
    floors: Tensor,
    coefficients: Tensor,
    inverse_width: float,
    ignore_index: int,
    threshold_groups: Tensor | None = None,
    *,
    pos_index: Tensor,
    pos_gradient: Tensor,
    factor: Tensor | None = None,
    pos_factor: Tensor | None = None,
) -> None:
    """Pass 2 over all levels: fill the walks' gradients.

    Args:
        walks: the levels.
        thresholds, floors, threshold_groups: as in pass 1.
        coefficients: ``[2, 2P + 1]``, level and slope of each bucket, in the dtype of ``floors``.
        inverse_width: 1 / (2 delta), 0 for delta = 0.
        ignore_index: label of what gets 0.
        pos_index: ``[P]`` int64, flat indices of the positives (row-major, level after level), ascending. Positives
            that it lacks get something, but nothing out of bounds is read for them.
        pos_gradient: ``[P]`` float64, what positives get.
        factor: a float scalar by which what negatives get is multiplied, before it is rounded to the logits' dtype.
            What is ignored gets 0 whatever it is.
        pos_factor: the same for what positives get.
    """
    kernel = "gradient" if threshold_groups is None else "gradient_grouped"
    table = make_table(thresholds, threshold_groups, len(floors) - 1)
    levels, slopes = coefficients.contiguous()
    to_write, first_index = [], 0
    for walk in walks:
        pointers = {"logits": walk.logits, "labels": walk.labels, "gradient": walk.gradient, "groups": walk.groups}
        to_write.append(make_level(pointers, walk.arguments("x", "y", "g", "z"), first_index=first_index))
        first_index += walk.num_logits
    with on_device_of(thresholds):
        launch(
            kernel,
            (gradient_kernel, gradient_levels_kernel),
            to_write,
            # To write twice is to write the same.
            dict,
            {
                **table.arguments(),
                "floors": floors,
                "levels": levels,
                "slopes": slopes,
                "pos_index": pos_index.contiguous(),
                "pos_gradient": pos_gradient.contiguous(),
                "factor": factor,
                "pos_factor": pos_factor,
                "num_positives": len(pos_index),
                "highest": 1 << len(pos_index).bit_length() >> 1,
                "ignore_index": ignore_index,
                "INVERSE_WIDTH": inverse_width,
                "LARGEST": torch.finfo(floors.dtype).max,
            },
        )
