"""The direct form by Triton kernels: every logit against every positive."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...kernels.pairwise_count import count_pairs
from ...kernels.pairwise_gradient import write_pairwise_gradient
from ...kernels.pairwise_positives import write_positives
from ..inputs import Levels
from ..knots import Ramps, inverse_width
from ..pairs import pair_function
from .factors import combine
from .triton import walks_to_read, walks_to_write, written


def count_negatives(
    levels: Levels,
    ramps: Ramps,
    pos_logits: Tensor,
    pos_groups: Tensor | None,
    ignore_index: int,
    scale: float,
) -> Tensor:
    """Pass 1: ``[1, P + 3]`` int64, N_FP of each positive in fixed point; then how many negatives are +inf, -inf, and
    NaN. Those at the same infinity as a positive are left out of its N_FP; but with groups or another function than
    the ramp they are in it, and nobody counts them.

    The thresholds are the positives' logits themselves, of all shards where there are several.
    """
    return count_pairs(
        walks_to_read(levels),
        ramps.thresholds,
        inverse_width(ramps.delta),
        scale,
        ignore_index,
        ramps.groups,
        **_function(ramps),
    )


def write_gradient(
    levels: Levels,
    ramps: Ramps,
    coefficients: Tensor,
    pos_index: Tensor,
    pos_gradient: Tensor,
    ignore_index: int,
    grad_output: Tensor,
) -> list[Tensor]:
    """Pass 2: ``coefficients`` ``[K, 1, P + 3]`` are the positives' weights, and what is added for negatives at +inf,
    at -inf, and for all; the rest as in ``backends.torch.write_gradient``."""
    walks = walks_to_write(levels)
    write_pairwise_gradient(
        walks,
        ramps.thresholds,
        combine(coefficients, grad_output)[0].to(ramps.thresholds.dtype),
        inverse_width(ramps.delta),
        ignore_index,
        ramps.groups,
        **_function(ramps),
    )
    write_positives(walks, pos_index, combine(pos_gradient, grad_output))
    return written(walks, levels)


def _function(ramps: Ramps) -> dict[str, Any]:
    return {"function": pair_function(ramps.function).triton, "delta": ramps.delta} if ramps.function else {}
