"""The linear form by Triton kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.buckets import count_into_buckets
from ...kernels.gradient import write_linear_gradient, write_positives
from ...kernels.walk import make_walk
from ..fixed_point import fraction_bits
from ..inputs import Levels
from ..knots import bucket_floors


def count_negatives(levels: Levels, thresholds: Tensor, pos_logits: Tensor, delta: float, ignore_index: int) -> Tensor:
    """Pass 1; see ``backends.torch.count_negatives``. Bucket 0, of which nothing depends, is not counted."""
    return count_into_buckets(
        [make_walk(logits.detach(), labels) for logits, labels in zip(*levels)],
        thresholds,
        bucket_floors(thresholds),
        inverse_width(delta),
        2.0 ** fraction_bits(levels.num_logits),
        ignore_index,
    )


def write_gradient(
    levels: Levels,
    thresholds: Tensor,
    coefficients: Tensor,
    pos_index: Tensor,
    pos_gradient: Tensor,
    delta: float,
    ignore_index: int,
) -> list[Tensor]:
    """Pass 2; see ``backends.torch.write_gradient``."""
    gradients = [torch.empty_like(logits) for logits in levels.logits]
    walks = [make_walk(logits.detach(), labels, out) for logits, labels, out in zip(*levels, gradients)]
    floors = bucket_floors(thresholds)
    write_linear_gradient(
        walks, thresholds, floors, coefficients.to(floors.dtype), inverse_width(delta), ignore_index
    )
    write_positives(walks, pos_index, pos_gradient)
    return gradients


def inverse_width(delta: float) -> float:
    """1 / (2 delta) as a finite float32; 0 for delta = 0, where no ramp has an inside."""
    return min(0.5 / delta, torch.finfo(torch.float32).max) if delta > 0 else 0.0
