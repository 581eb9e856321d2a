"""The ramps of positives on the device: their ends and heights. All kernels that compare positives with all positives
use this."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.constexpr_function
def largest(dtype):
    """The largest finite number."""
    return 1.7976931348623157e308 if dtype == tl.float64 else 3.4028234663852886e38


@triton.jit
def sort_key(x):
    """An integer with the order of floats in a stable sort: -0 equals 0, and NaN is above all."""
    bits = x.to(tl.int64 if x.dtype == tl.float64 else tl.int32, bitcast=True)
    lowest = tl.full(x.shape, 1, bits.dtype) << (bits.dtype.primitive_bitwidth - 1)
    return tl.where(x == x, tl.where(bits < 0, lowest - bits, bits), ~lowest)


@triton.jit
def next_above(x):
    """The next greater float; +inf and NaN stay."""
    bits = x.to(tl.int64 if x.dtype == tl.float64 else tl.int32, bitcast=True)
    moved = tl.where(x == 0, tl.full(x.shape, 1, bits.dtype), tl.where(bits < 0, bits - 1, bits + 1))
    return tl.where(x < float("inf"), moved.to(x.dtype, bitcast=True), x)


@triton.jit
def round_up_sum(x, DELTA: tl.constexpr, SIGN: tl.constexpr):
    """The smallest float that is not below the exact x + SIGN * DELTA; infinities stay."""
    exact = x.to(tl.float64)
    delta = tl.full(x.shape, DELTA, tl.float64)
    # The rounding error of the sum (Knuth's two-sum); NaN for infinities, which have none.
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
    return tl.where((again < total) | ((again == total) & (lost > 0)), next_above(rounded), rounded)


@triton.jit
def ramp_ends(x, DELTA: tl.constexpr):
    """Beginnings and ends of the ramps of scores, rounded up."""
    lower = round_up_sum(x, DELTA, -1)
    upper = round_up_sum(x, DELTA, 1)
    if DELTA > 0:
        # A sum with an infinity does not give the end of its ramp: it ends just above -inf, or above every float.
        upper = tl.where(x == float("-inf"), next_above(x), upper)
        upper = tl.where(x == float("inf"), float("nan"), upper)
    return lower, upper


@triton.jit
def finite(x):
    """As float64; infinities become the largest finite number, NaN stays."""
    limit: tl.constexpr = largest(x.dtype)
    x = tl.where(x > limit, limit, x)
    return tl.where(x < -limit, -limit, x).to(tl.float64)


@triton.jit
def finite_floor(threshold):
    """The lower end of a bucket in the thresholds' dtype; NaN counts as the largest number."""
    limit: tl.constexpr = largest(threshold.dtype)
    floor = tl.where(threshold == threshold, threshold, limit)
    return tl.where(floor > limit, limit, tl.where(floor < -limit, -limit, floor))


@triton.jit
def floor_of(bucket, thresholds, there):
    """The finite lower end of buckets other than 0, float64; NaN counts as the largest."""
    floor = tl.load(thresholds + bucket - 1, mask=there, other=0)
    return finite(tl.where(floor == floor, floor, largest(floor.dtype)))


@triton.jit
def height_at(floor, positive, ramp):
    """H(floor - positive) of a ramp that rises in the bucket. The difference is computed first and is exact enough in
    every bucket with scores; in a bucket that is too narrow for a score any value is allowed."""
    return tl.minimum(((floor - positive) + ramp.delta) * ramp.inverse_width, 1.0)


@triton.jit
def height_at_0(ramp):
    """H(0)."""
    return 0.5 if ramp.inverse_width > 0 else 1.0


@triton.jit
def heights(above, below, ramp):
    """H(above - below), float64; 0 for NaN."""
    x = tl.where(above == below, 0.0, above.to(tl.float64) - below.to(tl.float64))
    if ramp.inverse_width > 0:
        h = x * ramp.inverse_width + 0.5
        return tl.where(h > 0, tl.where(h < 1, h, 1.0), 0.0)
    else:
        return tl.where(x >= 0, 1.0, 0.0).to(tl.float64)


@triton.jit
def heights_in_kind(above, below, ramp):
    """H(above - below), computed in the scores' own dtype; 0 for NaN."""
    x = tl.where(above == below, 0.0, above - below)
    if ramp.inverse_width == 0:
        return tl.where(x >= 0, 1.0, 0.0).to(x.dtype)
    elif ramp.saturate:
        return saturated(x, ramp)
    else:
        h = x * ramp.inverse_width + 0.5
        return tl.where(h > 0, tl.where(h < 1, h, 1.0), 0.0)


@triton.jit
def saturated(x, ramp):
    """x / (2 delta) + 1/2 in [0, 1], by one instruction for multiply, add and clamp; 0 for NaN."""
    return tl.inline_asm_elementwise(
        "fma.rn.sat.f32 $0, $1, $2, 0f3F000000;",
        "=f,f,f",
        [x, tl.zeros_like(x) + ramp.inverse_width],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def exceeds(x, NUMBER: tl.constexpr):
    """x > NUMBER; a plain comparison would round NUMBER to float32."""
    return x > tl.full(x.shape, NUMBER, tl.float64)
