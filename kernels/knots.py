"""Where ramps begin and end, sorted by counting: for positives few enough to compare each with all."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .walk import _INTERPRETED, on_device_of

SETTINGS = {"block": 64, "block_p": 32 if _INTERPRETED else 8, "num_warps": 4}
"""Of all kernels that compare positives, which have too little to do to search for better ones; the interpreter pays
for each program."""


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
def table_kernel(thresholds, padded, floors, num_thresholds, places, LARGEST: tl.constexpr, BLOCK_P: tl.constexpr):
    place = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    threshold = tl.load(thresholds + place, mask=place < num_thresholds, other=float("nan"))
    tl.store(padded + place, threshold, mask=place < places)
    before = tl.load(thresholds + place - 1, mask=(place > 0) & (place <= num_thresholds), other=float("-inf"))
    floor = tl.where(before == before, before, LARGEST)
    floor = tl.where(floor > LARGEST, LARGEST, tl.where(floor < -LARGEST, -LARGEST, floor))
    tl.store(floors + place, floor, mask=place <= num_thresholds)


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
    launch(knots_kernel, num_pos, 1, pos_logits, thresholds, begin, end, num_pos, DELTA=delta, BITS=bits)
    return thresholds, begin, end


def search_table(thresholds: Tensor) -> tuple[Tensor, Tensor]:
    """What both passes look into, in one launch.

    Args:
        thresholds: ``[2P]``, ascending, NaN last.

    Returns:
        ``(padded [2^n], floors [2P + 1])``: the thresholds, and NaN up to the next power of two above 2P; the finite
        lower ends of the buckets, the lowest finite number first.
    """
    number = len(thresholds)
    padded = torch.empty(1 << number.bit_length(), dtype=thresholds.dtype, device=thresholds.device)
    floors = torch.empty(number + 1, dtype=thresholds.dtype, device=thresholds.device)
    largest = torch.finfo(thresholds.dtype).max
    with on_device_of(thresholds):
        table_kernel[(triton.cdiv(len(padded), 256),)](
            thresholds, padded, floors, number, len(padded), LARGEST=largest, BLOCK_P=256, num_warps=4
        )
    return padded, floors


def ramp_constants(pos_logits: Tensor, delta: float) -> dict[str, float]:
    """The kernels' arguments that say what the ramp is, and what is finite."""
    return {
        "DELTA": delta,
        "INVERSE_WIDTH": 0.5 / delta if delta else 0.0,
        "LARGEST": torch.finfo(pos_logits.dtype).max,
    }


def launch(kernel: Any, places: int, rows: int, *arguments: Any, **constants: Any) -> None:
    """Launch programs for blocks of places, in each of the rows."""
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
