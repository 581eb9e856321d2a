"""The direct form by Triton kernels: every logit against every positive."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...kernels.gradient import write_positives
from ...kernels.pairwise import count_pairs, write_pairwise_gradient
from ..inputs import Levels
from ..knots import inverse_width
from ..pairs import pair_function
from .triton import walks_to_read, walks_to_write, written


def count_negatives(
    levels: Levels,
    thresholds: Tensor,
    threshold_groups: Tensor | None,
    pos_logits: Tensor,
    pos_groups: Tensor | None,
    delta: float,
    ignore_index: int,
    scale: float,
    *,
    function: str = "",
) -> Tensor:
    """Pass 1: ``[1, P + 3]`` int64, N_FP of each positive in fixed point; then how many negatives are +inf, -inf, and
    NaN. Those at the same infinity as a positive are left out of its N_FP; but with groups or another function than
    the ramp they are in it, and nobody counts them.

    ``thresholds`` are the positives' logits themselves, of all shards where there are several.
    """
    return count_pairs(
        walks_to_read(levels),
        thresholds,
        inverse_width(delta),
        scale,
        ignore_index,
        threshold_groups,
        **_function(function, delta),
    )


def write_gradient(
    levels: Levels,
    thresholds: Tensor,
    threshold_groups: Tensor | None,
    coefficients: Tensor,
    pos_index: Tensor,
    pos_gradient: Tensor,
    delta: float,
    ignore_index: int,
    *,
    function: str = "",
) -> list[Tensor]:
    """Pass 2: ``coefficients`` ``[1, P + 3]`` are the positives' weights, and what is added for negatives at +inf, at
    -inf, and for all."""
    walks = walks_to_write(levels)
    write_pairwise_gradient(
        walks,
        thresholds,
        coefficients[0].to(thresholds.dtype),
        inverse_width(delta),
        ignore_index,
        threshold_groups,
        **_function(function, delta),
    )
    write_positives(walks, pos_index, pos_gradient)
    return written(walks, levels)


def _function(key: str, delta: float) -> dict[str, Any]:
    return {"function": pair_function(key).triton, "delta": delta} if key else {}
