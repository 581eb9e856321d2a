"""Pass 2 of the direct form: every logit's gradient, the sum of w_i H(n_j - p_i) over all positives.

In a fixed order: a few positives one after the other, then what they add up to over a block, and over blocks with the
rounding of each addition carried along (Kahan), so that thousands of positives cost no digits. Positives come in blocks
of ascending order (:mod:`.pairs`). A thread keeps several scores, so that the loads of a positive and of its weight are
shared; in a close block a pair takes two instructions, an addition with saturation and a multiply-add.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .configurations import choose
from .pairs import in_close_block, is_plain, make_blocks, pair_constants, pair_function, pairs, with_function
from .walk import Walk, elements_of, indices, is_negative, load, load_groups, on_device_of, steps_to, store

# Positives whose terms are added up first; divides every size of a block.
IN_TURN = tl.constexpr(16)


@triton.jit
def weighted_sums(
    score,
    group,
    positives,
    pos_groups,
    weights,
    first,
    num_positives,
    CLOSE: tl.constexpr,
    INVERSE_WIDTH: tl.constexpr,
    SATURATE: tl.constexpr,
    GROUPED: tl.constexpr,
    CUSTOM: tl.constexpr,
    FUNCTION: tl.constexpr,
    DELTA: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Sum over one block of positives of weight times H(score - positive), for each score."""
    sums = tl.zeros_like(score)
    for begin in range(0, BLOCK_P, IN_TURN):
        some = tl.zeros_like(score)
        for k in tl.static_range(IN_TURN):
            i = first + begin + k
            positive = tl.broadcast_to(tl.load(positives + i), score.shape)
            pos_group = load_groups(pos_groups, i, i < num_positives, GROUPED)
            h = pairs(
                score,
                positive,
                group,
                pos_group,
                CLOSE,
                INVERSE_WIDTH,
                SATURATE,
                GROUPED,
                CUSTOM,
                FUNCTION,
                DELTA,
            )
            some += h * tl.load(weights + i)
        sums += some
    return sums


@triton.jit(do_not_specialize=["ignore_index"])
def pairwise_gradient_kernel(
    logits,
    labels,
    gradient,
    groups,
    positives,
    scaled,
    bases,
    pos_groups,
    weights,
    at_infinities,
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
    CLASSES: tl.constexpr,
    FLAT: tl.constexpr,
    INVERSE_WIDTH: tl.constexpr,
    SATURATE: tl.constexpr,
    MAY_BE_CLOSE: tl.constexpr,
    GROUPED: tl.constexpr,
    CUSTOM: tl.constexpr,
    DELTA: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    i0, i1, i2, i3 = indices(begin, lane, size0, size1, size2, AXES, CLASSES)
    x_at = elements_of(begin + lane, i0, i1, i2, i3, x_step0, x_step1, x_step2, x_step3, AXES, FLAT)
    y_at = steps_to(i0, i1, i2, i3, y_step0, y_step1, y_step2, y_step3, AXES)
    g_at = elements_of(begin + lane, i0, i1, i2, i3, g_step0, g_step1, g_step2, g_step3, AXES, FLAT)
    there = begin + lane < num_logits
    score = load(logits + x_at, there, positives.dtype.element_ty)
    label = tl.load(labels + y_at, mask=there, other=0)
    negative = is_negative(label, i0, ignore_index, CLASSES)

    z_at = steps_to(i0, i1, i2, i3, z_step0, z_step1, z_step2, z_step3, AXES)
    group = load_groups(groups, z_at, there, GROUPED)

    # What the positives at +inf and at -inf give to scores there, and a constant (0 or NaN) for all.
    value = tl.zeros_like(score) + tl.load(at_infinities + 2)
    if not GROUPED and not CUSTOM:
        value += tl.where(score == float("inf"), tl.load(at_infinities), 0.0)
        value += tl.where(score == float("-inf"), tl.load(at_infinities + 1), 0.0)
    lost = tl.zeros_like(score)
    for first in range(0, num_positives, BLOCK_P):
        base = tl.load(bases + first // BLOCK_P)
        if MAY_BE_CLOSE and base == base:
            sums = weighted_sums(
                in_close_block(score, base, INVERSE_WIDTH),
                group,
                scaled,
                pos_groups,
                weights,
                first,
                num_positives,
                True,
                INVERSE_WIDTH,
                SATURATE,
                GROUPED,
                CUSTOM,
                pair_function,
                DELTA,
                BLOCK_P,
            )
        else:
            sums = weighted_sums(
                score,
                group,
                positives,
                pos_groups,
                weights,
                first,
                num_positives,
                False,
                INVERSE_WIDTH,
                SATURATE,
                GROUPED,
                CUSTOM,
                pair_function,
                DELTA,
                BLOCK_P,
            )
        term = sums - lost
        total = value + term
        lost = (total - value) - term
        value = total
    value = tl.where(negative, value, 0.0)
    store(gradient + g_at, value, there)


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
    num_pos = len(pos_logits)
    plain = is_plain(pos_logits, pos_groups, function)
    kernel = "pairwise_gradient" if plain else "pairwise_gradient_general"
    fast = plain and inverse_width > 0
    ordered, order = pos_logits.sort(stable=True)
    ordered_weights, at_infinities = weights[order], weights[num_pos:].clone()
    blocks_of = cache(partial(make_blocks, ordered, inverse_width if fast else 0))

    def launch(walk: Walk, block: int, block_p: int, num_warps: int) -> None:
        blocks = blocks_of(block_p)
        with_function(pairwise_gradient_kernel, function)[(triton.cdiv(walk.num_logits, block),)](
            walk.logits,
            walk.labels,
            walk.gradient,
            walk.groups,
            blocks.positives,
            blocks.scaled,
            blocks.bases,
            None if pos_groups is None else pos_groups[order],
            F.pad(ordered_weights, (0, len(blocks.positives) - num_pos)),
            at_infinities,
            num_pos,
            ignore_index,
            **walk.arguments("x", "y", "g", "z"),
            **pair_constants(pos_logits, inverse_width),
            MAY_BE_CLOSE=fast,
            GROUPED=pos_groups is not None,
            CUSTOM=function is not None,
            DELTA=delta,
            BLOCK=block,
            BLOCK_P=block_p,
            num_warps=num_warps,
        )

    with on_device_of(pos_logits):
        for walk in walks:
            if walk.num_logits:
                launch(walk, **choose(kernel, walk.logits, partial(launch, walk)))
