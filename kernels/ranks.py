"""What the two passes need between them, for positives few enough to compare each with all: O(P^2) work, no sort, no
scan, one launch for each result.

Each program takes a block of positives, or of buckets, past all others in the same order every time, without atomics.
Scores come in float32 or float64; what is computed from them is float64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .knots import finite, floor_of, height_at, launch, ramp_constants

KINDS = ("above", "received", "sorted", "sorted_received", "running_max")
"""Kinds of :func:`pair_sums`; kernels take their numbers."""


@triton.jit
def heights(above, below, INVERSE_WIDTH: tl.constexpr):
    """H(above - below), float64; 0 where it is NaN."""
    x = tl.where(above == below, 0.0, above.to(tl.float64) - below.to(tl.float64))
    if INVERSE_WIDTH > 0:
        h = x * INVERSE_WIDTH + 0.5
        return tl.where(h > 0, tl.where(h < 1, h, 1.0), 0.0)
    else:
        return tl.where(x >= 0, 1.0, 0.0).to(tl.float64)


@triton.jit
def false_positives(
    own,
    ramp_begin,
    ramp_end,
    thresholds,
    totals,
    unit,
    num_positives,
    DELTA: tl.constexpr,
    INVERSE_WIDTH: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """N_FP(i) of a block of positives, from what pass 1 counted: float64."""
    positive = finite(own, LARGEST)[:, None]
    ramp_begin, ramp_end = ramp_begin.to(tl.int32)[:, None], ramp_end.to(tl.int32)[:, None]
    offsets = totals + 2 * num_positives + 2
    found = tl.zeros([BLOCK_P, BLOCK], tl.float64)
    for first in range(1, 2 * num_positives + 1, BLOCK):
        bucket = first + tl.arange(0, BLOCK)
        inside = bucket <= 2 * num_positives
        count = tl.load(totals + bucket, mask=inside, other=0).to(tl.float64)[None, :]
        share = tl.where(bucket[None, :] >= ramp_end, count, 0.0)
        if INVERSE_WIDTH > 0:
            offset = tl.load(offsets + bucket, mask=inside, other=0).to(tl.float64)[None, :] * unit
            height = height_at(floor_of(bucket, thresholds, inside, LARGEST)[None, :], positive, DELTA, INVERSE_WIDTH)
            under_way = (bucket[None, :] >= ramp_begin) & (bucket[None, :] < ramp_end)
            share = tl.where(under_way, offset + count * height, share)
        found += share
    # Less than the fixed point of pass 1 resolves is rounding, and a loss would divide by it.
    total = tl.sum(found, axis=1)
    return tl.where(total < 1e-10, 0.0, total)


@triton.jit
def rank_among(
    i,
    own,
    pos_logits,
    values,
    num_positives,
    num_values,
    ABOVE: tl.constexpr,
    SORTED: tl.constexpr,
    INVERSE_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """In one look at all positives, for each of a block of them: rank+(i); the sums ``above`` and ``sorted`` of
    :func:`pair_sums`, of the first row of values, where they are asked for (rank+ again, where not). All float64.
    And how many of all scores and of ``num_values`` rows of values are NaN, at least 1 if any is."""
    count = tl.zeros([BLOCK_P, BLOCK], tl.float64)
    above = tl.zeros([BLOCK_P, BLOCK], tl.float64)
    before = tl.zeros([BLOCK_P, BLOCK], tl.float64)
    nan = tl.zeros([BLOCK], tl.int32)
    own, place = own[:, None], i[:, None]
    for first in range(0, num_positives, BLOCK):
        k = first + tl.arange(0, BLOCK)
        there = k < num_positives
        other = tl.load(pos_logits + k, mask=there, other=0)
        nan |= (other != other).to(tl.int32)
        inside, other = there[None, :], other[None, :]
        h = tl.where(inside & (k[None, :] != place), heights(other, own, INVERSE_WIDTH), 0.0)
        count += h
        if ABOVE or SORTED:
            value = tl.load(values + k, mask=there, other=0)
            nan |= (value != value).to(tl.int32)
            value = value.to(tl.float64)[None, :]
            above += tl.where(h > 0, value * h, 0.0)
            if SORTED:
                counts = inside & ((other > own) | ((other == own) & (k[None, :] >= place)))
                before += tl.where(counts, value, 0.0)
        elif values is not None:
            # Triton compiles a loop's body even if it never runs.
            for row in range(0, num_values):
                value = tl.load(values + row * num_positives + k, mask=there, other=0)
                nan |= (value != value).to(tl.int32)
    rank_positive = tl.sum(count, axis=1) + 1
    sum_above, sum_before = rank_positive, rank_positive
    if ABOVE:
        sum_above = tl.sum(above, axis=1)
    if SORTED:
        sum_before = tl.sum(before, axis=1)
    return rank_positive, sum_above, sum_before, tl.max(nan)


@triton.jit
def poison_of(num_nan, totals, num_positives):
    """What to add to whatever follows: 0, or NaN if a NaN takes part; float64."""
    any_nan = (num_nan > 0) | (tl.load(totals + 2 * num_positives + 1) > 0)
    return tl.where(any_nan, float("nan"), 0.0).to(tl.float64)


@triton.jit
def ranks_kernel(
    pos_logits,
    thresholds,
    begin,
    end,
    totals,
    unit,
    values,
    ranks,
    poison,
    num_positives,
    num_values,
    DELTA: tl.constexpr,
    INVERSE_WIDTH: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    there = i < num_positives
    own = tl.load(pos_logits + i, mask=there, other=0)
    ramp_begin, ramp_end = tl.load(begin + i, mask=there, other=0), tl.load(end + i, mask=there, other=0)
    rank_positive, _, _, num_nan = rank_among(
        i, own, pos_logits, values, num_positives, num_values, False, False, INVERSE_WIDTH, BLOCK, BLOCK_P
    )
    bad = poison_of(num_nan, totals, num_positives)
    rank_positive += bad
    found = false_positives(
        own,
        ramp_begin,
        ramp_end,
        thresholds,
        totals,
        tl.load(unit),
        num_positives,
        DELTA,
        INVERSE_WIDTH,
        LARGEST,
        BLOCK,
        BLOCK_P,
    )
    found += bad
    tl.store(ranks + i, found, mask=there)
    tl.store(ranks + num_positives + i, rank_positive, mask=there)
    tl.store(ranks + 2 * num_positives + i, rank_positive + found, mask=there)
    # Written as the same number by all.
    tl.store(poison, bad)


@triton.jit
def sum_over(
    i,
    own,
    pos_logits,
    values,
    num_positives,
    KIND: tl.constexpr,
    INVERSE_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """A sum over all positives, or the running maximum, for each of a block of them; see :func:`pair_sums`."""
    own, place = own[:, None], i[:, None]
    if KIND == 4:
        result = tl.full([BLOCK_P, BLOCK], float("-inf"), tl.float64)
    else:
        result = tl.zeros([BLOCK_P, BLOCK], tl.float64)
    for first in range(0, num_positives, BLOCK):
        k = first + tl.arange(0, BLOCK)
        inside = (k < num_positives)[None, :]
        other = tl.load(pos_logits + k, mask=k < num_positives, other=0)[None, :]
        value = tl.load(values + k, mask=k < num_positives, other=0).to(tl.float64)[None, :]
        k = k[None, :]
        if KIND < 2:
            h = heights(other, own, INVERSE_WIDTH) if KIND == 0 else heights(own, other, INVERSE_WIDTH)
            result += tl.where(inside & (k != place) & (h > 0), value * h, 0.0)
        elif KIND == 2:
            counts = inside & ((other > own) | ((other == own) & (k >= place)))
            result += tl.where(counts, value, 0.0)
        else:
            counts = inside & ((other < own) | ((other == own) & (k <= place)))
            if KIND == 3:
                result += tl.where(counts, value, 0.0)
            else:
                # A NaN stays: no number is above it.
                larger = counts & ((value > result) | (value != value))
                result = tl.where(larger, value, result)
    if KIND == 4:
        is_nan = tl.max((result != result).to(tl.int32), axis=1) > 0
        total = tl.max(tl.where(result == result, result, float("-inf")), axis=1)
        total = tl.where(is_nan, float("nan"), total)
    else:
        total = tl.sum(result, axis=1)
    return total


@triton.jit
def sums_kernel(
    pos_logits,
    values,
    poison,
    sums,
    num_positives,
    KIND: tl.constexpr,
    INVERSE_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    there = i < num_positives
    first = tl.program_id(1) * num_positives
    own = tl.load(pos_logits + i, mask=there, other=0)
    total = sum_over(i, own, pos_logits, values + first, num_positives, KIND, INVERSE_WIDTH, BLOCK, BLOCK_P)
    tl.store(sums + first + i, total + tl.load(poison), mask=there)


def rank(
    pos_logits: Tensor,
    thresholds: Tensor,
    begin: Tensor,
    end: Tensor,
    totals: Tensor,
    unit: Tensor,
    values: Tensor,
    delta: float,
) -> tuple[Tensor, Tensor]:
    """The ranks of the positives, from what pass 1 counted.

    Args:
        pos_logits, thresholds, begin, end, delta: as ``place_knots`` takes and returns them.
        totals: ``[2, 2P + 2]`` int64, counts and offsets of the buckets; ``[0, -1]`` counts NaN.
        unit: of the offsets, a float64 scalar tensor.
        values: ``[K, P]``, in which a NaN makes everything NaN.

    Returns:
        ``([3, P], [])`` float64: N_FP(i), rank+(i) and their sum; and what to add to whatever follows: 0, or NaN.
    """
    num_pos, values = len(pos_logits), values.contiguous()
    ranks = torch.empty(3, num_pos, dtype=torch.float64, device=pos_logits.device)
    poison = torch.empty((), dtype=torch.float64, device=pos_logits.device)
    tensors = pos_logits, thresholds, begin, end, totals.contiguous(), unit, values, ranks, poison
    # Without positives there may still be a NaN.
    places = max(1, num_pos)
    launch(ranks_kernel, places, 1, *tensors, num_pos, len(values), **ramp_constants(pos_logits, delta))
    return ranks, poison


def pair_sums(pos_logits: Tensor, values: Tensor, poison: Tensor, kind: str, delta: float) -> Tensor:
    """A sum over the positives for each of them, with H(p_k - p_i) the ramp of a difference, 0 for equal infinities.

    Args:
        pos_logits: ``[P]`` scores p, float32 or float64.
        values: ``[K, P]`` float64, the v.
        poison: float64 scalar tensor, added to every sum.
        kind: ``"above"``: sum over k != i of v_k H(p_k - p_i); ``"received"``: for k the sum over i != k of
            v_i H(p_k - p_i); ``"sorted"``: sum of v_k over i itself and what precedes it in descending order, of two
            equal ones the later; ``"sorted_received"``: over i itself and what follows it; ``"running_max"``: the
            largest of those, NaN if one is.
        delta: half width of the ramp.

    Returns:
        ``[K, P]`` float64.
    """
    num_pos, values = len(pos_logits), values.contiguous()
    sums = torch.empty(values.shape, dtype=torch.float64, device=values.device)
    constants = {"KIND": KINDS.index(kind), "INVERSE_WIDTH": ramp_constants(pos_logits, delta)["INVERSE_WIDTH"]}
    launch(sums_kernel, num_pos, len(values), pos_logits, values, poison, sums, num_pos, **constants)
    return sums
