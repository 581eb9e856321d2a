"""Device code and launches shared by what compares few positives with all of them: ramps, their ends, and floors."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .walk import _INTERPRETED, on_device_of

SETTINGS = (
    {"block": 64, "block_p": 128, "num_warps": 4} if _INTERPRETED else {"block": 128, "block_p": 4, "num_warps": 4}
)
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


def ramp_constants(pos_logits: Tensor, delta: float) -> dict[str, Any]:
    """The kernels' arguments that say what the ramp is, and what is finite."""
    return {
        "DELTA": delta,
        "INVERSE_WIDTH": 0.5 / delta if delta else 0.0,
        "LARGEST": torch.finfo(pos_logits.dtype).max,
    }


def launch(
    kernel: Any,
    places: int,
    rows: int,
    *arguments: Any,
    settings: dict[str, int] = SETTINGS,
    **constants: Any,
) -> None:
    """Launch programs for blocks of places, in each of the rows."""
    if places == 0 or rows == 0:
        return
    tensor: Tensor = arguments[0]
    with on_device_of(tensor):
        kernel[(triton.cdiv(places, settings["block_p"]), rows)](
            *arguments,
            **constants,
            BLOCK=settings["block"],
            BLOCK_P=settings["block_p"],
            num_warps=settings["num_warps"],
        )
