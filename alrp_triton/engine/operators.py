"""What touches M-sized data, registered with PyTorch, so that torch.compile sees opaque operators with known shapes.

``attach_gradient`` is where a ranking loss meets autograd: it returns the value it is given, and its derivative with
respect to the logits is what the loss's update rule says. For backward it keeps the logits and tables of size P. That
backward is an operator of its own without a derivative: differentiating twice raises instead of giving a wrong
number.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from . import positives
from .backends import LINEAR_BACKENDS
from .fixed_point import fraction_bits
from .inputs import Levels
from .knots import Ramps
from .pairs import pair_function
from .transforms import refuse_vmap

# Schemas are written out, since the oldest supported PyTorch does not read list[Tensor] from annotations.
_LEVELS = "Tensor[] logits, Tensor[] labels, Tensor[] groups"
_THRESHOLDS = "Tensor thresholds, Tensor? threshold_groups"
_TABLES = f"{_THRESHOLDS}, Tensor coefficients, Tensor pos_index, Tensor pos_gradient"
# ``function`` is the key of a pair function, or empty for the ramp.
_SETTINGS = "float delta, int ignore_index, str backend, str function"


def _backend(name: str) -> Any:
    return importlib.import_module(f".backends.{name}", __package__)


@refuse_vmap
@torch.library.custom_op(
    "alrp_triton::find_positives",
    mutates_args=(),
    schema=f"({_LEVELS}, SymInt? num_positives, int ignore_index, str name, str backend) -> (Tensor, Tensor, Tensor)",
)
def find_positives(
    logits: list[Tensor],
    labels: list[Tensor],
    groups: list[Tensor],
    num_positives: int | None,
    ignore_index: int,
    name: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Flat indices ``[P]``, logits ``[P]`` (compute dtype) and groups (``[P]``, or ``[0]``) of the positives."""
    return positives.find_positives(Levels(logits, labels, groups), num_positives, ignore_index, name, backend)


@find_positives.register_fake
def _(
    logits: list[Tensor],
    labels: list[Tensor],
    groups: list[Tensor],
    num_positives: int | None,
    ignore_index: int,
    name: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    length = torch.library.get_ctx().new_dynamic_size() if num_positives is None else num_positives
    like = logits[0]
    return (
        like.new_empty(length, dtype=torch.int64),
        like.new_empty(length, dtype=Levels(logits, labels).compute_dtype),
        like.new_empty(length if groups else 0, dtype=torch.int64),
    )


@refuse_vmap
@torch.library.custom_op(
    "alrp_triton::highest_in_row",
    mutates_args=(),
    schema="(Tensor[] logits, Tensor[] labels, Tensor pos_index, int ignore_index) -> Tensor",
)
def highest_in_row(logits: list[Tensor], labels: list[Tensor], pos_index: Tensor, ignore_index: int) -> Tensor:
    """For each positive the highest logit along the last axis ``[P]`` (compute dtype); of logits ``[M]`` its own."""
    return positives.highest_in_row(Levels(logits, labels), pos_index, ignore_index)


@highest_in_row.register_fake
def _(logits: list[Tensor], labels: list[Tensor], pos_index: Tensor, ignore_index: int) -> Tensor:
    return pos_index.new_empty(pos_index.shape, dtype=Levels(logits, labels).compute_dtype)


@refuse_vmap
@torch.library.custom_op(
    "alrp_triton::count_negatives",
    mutates_args=(),
    schema=f"({_LEVELS}, {_THRESHOLDS}, Tensor pos_logits, Tensor? pos_groups, {_SETTINGS}, SymInt? num_logits=None)"
    " -> (Tensor, Tensor)",
)
def count_negatives(
    logits: list[Tensor],
    labels: list[Tensor],
    groups: list[Tensor],
    thresholds: Tensor,
    threshold_groups: Tensor | None,
    pos_logits: Tensor,
    pos_groups: Tensor | None,
    delta: float,
    ignore_index: int,
    backend: str,
    function: str,
    num_logits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Pass 1: what the negatives add up to, as int64 in which ``[0, -1]`` counts NaN; and the unit of its fixed
    point, a float64 scalar (a tensor, so that a compiled graph does not depend on the number of logits). ``num_logits``
    is M of all processes, whose totals are going to be added; None where there is but this one."""
    levels = Levels(logits, labels, groups)
    bits = fraction_bits(levels.num_logits if num_logits is None else num_logits)
    ramps = Ramps(thresholds, threshold_groups, delta, function)
    totals = _backend(backend).count_negatives(levels, ramps, pos_logits, pos_groups, ignore_index, 2.0**bits)
    return totals, torch.full((), 2.0**-bits, dtype=torch.float64, device=totals.device)


@count_negatives.register_fake
def _(
    logits: list[Tensor],
    labels: list[Tensor],
    groups: list[Tensor],
    thresholds: Tensor,
    threshold_groups: Tensor | None,
    pos_logits: Tensor,
    pos_groups: Tensor | None,
    delta: float,
    ignore_index: int,
    backend: str,
    function: str,
    num_logits: int | None = None,
) -> tuple[Tensor, Tensor]:
    rows, buckets = (2, 1) if backend in LINEAR_BACKENDS else (1, 2)
    totals = thresholds.new_empty((rows, thresholds.shape[0] + buckets + 1), dtype=torch.int64)
    return totals, thresholds.new_empty((), dtype=torch.float64)


@refuse_vmap
@torch.library.custom_op(
    "alrp_triton::attach_gradient",
    mutates_args=(),
    schema=f"(Tensor values, {_LEVELS}, {_TABLES}, {_SETTINGS}) -> Tensor",
)
def attach_gradient(
    values: Tensor,
    logits: list[Tensor],
    labels: list[Tensor],
    groups: list[Tensor],
    thresholds: Tensor,
    threshold_groups: Tensor | None,
    coefficients: Tensor,
    pos_index: Tensor,
    pos_gradient: Tensor,
    delta: float,
    ignore_index: int,
    backend: str,
    function: str,
) -> Tensor:
    """``values`` ``[K]``, with derivatives with respect to the logits that are given by K tables of size P:
    ``coefficients`` ``[K, ...]`` and ``pos_gradient`` ``[K, P]``."""
    return values.clone()


@attach_gradient.register_fake
def _(values: Tensor, *further: Any) -> Tensor:
    return torch.empty_like(values)


@refuse_vmap
@torch.library.custom_op(
    "alrp_triton::write_gradient",
    mutates_args=(),
    schema=f"(Tensor grad_output, {_LEVELS}, {_TABLES}, {_SETTINGS}) -> Tensor[]",
)
def write_gradient(
    grad_output: Tensor,
    logits: list[Tensor],
    labels: list[Tensor],
    groups: list[Tensor],
    thresholds: Tensor,
    threshold_groups: Tensor | None,
    coefficients: Tensor,
    pos_index: Tensor,
    pos_gradient: Tensor,
    delta: float,
    ignore_index: int,
    backend: str,
    function: str,
) -> list[Tensor]:
    """Pass 2: the gradient of every logit, for the K values together; ``grad_output`` ``[K]`` goes into the tables
    before they are rounded."""
    levels, ramps = Levels(logits, labels, groups), Ramps(thresholds, threshold_groups, delta, function)
    gradients: list[Tensor] = _backend(backend).write_gradient(
        levels, ramps, coefficients, pos_index, pos_gradient, ignore_index, grad_output
    )
    return gradients


@write_gradient.register_fake
def _(grad_output: Tensor, logits: list[Tensor], *further: Any) -> list[Tensor]:
    return [torch.empty_like(level) for level in logits]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, logits, labels, groups, *tables, ctx.delta, ctx.ignore_index, ctx.backend, ctx.function = inputs
    ctx.num_levels, ctx.num_groups = len(logits), len(groups)
    # Held, since backward asks for it by its key, maybe when nothing else holds it.
    ctx.held = pair_function(ctx.function) if ctx.function else None
    ctx.save_for_backward(*logits, *labels, *groups, *tables)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    saved, n, g = list(ctx.saved_tensors), ctx.num_levels, ctx.num_groups
    logits, labels, groups, tables = saved[:n], saved[n : 2 * n], saved[2 * n : 2 * n + g], saved[2 * n + g :]
    settings = ctx.delta, ctx.ignore_index, ctx.backend, ctx.function
    gradients = write_gradient(grad_output, logits, labels, groups, *tables, *settings)
    return (None, gradients, [None] * n, [None] * g, *[None] * (len(tables) + len(settings)))


attach_gradient.register_autograd(_backward, setup_context=_keep)


@refuse_vmap
@torch.library.custom_op(
    "alrp_triton::attach_computed",
    mutates_args=(),
    schema="(Tensor values, Tensor[] logits, Tensor[] gradients) -> Tensor",
)
def attach_computed(values: Tensor, logits: list[Tensor], gradients: list[Tensor]) -> Tensor:
    """``values`` ``[K]``, with derivatives ``[K, ...]`` with respect to the logits that are given whole (for the
    reference)."""
    return values.clone()


@attach_computed.register_fake
def _(values: Tensor, logits: list[Tensor], gradients: list[Tensor]) -> Tensor:
    return torch.empty_like(values)


@refuse_vmap
@torch.library.custom_op(
    "alrp_triton::scale_gradients",
    mutates_args=(),
    schema="(Tensor grad_output, Tensor[] logits, Tensor[] gradients) -> Tensor[]",
)
def scale_gradients(grad_output: Tensor, logits: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
    """The sum over K of ``grad_output`` ``[K]`` times each of the gradients, rounded once to the dtype of the logits.

    The logits are there to be depended on: differentiating twice must raise here, too.
    """
    scaled = [sum(row * factor for row, factor in zip(each, grad_output.to(each.dtype))) for each in gradients]
    return [torch.empty_like(x).copy_(gradient) for x, gradient in zip(logits, scaled)]


@scale_gradients.register_fake
def _(grad_output: Tensor, logits: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
    return [torch.empty_like(x) for x in logits]


def _keep_computed(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.num_levels = len(inputs[1])
    ctx.save_for_backward(*inputs[1], *inputs[2])


def _backward_computed(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    saved, n = ctx.saved_tensors, ctx.num_levels
    return None, scale_gradients(grad_output, list(saved[:n]), list(saved[n:])), [None] * n


attach_computed.register_autograd(_backward_computed, setup_context=_keep_computed)
