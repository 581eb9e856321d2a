"""The losses' formulas on the device: what each positive adds to a loss, and what it sends to its false positives.

Each is the twin of a formula in ``alrp_triton/losses``, where its source is named; a test holds one against the other.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl


class Formula(NamedTuple):
    """What a formula needs beside the ranks, and what becomes of it."""

    terms: int = 1
    """How many scalars the loss has."""
    above: bool = False
    """Whether it takes a sum over what stands above a positive, of one value each, by ramps."""
    in_order: bool = False
    """Whether it takes their sum over what precedes a positive in descending order, itself included."""
    receives: str | None = None
    """The kind of sum, see ``ranks.pair_sums``, that is the second term's derivative with respect to the values."""
    sorts: bool = False
    """Whether its second term says how positives of lower values stand above those of higher ones."""
    interpolated: bool = False
    """Whether the largest precision among a positive and those below it stands for its own."""


FORMULAS = {
    "alrp_sorted": Formula(terms=2, above=True, in_order=True, receives="sorted_received"),
    "alrp_smooth": Formula(terms=2, above=True, receives="received"),
    "ap": Formula(),
    "ap_interpolated": Formula(interpolated=True),
    "ndcg": Formula(),
    "rank_sort": Formula(terms=2, sorts=True),
}


@triton.jit
def ideal_gain(num_positives, BLOCK: tl.constexpr):
    """Sum over r = 1..P of 1 / log2(1 + r)."""
    gains = tl.zeros([BLOCK], tl.float64)
    for first in range(0, num_positives, BLOCK):
        place = first + tl.arange(0, BLOCK)
        gains += tl.where(place < num_positives, 1 / log2(2.0 + place.to(tl.float64)), 0.0)
    return tl.sum(gains)


@triton.jit
def log2(x):
    """In float64, whose logarithm to base 2 not every target has."""
    return tl.log(x) * 1.4426950408889634


@triton.jit
def log2_of_1_plus(x):
    """log2(1 + x), with all digits of a small x, float64 (W. Kahan's way)."""
    y = 1 + x
    gone = y - 1
    return tl.where(gone == 0, x * 1.4426950408889634, log2(y) * (x / tl.where(gone == 0, 1.0, gone)))


@triton.jit
def evaluate(
    FORMULA: tl.constexpr,
    found,
    rank_positive,
    value,
    above,
    together,
    num_positives,
    HEIGHT_AT_0: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of a block of positives, in float64.

    Args:
        FORMULA: a name in :data:`FORMULAS`.
        found: N_FP(i).
        rank_positive: rank+(i).
        value: of the positive itself.
        above: the sum of the values by ramps, where the formula takes it.
        together: the sum of the values in order, or the sorting error, where the formula takes one of them.
        num_positives: P.
        HEIGHT_AT_0: H(0).

    Returns:
        ``(excess, first, second)``: l(i) - l*(i), and what it adds to each scalar; all times 1/Z.
    """
    rank = rank_positive + found
    share = 1.0 / tl.full([], num_positives, tl.float64)
    if FORMULA == "alrp_sorted" or FORMULA == "alrp_smooth":
        first = found / rank * share
        # Its own value cancels in the excess; the sum by ramps leaves it out, the one in order does not.
        excess = (found + above) / rank * share
        second = (together if FORMULA == "alrp_sorted" else value + above) / rank * share
    elif FORMULA == "ap" or FORMULA == "ap_interpolated":
        first = found / rank
        if FORMULA == "ap":
            first *= share
        excess, second = first, first
    elif FORMULA == "rank_sort":
        # Ranks include the positive itself by its ramp.
        excess = found / (rank - (1 - HEIGHT_AT_0)) * share
        first, second = excess, together * share
    else:
        tl.static_assert(FORMULA == "ndcg")
        gain = ideal_gain(num_positives, BLOCK)
        behind = log2(1 + rank_positive)
        excess = log2_of_1_plus(found / (1 + rank_positive)) / (behind * log2(1 + rank)) / gain
        first = share - 1 / log2(1 + rank) / gain
        second = first
    return excess, first, second
