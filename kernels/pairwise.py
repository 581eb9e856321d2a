"""The direct form: tiles of positives against tiles of logits. O(P M) work, any ramp; an independent check of the
linear form.

Pass 1 sums, for each positive, H(n_j - p_i) over all logits: within a strip in float32, over strips by
integer atomics in fixed point. Pass 2 sums w_i H(n_j - p_i) over all positives for each logit, in a fixed
order: in groups, and over groups with the rounding of each addition carried along (Kahan), so that thousands of
positives cost no digits.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configurations import choose
from .pairs import load_positives, pair_constants, pair_function, pairs, with_function
from .walk import Walk, indices, is_negative, load, load_groups, on_device_of, steps_to, store


@triton.jit(do_not_specialize=["ignore_index"])
def pairwise_count_kernel(
    logits,
    labels,
    groups,
    positives,
    pos_groups,
    totals,
    num_positives,
    scale,
    ignore_index,
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
    AXES: tl.constexpr,
    PER_CLASS: tl.constexpr,
    INVERSE_WIDTH: tl.constexpr,
    SATURATE: tl.constexpr,
    GROUPED: tl.constexpr,
    CUSTOM: tl.constexpr,
    DELTA: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    TILES: tl.constexpr,
):
    strip = tl.program_id(0).to(tl.int64) * (BLOCK * TILES)
    i = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    positive = load_positives(positives, i, num_positives, CUSTOM)
    pos_group = load_groups(pos_groups, i, i < num_positives, GROUPED)
    lane = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK_P, BLOCK], positives.dtype.element_ty)
    num_above = tl.zeros([BLOCK], tl.int32)
    num_below = tl.zeros([BLOCK], tl.int32)
    num_nan = tl.zeros([BLOCK], tl.int32)
    for tile in range(TILES):
        begin = strip + tile * BLOCK
        i0, i1, i2, i3 = indices(begin, lane, size0, size1, size2, AXES)
        x_at = steps_to(i0, i1, i2, i3, x_step0, x_step1, x_step2, x_step3, AXES)
        y_at = steps_to(i0, i1, i2, i3, y_step0, y_step1, y_step2, y_step3, AXES)
        there = begin + lane < num_logits
        score = load(logits + x_at, there, positives.dtype.element_ty)
        label = tl.load(labels + y_at, mask=there, other=0)
        counted = there & is_negative(label, i0, ignore_index, PER_CLASS)
        num_nan += (counted & (score != score)).to(tl.int32)
        # What does not count becomes NaN as well.
        score = tl.where(counted, score, float("nan"))
        if not GROUPED and not CUSTOM:
            num_above += (score == float("inf")).to(tl.int32)
            num_below += (score == float("-inf")).to(tl.int32)
        z_at = steps_to(i0, i1, i2, i3, z_step0, z_step1, z_step2, z_step3, AXES)
        group = load_groups(groups, z_at, there, GROUPED)
        sums += pairs(score, positive, group, pos_group, INVERSE_WIDTH, SATURATE, GROUPED, CUSTOM, pair_function, DELTA)
    sums = tl.sum(sums, axis=1)
    if CUSTOM:
        # A NaN that the function made counts as one that it was given.
        failed = (sums != sums) & (i < num_positives)
        tl.atomic_add(totals + num_positives + 2, tl.sum(failed.to(tl.int32)).to(tl.int64), sem="relaxed")
        sums = tl.where(failed, 0.0, sums)
    units = (sums * scale).to(tl.int64)
    tl.atomic_add(totals + i, units, mask=i < num_positives, sem="relaxed")
    if tl.program_id(1) == 0:
        if not GROUPED and not CUSTOM:
            tl.atomic_add(totals + num_positives, tl.sum(num_above).to(tl.int64), sem="relaxed")
            tl.atomic_add(totals + num_positives + 1, tl.sum(num_below).to(tl.int64), sem="relaxed")
        tl.atomic_add(totals + num_positives + 2, tl.sum(num_nan).to(tl.int64), sem="relaxed")


@triton.jit(do_not_specialize=["ignore_index"])
def pairwise_gradient_kernel(
    logits,
    labels,
    gradient,
    groups,
    positives,
    pos_groups,
    weights,
    num_positives,
    ignore_index,
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
    AXES: tl.constexpr,
    PER_CLASS: tl.constexpr,
    INVERSE_WIDTH: tl.constexpr,
    SATURATE: tl.constexpr,
    GROUPED: tl.constexpr,
    CUSTOM: tl.constexpr,
    DELTA: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    i0, i1, i2, i3 = indices(begin, lane, size0, size1, size2, AXES)
    x_at = steps_to(i0, i1, i2, i3, x_step0, x_step1, x_step2, x_step3, AXES)
    y_at = steps_to(i0, i1, i2, i3, y_step0, y_step1, y_step2, y_step3, AXES)
    g_at = steps_to(i0, i1, i2, i3, g_step0, g_step1, g_step2, g_step3, AXES)
    there = begin + lane < num_logits
    score = load(logits + x_at, there, positives.dtype.element_ty)
    label = tl.load(labels + y_at, mask=there, other=0)
    negative = is_negative(label, i0, ignore_index, PER_CLASS)

    z_at = steps_to(i0, i1, i2, i3, z_step0, z_step1, z_step2, z_step3, AXES)
    group = load_groups(groups, z_at, there, GROUPED)

    # After the weights: what the positives at +inf and at -inf give to scores there, and a constant (0 or NaN) for all.
    value = tl.zeros_like(score) + tl.load(weights + num_positives + 2)
    if not GROUPED and not CUSTOM:
        value += tl.where(score == float("inf"), tl.load(weights + num_positives), 0.0)
        value += tl.where(score == float("-inf"), tl.load(weights + num_positives + 1), 0.0)
    lost = tl.zeros_like(score)
    for begin_p in range(0, num_positives, BLOCK_P * BLOCKS):
        sums = tl.zeros([BLOCK_P, BLOCK], positives.dtype.element_ty)
        for block in range(BLOCKS):
            i = begin_p + block * BLOCK_P + tl.arange(0, BLOCK_P)
            positive = load_positives(positives, i, num_positives, CUSTOM)
            weight = tl.load(weights + i, mask=i < num_positives, other=0)
            pos_group = load_groups(pos_groups, i, i < num_positives, GROUPED)
            h = pairs(score, positive, group, pos_group, INVERSE_WIDTH, SATURATE, GROUPED, CUSTOM, pair_function, DELTA)
            sums += h * weight[:, None]
        term = tl.sum(sums, axis=0) - lost
        total = value + term
        lost = (total - value) - term
        value = total
    value = tl.where(negative, value, 0.0)
    store(gradient + g_at, value, there)


def count_pairs(
    walks: list[Walk],
    pos_logits: Tensor,
    inverse_width: float,
    scale: float,
    ignore_index: int,
    pos_groups: Tensor | None = None,
    function: Any = None,
    delta: float = 0.0,
) -> Tensor:
    """Pass 1: N_FP(i) in fixed point.

    Args:
        walks: the levels.
        pos_logits: ``[P]``, float32 or float64.
        inverse_width: 1 / (2 delta), 0 for delta = 0.
        scale: units of the fixed point in 1.
        ignore_index: label of what is not counted.
        pos_groups: ``[P]`` int64, for walks with groups: the group of each positive. Only pairs of one group count.
        function: a ``@triton.jit`` device function f(x, delta) of the differences n_j - p_i, in the place of H. What it
            returns is clamped into [0, 1].
        delta: the second argument of ``function``.

    Returns:
        ``[1, P + 3]`` int64: N_FP of each positive in units, without equal infinities; then how many negatives are
        +inf, -inf, and NaN. With groups or a function, equal infinities are pairs as others are (x = 0), the two
        numbers of infinite negatives stay 0, and a NaN that the function makes of a number is among the NaN.
    """
    num_pos = len(pos_logits)
    kernel = "pairwise_count" if pos_groups is None and function is None else "pairwise_count_general"
    totals = torch.zeros(1, num_pos + 3, dtype=torch.int64, device=pos_logits.device)

    def launch(walk: Walk, into: Tensor, block: int, block_p: int, tiles: int, num_warps: int) -> None:
        grid = (triton.cdiv(walk.num_logits, block * tiles), max(1, triton.cdiv(num_pos, block_p)))
        with_function(pairwise_count_kernel, function)[grid](
            walk.logits,
            walk.labels,
            walk.groups,
            pos_logits,
            pos_groups,
            into,
            num_pos,
            scale,
            ignore_index,
            **walk.arguments("x", "y", "z"),
            **pair_constants(pos_logits, inverse_width),
            PER_CLASS=walk.per_class,
            GROUPED=pos_groups is not None,
            CUSTOM=function is not None,
            DELTA=delta,
            BLOCK=block,
            BLOCK_P=block_p,
            TILES=tiles,
            num_warps=num_warps,
        )

    def rehearse(walk: Walk, **settings: int) -> None:
        launch(walk, torch.zeros_like(totals), **settings)

    with on_device_of(pos_logits):
        for walk in walks:
            if walk.num_logits:
                launch(walk, totals, **choose(kernel, walk.logits, partial(rehearse, walk)))
    return totals


def write_pairwise_gradient(
    walks: list[Walk],
    pos_logits: Tensor,
    weights: Tensor,
    inverse_width: float,
    ignore_index: int,
    pos_groups: Tensor | None = None,
    function: Any = None,
    delta: float = 0.0,
) -> None:
    """Pass 2: fill the walks' gradients; positives get 0.

    Args:
        walks: the levels.
        pos_logits, pos_groups, function, delta: as in pass 1.
        weights: ``[P + 3]`` in the dtype of ``pos_logits``; the last three are added to the gradients of negatives at
            +inf, of those at -inf, and of all; with groups or a function, the last alone.
        inverse_width: 1 / (2 delta), 0 for delta = 0.
        ignore_index: label of what gets 0.
    """
    kernel = "pairwise_gradient" if pos_groups is None and function is None else "pairwise_gradient_general"

    def launch(walk: Walk, block: int, block_p: int, blocks: int, num_warps: int) -> None:
        with_function(pairwise_gradient_kernel, function)[(triton.cdiv(walk.num_logits, block),)](
            walk.logits,
            walk.labels,
            walk.gradient,
            walk.groups,
            pos_logits,
            pos_groups,
            weights,
            len(pos_logits),
            ignore_index,
            **walk.arguments("x", "y", "g", "z"),
            **pair_constants(pos_logits, inverse_width),
            PER_CLASS=walk.per_class,
            GROUPED=pos_groups is not None,
            CUSTOM=function is not None,
            DELTA=delta,
            BLOCK=block,
            BLOCK_P=block_p,
            BLOCKS=blocks,
            num_warps=num_warps,
        )

    with on_device_of(pos_logits):
        for walk in walks:
            if walk.num_logits:
                launch(walk, **choose(kernel, walk.logits, partial(launch, walk)))
