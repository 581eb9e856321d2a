"""The direct form by Triton kernels: every logit against every positive."""

from __future__ import annotations

from torch import Tensor

from ...kernels.gradient import write_positives
from ...kernels.pairwise import count_pairs, write_pairwise_gradient
from ...kernels.walk import make_walk
from ..inputs import Levels
from .triton import inverse_width, walks_to_write, written


def count_negatives(
    levels: Levels, thresholds: Tensor, pos_logits: Tensor, delta: float, ignore_index: int, scale: float
) -> Tensor:
    """Pass 1: ``[1, P + 3]`` int64, N_FP of each positive in fixed point, without those at the same infinity; then how
    many negatives are +inf, -inf, and NaN.

    ``thresholds`` are the positives' logits themselves, of all shards where there are several.
    """
    return count_pairs(
        [make_walk(logits.detach(), labels) for logits, labels in zip(*levels)],
        thresholds,
        inverse_width(delta),
        scale,
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
    """Pass 2: ``coefficients`` ``[1, P + 3]`` are the positives' weights, and what is added for negatives at +inf, at
    -inf, and for all."""
    walks = walks_to_write(levels)
    write_pairwise_gradient(walks, thresholds, coefficients[0].to(thresholds.dtype), inverse_width(delta), ignore_index)
    write_positives(walks, pos_index, pos_gradient)
    return written(walks, levels)
