"""The P-sized steps for few positives, by Triton kernels, as operators, so that torch.compile sees their shapes."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from .transforms import refuse_vmap

_TABLE = "Tensor pos_logits, Tensor thresholds, Tensor begin, Tensor end"


def _kernels(name: str) -> Any:
    return importlib.import_module(f"...kernels.{name}", __name__)


@refuse_vmap
@torch.library.custom_op(
    "alrp_triton::place_knots", mutates_args=(), schema="(Tensor pos_logits, float delta) -> (Tensor, Tensor, Tensor)"
)
def place_knots(pos_logits: Tensor, delta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Sorted thresholds ``[2P]``, and the buckets in which ramps begin and end: ``[P]`` int64 each."""
    thresholds, begin, end = _kernels("arrange").place_knots(pos_logits, delta)
    return thresholds, begin, end


@place_knots.register_fake
def _(pos_logits: Tensor, delta: float) -> tuple[Tensor, Tensor, Tensor]:
    num_pos = pos_logits.shape[0]
    begin, end = (pos_logits.new_empty((num_pos,), dtype=torch.int64) for _ in range(2))
    return pos_logits.new_empty((2 * num_pos,)), begin, end


@refuse_vmap
@torch.library.custom_op(
    "alrp_triton::rank",
    mutates_args=(),
    schema=f"({_TABLE}, Tensor totals, Tensor unit, Tensor values, float delta) -> (Tensor, Tensor)",
)
def rank(
    pos_logits: Tensor,
    thresholds: Tensor,
    begin: Tensor,
    end: Tensor,
    totals: Tensor,
    unit: Tensor,
    values: Tensor,
    delta: float,
) -> tuple[Tensor, Tensor]:
    """N_FP, rank+ and rank, ``[3, P]``, from the totals of pass 1; and 0, or NaN if there is one: float64."""
    ranks, poison = _kernels("ranks").rank(pos_logits, thresholds, begin, end, totals, unit, values, delta)
    return ranks, poison


@rank.register_fake
def _(pos_logits: Tensor, *further: Any) -> tuple[Tensor, Tensor]:
    num_pos = pos_logits.shape[0]
    return pos_logits.new_empty((3, num_pos), dtype=torch.float64), pos_logits.new_empty((), dtype=torch.float64)


@refuse_vmap
@torch.library.custom_op(
    "alrp_triton::pair_sums",
    mutates_args=(),
    schema="(Tensor pos_logits, Tensor values, Tensor poison, str kind, float delta) -> Tensor",
)
def pair_sums(pos_logits: Tensor, values: Tensor, poison: Tensor, kind: str, delta: float) -> Tensor:
    """A sum, or the running maximum, over the positives for each of them: ``[K, P] -> [K, P]`` float64."""
    sums: Tensor = _kernels("ranks").pair_sums(pos_logits, values, poison, kind, delta)
    return sums


@pair_sums.register_fake
def _(pos_logits: Tensor, values: Tensor, poison: Tensor, kind: str, delta: float) -> Tensor:
    return values.new_empty(values.shape)


_TRANSPOSED = {"above": "received", "received": "above", "sorted": "sorted_received", "sorted_received": "sorted"}


def _keep_scores(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    pos_logits, _, poison, ctx.kind, ctx.delta = inputs
    ctx.save_for_backward(pos_logits, poison)


def _transpose(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    pos_logits, poison = ctx.saved_tensors
    # Of the running maximum this is a KeyError: nothing differentiates it.
    return None, pair_sums(pos_logits, grad, poison, _TRANSPOSED[ctx.kind], ctx.delta), None, None, None


pair_sums.register_autograd(_transpose, setup_context=_keep_scores)


@refuse_vmap
@torch.library.custom_op(
    "alrp_triton::ramp_coefficients",
    mutates_args=(),
    schema=f"({_TABLE}, Tensor weights, Tensor poison, float delta) -> Tensor",
)
def ramp_coefficients(
    pos_logits: Tensor, thresholds: Tensor, begin: Tensor, end: Tensor, weights: Tensor, poison: Tensor, delta: float
) -> Tensor:
    """Level and slope of sum_i w_i H(t - p_i) in each bucket: ``[K, P] -> [K, 2, 2P + 1]`` float64."""
    found: Tensor = _kernels("coefficients").coefficients(pos_logits, thresholds, begin, end, weights, poison, delta)
    return found


@ramp_coefficients.register_fake
def _(
    pos_logits: Tensor, thresholds: Tensor, begin: Tensor, end: Tensor, weights: Tensor, poison: Tensor, delta: float
) -> Tensor:
    return weights.new_empty((weights.shape[0], 2, 2 * weights.shape[1] + 1))


@refuse_vmap
@torch.library.custom_op(
    "alrp_triton::send",
    mutates_args=(),
    schema=(
        f"({_TABLE}, Tensor excess, Tensor share, Tensor spread, Tensor poison, float delta, float eps)"
        " -> (Tensor, Tensor)"
    ),
)
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
    """The coefficients ``[1, 2, 2P + 1]`` of what positives send, and the gradients of their own ``[1, P]``."""
    table = pos_logits, thresholds, begin, end
    found, pos_gradient = _kernels("coefficients").send(*table, excess, share, spread, poison, delta, eps)
    return found, pos_gradient


@send.register_fake
def _(pos_logits: Tensor, *further: Any) -> tuple[Tensor, Tensor]:
    num_pos = pos_logits.shape[0]
    coefficients = pos_logits.new_empty((1, 2, 2 * num_pos + 1), dtype=torch.float64)
    return coefficients, pos_logits.new_empty((1, num_pos), dtype=torch.float64)
