"""The operators that the engine registers with PyTorch; torch.compile treats them as opaque, with known shapes.

Related tensors are passed as lists. A table is its thresholds and cells, and with groups the groups of the thresholds.
Positives are their logits, the buckets in which their ramps begin and end, and with groups their groups.

``send`` and ``attach`` connect a ranking loss to autograd: the derivative of their result with respect to the logits is
that of the update rule. For backward they keep the logits and tables of size P. Backward is a separate operator without
a derivative, so differentiating twice raises an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .inputs import Levels, compute_dtype
from .knots import Table
from .passes import Found, Own, kernels_take, passes_of
from .registered import differentiable, fake_of, operator
from .scans import fraction_bits


def present(*tensors: Tensor | None) -> list[Tensor]:
    """The tensors that are not None, as operators take them."""
    return [tensor for tensor in tensors if tensor is not None]


@operator("find")
def find(
    logits: list[Tensor],
    labels: list[Tensor],
    groups: list[Tensor],
    ignore_index: int,
    num_positives: int | None,
    in_order: bool,
    name: str,
    backend: str,
) -> list[Tensor]:
    """The positives of this process: flat indices ``[P]``, logits ``[P]``, numbers, and with groups the groups ``[P]``;
    see ``passes.Found``. Numbers are ``[2]``, or ``[0]`` if there are none."""
    found = passes_of(backend).find(Levels(logits, labels, groups, ignore_index), num_positives, name)
    if found.numbers is None or in_order:
        found = _put_in_order(found)
    numbers = found.indices.new_empty(0) if found.numbers is None else found.numbers
    return present(found.indices, found.logits, numbers, found.groups)


def _put_in_order(found: Found) -> Found:
    """By a sort, if there are too many positives to compare, or if other processes need them."""
    if found.numbers is None:
        return found
    number, invalid = found.numbers.unbind()
    taken = torch.arange(len(found.indices), device=found.indices.device) < number
    index, order = found.indices.masked_fill(~taken, 0).sort(stable=True)
    mistaken = (number != len(index)) | (invalid > 0)
    groups = None if found.groups is None else found.groups.masked_fill(~taken, 0)[order]
    return Found(index, found.logits[order].masked_fill(mistaken, torch.nan), groups)


@fake_of(find)
def _(logits: list[Tensor], labels: list[Tensor], groups: list[Tensor], *further: Any) -> list[Tensor]:
    _, num_positives, in_order, *_ = further
    length = torch.library.get_ctx().new_dynamic_size() if num_positives is None else num_positives
    index = logits[0].new_empty(length, dtype=torch.int64)
    found = [index, index.new_empty(length, dtype=compute_dtype(logits[0].dtype))]
    numbers = index.new_empty(0 if in_order else 2)
    return [*found, numbers, *[index.new_empty(length) for _ in groups[:1]]]


@operator("highest_in_row")
def highest_in_row(logits: list[Tensor], labels: list[Tensor], ignore_index: int, pos_index: Tensor) -> Tensor:
    """For each positive the highest logit along the last axis, ``[P]`` (compute dtype); for logits ``[M]`` its own."""
    levels = Levels(logits, labels, (), ignore_index)
    if kernels_take(pos_index.device):
        from .passes import gpu

        return gpu.highest_in_row(levels, pos_index)
    from .passes.find import highest_in_row

    return highest_in_row(levels, pos_index)


@fake_of(highest_in_row)
def _(logits: list[Tensor], labels: list[Tensor], ignore_index: int, pos_index: Tensor) -> Tensor:
    return pos_index.new_empty(pos_index.shape, dtype=compute_dtype(logits[0].dtype))


@operator("place")
def place(
    index: Tensor, logits: Tensor, numbers: Tensor, groups: Tensor | None, delta: float, dtype: torch.dtype
) -> list[Tensor]:
    """The ramps of positives, by kernels, for scores of a dtype: the totals of pass 1, still 0; thresholds, cells;
    beginnings and ends of ramps. With groups, the groups of the thresholds and their number ``[1]``. For positives in
    any order also those in flat order: indices, logits, groups."""
    from .passes import gpu

    placed = gpu.place_positives(Found(index, logits, groups, numbers if len(numbers) else None), delta, dtype)
    positives, (thresholds, cells, of_thresholds) = placed.positives, placed.table
    in_order = present(placed.indices, positives.logits, positives.groups) if len(numbers) else []
    by_group = present(of_thresholds, placed.num_groups)
    return [placed.totals, thresholds, cells, positives.begin, positives.end, *by_group, *in_order]


@fake_of(place)
def _(
    index: Tensor, logits: Tensor, numbers: Tensor, groups: Tensor | None, delta: float, dtype: torch.dtype
) -> list[Tensor]:
    from .passes import gpu

    num_pos = index.shape[0]
    totals, begin, end = (index.new_empty(size) for size in ((2, 2 * num_pos + 2), num_pos, num_pos))
    cells = logits.new_empty(gpu.shape_of_cells(num_pos, dtype, groups is not None))
    placed = [totals, logits.new_empty(4 * num_pos + 1), cells, begin, end]
    if groups is not None:
        placed += [index.new_empty(4 * num_pos + 1), index.new_empty(1)]
    if numbers.shape[0]:
        placed += [torch.empty_like(tensor) for tensor in present(index, logits, groups)]
    return placed


@operator("count", mutates_args=("totals",))
def count(
    logits: list[Tensor],
    labels: list[Tensor],
    groups: list[Tensor],
    ignore_index: int,
    table: list[Tensor],
    own: list[Tensor],
    totals: Tensor,
    num_logits: int,
    delta: float,
    backend: str,
) -> None:
    """Pass 1; see ``passes.Passes.count``. ``own`` holds logits and groups of this process's positives, and
    ``num_logits`` is M of all processes."""
    found = Found(own[0], own[0], own[1] if len(own) > 1 else None)
    levels = Levels(logits, labels, groups, ignore_index)
    passes_of(backend).count(levels, Table(*table), found, totals, delta, num_logits)


@fake_of(count)
def _(*given: Any) -> None:
    return None


@operator("rank")
def rank(
    positives: list[Tensor],
    table: list[Tensor],
    totals: Tensor,
    num_groups: Tensor | None,
    values: Tensor | None,
    num_logits: int,
    delta: float,
    eps: float,
    formula: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows ``[R, P]``, rank and poison, by kernels; see ``kernels.rank.Ranks``. ``values`` are ``[K, P]``."""
    from .passes import gpu

    unit = 2.0 ** -fraction_bits(num_logits)
    rows, ranks, poison = gpu.rank_positives(positives, table, totals, num_groups, values, unit, formula, delta, eps)
    return rows, ranks, poison


@fake_of(rank)
def _(positives: list[Tensor], *further: Any) -> tuple[Tensor, Tensor, Tensor]:
    from .passes import gpu

    logits, formula = positives[0], further[-1]
    rows = logits.new_empty((gpu.formula_of(formula).num_rows, logits.shape[0]), dtype=torch.float64)
    return rows, logits.new_empty(logits.shape[0] if formula else 0), rows.new_empty(())


@operator("sums")
def sums(positives: list[Tensor], values: Tensor, poison: Tensor, delta: float, kind: str) -> Tensor:
    """For each positive a sum over the positives, or the running maximum, by kernels; see ``kernels.sums``."""
    from .passes import gpu

    return gpu.sums(positives, values, poison, kind, delta)


@fake_of(sums)
def _(positives: list[Tensor], values: Tensor, *further: Any) -> Tensor:
    return values.new_empty(values.shape)


@operator("send")
def send(
    logits: list[Tensor],
    labels: list[Tensor],
    groups: list[Tensor],
    ignore_index: int,
    given: Tensor | None,
    index: Tensor,
    positives: list[Tensor],
    table: list[Tensor],
    rows: Tensor,
    poison: Tensor,
    first_own: int,
    num_processes: int,
    delta: float,
    eps: float,
    formula: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The scalars of a loss by kernels, with their derivatives; see ``kernels.send.Sent``.

    Args:
        logits, labels, groups, ignore_index: the levels.
        given: ``[P]``, for which the last scalar has a derivative: the values, if the kernels have the formula,
            otherwise the errors.
        index: flat indices of this process's positives.
        positives, table: of all processes.
        rows, poison: from :func:`rank`.
        first_own: index of this process's first positive among all.
        num_processes: factor of the derivatives with respect to scores.
    """
    from .passes import gpu

    sent = gpu.send_positives(positives, table, rows, poison, given, formula, delta, eps, num_processes)
    own = sent.own[:, first_own : first_own + len(index)].contiguous()
    return sent.first, sent.second, sent.lines, own, sent.derivative


@fake_of(send)
def _(logits: list[Tensor], *further: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from .passes import gpu

    _, _, _, given, index, positives, table, *_, formula, _ = further
    like, how = positives[0], gpu.formula_of(formula)
    return (
        like.new_empty(()),
        like.new_empty(()),
        like.new_empty((table[0].shape[0] // 2 + 1, 2)).t(),
        like.new_empty((how.num_scores, index.shape[0]), dtype=torch.float64),
        like.new_empty(like.shape[0] if how.has_derivative else 0, dtype=how.derivative_dtype(given)),
    )


@operator("attach")
def attach(
    first: Tensor,
    second: Tensor | None,
    logits: list[Tensor],
    labels: list[Tensor],
    groups: list[Tensor],
    ignore_index: int,
    given: Tensor | None,
    derivative: Tensor | None,
    table: list[Tensor],
    index: Tensor,
    lines: Tensor,
    own: Tensor,
    delta: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The scalars of a loss, with derivatives that are already computed.

    Args:
        first, second: the scalars; the first twice if there is only one.
        logits, labels, groups, ignore_index: the levels.
        given, derivative: ``[P]`` each: values, and the derivative of the last scalar with respect to them.
        table: of all positives.
        index: flat indices of this process's positives.
        lines, own: see ``passes.Passes.write``. ``lines`` belong to the first scalar; each scalar has a row of ``own``.
    """
    return first.clone(), (first if second is None else second).clone()


@fake_of(attach)
def _(first: Tensor, *further: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(first), torch.empty_like(first)


@operator("write")
def write(
    factors: list[Tensor],
    logits: list[Tensor],
    labels: list[Tensor],
    groups: list[Tensor],
    ignore_index: int,
    table: list[Tensor],
    index: Tensor,
    lines: Tensor,
    own: Tensor,
    delta: float,
    backend: str,
) -> list[Tensor]:
    """Pass 2: the gradient of every logit; ``factors`` are the upstream gradients of the scalars."""
    levels, passes = Levels(logits, labels, groups, ignore_index), passes_of(backend)
    return passes.write(levels, Table(*table), lines, Own(index, own), factors, delta)


@fake_of(write)
def _(factors: list[Tensor], logits: list[Tensor], *further: Any) -> list[Tensor]:
    return [torch.empty_like(level) for level in logits]


def _of_loss(*given: Any) -> list[Tensor]:
    """The logits, and the given values if there are any, of the arguments of :func:`send`."""
    return [*given[0], *present(given[4])]


def _keep_sent(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> list[Tensor]:
    from .passes import gpu

    logits, labels, groups, ignore_index, _, index, _, table, *_, delta, _, formula, backend = inputs
    _, _, *tables = output
    ctx.mark_non_differentiable(*tables)
    how = gpu.formula_of(formula)
    ctx.term = how.terms if how.has_derivative else 0
    ctx.settings = ignore_index, delta, backend
    return _in_lists(ctx, [logits, labels, groups, table], index, *tables)


def _keep_attached(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> list[Tensor]:
    _, second, logits, labels, groups, ignore_index, _, derivative, table, index, lines, own, *settings = inputs
    # The scalar that has a derivative with respect to the given values; 0 for none.
    ctx.term = 0 if derivative is None else 1 if second is None else 2
    ctx.settings = ignore_index, *settings
    derivative = own.new_empty(0) if derivative is None else derivative
    return _in_lists(ctx, [logits, labels, groups, table], index, lines, own, derivative)


def _in_lists(ctx: Any, lists: list[list[Tensor]], *tensors: Tensor) -> list[Tensor]:
    """All but the logits, which are kept as inputs."""
    ctx.lengths = [len(each) for each in lists]
    return [*(tensor for each in lists[1:] for tensor in each), *tensors]


def _differentiate(
    ctx: Any, inputs: Sequence[Tensor], kept: Sequence[Tensor], first: Tensor | None, second: Tensor | None, *_: None
) -> list[Tensor | None]:
    """The gradients of the logits and of the given values, for upstream gradients of the scalars."""
    num_logits = ctx.lengths[0]
    rest, lists = [*inputs[:num_logits], *kept], []
    for length in ctx.lengths:
        lists.append(rest[:length])
        del rest[:length]
    (*levels, table), (index, lines, own, derivative) = lists, rest
    ignore_index, *settings = ctx.settings
    last = second if ctx.term == 2 else first
    to_sort = second if len(own) > 1 else None
    if first is None and to_sort is not None:
        first = torch.zeros_like(to_sort)
    of_logits: list[Any] = [None] * num_logits
    if first is not None:
        factors = present(first, to_sort)
        if len(own) > 1 and to_sort is None:
            own = own[:1]
        of_logits = write(factors, *levels, ignore_index, table, index, lines, own, *settings)
    elif lines.shape[-1] == 1:  # no positives at all
        of_logits = [torch.zeros_like(level) for level in levels[0]]
    of_given = None if last is None or ctx.term == 0 else derivative * last
    return [*of_logits, *(None if of_given is None else of_given.to(x.dtype) for x in inputs[num_logits:])]


differentiable(send, _of_loss, _keep_sent, _differentiate)
differentiable(attach, lambda *given: [*given[2], *present(given[6])], _keep_attached, _differentiate)


@operator("sort_by_value")
def sort_by_value(
    logits: Tensor,
    values: Tensor,
    groups: Tensor | None,
    share: Tensor,
    delta: float,
    eps: float,
    ranks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sorting error and sorting gradient of each positive; see ``sorting.sort_by_value``."""
    from .sorting import sort_by_value

    return sort_by_value(logits, values, groups, share, delta, eps, ranks)


@fake_of(sort_by_value)
def _(logits: Tensor, *further: Any) -> tuple[Tensor, Tensor]:
    errors, gradients = (logits.new_empty(logits.shape, dtype=torch.float64) for _ in range(2))
    return errors, gradients


@operator("compare_boxes")
def compare_boxes(
    pred: Tensor, target: Tensor, kind: str, divisor: float, differentiate: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Similarities or errors of boxes ``[P]``, and if asked for the derivatives with respect to both boxes ``[P, 4]``,
    by a kernel; see ``kernels.boxes``."""
    from .passes import gpu

    return gpu.compare_boxes(pred, target, kind, divisor, differentiate)


@fake_of(compare_boxes)
def _(pred: Tensor, target: Tensor, kind: str, divisor: float, differentiate: bool) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(torch.promote_types(pred.dtype, target.dtype))
    of_pred, of_target = (pred.new_empty(pred.shape if differentiate else 0, dtype=dtype) for _ in range(2))
    return pred.new_empty(pred.shape[0], dtype=dtype), of_pred, of_target


@operator("scale_rows")
def scale_rows(rows: Tensor, factors: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows ``[P, K]`` times factors ``[P]``; it has no derivative."""
    return (rows * factors[:, None]).to(dtype)


@fake_of(scale_rows)
def _(rows: Tensor, factors: Tensor, dtype: torch.dtype) -> Tensor:
    return rows.new_empty(rows.shape, dtype=dtype)


def _keep_derivatives(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> Sequence[Tensor]:
    ctx.mark_non_differentiable(*output[1:])
    return output[1:]


def _scale_derivatives(
    ctx: Any, boxes: Sequence[Tensor], derivatives: Sequence[Tensor], upstream: Tensor | None, *_: None
) -> list[Tensor | None]:
    return [
        scale_rows(rows, upstream, x.dtype) if upstream is not None and x.requires_grad else None
        for x, rows in zip(boxes, derivatives)
    ]


differentiable(compare_boxes, lambda pred, target, *_: [pred, target], _keep_derivatives, _scale_derivatives)


@operator("balance", mutates_args=("weight", "sums", "count"))
def balance(
    cls: Tensor, loc: Tensor, weight: Tensor, sums: Tensor, count: Tensor, period: int, by_means: bool
) -> Tensor:
    """The weight of self-balancing for this iteration, by a kernel that changes its state; see ``kernels.balance``."""
    from .passes import gpu

    return gpu.balance(cls, loc, (weight, sums, count), period, by_means)


@fake_of(balance)
def _(cls: Tensor, loc: Tensor, weight: Tensor, *further: Any) -> Tensor:
    return torch.empty_like(weight)
