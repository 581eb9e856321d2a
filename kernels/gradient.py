"""Pass 2 of the linear form: every logit's gradient, level + slope * offset of its bucket; then the positives' own."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .levels import launch, level_of, make_level
from .search import find_bucket, make_table, offset_in_bucket, reaches_any
from .walk import Walk, elements_of, indices, is_negative, load, load_groups, on_device_of, steps_to, store


@triton.jit(do_not_specialize=["ignore_index"])
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
    thresholds,
    threshold_groups,
    floors,
    levels,
    slopes,
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

    value = tl.zeros_like(score) + tl.load(levels)
    if tl.max(reaches_any(score, thresholds, STEPS, GROUPED).to(tl.int32)) > 0:
        z_at = steps_to(i0, i1, i2, i3, z_step0, z_step1, z_step2, z_step3, AXES)
        group = load_groups(groups, z_at, there, GROUPED)
        bucket = find_bucket(score, group, thresholds, threshold_groups, STEPS, GROUPED)
        offset = offset_in_bucket(score, bucket, floors, INVERSE_WIDTH, LARGEST)
        value = tl.load(levels + bucket) + tl.load(slopes + bucket) * offset
    value = tl.where(negative, value, 0.0)
    store(gradient + g_at, value, there)


@triton.jit(do_not_specialize=["ignore_index"])
def gradient_levels_kernel(
    walks,
    thresholds,
    threshold_groups,
    floors,
    levels,
    slopes,
    ignore_index,
    POINTERS: tl.constexpr,
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
        *level_of(tl.program_id(0), walks, POINTERS, UNIT),
        thresholds,
        threshold_groups,
        floors,
        levels,
        slopes,
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
def positives_kernel(
    gradient,
    pos_index,
    pos_gradient,
    first_index,
    num_positives,
    num_logits,
    size0,
    size1,
    size2,
    g_step0,
    g_step1,
    g_step2,
    g_step3,
    AXES: tl.constexpr,
    CLASSES: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = lane < num_positives
    index = tl.load(pos_index + lane, mask=there, other=0) - first_index
    inside = there & (index >= 0) & (index < num_logits)
    value = tl.load(pos_gradient + lane, mask=inside, other=0)
    # Few enough to divide each 64-bit index along all axes.
    i0, i1, i2, i3 = indices(index, 0, size0, size1, size2, AXES, CLASSES)
    at = elements_of(index, i0, i1, i2, i3, g_step0, g_step1, g_step2, g_step3, AXES, FLAT)
    store(gradient + at, value, inside)


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
) -> None:
    """Pass 2 over all levels: fill the walks' gradients. Positives get 0.

    Args:
        walks: the levels.
        thresholds, floors, threshold_groups: as in pass 1.
        coefficients: ``[2, 2P + 1]``, level and slope of each bucket, in the dtype of ``floors``.
        inverse_width: 1 / (2 delta), 0 for delta = 0.
        ignore_index: label of what gets 0.
    """
    kernel = "gradient" if threshold_groups is None else "gradient_grouped"
    table = make_table(thresholds, threshold_groups, len(floors) - 1)
    levels, slopes = coefficients.contiguous()

    to_write = [
        make_level(
            {"logits": walk.logits, "labels": walk.labels, "gradient": walk.gradient, "groups": walk.groups},
            walk.arguments("x", "y", "g", "z"),
        )
        for walk in walks
    ]
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
                "ignore_index": ignore_index,
                "INVERSE_WIDTH": inverse_width,
                "LARGEST": torch.finfo(floors.dtype).max,
            },
        )


def write_positives(walks: list[Walk], pos_index: Tensor, pos_gradient: Tensor) -> None:
    """Write ``pos_gradient`` ``[P]`` at flat indices ``pos_index`` ``[P]`` (row-major, level after level)."""
    if len(pos_index) == 0:
        return
    first_index = 0
    with on_device_of(pos_index):
        for walk in walks:
            if walk.num_logits:
                positives_kernel[(triton.cdiv(len(pos_index), 256),)](
                    walk.gradient,
                    pos_index,
                    pos_gradient,
                    first_index,
                    len(pos_index),
                    **walk.arguments("g"),
                    BLOCK=256,
                )
            first_index += walk.num_logits
