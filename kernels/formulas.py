"""The formulas of the losses on the device: the term of each positive, and what it sends to its false positives.

Each has the same formula as in ``alrp_triton/losses``, which names the source; a test compares the two.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .launch import constant


class Formula(NamedTuple):
    """The inputs of a formula besides the ranks, and its results."""

    name: str = ""
    terms: int = 1
    """The number of scalars of the loss."""
    above: bool = False
    """Whether it takes a sum of values over the positives above, by ramps."""
    in_order: bool = False
    """Whether it takes the sum of values over a positive and those before it in descending order."""
    receives: str | None = None
    """The kind of sum, see ``sums.sums``, that is the second scalar's derivative with respect to the values."""
    sorts: bool = False
    """Whether its second scalar is the sorting error."""
    by_rank: bool = False
    """Whether the sorting error is a share of the rank, and both errors are multiplied by the values."""
    interpolated: bool = False
    """Whether the precision of a positive is the largest among it and those below it."""
    eps: float = 0.0
    """A positive with at most this many false positives sends nothing."""

    @property
    def constants(self) -> Formula:
        """In the form that kernels take."""
        return _constants(*self)

    @property
    def num_rows(self) -> int:
        """Rows of ``rank.Ranks``."""
        if not self.name or (self.terms > 1 and not self.sorts):
            return 5
        return 6 if self.sorts or self.interpolated else 3

    @property
    def num_scores(self) -> int:
        """The number of scalars with a derivative with respect to scores."""
        return 2 if self.sorts else 1

    @property
    def has_derivative(self) -> bool:
        """Whether the last scalar has a derivative with respect to the values, or to the errors of an unknown
        formula."""
        return not self.name or (self.terms > 1 and not self.sorts)

    def derivative_dtype(self, given: torch.Tensor | None) -> torch.dtype:
        """The dtype of that derivative."""
        return torch.float64 if given is None else torch.promote_types(given.dtype, torch.float32)


@lru_cache(maxsize=None, typed=True)
def _constants(*fields: Any) -> Formula:
    return Formula(*map(constant, fields))


FORMULAS = {
    formula.name: formula
    for formula in (
        Formula(),
        Formula("alrp_sorted", terms=2, above=True, in_order=True, receives="sorted_received"),
        Formula("alrp_smooth", terms=2, above=True, receives="received"),
        Formula("ap"),
        Formula("ap_interpolated", interpolated=True),
        Formula("ndcg"),
        Formula("rank_sort", terms=2, sorts=True),
        Formula("ape", terms=2, sorts=True, by_rank=True),
    )
}
"""By name; "" is for a loss whose formula is not known here."""


@triton.jit
def ideal_gain(num_together, num_positives, ONE_RANKING: tl.constexpr, BLOCK: tl.constexpr):
    """Sum over r = 1..n of 1 / log2(1 + r), for n positives in one ranking."""
    gains = tl.zeros([BLOCK] if ONE_RANKING else [num_together.shape[0], BLOCK], tl.float64)
    for first in range(0, num_positives, BLOCK):
        place = first + tl.arange(0, BLOCK)
        gain = 1 / log2(2.0 + place.to(tl.float64))
        if ONE_RANKING:
            gains += tl.where(place < num_positives, gain, 0.0)
        else:
            gains += tl.where(place[None, :] < num_together[:, None], gain[None, :], 0.0)
    return tl.sum(gains, axis=0 if ONE_RANKING else 1)


@triton.jit
def log2(x):
    """In float64; not every target has its logarithm to base 2."""
    return tl.log(x) * 1.4426950408889634


@triton.jit
def log2_of_1_plus(x):
    """log2(1 + x) in float64, exact also for a small x (W. Kahan's method)."""
    y = 1 + x
    gone = y - 1
    return tl.where(gone == 0, x * 1.4426950408889634, log2(y) * (x / tl.where(gone == 0, 1.0, gone)))


@triton.jit
def evaluate(
    formula,
    found,
    rank_positive,
    value,
    above,
    together_in_order,
    num_together,
    shared_by,
    height_at_0,
    num_positives,
    ONE_RANKING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Evaluate a formula for a block of positives, in float64.

    Args:
        formula: one of :data:`FORMULAS`.
        found: N_FP(i).
        rank_positive: rank+(i).
        value: the value of the positive, if the formula takes it.
        above: the sum of the values by ramps, if the formula takes it.
        together_in_order: the sum of the values in order, or the sorting error, if the formula takes one of them.
        num_together: the number of positives in the ranking of i.
        shared_by: the same times the number of groups.
        height_at_0: H(0).
        num_positives: P.

    Returns:
        ``(excess, first, second)``: l(i) - l*(i), and its terms of the scalars; all times 1/Z, except precision before
        interpolation.
    """
    rank, share = rank_positive + found, 1.0 / shared_by
    if formula.name == "alrp_sorted" or formula.name == "alrp_smooth":
        first = found / rank * share
        # Its own value cancels in the excess. The sum by ramps leaves it out; the sum in order includes it.
        excess = (found + above) / rank * share
        second = (together_in_order if formula.in_order else value + above) / rank * share
    elif formula.name == "ap":
        first = found / rank * share
        excess, second = first, first
    elif formula.name == "ap_interpolated":
        first = found / rank
        excess, second = first, first
    elif formula.name == "rank_sort":
        # Here ranks include the positive itself by H(0).
        excess = found / (rank - (1 - height_at_0)) * share
        first, second = excess, together_in_order * share
    elif formula.name == "ape":
        excess = value * found / (rank - (1 - height_at_0)) * share
        first, second = excess, together_in_order * share
    else:
        tl.static_assert(formula.name == "ndcg")
        gain = ideal_gain(num_together, num_positives, ONE_RANKING, BLOCK)
        if not ONE_RANKING:
            gain *= shared_by / num_together
        behind = log2(1 + rank_positive)
        excess = log2_of_1_plus(found / (1 + rank_positive)) / (behind * log2(1 + rank)) / gain
        first = share - 1 / log2(1 + rank) / gain
        second = first
    return excess, first, second
