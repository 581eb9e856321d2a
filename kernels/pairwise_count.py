"""Pass 1 of the direct form: tiles of positives against tiles of logits. O(P M) work, any ramp; an independent check
of the linear form.

Sums, for each positive, H(n_j - p_i) over all logits: within a strip in float32, over strips by integer atomics in
fixed point. Positives come in blocks of ascending order (:mod:`.pairs`). In a close block a pair takes two
instructions, an addition with saturation and one that sums; what else there is to do for a logit is shared by a whole
block of positives. A thread keeps one sum for each of its positives, and takes a quarter of a tile of scores at a time
past them.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configurations import choose
from .pairs import in_close_block, is_plain, make_blocks, pair_constants, pair_function, pairs, with_function
from .walk import Walk, advance, elements_of, indices, is_negative, load, load_groups, on_device_of, steps_to


@triton.jit
def quarters(tile, WIDTH: tl.constexpr):
    """Every fourth element each, ``[WIDTH]`` of ``[4 * WIDTH]``."""
    even, odd = tl.split(tl.reshape(tile, [2 * WIDTH, 2]))
    first, third = tl.split(tl.reshape(even, [WIDTH, 2]))
    second, fourth = tl.split(tl.reshape(odd, [WIDTH, 2]))
    return first, second, third, fourth


@triton.jit(do_not_specialize=["ignore_index"])
def pairwise_count_kernel(
    logits,
    labels,
    groups,
    positives,
    bases,
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
    CLASSES: tl.constexpr,
    FLAT: tl.constexpr,
    INVERSE_WIDTH: tl.constexpr,
    SATURATE: tl.constexpr,
    CLOSE: tl.constexpr,
    GROUPED: tl.constexpr,
    CUSTOM: tl.constexpr,
    DELTA: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    TILES: tl.constexpr,
):
    # Of two launches one is for the close blocks and one for the others.
    base = tl.load(bases + tl.program_id(1))
    if (base == base) == CLOSE:
        WIDTH: tl.constexpr = BLOCK // 4
        begin = tl.program_id(0).to(tl.int64) * (BLOCK * TILES)
        i = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
        positive = tl.load(positives + i)[:, None]
        pos_group = load_groups(pos_groups, i, i < num_positives, GROUPED)[:, None]
        lane = tl.arange(0, BLOCK)
        sums = tl.zeros([BLOCK_P, WIDTH], positives.dtype.element_ty)
        num_above = tl.zeros([BLOCK], tl.int32)
        num_below = tl.zeros([BLOCK], tl.int32)
        num_nan = tl.zeros([BLOCK], tl.int32)
        i0, i1, i2, i3 = indices(begin, lane, size0, size1, size2, AXES, CLASSES)
        d0, d1, d2, d3 = indices(tl.full([], BLOCK, tl.int64), 0, size0, size1, size2, AXES, CLASSES)
        for _ in range(TILES):
            x_at = elements_of(begin + lane, i0, i1, i2, i3, x_step0, x_step1, x_step2, x_step3, AXES, FLAT)
            y_at = steps_to(i0, i1, i2, i3, y_step0, y_step1, y_step2, y_step3, AXES)
            there = begin + lane < num_logits
            score = load(logits + x_at, there, positives.dtype.element_ty)
            label = tl.load(labels + y_at, mask=there, other=0)
            counted = there & is_negative(label, i0, ignore_index, CLASSES)
            num_nan += (counted & (score != score)).to(tl.int32)
            # What does not count becomes NaN as well.
            score = tl.where(counted, score, float("nan"))
            if not GROUPED and not CUSTOM:
                num_above += (score == float("inf")).to(tl.int32)
                num_below += (score == float("-inf")).to(tl.int32)
            if CLOSE:
                score = in_close_block(score, base, INVERSE_WIDTH)
            score_a, score_b, score_c, score_d = quarters(score, WIDTH)
            group_a, group_b, group_c, group_d = score_a, score_b, score_c, score_d
            if GROUPED:
                z_at = steps_to(i0, i1, i2, i3, z_step0, z_step1, z_step2, z_step3, AXES)
                group_a, group_b, group_c, group_d = quarters(load_groups(groups, z_at, there, GROUPED), WIDTH)
            for quarter in tl.static_range(4):
                if quarter == 0:
                    score, group = score_a, group_a
                elif quarter == 1:
                    score, group = score_b, group_b
                elif quarter == 2:
                    score, group = score_c, group_c
                else:
                    score, group = score_d, group_d
                sums += pairs(
                    score[None, :],
                    positive,
                    group[None, :],
                    pos_group,
                    CLOSE,
                    INVERSE_WIDTH,
                    SATURATE,
                    GROUPED,
                    CUSTOM,
                    pair_function,
                    DELTA,
                )
            i0, i1, i2, i3 = advance(i0, i1, i2, i3, d0, d1, d2, d3, size0, size1, size2, AXES, CLASSES)
            begin += BLOCK
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
    plain = is_plain(pos_logits, pos_groups, function)
    kernel = "pairwise_count" if plain else "pairwise_count_general"
    fast = plain and inverse_width > 0
    totals = torch.zeros(1, num_pos + 3, dtype=torch.int64, device=pos_logits.device)
    ordered, order = pos_logits.sort(stable=True)
    blocks_of = cache(partial(make_blocks, ordered, inverse_width if fast else 0))

    def launch(walk: Walk, into: Tensor, block: int, block_p: int, tiles: int, num_warps: int) -> None:
        blocks = blocks_of(block_p)
        grid = (triton.cdiv(walk.num_logits, block * tiles), len(blocks.bases))
        for close in (True, False) if fast else (False,):
            with_function(pairwise_count_kernel, function)[grid](
                walk.logits,
                walk.labels,
                walk.groups,
                blocks.scaled if close else blocks.positives,
                blocks.bases,
                None if pos_groups is None else pos_groups[order],
                into,
                num_pos,
                scale,
                ignore_index,
                **walk.arguments("x", "y", "z"),
                **pair_constants(pos_logits, inverse_width),
                CLOSE=close,
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
    return totals.index_copy(1, order, totals[:, :num_pos])
