"""What each positive adds to a loss, and what it sends to its false positives: one kernel, and one more where precision
is interpolated. For positives few enough to compare each with all, in one ranking; everything is float64 until stored.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .coefficients import exceeds
from .formulas import evaluate
from .knots import SETTINGS
from .ranks import false_positives, poison_of, rank_among, sum_over
from .sorting import missorted

MANY_SUMS = SETTINGS | {"num_warps": 8}
"""Settings of the kernel that has so many sums at once that some targets run out of registers for more of each."""

# Rows of numbers for each positive, which one kernel hands to the next: the gradient of its own score; what it sends to
# a whole false positive; what it adds to each scalar; and what it passes on to the values above it. Where precision is
# interpolated, N_FP(i) and its error go where the second scalar and the passing on are not needed. Last, what a
# positive sends because others are above it that should not be.
OWN, WEIGHT, FIRST, SECOND, PASSED, MISSORTED = (tl.constexpr(row) for row in range(6))
FOUND, ERROR = SECOND, PASSED


@triton.jit
def sorting_errors(
    i,
    there,
    own,
    pos_logits,
    values,
    rows,
    bad,
    num_positives,
    EPS: tl.constexpr,
    INVERSE_WIDTH: tl.constexpr,
    SATURATE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """The sorting errors of a block of positives, and, into rows, what they send to others of lower values."""
    value = tl.load(values + i, mask=there, other=0)
    target, target_error, lost, lost_error = missorted(
        own, value, i, pos_logits, values, i, num_positives, INVERSE_WIDTH, SATURATE, False, BLOCK, BLOCK_P
    )
    error = (target_error + lost_error) / (target + lost) - target_error / target
    sends = exceeds(lost, EPS)
    sent = tl.where(sends, error / tl.full([], num_positives, tl.float64), 0.0)
    tl.store(rows + PASSED * num_positives + i, tl.where(sends, sent / lost, 0.0) + bad, mask=there)
    tl.store(rows + MISSORTED * num_positives + i, sent + bad, mask=there)
    return error


@triton.jit
def store_sent(rows, i, there, excess, found, bad, num_positives, EPS: tl.constexpr):
    """What positives with more than EPS of false positives send in all, up their own scores; and for a whole one."""
    sends = exceeds(found, EPS)
    tl.store(rows + WEIGHT * num_positives + i, tl.where(sends, excess / found, 0.0) + bad, mask=there)
    tl.store(rows + OWN * num_positives + i, bad - tl.where(sends, excess, 0.0), mask=there)


@triton.jit(do_not_specialize=["num_positives"])
def errors_kernel(
    pos_logits,
    thresholds,
    begin,
    end,
    totals,
    values,
    rows,
    ranks,
    num_positives,
    unit,
    FORMULA: tl.constexpr,
    ABOVE: tl.constexpr,
    SORTED: tl.constexpr,
    SORTS: tl.constexpr,
    INTERPOLATED: tl.constexpr,
    ROWS: tl.constexpr,
    SATURATE: tl.constexpr,
    EPS: tl.constexpr,
    DELTA: tl.constexpr,
    INVERSE_WIDTH: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    there = i < num_positives
    own = tl.load(pos_logits + i, mask=there, other=0)
    rank_positive, above, before, num_nan = rank_among(
        i, own, pos_logits, values, num_positives, 1 if SORTS else 0, ABOVE, SORTED, INVERSE_WIDTH, BLOCK, BLOCK_P
    )
    bad = poison_of(num_nan, totals, num_positives)
    found = false_positives(
        own,
        tl.load(begin + i, mask=there, other=0),
        tl.load(end + i, mask=there, other=0),
        thresholds,
        totals,
        unit,
        num_positives,
        DELTA,
        INVERSE_WIDTH,
        LARGEST,
        BLOCK,
        BLOCK_P,
    )
    value, together = above, before
    if ABOVE:
        value = tl.load(values + i, mask=there, other=0).to(tl.float64)
    if SORTS:
        together = sorting_errors(
            i,
            there,
            own,
            pos_logits,
            values,
            rows,
            bad,
            num_positives,
            EPS,
            INVERSE_WIDTH,
            SATURATE,
            BLOCK,
            BLOCK_P,
        )
    excess, first, second = evaluate(
        FORMULA,
        found,
        rank_positive,
        value,
        above,
        together,
        num_positives,
        0.5 if INVERSE_WIDTH > 0 else 1.0,
        BLOCK,
    )
    rank = rank_positive + found
    tl.store(ranks + i, rank + bad, mask=there)
    if INTERPOLATED:
        tl.store(rows + FOUND * num_positives + i, found, mask=there)
        tl.store(rows + ERROR * num_positives + i, -first, mask=there)
    else:
        store_sent(rows, i, there, excess, found, bad, num_positives, EPS)
        tl.store(rows + FIRST * num_positives + i, first + bad, mask=there)
    if ABOVE or SORTS:
        tl.store(rows + SECOND * num_positives + i, second + bad, mask=there)
    if ABOVE:
        tl.store(rows + PASSED * num_positives + i, 1 / (rank * num_positives) + bad, mask=there)
    # Written as the same number by all.
    tl.store(rows + ROWS * num_positives, bad)


@triton.jit(do_not_specialize=["num_positives"])
def interpolate_kernel(
    pos_logits,
    rows,
    num_positives,
    ROWS: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    there = i < num_positives
    own = tl.load(pos_logits + i, mask=there, other=0)
    bad = tl.load(rows + ROWS * num_positives)
    found = tl.load(rows + FOUND * num_positives + i, mask=there, other=0)
    # The largest precision goes with the smallest error.
    highest = sum_over(i, own, pos_logits, rows + ERROR * num_positives, num_positives, 4, 0.0, BLOCK, BLOCK_P)
    error = -highest / tl.full([], num_positives, tl.float64)
    store_sent(rows, i, there, error, found, bad, num_positives, EPS)
    tl.store(rows + FIRST * num_positives + i, error + bad, mask=there)
