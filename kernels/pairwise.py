"""The direct form of both passes compares every logit with every positive, tile by tile. It takes O(P M) work and is an
independent check of the linear form.

Positives are sorted and cut into blocks. The positives of a block mostly lie close together. For a score s and each of
these positives p one saturated addition is enough: H(s - p) = sat(t - q), with t = (s - base) / (2 delta) + 1/2 and q =
(p - base) / (2 delta), for a base in the middle of the block. The rounding of t and q is that of numbers near 1. If the
positives of a block lie further apart, the difference s - p is scaled, with one more instruction.

Pass 1 sums, for each positive, H(n_j - p_i) over all logits: within a strip in float32, over strips by integer atomics
in fixed point. Pass 2 sums, for each logit, w_i H(n_j - p_i) over all positives: first a few in sequence, then these
sums over a block, then over blocks with compensated (Kahan) summation, so that thousands of positives cost no
precision. In a close block a pair takes two instructions in each pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .lanes import (
    address,
    address_of_label,
    address_or_position,
    is_positive,
    load,
    places,
    store,
    takes_part,
    within,
)
from .launch import join, level_of, on_device_of, ramp_of, settings_for, tiles_of
from .layout import Walk
from .ramp import heights_in_kind, saturated
from .write import Factors, Own, with_positives

# Largest extent of a close block in units of 2 delta: t and q are then below 3 if H is neither 0 nor 1, and H is right
# to 3e-7.
_CLOSE_WIDTHS = 2.0
# Number of positives whose terms are added first; divides every block size.
_IN_TURN = tl.constexpr(16)


# Kinds of blocks: any; without an infinite positive; and close together.
_ANY, _FINITE, _CLOSE = (tl.constexpr(kind) for kind in range(3))


class Blocks(NamedTuple):
    """Positives in ascending order, in blocks of one size; the last is padded with NaN."""

    positives: Any
    """``[blocks * size]``"""
    scaled: Any
    """``[blocks * size]``: (p - base) / (2 delta)."""
    bases: Any
    """``[blocks]``: infinite for a block with an infinity, NaN for another block that is not close."""
    groups: Any = None
    """``[blocks * size]`` int64, or None."""
    weights: Any = None
    """``[blocks * size]``, for pass 2; 0 in the padding."""
    constant: Any = None
    """``[1]``, added to all."""


def make_blocks(positives: Tensor, inverse_width: float, size: int) -> Blocks:
    """Cut positives into blocks.

    Args:
        positives: ``[P]`` float32 or float64, ascending.
        inverse_width: 1 / (2 delta).
        size: of a block.
    """
    padded = _fill_up(positives, size, torch.nan).view(-1, size)
    # The padding of the last block does not widen it; a positive that is NaN does.
    highest = padded[:, -1].clone()
    highest[-1:] = positives[-1:] if len(positives) else torch.nan
    lowest, highest = padded[:, 0].double(), highest.double()
    bases = torch.where((highest - lowest) * inverse_width <= _CLOSE_WIDTHS, (lowest + highest) / 2, torch.nan)
    bases = bases.masked_fill(padded.isinf().any(1), torch.inf).to(positives.dtype)
    scaled = ((padded.double() - bases.double()[:, None]) * inverse_width).to(positives.dtype)
    return Blocks(padded.view(-1), scaled.view(-1), bases)


def _fill_up(values: Tensor, size: int, value: float) -> Tensor:
    """Pad to whole blocks, at least one."""
    return F.pad(values, (0, max(1, triton.cdiv(len(values), size)) * size - len(values)), value=value)


@triton.jit
def kind_of(base):
    """The kind of a block."""
    return tl.where(base != base, _FINITE, tl.where(tl.abs(base) < float("inf"), _CLOSE, _ANY))


@triton.jit
def scores_for(score, base, KIND: tl.constexpr, ramp):
    """Scores in the form that :func:`pairs` takes: for a close block t = (score - base) / (2 delta) + 1/2."""
    return (score - base) * ramp.inverse_width + 0.5 if KIND == _CLOSE else score


@triton.jit
def pairs(score, positive, group, pos_group, KIND: tl.constexpr, GROUPED: tl.constexpr, ramp):
    """H(score - positive) for broadcastable shapes; 0 if either is NaN, and for pairs of different groups. Scores and
    positives of a close block are given as t and q."""
    if KIND == _CLOSE and ramp.saturate:
        h = tl.inline_asm_elementwise(
            "sub.sat.f32 $0, $1, $2;", "=f,f,f", [score, positive], dtype=tl.float32, is_pure=True, pack=1
        )
    elif KIND == _CLOSE:
        h = score - positive
        h = tl.where(h > 0, tl.where(h < 1, h, 1.0), 0.0)
    elif KIND == _FINITE and ramp.saturate:
        h = saturated(score - positive, ramp)
    else:
        h = heights_in_kind(score, positive, ramp)
    if GROUPED:
        h = tl.where(group == pos_group, h, 0.0)
    return h


@triton.jit
def quarters(tile, WIDTH: tl.constexpr):
    """Four parts with every fourth element, ``[WIDTH]`` of ``[4 * WIDTH]``."""
    even, odd = tl.split(tl.reshape(tile, [2 * WIDTH, 2]))
    first, third = tl.split(tl.reshape(even, [WIDTH, 2]))
    second, fourth = tl.split(tl.reshape(odd, [WIDTH, 2]))
    return first, second, third, fourth


@triton.jit
def advance(at, by, levels, level):
    """Indices after a distance with the indices ``by``, without divisions."""
    size0 = levels.CLASSES if levels.CLASSES > 0 else level.sizes[0]
    i0 = at[0] + by[0]
    if levels.AXES == 1:
        return i0, i0, i0, i0
    else:
        carry0 = (i0 >= size0).to(tl.int32)
        i0, i1 = i0 - carry0 * size0, at[1] + by[1] + carry0
        if levels.AXES == 2:
            return i0, i1, i1, i1
        else:
            carry1 = (i1 >= level.sizes[1]).to(tl.int32)
            i1, i2 = i1 - carry1 * level.sizes[1], at[2] + by[2] + carry1
            if levels.AXES == 3:
                return i0, i1, i2, i2
            else:
                carry2 = (i2 >= level.sizes[2]).to(tl.int32)
                return i0, i1, i2 - carry2 * level.sizes[2], at[3] + by[3] + carry2


@triton.jit(do_not_specialize=["num_positives", "ignore_index"])
def pairwise_count_kernel(
    levels,
    blocks,
    totals,
    num_positives,
    scale,
    ignore_index,
    ramp,
    KIND: tl.constexpr,
    ALL: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    TILES: tl.constexpr,
):
    # Each of the three launches is for the blocks of one kind.
    base = tl.load(blocks.bases + tl.program_id(1))
    if ALL or kind_of(base) == KIND:
        WIDTH: tl.constexpr = BLOCK // 4
        GROUPED: tl.constexpr = blocks.groups is not None
        level = level_of(levels, tl.program_id(0))
        begin, lane = level.tile.to(tl.int64) * (BLOCK * TILES), tl.arange(0, BLOCK)
        i = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
        positive = tl.load((blocks.scaled if KIND == _CLOSE else blocks.positives) + i)[:, None]
        pos_group = positive
        if GROUPED:
            pos_group = tl.load(blocks.groups + i)[:, None]
        dtype: tl.constexpr = blocks.positives.dtype.element_ty
        sums = tl.zeros([BLOCK_P, WIDTH], dtype)
        num_nan = tl.zeros([BLOCK], tl.int32)
        at, by = places(levels, level, begin, lane, BLOCK), places(levels, level, tl.full([], BLOCK, tl.int64), 0, 0)
        for _ in range(TILES):
            x_at = address_or_position(begin + lane, at, level.logit_steps, levels)
            there = within(begin, lane, level.num_logits, BLOCK)
            score = load(level.logits + x_at, there, dtype)
            label = tl.load(level.labels + address_of_label(at, levels, level), mask=there, other=0)
            counted = there & takes_part(label, ignore_index, levels.CLASSES)
            counted = counted & ~is_positive(label, at[0], levels.CLASSES)
            num_nan += (counted & (score != score)).to(tl.int32)
            # Logits that do not count become NaN too.
            score = scores_for(tl.where(counted, score, float("nan")), base, KIND, ramp)
            scores = quarters(score, WIDTH)
            groups = scores
            if GROUPED:
                group = tl.load(level.groups + address(at, level.group_steps, levels.AXES), mask=there, other=0)
                groups = quarters(group.to(tl.int64), WIDTH)
            for q in tl.static_range(4):
                sums += pairs(scores[q][None, :], positive, groups[q][None, :], pos_group, KIND, GROUPED, ramp)
            at = advance(at, by, levels, level)
            begin += BLOCK
        units = (tl.sum(sums, axis=1) * scale).to(tl.int64)
        tl.atomic_add(totals + i, units, mask=i < num_positives, sem="relaxed")
        if tl.program_id(1) == 0:
            tl.atomic_add(totals + num_positives, tl.sum(num_nan).to(tl.int64), sem="relaxed")


@triton.jit
def weighted_sums(
    score, group, positives, blocks, first, KIND: tl.constexpr, GROUPED: tl.constexpr, ramp, BLOCK_P: tl.constexpr
):
    """Sum over one block of positives of weight times H(score - positive), for each score."""
    sums = tl.zeros_like(score)
    for begin in range(0, BLOCK_P, _IN_TURN):
        some = tl.zeros_like(score)
        for k in tl.static_range(_IN_TURN):
            i = first + begin + k
            positive, pos_group = tl.broadcast_to(tl.load(positives + i), score.shape), i
            if GROUPED:
                pos_group = tl.load(blocks.groups + i)
            some += pairs(score, positive, group, pos_group, KIND, GROUPED, ramp) * tl.load(blocks.weights + i)
        sums += some
    return sums


@triton.jit(do_not_specialize=["num_positives", "num_own", "highest", "ignore_index"])
def pairwise_write_kernel(
    levels,
    blocks,
    own,
    factors,
    num_positives,
    num_own,
    highest,
    ignore_index,
    ramp,
    FAST: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    level = level_of(levels, tl.program_id(0))
    begin, lane = level.tile.to(tl.int64) * BLOCK, tl.arange(0, BLOCK)
    at = places(levels, level, begin, lane, BLOCK)
    x_at = address_or_position(begin + lane, at, level.logit_steps, levels)
    there = within(begin, lane, level.num_logits, BLOCK)
    score = load(level.logits + x_at, there, blocks.positives.dtype.element_ty)
    label = tl.load(level.labels + address_of_label(at, levels, level), mask=there, other=0)
    counted = takes_part(label, ignore_index, levels.CLASSES)
    positive = there & counted & is_positive(label, at[0], levels.CLASSES)
    GROUPED: tl.constexpr = blocks.groups is not None
    group = lane
    if GROUPED:
        z_at = address(at, level.group_steps, levels.AXES)
        group = tl.load(level.groups + z_at, mask=there, other=0).to(tl.int64)

    value = tl.zeros_like(score) + tl.load(blocks.constant)
    lost = tl.zeros_like(score)
    for first in range(0, num_positives, BLOCK_P):
        base = tl.load(blocks.bases + first // BLOCK_P)
        kind = kind_of(base)
        if FAST and kind == _CLOSE:
            t = scores_for(score, base, _CLOSE, ramp)
            sums = weighted_sums(t, group, blocks.scaled, blocks, first, _CLOSE, GROUPED, ramp, BLOCK_P)
        elif FAST and kind == _FINITE:
            sums = weighted_sums(score, group, blocks.positives, blocks, first, _FINITE, GROUPED, ramp, BLOCK_P)
        else:
            sums = weighted_sums(score, group, blocks.positives, blocks, first, _ANY, GROUPED, ramp, BLOCK_P)
        term = sums - lost
        total = value + term
        lost = (total - value) - term
        value = total
    value = tl.where(counted, value, 0.0)
    if tl.max(positive.to(tl.int32)) > 0:
        value = with_positives(value, lane, level.first_index + begin, own, factors, num_own, highest, BLOCK)
    store(level.gradient + address_or_position(begin + lane, at, level.gradient_steps, levels), value, there)


def count_pairs(
    walks: Sequence[Walk],
    pos_logits: Tensor,
    pos_groups: Tensor | None,
    totals: Tensor,
    delta: float,
    scale: float,
    ignore_index: int,
) -> None:
    """Pass 1: N_FP(i) in fixed point.

    Args:
        walks: the levels.
        pos_logits: ``[P]``, float32 or float64.
        pos_groups: ``[P]`` int64: the group of each positive, or None. Only pairs of one group count.
        totals: ``[P + 1]`` int64 zeros; they become N_FP of each positive in units, and last the number of negatives
            that are NaN.
        delta: half width of the ramp.
        scale: units of the fixed point in 1.
        ignore_index: label of logits that are not counted.
    """
    ordered, order = pos_logits.sort(stable=True)
    name, fast = _kind("pairwise_count", pos_logits, pos_groups, delta)
    in_order = torch.zeros_like(totals)
    for parts in join(walks):
        settings = settings_for(name, parts)
        blocks = _blocks(ordered, order, pos_groups, delta, settings["block_p"])
        num_tiles, levels = tiles_of(parts, settings["block"] * settings["tiles"])
        for kind in (_CLOSE, _FINITE, _ANY) if fast else (_ANY,):
            with on_device_of(pos_logits):
                pairwise_count_kernel[(num_tiles, len(blocks.bases))](
                    levels=levels,
                    blocks=blocks,
                    totals=in_order,
                    num_positives=len(pos_logits),
                    scale=scale,
                    ignore_index=ignore_index,
                    ramp=ramp_of(pos_logits, delta),
                    KIND=kind,
                    ALL=not fast,
                    BLOCK=settings["block"],
                    BLOCK_P=settings["block_p"],
                    TILES=settings["tiles"],
                    num_warps=settings["num_warps"],
                )
    totals[:-1].index_copy_(0, order, in_order[:-1])
    totals[-1:] = in_order[-1:]


def write_pairs(
    walks: Sequence[Walk],
    gradients: Sequence[Tensor],
    pos_logits: Tensor,
    pos_groups: Tensor | None,
    weights: Tensor,
    own: Own,
    factors: Factors,
    delta: float,
    ignore_index: int,
) -> None:
    """Pass 2: fill the gradients.

    Args:
        walks, pos_logits, pos_groups, delta: as in pass 1.
        gradients: tensors to write, one for each level.
        weights: ``[P + 1]`` in the dtype of ``pos_logits``; the last is added to every gradient.
        own: gradients of the positives, before the factors.
        ignore_index: label of logits with gradient 0.
    """
    num_pos, num_own = len(pos_logits), len(own.indices)
    ordered, order = pos_logits.sort(stable=True)
    name, fast = _kind("pairwise_write", pos_logits, pos_groups, delta)
    for parts in join(walks, gradients):
        settings = settings_for(name, parts)
        blocks = _blocks(ordered, order, pos_groups, delta, settings["block_p"])
        num_tiles, levels = tiles_of(parts, settings["block"])
        with on_device_of(pos_logits):
            pairwise_write_kernel[(num_tiles,)](
                levels=levels,
                blocks=blocks._replace(
                    weights=_fill_up(weights[order], settings["block_p"], 0.0), constant=weights[num_pos:].clone()
                ),
                own=Own(own.indices.contiguous(), own.gradients.contiguous()),
                factors=factors,
                num_positives=num_pos,
                num_own=num_own,
                highest=1 << num_own.bit_length() >> 1,
                ignore_index=ignore_index,
                ramp=ramp_of(pos_logits, delta),
                FAST=fast,
                BLOCK=settings["block"],
                BLOCK_P=settings["block_p"],
                num_warps=settings["num_warps"],
            )


def _kind(name: str, pos_logits: Tensor, pos_groups: Tensor | None, delta: float) -> tuple[str, bool]:
    """The name of the launch settings, and whether blocks have different kinds."""
    plain = pos_logits.dtype == torch.float32 and pos_groups is None
    return name if plain else f"{name}_general", plain and delta > 0


def _blocks(ordered: Tensor, order: Tensor, pos_groups: Tensor | None, delta: float, size: int) -> Blocks:
    blocks = make_blocks(ordered, 0.5 / delta if delta else 0.0, size)
    return blocks if pos_groups is None else blocks._replace(groups=_fill_up(pos_groups[order], size, 0))
