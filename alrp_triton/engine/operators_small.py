"""The P-sized steps of :mod:`alrp_triton.kernels.ranks` as operators, so that torch.compile sees their shapes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_TABLE = "Tensor pos_logits, Tensor thresholds, Tensor begin, Tensor end"


def _kernels() -> Any:
    from ..kernels import ranks

    return ranks


@torch.library.custom_op(
    "alrp_triton::place_knots", mutates_args=(), schema="(Tensor pos_logits, float delta) -> (Tensor, Tensor, Tensor)"
)
def place_knots(pos_logits: Tensor, delta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Sorted thresholds ``[2P]``, and the buckets in which ramps begin and end: ``[P]`` int64 each."""
    thresholds, begin, end = _kernels().place_knots(pos_logits, delta)
    return thresholds, begin, end


@place_knots.register_fake
def _(pos_logits: Tensor, delta: float) -> tuple[Tensor, Tensor, Tensor]:
    num_pos = pos_logits.shape[0]
    begin, end = (pos_logits.new_empty((num_pos,), dtype=torch.int64) for _ in range(2))
    return pos_logits.new_empty((2 * num_pos,)), begin, end


@torch.library.custom_op(
    "alrp_triton::false_positives",
    mutates_args=(),
    schema=f"({_TABLE}, Tensor totals, Tensor unit, float delta) -> Tensor",
)
def false_positives(
    pos_logits: Tensor, thresholds: Tensor, begin: Tensor, end: Tensor, totals: Tensor, unit: Tensor, delta: float
) -> Tensor:
    """N_FP(i) ``[P]`` float64 from the totals of pass 1."""
    found: Tensor = _kernels().false_positives(pos_logits, thresholds, begin, end, totals, unit, delta)
    return found


@false_positives.register_fake
def _(pos_logits: Tensor, *further: Any) -> Tensor:
    return pos_logits.new_empty(pos_logits.shape, dtype=torch.float64)


@torch.library.custom_op(
    "alrp_triton::pair_sums",
    mutates_args=(),
    schema="(Tensor pos_logits, Tensor values, str kind, float delta) -> Tensor",
)
def pair_sums(pos_logits: Tensor, values: Tensor, kind: str, delta: float) -> Tensor:
    """A sum, or the running maximum, over the positives for each of them: ``[K, P] -> [K, P]`` float64."""
    sums: Tensor = _kernels().pair_sums(pos_logits, values, kind, delta)
    return sums


@pair_sums.register_fake
def _(pos_logits: Tensor, values: Tensor, kind: str, delta: float) -> Tensor:
    return values.new_empty(values.shape)


_TRANSPOSED = {"above": "received", "received": "above", "sorted": "sorted_received", "sorted_received": "sorted"}


def _keep_scores(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    pos_logits, _, ctx.kind, ctx.delta = inputs
    ctx.save_for_backward(pos_logits)


def _transpose(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    # Of the running maximum this is a KeyError: nothing differentiates it.
    return None, pair_sums(ctx.saved_tensors[0], grad, _TRANSPOSED[ctx.kind], ctx.delta), None, None


pair_sums.register_autograd(_transpose, setup_context=_keep_scores)


@torch.library.custom_op(
    "alrp_triton::ramp_coefficients",
    mutates_args=(),
    schema=f"({_TABLE}, Tensor weights, float delta) -> Tensor",
)
def ramp_coefficients(
    pos_logits: Tensor, thresholds: Tensor, begin: Tensor, end: Tensor, weights: Tensor, delta: float
) -> Tensor:
    """Level and slope of sum_i w_i H(t - p_i) in each bucket: ``[K, P] -> [K, 2, 2P + 1]`` float64."""
    found: Tensor = _kernels().coefficients(pos_logits, thresholds, begin, end, weights, delta)
    return found


@ramp_coefficients.register_fake
def _(pos_logits: Tensor, thresholds: Tensor, begin: Tensor, end: Tensor, weights: Tensor, delta: float) -> Tensor:
    return weights.new_empty((weights.shape[0], 2, 2 * weights.shape[1] + 1))
