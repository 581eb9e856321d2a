"""The passes by Triton kernels, and the steps of size P if there are few enough positives to compare each with all.
Only this module imports :mod:`alrp_triton.kernels`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...kernels import balance as kernel_balance
from ...kernels import boxes, count, find, grid, highest, pairwise, place, rank, send, write
from ...kernels.formulas import FORMULAS, Formula
from ...kernels.layout import Positives, Walk, walk_over
from ...kernels.layout import Table as kernel_table
from ...kernels.sums import sums as kernel_sums
from ..devices import is_asynchronous
from ..inputs import Levels, compute_dtype, debug_checks
from ..knots import Table
from ..scans import fraction_bits
from .find import raise_on_mistakes
from .protocol import Found, Own


class Linear:
    """The linear form: search each score in the table."""

    def find(self, levels: Levels, num_positives: int | None, name: str) -> Found:
        arguments = levels.ignore_index, levels.compute_dtype()
        if num_positives is None:
            num_positives = int(find.find(_walks(levels), 0, *arguments)[3][0])
        index, logits, groups, numbers = find.find(_walks(levels), num_positives, *arguments)
        if debug_checks() or not is_asynchronous(numbers.device):
            number, num_invalid = numbers.tolist()
            raise_on_mistakes(levels, number, num_invalid > 0, num_positives, name)
        return Found(index, logits, groups, numbers)

    def count(self, levels: Levels, table: Table, own: Found, totals: Tensor, delta: float, num_logits: int) -> None:
        # Several processes get the bits of one.
        alone, scale = num_logits == levels.num_logits(), 2.0 ** fraction_bits(num_logits)
        count.count(
            _walks(levels, in_memory_order=True),
            _searchable(table, levels),
            totals,
            delta,
            scale,
            levels.ignore_index,
            alone,
        )

    def write(
        self, levels: Levels, table: Table, lines: Tensor, own: Own, factors: Sequence[Tensor], delta: float
    ) -> list[Tensor]:
        walks, gradients = _to_write(levels, in_memory_order=True)
        arguments = write.Own(*own), _factors(factors), delta, levels.ignore_index
        write.write(walks, gradients, _searchable(table, levels), lines.to(table.thresholds.dtype), *arguments)
        return _written(levels, gradients)


class Pairwise(Linear):
    """The direct form: compare each score with each positive, whose logits replace the thresholds. Totals are
    ``[P + 1]``: N_FP in units, and the number of NaN. Lines are ``[P + 1]``: weights, and a term that is added to
    all."""

    def count(self, levels: Levels, table: Table, own: Found, totals: Tensor, delta: float, num_logits: int) -> None:
        scale = 2.0 ** fraction_bits(num_logits)
        arguments = table.thresholds, table.groups, totals, delta, scale, levels.ignore_index
        pairwise.count_pairs(_walks(levels), *arguments)

    def write(
        self, levels: Levels, table: Table, lines: Tensor, own: Own, factors: Sequence[Tensor], delta: float
    ) -> list[Tensor]:
        walks, gradients = _to_write(levels)
        weights = (lines * factors[0].double()).to(table.thresholds.dtype)
        arguments = write.Own(*own), _factors(factors), delta, levels.ignore_index
        pairwise.write_pairs(walks, gradients, table.thresholds, table.groups, weights, *arguments)
        return _written(levels, gradients)


def _searchable(table: Table, levels: Levels) -> kernel_table:
    """A table that was not made by kernels has nothing yet from which a search begins."""
    given = kernel_table(table.thresholds, table.cells if table.cells.numel() else None, table.groups)
    return given if given.cells is not None else grid.lay(given, levels.logits[0].dtype)


def _walks(levels: Levels, in_memory_order: bool = False) -> list[Walk]:
    """Layouts of the levels; sums of integers, and gradients that are written, do not ask for an order."""
    return [walk_over(x, labels, groups, in_memory_order) for x, labels, groups in levels.each()]


def _to_write(levels: Levels, in_memory_order: bool = False) -> tuple[list[Walk], list[Tensor]]:
    """Layouts of the levels, and gradients for them."""
    walks = _walks(levels, in_memory_order)
    return walks, [torch.empty_like(walk.logits) for walk in walks]


def _written(levels: Levels, gradients: list[Tensor]) -> list[Tensor]:
    """Gradients with the strides of ``empty_like``; gradients of levels that were copied have other strides."""
    like = [torch.empty_like(logits, device="meta").stride() for logits in levels.logits]
    return [
        gradient if gradient.stride() == stride else torch.empty_like(logits).copy_(gradient)
        for gradient, stride, logits in zip(gradients, like, levels.logits)
    ]


def _factors(factors: Sequence[Tensor]) -> write.Factors:
    first, *second = factors
    return write.Factors(first, second[0] if second else None)


def formula_of(name: str) -> Formula:
    """A formula that the kernels have."""
    return FORMULAS[name]


def shape_of_cells(num_positives: int, dtype: torch.dtype, grouped: bool) -> tuple[int, int]:
    """See ``kernels.grid``."""
    return grid.shape_of_cells(num_positives, dtype, grouped)


def place_positives(found: Found, delta: float, dtype: torch.dtype) -> place.Placed:
    """See ``kernels.place``."""
    return place.place(place.Found(*found), delta, dtype)


def rank_positives(
    positives: list[Tensor],
    table: list[Tensor],
    totals: Tensor,
    num_groups: Tensor | None,
    values: Tensor | None,
    unit: float,
    formula: str,
    delta: float,
    eps: float,
) -> rank.Ranks:
    """See ``kernels.rank``."""
    counted, how = rank.Counted(totals, unit, num_groups), FORMULAS[formula]._replace(eps=eps)
    return rank.rank(Positives(*positives), kernel_table(*table), counted, values, how, delta)


def sums(positives: list[Tensor], values: Tensor, poison: Tensor, kind: str, delta: float) -> Tensor:
    """See ``kernels.sums``."""
    return kernel_sums(Positives(*positives), values, poison, kind, delta)


def send_positives(
    positives: list[Tensor],
    table: list[Tensor],
    rows: Tensor,
    poison: Tensor,
    values: Tensor | None,
    formula: str,
    delta: float,
    eps: float,
    num_processes: int,
) -> send.Sent:
    """See ``kernels.send``."""
    ranks, how = rank.Ranks(rows, None, poison), FORMULAS[formula]._replace(eps=eps)
    return send.send(Positives(*positives), kernel_table(*table), ranks, values, how, delta, num_processes)


def highest_in_row(levels: Levels, pos_index: Tensor) -> Tensor:
    """See ``kernels.highest``."""
    return highest.highest(_walks(levels), pos_index, levels.ignore_index, levels.compute_dtype())


def compare_boxes(
    pred: Tensor, target: Tensor, kind: str, divisor: float, differentiate: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``kernels.boxes``; empty tensors for derivatives that are not asked for."""
    dtype = compute_dtype(torch.promote_types(pred.dtype, target.dtype))
    pair = boxes.Boxes(pred, target)
    values, (of_pred, of_target) = boxes.compare_boxes(pair, kind, divisor, dtype, differentiate)
    return values, *((of_pred, of_target) if differentiate else (values.new_empty(0), values.new_empty(0)))


def balance(cls: Tensor, loc: Tensor, state: tuple[Tensor, Tensor, Tensor], period: int, by_means: bool) -> Tensor:
    """See ``kernels.balance``."""
    return kernel_balance.balance(cls, loc, kernel_balance.State(*state), period, by_means)
