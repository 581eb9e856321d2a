"""The steps of size P between the passes: place, rank, send. They use sorts and scans in PyTorch for any number of
positives on any device, or kernels that compare all positives with all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import operators, scans
from .knots import Table, false_positives, make_knots, num_inside, ramp_coefficients, ramp_sums, received_sums

MOST_COMPARED = 4096
"""Kernels compare at most this many positives with one another. More are sorted, because launches then cost less than
pairs."""


class Ranks(NamedTuple):
    """For each positive, ``[P]`` float64, within its group; all NaN if there is a NaN that is not ignored."""

    num_false_positives: Tensor
    rank_positive: Tensor
    rank: Tensor
    num_positives: Tensor
    """The number of positives in its ranking."""
    share: Tensor
    """With this factor a sum over all positives is the mean over the groups of means over their positives."""
    poison: Tensor
    """A scalar, 0 or NaN. It is added to all later results, so that a comparison cannot hide a NaN."""


class Sorted:
    """By sorted knots and scans, in O(P log P)."""

    table: Table
    totals: Tensor
    """Int64 zeros for the counts of pass 1; see ``passes.Passes.count``."""

    def __init__(self, logits: Tensor, groups: Tensor | None, delta: float) -> None:
        self.logits, self.groups, self.delta = logits, groups, delta
        self.knots = make_knots(logits, delta, groups)
        self.table = self.knots.table
        self.totals = torch.zeros(2, 2 * logits.shape[0] + 2, dtype=torch.int64, device=logits.device)

    def rank(self, num_logits: int, values: Sequence[Tensor]) -> Ranks:
        """The ranks from the counts of pass 1 among ``num_logits`` logits; a NaN in ``[P]`` values makes everything
        NaN."""
        poison = poison_of(self.totals[0, -1], (self.logits, *values))
        return self.ranks(self._found(scans.unit_of(num_logits, self.logits.device)), poison)

    def ranks(self, found: Tensor, poison: Tensor, rank_positive: Tensor | None = None) -> Ranks:
        """From N_FP, and from rank+ unless it is the sum of ramps."""
        found = found + poison
        if rank_positive is None:
            rank_positive = 1 + self.sums(torch.ones_like(found), "above", poison)
        num_positives, num_groups = self._sizes()
        share = 1 / (num_positives * num_groups) + poison
        return Ranks(found, rank_positive, rank_positive + found, num_positives, share, poison)

    def _found(self, unit: Tensor) -> Tensor:
        counts, offsets = self.totals[:, :-1].double()
        return false_positives(self.knots, counts, offsets * unit * (2 * self.delta))

    def sums(self, values: Tensor, kind: str, poison: Tensor) -> Tensor:
        """For each positive a sum over the positives plus poison, ``[P] -> [P]`` float64. Kinds: ``"above"``, sum over
        k != i of v_k H(p_k - p_i), and its transpose ``"received"``; ``"sorted"``, over i and the positives before it
        in descending order (the later of equal ones is first), and its transpose ``"sorted_received"``;
        ``"running_max"``, the largest of i and the positives after it."""
        order, groups = self.knots.order, self.knots.order_groups
        if kind == "above":
            return ramp_sums(self.knots, values[None])[0] + poison
        if kind == "received":
            return received_sums(self.knots, values) + poison
        if kind == "sorted":
            ordered = scans.suffix_sums(values[order][None], groups)[0, :-1]
        elif kind == "sorted_received":
            ordered = scans.prefix_sums(values[order][None], groups)[0, 1:]
        else:
            ordered = scans.running_max(values[order], groups)
        return torch.empty_like(ordered).index_copy(0, order, ordered) + poison

    def lines(self, weights: Tensor, poison: Tensor) -> Tensor:
        """g(t) = sum_i w_i H(t - p_i), as ``passes.Passes.write`` takes it."""
        return ramp_coefficients(self.knots, weights) + poison

    def derivatives(self, by_false: Tensor, by_positive: Tensor, poison: Tensor) -> tuple[Tensor, Tensor]:
        """Of a function of the ranks, with respect to scores: that of negatives, as ``passes.Passes.write`` takes it,
        and ``[P]`` of the positives.

        The derivative of a ramp is 1 / (2 delta) within it, where it begins included, and 0 elsewhere.

        Args:
            by_false, by_positive: ``[P]`` float64: the derivatives with respect to N_FP(i) and to rank+(i).
        """
        knots, width = self.knots, self.knots.inverse_width
        rising = ramp_coefficients(knots, by_false)[1] * width
        # Each positive moves its own ramp over the others, and lies on theirs.
        received = ramp_coefficients(knots, by_positive)[1][knots.bucket] - by_positive
        negatives, positives = num_inside(knots, self.totals[0, :-1].double())
        own = (received - by_false * negatives - by_positive * positives) * width
        return torch.stack([rising, torch.zeros_like(rising)]) + poison, own

    def _sizes(self) -> tuple[Tensor, Tensor]:
        """The number of positives in each positive's group ``[P]``, and the number of groups."""
        ordered, num_pos = self.knots.order_groups, self.logits.shape[0]
        if ordered is None or self.groups is None:
            like = self.logits.new_ones((), dtype=torch.float64)
            return like.new_full((num_pos,), num_pos), like
        sizes = torch.searchsorted(ordered, self.groups, right=True) - torch.searchsorted(ordered, self.groups)
        return sizes.double(), (ordered[1:] != ordered[:-1]).sum().double() + 1


class Paired(Sorted):
    """The same for passes that compare every score with every positive and use no table."""

    def __init__(self, logits: Tensor, groups: Tensor | None, delta: float) -> None:
        super().__init__(logits, groups, delta)
        # The positives replace the ends of their ramps.
        self.table = Table(logits, logits.new_empty(0), groups)
        self.totals = self.totals.new_zeros(logits.shape[0] + 1)

    def rank(self, num_logits: int, values: Sequence[Tensor]) -> Ranks:
        poison = poison_of(self.totals[-1], (self.logits, *values))
        return self.ranks(self.totals[:-1].double() * scans.unit_of(num_logits, self.logits.device), poison)

    def lines(self, weights: Tensor, poison: Tensor) -> Tensor:
        return torch.cat([weights, weights.new_zeros(1)]) + poison


class Compared:
    """By kernels that compare all positives with all, with one launch each."""

    def __init__(
        self, logits: Tensor, groups: Tensor | None, delta: float, table: Table, totals: Tensor, ends: Sequence[Tensor]
    ) -> None:
        self.logits, self.groups, self.delta, self.table, self.totals = logits, groups, delta, table, totals
        begin, end, *num_groups = ends
        #: In the form that operators take.
        self.positives = operators.present(logits, begin, end, groups)
        self._num_groups = num_groups[0] if num_groups else None

    def rows(
        self, num_logits: int, values: Sequence[Tensor], formula: str = "", eps: float = 0.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See ``operators.rank``."""
        stacked = None
        if values:
            stacked = values[0][None] if len(values) == 1 else torch.stack([value.double() for value in values])
        found: tuple[Tensor, Tensor, Tensor] = operators.rank(
            self.positives,
            operators.present(*self.table),
            self.totals,
            self._num_groups,
            stacked,
            num_logits,
            self.delta,
            eps,
            formula,
        )
        return found

    def rank(self, num_logits: int, values: Sequence[Tensor]) -> Ranks:
        """See :meth:`Sorted.rank`."""
        rows, _, poison = self.rows(num_logits, values)
        found, rank_positive, rank, num_positives, share = rows.unbind()
        return Ranks(found, rank_positive, rank, num_positives, share, poison)

    def sums(self, values: Tensor, kind: str, poison: Tensor) -> Tensor:
        """See :meth:`Sorted.sums`."""
        if kind == "running_max" and values.requires_grad:
            # This is rare, so use the sorted form, which has the derivative.
            return Sorted(self.logits, self.groups, self.delta).sums(values, kind, poison)
        found: Tensor = operators.sums(self.positives, values.double(), poison, self.delta, kind)
        return found


def compare(
    index: Tensor, logits: Tensor, numbers: Tensor, groups: Sequence[Tensor], delta: float, dtype: torch.dtype
) -> tuple[Tensor, Compared]:
    """Placed positives from those of ``operators.find``, and their indices in flat order; for scores of a dtype."""
    grouped, in_any_order = bool(groups), numbers.shape[0] > 0
    of_each = groups[0] if groups else None
    totals, thresholds, cells, *rest = operators.place(index, logits, numbers, of_each, delta, dtype)
    if in_any_order:
        index, logits = rest[-3:-1] if grouped else rest[-2:]
        of_each = rest[-1] if grouped else None
    table = Table(thresholds, cells, rest[2] if grouped else None)
    return index, Compared(logits, of_each, delta, table, totals, rest[:2] + (rest[3:4] if grouped else []))


def poison_of(num_nan: Tensor, values: Sequence[Tensor]) -> Tensor:
    """A float64 scalar: NaN if ``num_nan`` is not 0 or one of ``values`` holds a NaN, else 0."""
    has_nan = num_nan > 0
    for value in values:
        has_nan = has_nan | value.isnan().any()
    return torch.where(has_nan, torch.nan, 0.0).double()
