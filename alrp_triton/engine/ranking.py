"""The statistics that the formula of a loss reads, of a ranking of P positives among M logits."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, autograd

from .counted import Counted
from .knots import ramp_at_0


class Statistics(Protocol):
    """The statistics for a formula: for each positive, ``[P]`` float64, within its group.

    :class:`Ranking` is one, and so is the ranking of the reference.
    """

    num_false_positives: Tensor
    """N_FP(i) = sum over negatives of H(n_j - p_i)."""
    rank_positive: Tensor
    """rank+(i) = 1 + sum over k != i of H(p_k - p_i)."""
    rank: Tensor
    """rank(i) = rank+(i) + N_FP(i)."""
    num_positives: Tensor
    """P, the number of positives in the ranking of i."""

    def sums_above(self, values: Tensor) -> Tensor:
        """sum over k != i of v_k H(p_k - p_i)."""

    def sums_sorted(self, values: Tensor) -> Tensor:
        """Sum of v_k over i and the positives before it in descending order; of equal ones the later in flat order is
        first."""

    def running_max(self, values: Tensor) -> Tensor:
        """The largest v_k among i and the positives after it in that order."""


class Ranking:
    """Statistics of each positive, all float64 ``[P]`` and without a derivative; sums of values are differentiable for
    the values."""

    def __init__(self, counted: Counted) -> None:
        self.counted, self.ranks = counted, counted.rank()
        self.num_false_positives, self.rank_positive, self.rank, self.num_positives, self.share, self.poison = (
            self.ranks
        )

    @property
    def height_at_0(self) -> float:
        """H(0), the ramp of a positive at its own score."""
        return ramp_at_0(self.counted.delta)

    def sums_above(self, values: Tensor) -> Tensor:
        """sum over k != i of v_k H(p_k - p_i), for ``[P]`` float64 values."""
        return self._sums(values, "above")

    def sums_received(self, values: Tensor) -> Tensor:
        """sum over i != k of v_i H(p_k - p_i): the transpose of :meth:`sums_above`."""
        return self._sums(values, "received")

    def sums_sorted(self, values: Tensor) -> Tensor:
        """Sum of v_k over i and the positives before it in descending order; of equal ones the later in flat order is
        first (a stable ascending sort, flipped)."""
        return self._sums(values, "sorted")

    def sums_sorted_received(self, values: Tensor) -> Tensor:
        """Sum of v_i over k and the positives after it in descending order: the transpose of :meth:`sums_sorted`."""
        return self._sums(values, "sorted_received")

    def running_max(self, values: Tensor) -> Tensor:
        """The largest value among i and the positives after it in descending order."""
        return self.counted.sums(values, "running_max", self.poison)

    def _sums(self, values: Tensor, kind: str) -> Tensor:
        if not values.requires_grad:
            return self.counted.sums(values, kind, self.poison)
        found: Tensor = _Sum.apply(values, self, kind)  # type: ignore[no-untyped-call]
        return found


_TRANSPOSED = {"above": "received", "received": "above", "sorted": "sorted_received", "sorted_received": "sorted"}


class _Sum(autograd.Function):
    """A sum with its transpose as the derivative, so that backward also adds in a fixed order."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, ranking: Ranking, kind: str) -> Tensor:
        ctx.ranking, ctx.kind = ranking, kind
        return ranking.counted.sums(values, kind, ranking.poison)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        ranking: Ranking = ctx.ranking
        return ranking.counted.sums(grad, _TRANSPOSED[ctx.kind], ranking.poison), None, None
