"""What pass 2 looks up, for positives few enough to compare each bucket with all of them: one launch, no atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .knots import finite, floor_of, height_at, launch, ramp_constants


@triton.jit
def exceeds(x, NUMBER: tl.constexpr):
    """x > NUMBER, which a comparison by itself would round to float32."""
    return x > tl.full(x.shape, NUMBER, tl.float64)


@triton.jit
def level_and_slope(
    bucket,
    there,
    pos_logits,
    thresholds,
    begin,
    end,
    weights,
    share,
    spread,
    num_positives,
    DELTA: tl.constexpr,
    INVERSE_WIDTH: tl.constexpr,
    LARGEST: tl.constexpr,
    SENDS: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """g(t) = sum_i w_i H(t - p_i) in a block of buckets: its value at the floor, and what it gains over 2 delta."""
    # Bucket 0 has no floor, and no ramp that would ask for it.
    floor = floor_of(bucket, thresholds, there & (bucket > 0), LARGEST)[:, None]
    level = tl.zeros([BLOCK_P, BLOCK], tl.float64)
    slope = tl.zeros([BLOCK_P, BLOCK], tl.float64)
    for first in range(0, num_positives, BLOCK):
        i = first + tl.arange(0, BLOCK)
        inside = i < num_positives
        weight = tl.load(weights + i, mask=inside, other=0)
        if SENDS:
            weight *= tl.load(share + i, mask=inside, other=0)
            among = tl.load(spread + i, mask=inside, other=1)
            weight = tl.where(exceeds(among, EPS), weight / among, 0.0)
        weight = weight[None, :]
        ramp_begin = tl.load(begin + i, mask=inside, other=0).to(tl.int32)[None, :]
        ramp_end = tl.load(end + i, mask=inside, other=0).to(tl.int32)[None, :]
        under_way = (bucket[:, None] >= ramp_begin) & (bucket[:, None] < ramp_end)
        slope += tl.where(under_way, weight, 0.0)
        level += tl.where(bucket[:, None] >= ramp_end, weight, 0.0)
        if INVERSE_WIDTH > 0:
            positive = finite(tl.load(pos_logits + i, mask=inside, other=0), LARGEST)[None, :]
            level += tl.where(under_way, weight * height_at(floor, positive, DELTA, INVERSE_WIDTH), 0.0)
    return tl.sum(level, axis=1), tl.sum(slope, axis=1)


@triton.jit
def coefficients_kernel(
    pos_logits,
    thresholds,
    begin,
    end,
    weights,
    poison,
    coefficients,
    num_positives,
    share,
    spread,
    pos_gradient,
    DELTA: tl.constexpr,
    INVERSE_WIDTH: tl.constexpr,
    LARGEST: tl.constexpr,
    SENDS: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    bucket = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    num_buckets = 2 * num_positives + 1
    there = bucket < num_buckets
    weights += tl.program_id(1) * num_positives
    coefficients += tl.program_id(1) * 2 * num_buckets
    bad = tl.load(poison)
    level, slope = level_and_slope(
        bucket,
        there,
        pos_logits,
        thresholds,
        begin,
        end,
        weights,
        share,
        spread,
        num_positives,
        DELTA,
        INVERSE_WIDTH,
        LARGEST,
        SENDS,
        EPS,
        BLOCK,
        BLOCK_P,
    )
    tl.store(coefficients + bucket, level + bad, mask=there)
    tl.store(coefficients + num_buckets + bucket, slope + bad, mask=there)
    if SENDS:
        # There are more buckets than positives.
        own = bucket < num_positives
        sent = tl.load(weights + bucket, mask=own, other=0) * tl.load(share + bucket, mask=own, other=0)
        among = tl.load(spread + bucket, mask=own, other=0)
        tl.store(pos_gradient + bucket, bad - tl.where(exceeds(among, EPS), sent, 0.0), mask=own)


def coefficients(
    pos_logits: Tensor, thresholds: Tensor, begin: Tensor, end: Tensor, weights: Tensor, poison: Tensor, delta: float
) -> Tensor:
    """g(t) = sum_i w_i H(t - p_i) is level + slope * (t - floor) / (2 delta) in each bucket.

    Args:
        pos_logits, thresholds, begin, end, delta: as ``place_knots`` takes and returns them.
        weights: ``[K, P]`` float64, the w.
        poison: float64 scalar tensor, added to every number.

    Returns:
        ``[K, 2, 2P + 1]`` float64.
    """
    num_pos, weights = len(pos_logits), weights.contiguous()
    found = torch.empty(len(weights), 2, 2 * num_pos + 1, dtype=torch.float64, device=pos_logits.device)
    tensors = pos_logits, thresholds, begin, end, weights, poison, found
    constants = ramp_constants(pos_logits, delta) | {"SENDS": False, "EPS": 0.0}
    launch(coefficients_kernel, 2 * num_pos + 1, len(weights), *tensors, num_pos, None, None, None, **constants)
    return found


def send(
    pos_logits: Tensor,
    thresholds: Tensor,
    begin: Tensor,
    end: Tensor,
    excess: Tensor,
    share: Tensor,
    spread: Tensor,
    poison: Tensor,
    delta: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """What positives send, and :func:`coefficients` of it: positive i ``excess * share``, if its false positives,
    ``spread``, are more than ``eps``, and of each of them that over ``spread``.

    Args:
        pos_logits, thresholds, begin, end, delta: as ``place_knots`` takes and returns them.
        excess, share, spread: ``[P]`` float64.
        poison: float64 scalar tensor, added to every number.
        eps: >= 0.

    Returns:
        ``(coefficients [1, 2, 2P + 1], pos_gradient [1, P])`` float64, the latter negative.
    """
    num_pos = len(pos_logits)
    found = torch.empty(1, 2, 2 * num_pos + 1, dtype=torch.float64, device=pos_logits.device)
    pos_gradient = torch.empty(1, num_pos, dtype=torch.float64, device=pos_logits.device)
    tensors = pos_logits, thresholds, begin, end, excess.contiguous(), poison, found
    more = share.contiguous(), spread.contiguous(), pos_gradient
    constants = ramp_constants(pos_logits, delta) | {"SENDS": True, "EPS": float(eps)}
    launch(coefficients_kernel, 2 * num_pos + 1, 1, *tensors, num_pos, *more, **constants)
    return found, pos_gradient
