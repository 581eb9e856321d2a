"""Device code shared by both passes of the linear form: the bucket of a score, and its offset in it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor


def pad_thresholds(thresholds: Tensor) -> tuple[Tensor, int]:
    """Thresholds padded with NaN, which no score reaches, to 2^steps places; and the steps of a binary search."""
    steps = len(thresholds).bit_length()
    return F.pad(thresholds, (0, (1 << steps) - len(thresholds)), value=torch.nan), steps


@triton.jit
def find_bucket(score, thresholds, STEPS: tl.constexpr):
    """How many of the padded thresholds lie at or below each score; 0 for NaN."""
    bucket = tl.zeros_like(score).to(tl.int32)
    for step in tl.static_range(STEPS):
        half = 1 << (STEPS - 1 - step)
        threshold = tl.load(thresholds + bucket + (half - 1))
        bucket += tl.where(score >= threshold, half, 0)
    return bucket


@triton.jit
def offset_in_bucket(score, bucket, floors, INVERSE_WIDTH: tl.constexpr, LARGEST: tl.constexpr):
    """(score - floor) / (2 delta), at most 1. Infinities count as the largest finite number, as they do in
    ``floors``."""
    if INVERSE_WIDTH == 0:
        return tl.zeros_like(score)
    else:
        finite = tl.minimum(tl.maximum(score, -LARGEST), LARGEST)
        return tl.minimum((finite - tl.load(floors + bucket)) * INVERSE_WIDTH, 1.0)
