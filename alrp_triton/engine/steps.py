"""The P-sized steps between the two passes over the logits, as one object that a ranking asks."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from . import operators_small, sums
from .knots import false_positives, make_knots, ramp_coefficients, ramp_sums, received_sums

# More positives than this are sorted: beyond, launches cost less than pairs.
MOST_COMPARED = 4096


class Steps(ABC):
    """What sums of ramps over the positives, or from buckets, there are. All take and give float64."""

    thresholds: Tensor
    """``[2P]`` sorted knots in the compute dtype; NaN stands above +inf."""
    threshold_groups: Tensor | None
    """``[2P]`` int64: the group of each threshold."""

    def __init__(self, pos_logits: Tensor, delta: float) -> None:
        self.pos_logits, self.delta = pos_logits, delta

    @abstractmethod
    def false_positives(self, totals: Tensor, unit: Tensor) -> Tensor:
        """N_FP(i) = sum_j H(n_j - p_i), ``[P]``.

        Args:
            totals: ``[2, 2P + 2]`` int64, for each bucket how many negatives it has, and what their distances from
                its lower threshold, over 2 delta, add up to in units.
            unit: a float64 scalar.
        """

    @abstractmethod
    def sums_above(self, values: Tensor) -> Tensor:
        """sum over k != i of v_k H(p_k - p_i): ``[P] -> [P]``."""

    @abstractmethod
    def sums_received(self, values: Tensor) -> Tensor:
        """sum over i != k of v_i H(p_k - p_i): ``[P] -> [P]``."""

    @abstractmethod
    def sums_sorted(self, values: Tensor) -> Tensor:
        """Sum over i itself and what precedes it in descending order, of two equal ones the later: ``[P] -> [P]``."""

    @abstractmethod
    def sums_sorted_received(self, values: Tensor) -> Tensor:
        """Sum over k itself and what follows it in that order: ``[P] -> [P]``."""

    @abstractmethod
    def running_max(self, values: Tensor) -> Tensor:
        """The largest value among i itself and what follows it in that order: ``[P] -> [P]``."""

    @abstractmethod
    def coefficients(self, weights: Tensor) -> Tensor:
        """g(t) = sum_i w_i H(t - p_i), level and slope of each bucket: ``[K, P] -> [K, 2, 2P + 1]``."""

    def sizes(self) -> tuple[Tensor, Tensor]:
        """How many positives each positive's group has ``[P]``, and how many groups there are."""
        like, num_pos = self.pos_logits, self.pos_logits.shape[0]
        return like.new_full((num_pos,), num_pos, dtype=torch.float64), like.new_ones((), dtype=torch.float64)


class SortedSteps(Steps):
    """By sorted knots and scans, in O(P log P): for any P, device and groups."""

    def __init__(self, pos_logits: Tensor, delta: float, groups: Tensor | None = None) -> None:
        super().__init__(pos_logits, delta)
        self._groups, self.knots = groups, make_knots(pos_logits, delta, groups)
        self.thresholds, self.threshold_groups = self.knots.thresholds, self.knots.threshold_groups

    def false_positives(self, totals: Tensor, unit: Tensor) -> Tensor:
        counts, offsets = totals[:, :-1].double()
        return false_positives(self.knots, counts, offsets * unit * (2 * self.delta))

    def sums_above(self, values: Tensor) -> Tensor:
        return ramp_sums(self.knots, values[None])[0]

    def sums_received(self, values: Tensor) -> Tensor:
        return received_sums(self.knots, values)

    def sums_sorted(self, values: Tensor) -> Tensor:
        ordered = values[self.knots.order][None]
        return self._in_flat_order(sums.suffix_sums(ordered, self.knots.order_groups)[0, :-1])

    def sums_sorted_received(self, values: Tensor) -> Tensor:
        ordered = values[self.knots.order][None]
        return self._in_flat_order(sums.prefix_sums(ordered, self.knots.order_groups)[0, 1:])

    def running_max(self, values: Tensor) -> Tensor:
        return self._in_flat_order(sums.running_max(values[self.knots.order], self.knots.order_groups))

    def coefficients(self, weights: Tensor) -> Tensor:
        return torch.stack([ramp_coefficients(self.knots, row) for row in weights])

    def sizes(self) -> tuple[Tensor, Tensor]:
        ordered, groups = self.knots.order_groups, self._groups
        if ordered is None or groups is None:
            return super().sizes()
        sizes = torch.searchsorted(ordered, groups, right=True) - torch.searchsorted(ordered, groups)
        return sizes.double(), (ordered[1:] != ordered[:-1]).sum().double() + 1

    def _in_flat_order(self, ordered: Tensor) -> Tensor:
        return torch.empty_like(ordered).index_copy(0, self.knots.order, ordered)


class ComparedSteps(Steps):
    """By kernels that compare all positives with all, a launch each; without groups."""

    threshold_groups = None

    def __init__(self, pos_logits: Tensor, delta: float) -> None:
        super().__init__(pos_logits, delta)
        self._table = operators_small.place_knots(pos_logits, delta)
        self.thresholds = self._table[0]

    def false_positives(self, totals: Tensor, unit: Tensor) -> Tensor:
        found: Tensor = operators_small.false_positives(self.pos_logits, *self._table, totals, unit, self.delta)
        return found

    def sums_above(self, values: Tensor) -> Tensor:
        return self._sums(values, "above")

    def sums_received(self, values: Tensor) -> Tensor:
        return self._sums(values, "received")

    def sums_sorted(self, values: Tensor) -> Tensor:
        return self._sums(values, "sorted")

    def sums_sorted_received(self, values: Tensor) -> Tensor:
        return self._sums(values, "sorted_received")

    def running_max(self, values: Tensor) -> Tensor:
        if values.requires_grad:
            # Rare enough for the other way, which knows the derivative.
            return SortedSteps(self.pos_logits, self.delta).running_max(values)
        return self._sums(values, "running_max")

    def coefficients(self, weights: Tensor) -> Tensor:
        found: Tensor = operators_small.ramp_coefficients(self.pos_logits, *self._table, weights, self.delta)
        return found

    def _sums(self, values: Tensor, kind: str) -> Tensor:
        found: Tensor = operators_small.pair_sums(self.pos_logits, values.double()[None], kind, self.delta)
        return found[0]


def make_steps(pos_logits: Tensor, delta: float, groups: Tensor | None, backend: str) -> Steps:
    """The kind that suits positives ``[P]``, their groups ``[P]`` int64 if any, and the backend of the passes."""
    if backend == "triton" and groups is None and pos_logits.shape[0] <= MOST_COMPARED:
        return ComparedSteps(pos_logits, delta)
    return SortedSteps(pos_logits, delta, groups)
