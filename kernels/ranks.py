"""What the two passes need between them, for positives few enough to compare each with all: O(P^2) work, no sort, no
scan, one launch for each result.

Each program takes a block of positives, or of buckets, past all others in the same order every time, without atomics.
Scores come in float32 or float64; what is computed from them is float64.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .walk import on_device_of

SETTINGS = {"block": 64, "block_p": 8, "num_warps": 4}
"""Of all kernels here, which have too little to do to search for better ones."""

KINDS = ("above", "received", "sorted", "sorted_received", "running_max")
"""Kinds of :func:`pair_sums`; kernels take their numbers."""


@triton.jit
def sort_key(x, BITS: tl.constexpr):
    """An integer in whose order a stable sort puts floats: -0 is 0, and NaN stands above all."""
    dtype: tl.constexpr = tl.int64 if BITS == 64 else tl.int32
    bits = x.to(dtype, bitcast=True)
    lowest = tl.full(x.shape, 1, dtype) << (BITS - 1)
    return tl.where(x == x, tl.where(bits < 0, lowest - bits, bits), ~lowest)


@triton.jit
def next_above(x, BITS: tl.constexpr):
    """The next greater float; +inf and NaN stay."""
    dtype: tl.constexpr = tl.int64 if BITS == 64 else tl.int32
    bits = x.to(dtype, bitcast=True)
    moved = tl.where(x == 0, tl.full(x.shape, 1, dtype), tl.where(bits < 0, bits - 1, bits + 1))
    return tl.where(x < float("inf"), moved.to(x.dtype, bitcast=True), x)


@triton.jit
def round_up_sum(x, DELTA: tl.constexpr, SIGN: tl.constexpr, BITS: tl.constexpr):
    """The smallest float that is not below the exact x + SIGN * DELTA; infinities stay."""
    exact = x.to(tl.float64)
    delta = tl.full(x.shape, DELTA, tl.float64)
    # What the sum lost to rounding (Knuth's two-sum); NaN for infinities, which lose nothing.
    if SIGN > 0:
        total = exact + delta
        moved = total - exact
        lost = (exact - (total - moved)) + (delta - moved)
    else:
        total = exact - delta
        moved = total - exact
        lost = (exact - (total - moved)) - (delta + moved)
    rounded = total.to(x.dtype)
    again = rounded.to(tl.float64)
    return tl.where((again < total) | ((again == total) & (lost > 0)), next_above(rounded, BITS), rounded)


@triton.jit
def ramp_ends(x, DELTA: tl.constexpr, BITS: tl.constexpr):
    """Where the ramps of scores begin and end, rounded up."""
    lower = round_up_sum(x, DELTA, -1, BITS)
    upper = round_up_sum(x, DELTA, 1, BITS)
    if DELTA > 0:
        # Sums with an infinity say nothing of where its ramp ends: just above -inf, and above every float.
        upper = tl.where(x == float("-inf"), next_above(x, BITS), upper)
        upper = tl.where(x == float("inf"), float("nan"), upper)
    return lower, upper


@triton.jit
def finite(x, LARGEST: tl.constexpr):
    """As float64; infinities as the largest finite number, NaN as it is."""
    x = tl.where(x > LARGEST, LARGEST, x)
    return tl.where(x < -LARGEST, -LARGEST, x).to(tl.float64)


@triton.jit
def floor_of(bucket, thresholds, there, LARGEST: tl.constexpr):
    """The finite lower end of buckets other than 0, float64; NaN counts as the largest."""
    floor = tl.load(thresholds + bucket - 1, mask=there, other=0)
    return finite(tl.where(floor == floor, floor, LARGEST), LARGEST)


@triton.jit
def height_at(floor, positive, DELTA: tl.constexpr, INVERSE_WIDTH: tl.constexpr):
    """H(floor - positive) of a ramp that is under way. The difference comes first: where scores are, it loses nothing;
    in a bucket too narrow to hold one it may be anything."""
    return tl.minimum(((floor - positive) + DELTA) * INVERSE_WIDTH, 1.0)


@triton.jit
def knots_kernel(
    pos_logits,
    thresholds,
    begin,
    end,
    num_positives,
    DELTA: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    there = i < num_positives
    lower, upper = ramp_ends(tl.load(pos_logits + i, mask=there, other=0), DELTA, BITS)
    lower_key, upper_key = sort_key(lower, BITS)[:, None], sort_key(upper, BITS)[:, None]
    lower_place = tl.zeros([BLOCK_P], tl.int32)
    upper_place = tl.zeros([BLOCK_P], tl.int32)
    for first in range(0, num_positives, BLOCK):
        k = first + tl.arange(0, BLOCK)
        other = k[None, :] < num_positives
        earlier = k[None, :] < i[:, None]
        low, up = ramp_ends(tl.load(pos_logits + k, mask=k < num_positives, other=0), DELTA, BITS)
        low, up = sort_key(low, BITS)[None, :], sort_key(up, BITS)[None, :]
        # Of equal knots, all that begin a ramp come before those that end one.
        before = ((low < lower_key) | ((low == lower_key) & earlier)).to(tl.int32) + (up < lower_key).to(tl.int32)
        lower_place += tl.sum(tl.where(other, before, 0), axis=1)
        before = (low <= upper_key).to(tl.int32) + ((up < upper_key) | ((up == upper_key) & earlier)).to(tl.int32)
        upper_place += tl.sum(tl.where(other, before, 0), axis=1)
    tl.store(thresholds + lower_place, lower, mask=there)
    tl.store(thresholds + upper_place, upper, mask=there)
    tl.store(begin + i, lower_place.to(tl.int64) + 1, mask=there)
    tl.store(end + i, upper_place.to(tl.int64) + 1, mask=there)


@triton.jit
def false_positives_kernel(
    pos_logits,
    thresholds,
    begin,
    end,
    totals,
    unit,
    false_positives,
    num_positives,
    row,
    DELTA: tl.constexpr,
    INVERSE_WIDTH: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    there = i < num_positives
    positive = finite(tl.load(pos_logits + i, mask=there, other=0), LARGEST)[:, None]
    ramp_begin = tl.load(begin + i, mask=there, other=0).to(tl.int32)[:, None]
    ramp_end = tl.load(end + i, mask=there, other=0).to(tl.int32)[:, None]
    one = tl.load(unit)
    found = tl.zeros([BLOCK_P, BLOCK], tl.float64)
    for first in range(1, 2 * num_positives + 1, BLOCK):
        bucket = first + tl.arange(0, BLOCK)
        inside = bucket <= 2 * num_positives
        count = tl.load(totals + bucket, mask=inside, other=0).to(tl.float64)[None, :]
        bucket_place = bucket[None, :]
        share = tl.where(bucket_place >= ramp_end, count, 0.0)
        if INVERSE_WIDTH > 0:
            offset = tl.load(totals + row + bucket, mask=inside, other=0).to(tl.float64)[None, :] * one
            height = height_at(floor_of(bucket, thresholds, inside, LARGEST)[None, :], positive, DELTA, INVERSE_WIDTH)
            under_way = (bucket_place >= ramp_begin) & (bucket_place < ramp_end)
            share = tl.where(under_way, offset + count * height, share)
        found += share
    result = tl.sum(found, axis=1)
    # Less than the fixed point of pass 1 resolves is rounding, and a loss would divide by it.
    tl.store(false_positives + i, tl.where(result < 1e-10, 0.0, result), mask=there)


@triton.jit
def sums_kernel(
    pos_logits,
    values,
    sums,
    num_positives,
    KIND: tl.constexpr,
    INVERSE_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    there = i < num_positives
    values += tl.program_id(1) * num_positives
    own = tl.load(pos_logits + i, mask=there, other=0)[:, None]
    place = i[:, None]
    if KIND == 4:
        result = tl.full([BLOCK_P, BLOCK], float("-inf"), tl.float64)
    else:
        result = tl.zeros([BLOCK_P, BLOCK], tl.float64)
    for first in range(0, num_positives, BLOCK):
        k = first + tl.arange(0, BLOCK)
        inside = (k < num_positives)[None, :]
        other = tl.load(pos_logits + k, mask=k < num_positives, other=0)[None, :]
        value = tl.load(values + k, mask=k < num_positives, other=0)[None, :]
        k = k[None, :]
        if KIND < 2:
            x = other.to(tl.float64) - own.to(tl.float64)
            x = tl.where(other == own, 0.0, x)
            if KIND == 1:
                x = -x
            if INVERSE_WIDTH > 0:
                h = x * INVERSE_WIDTH + 0.5
                h = tl.where(h < 1, h, 1.0)
            else:
                h = tl.where(x >= 0, 1.0, 0.0).to(tl.float64)
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
    tl.store(sums + tl.program_id(1) * num_positives + i, total, mask=there)


@triton.jit
def coefficients_kernel(
    pos_logits,
    thresholds,
    begin,
    end,
    weights,
    coefficients,
    num_positives,
    DELTA: tl.constexpr,
    INVERSE_WIDTH: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    bucket = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    num_buckets = 2 * num_positives + 1
    there = bucket < num_buckets
    weights += tl.program_id(1) * num_positives
    coefficients += tl.program_id(1) * 2 * num_buckets
    # Bucket 0 has no floor, and no ramp that would ask for it.
    floor = floor_of(bucket, thresholds, there & (bucket > 0), LARGEST)[:, None]
    level = tl.zeros([BLOCK_P, BLOCK], tl.float64)
    slope = tl.zeros([BLOCK_P, BLOCK], tl.float64)
    for first in range(0, num_positives, BLOCK):
        i = first + tl.arange(0, BLOCK)
        inside = i < num_positives
        weight = tl.load(weights + i, mask=inside, other=0)[None, :]
        ramp_begin = tl.load(begin + i, mask=inside, other=0).to(tl.int32)[None, :]
        ramp_end = tl.load(end + i, mask=inside, other=0).to(tl.int32)[None, :]
        under_way = (bucket[:, None] >= ramp_begin) & (bucket[:, None] < ramp_end)
        slope += tl.where(under_way, weight, 0.0)
        level += tl.where(bucket[:, None] >= ramp_end, weight, 0.0)
        if INVERSE_WIDTH > 0:
            positive = finite(tl.load(pos_logits + i, mask=inside, other=0), LARGEST)[None, :]
            level += tl.where(under_way, weight * height_at(floor, positive, DELTA, INVERSE_WIDTH), 0.0)
    tl.store(coefficients + bucket, tl.sum(level, axis=1), mask=there)
    tl.store(coefficients + num_buckets + bucket, tl.sum(slope, axis=1), mask=there)


def place_knots(pos_logits: Tensor, delta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Sort the ends of all ramps.

    Args:
        pos_logits: ``[P]`` scores p, float32 or float64.
        delta: half width of the ramp.

    Returns:
        ``(thresholds [2P], begin [P], end [P])``: p - delta and p + delta, rounded up to the dtype and sorted, NaN
        last; and from which place on, counted from 1, each ramp has begun, and ended (int64).
    """
    num_pos = len(pos_logits)
    thresholds = torch.empty(2 * num_pos, dtype=pos_logits.dtype, device=pos_logits.device)
    begin, end = (torch.empty(num_pos, dtype=torch.int64, device=pos_logits.device) for _ in range(2))
    bits = torch.finfo(pos_logits.dtype).bits
    _launch(knots_kernel, num_pos, 1, pos_logits, thresholds, begin, end, num_pos, DELTA=delta, BITS=bits)
    return thresholds, begin, end


def false_positives(
    pos_logits: Tensor, thresholds: Tensor, begin: Tensor, end: Tensor, totals: Tensor, unit: Tensor, delta: float
) -> Tensor:
    """N_FP(i), from what pass 1 counted.

    Args:
        pos_logits, thresholds, begin, end, delta: as :func:`place_knots` takes and returns them.
        totals: ``[2, 2P + 2]`` int64, counts and offsets of the buckets; the last column is not used.
        unit: of the offsets, a float64 scalar tensor.

    Returns:
        ``[P]`` float64.
    """
    num_pos = len(pos_logits)
    found = torch.empty(num_pos, dtype=torch.float64, device=pos_logits.device)
    tensors = pos_logits, thresholds, begin, end, totals, unit, found
    _launch(false_positives_kernel, num_pos, 1, *tensors, num_pos, totals.shape[1], **_ramp(pos_logits, delta))
    return found


def pair_sums(pos_logits: Tensor, values: Tensor, kind: str, delta: float) -> Tensor:
    """A sum over the positives for each of them, with H(p_k - p_i) the ramp of a difference, 0 for equal infinities.

    Args:
        pos_logits: ``[P]`` scores p, float32 or float64.
        values: ``[K, P]`` float64, the v.
        kind: ``"above"``: sum over k != i of v_k H(p_k - p_i); ``"received"``: for k the sum over i != k of
            v_i H(p_k - p_i); ``"sorted"``: sum of v_k over i itself and what precedes it in descending order, of two
            equal ones the later; ``"sorted_received"``: over i itself and what follows it; ``"running_max"``: the
            largest of those, NaN if one is.
        delta: half width of the ramp.

    Returns:
        ``[K, P]`` float64.
    """
    num_pos, values = len(pos_logits), values.contiguous()
    sums = torch.empty_like(values)
    inverse_width = _ramp(pos_logits, delta)["INVERSE_WIDTH"]
    _launch(
        sums_kernel,
        num_pos,
        len(values),
        pos_logits,
        values,
        sums,
        num_pos,
        KIND=KINDS.index(kind),
        INVERSE_WIDTH=inverse_width,
    )
    return sums


def coefficients(
    pos_logits: Tensor, thresholds: Tensor, begin: Tensor, end: Tensor, weights: Tensor, delta: float
) -> Tensor:
    """g(t) = sum_i w_i H(t - p_i) is level + slope * (t - floor) / (2 delta) in each bucket.

    Args:
        pos_logits, thresholds, begin, end, delta: as :func:`place_knots` takes and returns them.
        weights: ``[K, P]`` float64, the w.

    Returns:
        ``[K, 2, 2P + 1]`` float64.
    """
    num_pos, weights = len(pos_logits), weights.contiguous()
    found = torch.empty(len(weights), 2, 2 * num_pos + 1, dtype=torch.float64, device=pos_logits.device)
    tensors = pos_logits, thresholds, begin, end, weights, found
    _launch(coefficients_kernel, 2 * num_pos + 1, len(weights), *tensors, num_pos, **_ramp(pos_logits, delta))
    return found


def _ramp(pos_logits: Tensor, delta: float) -> dict[str, float]:
    return {
        "DELTA": delta,
        "INVERSE_WIDTH": 0.5 / delta if delta else 0.0,
        "LARGEST": torch.finfo(pos_logits.dtype).max,
    }


def _launch(kernel: Any, places: int, rows: int, *arguments: Any, **constants: Any) -> None:
    if places == 0 or rows == 0:
        return
    tensor: Tensor = arguments[0]
    with on_device_of(tensor):
        kernel[(triton.cdiv(places, SETTINGS["block_p"]), rows)](
            *arguments,
            **constants,
            BLOCK=SETTINGS["block"],
            BLOCK_P=SETTINGS["block_p"],
            num_warps=SETTINGS["num_warps"],
        )
