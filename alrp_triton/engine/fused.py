"""A whole loss as one operator, for losses whose formula the kernels know, of one ranking of few positives.

What :class:`Ranking` does step by step, each of which launches something, is here a handful of launches: on a GPU they
are what small inputs wait for.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from .devices import is_asynchronous
from .fixed_point import fraction_bits
from .inputs import Levels, debug_checks
from .knots import inverse_width
from .positives import raise_on_mistakes
from .steps import MOST_COMPARED
from .transforms import refuse_vmap

_LEVELS = "Tensor[] logits, Tensor[] labels"
_TABLES = "Tensor received, Tensor thresholds, Tensor floors, Tensor coefficients, Tensor pos_index, Tensor rows"


def can_fuse(levels: Levels, num_positives: int | None, backend: str) -> bool:
    """Whether :func:`fused_loss` can take these."""
    one_ranking = not levels.groups and levels.processes is None
    return backend == "triton" and one_ranking and num_positives is not None and num_positives <= MOST_COMPARED


def fused_loss(
    formula: str,
    levels: Levels,
    num_positives: int,
    values: Tensor | None = None,
    *,
    delta: float,
    ignore_index: int,
    eps: float = 0.0,
    name: str = "num_positives",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The scalars of a loss, the ranks behind them, and where the positives are.

    Args:
        formula: a name in ``kernels.formulas``.
        levels: checked logits and labels.
        num_positives: P.
        values: ``[P]``, where the formula takes them; the second scalar has a derivative with respect to them.
        delta: half width of the ramp.
        ignore_index: label of what takes part in nothing.
        eps: a positive with at most this many false positives sends nothing.
        name: the argument that said how many positives there are, for errors.

    Returns:
        ``(first, second, rank [P], pos_index [P] int64)``, floats in the compute dtype. The first carries the gradient
        of the scores, and so does the second of a loss that sorts; of a loss of one scalar, both are that.
    """
    settings = float(delta), ignore_index, float(eps), formula, name
    outcome = evaluate_loss(levels.logits, levels.labels, values, num_positives, *settings)
    return (*outcome[:3], outcome[7])


def _kernels(name: str) -> Any:
    return importlib.import_module(f"...kernels.{name}", __name__)


@refuse_vmap
@torch.library.custom_op(
    "alrp_triton::evaluate_loss",
    mutates_args=(),
    schema=(
        f"({_LEVELS}, Tensor? values, SymInt num_positives, float delta, int ignore_index, float eps, str formula,"
        " str name) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
)
def evaluate_loss(
    logits: list[Tensor],
    labels: list[Tensor],
    values: Tensor | None,
    num_positives: int,
    delta: float,
    ignore_index: int,
    eps: float,
    formula: str,
    name: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """First and second scalar, rank, and what backward needs: ``received``, and the tables of pass 2."""
    from .backends.triton import walks_to_read

    positives, arrange = _kernels("positives"), _kernels("arrange")
    levels = Levels(logits, labels)
    device = logits[0].device
    # All zeros in one launch, the last at an even place, since a launch compiles anew for what is not aligned.
    sizes = [2, num_positives, num_positives % 2, 4 * num_positives + 4]
    found, slots, _, totals = torch.zeros(sum(sizes), dtype=torch.int64, device=device).split(sizes)
    scores = torch.empty(num_positives, dtype=levels.compute_dtype, device=device)
    positives.append([(x.detach(), y) for x, y in zip(logits, labels)], found, slots, scores, ignore_index)
    if debug_checks() or not is_asynchronous(device):
        count, num_invalid = found.tolist()
        raise_on_mistakes(count, num_invalid > 0, num_positives, name)
    arrangement = arrange.arrange(found, slots, scores, delta)
    bits = fraction_bits(levels.num_logits)
    totals = _kernels("buckets").count_into_buckets(
        walks_to_read(levels),
        arrangement.thresholds[: arrange.table_size(num_positives)],
        arrangement.floors,
        inverse_width(delta),
        2.0**bits,
        ignore_index,
        totals=totals.view(2, -1),
    )
    outcome = _kernels("fused").evaluate_loss(arrangement, totals, 2.0**-bits, values, formula, delta, eps)
    first, second, rank, received, coefficients, rows = outcome
    tables = arrangement.thresholds, arrangement.floors, coefficients, arrangement.pos_index, rows
    return first, second, rank, received, *tables


@evaluate_loss.register_fake
def _(
    logits: list[Tensor],
    labels: list[Tensor],
    values: Tensor | None,
    num_positives: int,
    delta: float,
    ignore_index: int,
    eps: float,
    formula: str,
    name: str,
) -> tuple[Tensor, ...]:
    like = logits[0].new_empty(0, dtype=Levels(logits, labels).compute_dtype)
    fused = _kernels("fused")
    of_values = fused.received_dtype(formula, None if values is None else values.dtype)
    shapes: list[tuple[Any, ...]] = [(), (), (num_positives,), (0 if values is None else num_positives,)]
    shapes += [(4 * num_positives + 1,), (2 * num_positives + 1,), (2, 2 * num_positives + 1)]
    shapes += [(num_positives,), (fused.num_rows(formula) * num_positives + 1,)]
    dtypes = [like.dtype] * 3 + [of_values] + [like.dtype] * 3 + [torch.int64, torch.float64]
    return tuple(like.new_empty(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes))


@refuse_vmap
@torch.library.custom_op(
    "alrp_triton::write_loss_gradient",
    mutates_args=(),
    schema=f"(Tensor grad_first, Tensor? grad_second, {_LEVELS}, {_TABLES}, float delta, int ignore_index) -> Tensor[]",
)
def write_loss_gradient(
    grad_first: Tensor,
    grad_second: Tensor | None,
    logits: list[Tensor],
    labels: list[Tensor],
    received: Tensor,
    thresholds: Tensor,
    floors: Tensor,
    coefficients: Tensor,
    pos_index: Tensor,
    rows: Tensor,
    delta: float,
    ignore_index: int,
) -> list[Tensor]:
    """Pass 2: the derivative of the first scalar with respect to every logit, times ``grad_first``; and of the second,
    times ``grad_second``, where it has one."""
    from .backends.triton import walks_to_write, written

    num_positives = len(pos_index)
    own: Tensor = rows[:num_positives]
    if grad_second is not None:
        own = _kernels("fused").own_gradient(rows, received, grad_first, grad_second)
    levels = Levels(logits, labels)
    walks = walks_to_write(levels)
    _kernels("gradient").write_linear_gradient(
        walks,
        thresholds[: _kernels("arrange").table_size(num_positives)],
        floors,
        coefficients,
        inverse_width(delta),
        ignore_index,
        pos_index=pos_index,
        pos_gradient=own,
        factor=grad_first,
        pos_factor=grad_first if grad_second is None else None,
    )
    return written(walks, levels)


@write_loss_gradient.register_fake
def _(grad_first: Tensor, grad_second: Tensor | None, logits: list[Tensor], *further: Any) -> list[Tensor]:
    return [torch.empty_like(level) for level in logits]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, labels, values, ctx.num_positives, ctx.delta, ctx.ignore_index, _, formula, _ = inputs
    _, _, rank, *tables = output
    ctx.mark_non_differentiable(rank, *tables)
    # Of what nobody differentiates there is nothing to fill with zeros.
    ctx.set_materialize_grads(False)
    ctx.sorts = _kernels("formulas").FORMULAS[formula].sorts
    ctx.num_levels, ctx.value_dtype = len(logits), None if values is None else values.dtype
    ctx.save_for_backward(*logits, *labels, *tables)


def _backward(ctx: Any, first: Tensor | None, second: Tensor | None, *others: None) -> tuple[Any, ...]:
    n = ctx.num_levels
    logits, labels, tables = list(ctx.saved_tensors[:n]), list(ctx.saved_tensors[n : 2 * n]), ctx.saved_tensors[2 * n :]
    of_logits: list[Tensor] | list[None] = [None] * n
    of_values, to_sort = None, second if ctx.sorts else None
    if second is not None and ctx.value_dtype is not None and not ctx.sorts:
        of_values = (tables[0] * second).to(ctx.value_dtype)
    if first is None and to_sort is not None:
        first = torch.zeros_like(to_sort)
    if first is not None:
        of_logits = write_loss_gradient(first, to_sort, logits, labels, *tables, ctx.delta, ctx.ignore_index)
    elif ctx.num_positives == 0:
        of_logits = [torch.zeros_like(level) for level in logits]
    return of_logits, [None] * n, of_values, *[None] * 6


evaluate_loss.register_autograd(_backward, setup_context=_keep)
