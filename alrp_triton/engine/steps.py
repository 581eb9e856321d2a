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
    def rank(self, totals: Tensor, unit: Tensor, values: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """N_FP(i) = sum_j H(n_j - p_i), rank+(i), their sum, ``[P]`` each; and 0, or NaN if there is one anywhere.

        Args:
            totals: ``[2, 2P + 2]`` int64, for each bucket how many negatives it has, and what their distances from
                its lower threshold, over 2 delta, add up to in units; ``[0, -1]`` counts NaN.
            unit: a float64 scalar.
            values: ``[P]`` each, in which a NaN makes everything NaN.
        """

    @abstractmethod
    def sums_above(self, values: Tensor, poison: Tensor) -> Tensor:
        """sum over k != i of v_k H(p_k - p_i): ``[P] -> [P]``. To all results ``poison``, a scalar, is added."""

    @abstractmethod
    def sums_received(self, values: Tensor, poison: Tensor) -> Tensor:
        """sum over i != k of v_i H(p_k - p_i): ``[P] -> [P]``."""

    @abstractmethod
    def sums_sorted(self, values: Tensor, poison: Tensor) -> Tensor:
        """Sum over i itself and what precedes it in descending order, of two equal ones the later: ``[P] -> [P]``."""

    @abstractmethod
    def sums_sorted_received(self, values: Tensor, poison: Tensor) -> Tensor:
        """Sum over k itself and what follows it in that order: ``[P] -> [P]``."""

    @abstractmethod
    def running_max(self, values: Tensor, poison: Tensor) -> Tensor:
        """The largest value among i itself and what follows it in that order: ``[P] -> [P]``."""

    @abstractmethod
    def coefficients(self, weights: Tensor, poison: Tensor) -> Tensor:
        """g(t) = sum_i w_i H(t - p_i), level and slope of each bucket: ``[K, P] -> [K, 2, 2P + 1]``."""

    def send(self, excess: Tensor, share: Tensor, spread: Tensor, eps: float, poison: Tensor) -> tuple[Tensor, Tensor]:
        """What positives with a ``spread`` above ``eps`` send, ``excess * share`` each, as coefficients
        ``[1, 2, 2P + 1]`` and as gradients of their own scores ``[1, P]``."""
        sent, weights = sent_of(excess * share, spread, eps)
        return self.coefficients(weights[None], poison), poison - sent[None]

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

    def rank(self, totals: Tensor, unit: Tensor, values: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        poison = poison_of(totals[0, -1], (self.pos_logits, *values))
        counts, offsets = totals[:, :-1].double()
        found = false_positives(self.knots, counts, offsets * unit * (2 * self.delta)) + poison
        rank_positive = 1 + self.sums_above(torch.ones_like(found), poison)
        return found, rank_positive, rank_positive + found, poison

    def sums_above(self, values: Tensor, poison: Tensor) -> Tensor:
        return ramp_sums(self.knots, values[None])[0] + poison

    def sums_received(self, values: Tensor, poison: Tensor) -> Tensor:
        return received_sums(self.knots, values) + poison

    def sums_sorted(self, values: Tensor, poison: Tensor) -> Tensor:
        ordered = values[self.knots.order][None]
        return self._in_flat_order(sums.suffix_sums(ordered, self.knots.order_groups)[0, :-1]) + poison

    def sums_sorted_received(self, values: Tensor, poison: Tensor) -> Tensor:
        ordered = values[self.knots.order][None]
        return self._in_flat_order(sums.prefix_sums(ordered, self.knots.order_groups)[0, 1:]) + poison

    def running_max(self, values: Tensor, poison: Tensor) -> Tensor:
        return self._in_flat_order(sums.running_max(values[self.knots.order], self.knots.order_groups)) + poison

    def coefficients(self, weights: Tensor, poison: Tensor) -> Tensor:
        return torch.stack([ramp_coefficients(self.knots, row) for row in weights]) + poison

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

    def rank(self, totals: Tensor, unit: Tensor, values: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows = [value.double() for value in values]
        stacked = torch.stack(rows) if len(rows) > 1 else rows[0][None] if rows else self.pos_logits.new_empty(0, 0)
        ranks, poison = operators_small.rank(self.pos_logits, *self._table, totals, unit, stacked, self.delta)
        found, rank_positive, both = ranks.unbind()
        return found, rank_positive, both, poison

    def sums_above(self, values: Tensor, poison: Tensor) -> Tensor:
        return self._sums(values, poison, "above")

    def sums_received(self, values: Tensor, poison: Tensor) -> Tensor:
        return self._sums(values, poison, "received")

    def sums_sorted(self, values: Tensor, poison: Tensor) -> Tensor:
        return self._sums(values, poison, "sorted")

    def sums_sorted_received(self, values: Tensor, poison: Tensor) -> Tensor:
        return self._sums(values, poison, "sorted_received")

    def running_max(self, values: Tensor, poison: Tensor) -> Tensor:
        if values.requires_grad:
            # Rare enough for the other way, which knows the derivative.
            return SortedSteps(self.pos_logits, self.delta).running_max(values, poison)
        return self._sums(values, poison, "running_max")

    def coefficients(self, weights: Tensor, poison: Tensor) -> Tensor:
        found: Tensor = operators_small.ramp_coefficients(self.pos_logits, *self._table, weights, poison, self.delta)
        return found

    def send(self, excess: Tensor, share: Tensor, spread: Tensor, eps: float, poison: Tensor) -> tuple[Tensor, Tensor]:
        settings = self.delta, float(eps)
        found, own = operators_small.send(self.pos_logits, *self._table, excess, share, spread, poison, *settings)
        return found, own

    def _sums(self, values: Tensor, poison: Tensor, kind: str) -> Tensor:
        found: Tensor = operators_small.pair_sums(self.pos_logits, values.double()[None], poison, kind, self.delta)
        return found[0]


def sent_of(excess: Tensor, spread: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """What positives with more than ``eps`` of false positives send in all, and for a whole one: ``[P]`` each."""
    sends = spread > eps
    return torch.where(sends, excess, 0.0), torch.where(sends, excess / spread, 0.0)


def poison_of(num_nan: Tensor, values: tuple[Tensor, ...]) -> Tensor:
    """A float64 scalar: NaN if ``num_nan`` is not 0 or one of ``values`` holds a NaN, else 0."""
    has_nan = num_nan > 0
    for value in values:
        has_nan = has_nan | value.isnan().any()
    return torch.where(has_nan, torch.nan, 0.0).double()


def make_steps(pos_logits: Tensor, delta: float, groups: Tensor | None, backend: str) -> Steps:
    """The kind that suits positives ``[P]``, their groups ``[P]`` int64 if any, and the backend of the passes."""
    if backend == "triton" and groups is None and pos_logits.shape[0] <= MOST_COMPARED:
        return ComparedSteps(pos_logits, delta)
    return SortedSteps(pos_logits, delta, groups)
