"""Rank the positives from the counts of pass 1: N_FP, rank+, and, if the kernels have the formula of the loss, the term
of each positive in the loss and what it sends.

For few enough positives to compare each with all: O(P^2) work, without sort and scan. Each program compares a block of
positives with all others in a fixed order, without atomics. Scores are float32 or float64; results are float64.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .formulas import Formula, evaluate
from .launch import compare, ramp_of
from .layout import Positives, Table
from .ramp import exceeds, finite, floor_of, height_at, height_at_0, heights
from .sorting import missorted
from .sums import group_of, ranked_together, sum_over

# Rows of numbers for each positive, from the rank kernel to the send kernel: what it sends in all; what it sends to a
# whole false positive; its term of each scalar; what it sends to the values above it; and what it sends to missorted
# positives above it. With interpolated precision, N_FP(i), its error and its divisor are in rows that are not needed
# otherwise.
SENT, WEIGHT, FIRST, SECOND, PASSED, MISSORTED = (tl.constexpr(row) for row in range(6))
FOUND, ERROR, TOGETHER = SECOND, PASSED, MISSORTED


class Counted(NamedTuple):
    """The counts of the previous passes."""

    totals: Any
    """``[2, 2P + 2]`` int64, see ``count.count``."""
    unit: Any
    """The unit of the offsets, a power of two."""
    num_groups: Any
    """``[1]`` int64: the number of groups with a positive; None for one ranking."""


class Ranks(NamedTuple):
    """The results of ranking, all float64 except ``rank``."""

    rows: Any
    """``[R, P]``: for a known formula the rows named above; otherwise N_FP(i), rank+(i), rank(i), the number of
    positives in the ranking of i, and the share of i in a mean over the groups of means over their positives."""
    rank: Any
    """``[P]`` rank(i), in the scores' dtype; for a known formula."""
    poison: Any
    """A scalar that is added to all later results: 0, or NaN if there is a NaN that is not ignored."""


@triton.jit
def false_positives(
    i, group, positives, table, counted, num_positives, ramp, BLOCK: tl.constexpr, BLOCK_P: tl.constexpr
):
    """N_FP(i) of a block of positives, from the counts of pass 1: float64."""
    there = i < num_positives
    positive = finite(tl.load(positives.logits + i, mask=there, other=0))[:, None]
    ramp_begin = tl.load(positives.begin + i, mask=there, other=0).to(tl.int32)[:, None]
    ramp_end = tl.load(positives.end + i, mask=there, other=0).to(tl.int32)[:, None]
    offsets = counted.totals + 2 * num_positives + 2
    found = tl.zeros([BLOCK_P, BLOCK], tl.float64)
    for first in range(1, 2 * num_positives + 1, BLOCK):
        bucket = first + tl.arange(0, BLOCK)
        inside = bucket <= 2 * num_positives
        count = tl.load(counted.totals + bucket, mask=inside, other=0).to(tl.float64)[None, :]
        share = tl.where(bucket[None, :] >= ramp_end, count, 0.0)
        if ramp.inverse_width > 0:
            offset = tl.load(offsets + bucket, mask=inside, other=0).to(tl.float64)[None, :] * counted.unit
            height = height_at(floor_of(bucket, table.thresholds, inside)[None, :], positive, ramp)
            under_way = (bucket[None, :] >= ramp_begin) & (bucket[None, :] < ramp_end)
            share = tl.where(under_way, offset + count * height, share)
        if table.groups is not None:
            of_bucket = tl.load(table.groups + bucket - 1, mask=inside, other=0)
            share = tl.where(of_bucket[None, :] == group[:, None], share, 0.0)
        found += share
    # Smaller numbers are rounding of the fixed point of pass 1, and a loss would divide by them.
    total = tl.sum(found, axis=1)
    return tl.where(total < 1e-10, 0.0, total)


@triton.jit
def rank_among(
    i, group, positives, values, num_values, num_positives, formula, ramp, BLOCK: tl.constexpr, BLOCK_P: tl.constexpr
):
    """In one loop over all positives, for each of a block: rank+(i); the sums ``above`` and ``sorted``, see
    :func:`.sums.sums`, over the first row of values, if the formula needs them (otherwise rank+ again); the number of
    positives of its group. All are float64. Last, whether (> 0) any score or value is NaN."""
    own, place = tl.load(positives.logits + i, mask=i < num_positives, other=0)[:, None], i[:, None]
    count = tl.zeros([BLOCK_P, BLOCK], tl.float64)
    above = tl.zeros([BLOCK_P, BLOCK], tl.float64)
    before = tl.zeros([BLOCK_P, BLOCK], tl.float64)
    together = tl.zeros([BLOCK_P, BLOCK], tl.int32)
    nan = tl.zeros([BLOCK], tl.int32)
    for first in range(0, num_positives, BLOCK):
        k = first + tl.arange(0, BLOCK)
        other = tl.load(positives.logits + k, mask=k < num_positives, other=0)
        nan |= (other != other).to(tl.int32)
        inside, other = ranked_together(positives, k, group, num_positives), other[None, :]
        if positives.groups is not None:
            together += inside.to(tl.int32)
        h = tl.where(inside & (k[None, :] != place), heights(other, own, ramp), 0.0)
        count += h
        if formula.above or formula.in_order:
            value = tl.load(values + k, mask=k < num_positives, other=0)
            nan |= (value != value).to(tl.int32)
            value = value.to(tl.float64)[None, :]
            above += tl.where(h > 0, value * h, 0.0)
            if formula.in_order:
                counts = inside & ((other > own) | ((other == own) & (k[None, :] >= place)))
                before += tl.where(counts, value, 0.0)
        elif values is not None:
            # Triton compiles the body of a loop even if it never runs.
            for row in range(0, num_values):
                value = tl.load(values + row * num_positives + k, mask=k < num_positives, other=0)
                nan |= (value != value).to(tl.int32)
    rank_positive = tl.sum(count, axis=1) + 1
    sum_above, sum_before = rank_positive, rank_positive
    if formula.above:
        sum_above = tl.sum(above, axis=1)
    if formula.in_order:
        sum_before = tl.sum(before, axis=1)
    num_together = tl.full([BLOCK_P], num_positives, tl.float64)
    if positives.groups is not None:
        num_together = tl.sum(together, axis=1).to(tl.float64)
    return rank_positive, sum_above, sum_before, num_together, tl.max(nan)


@triton.jit
def sorting_errors(
    i,
    group,
    positives,
    values,
    rows,
    bad,
    rank,
    together,
    num_positives,
    formula,
    ramp,
    BLOCK: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """The sorting errors of a block of positives, whose ranks include themselves by H(0); writes what they send to
    positives of lower values into rows."""
    there = i < num_positives
    target, target_error, lost, lost_error = missorted(i, group, positives, values, num_positives, ramp, BLOCK, BLOCK_P)
    if formula.by_rank:
        error = tl.load(values + i, mask=there, other=0).to(tl.float64) * lost / rank
    else:
        error = (target_error + lost_error) / (target + lost) - target_error / target
    sends = exceeds(lost, formula.eps)
    sent = tl.where(sends, error / together, 0.0)
    tl.store(rows + PASSED * num_positives + i, tl.where(sends, sent / lost, 0.0) + bad, mask=there)
    tl.store(rows + MISSORTED * num_positives + i, sent + bad, mask=there)
    return error


@triton.jit
def store_sent(rows, i, excess, found, bad, num_positives, formula):
    """Stores what positives with more than eps of false positives send in all, and to a whole one."""
    there, sends = i < num_positives, exceeds(found, formula.eps)
    tl.store(rows + SENT * num_positives + i, tl.where(sends, excess, 0.0), mask=there)
    tl.store(rows + WEIGHT * num_positives + i, tl.where(sends, excess / found, 0.0) + bad, mask=there)


@triton.jit(do_not_specialize=["num_values", "num_positives"])
def rank_kernel(
    positives,
    table,
    counted,
    values,
    num_values,
    ranks,
    num_positives,
    formula,
    ramp,
    BLOCK: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    there, rows = i < num_positives, ranks.rows
    group = group_of(positives, i, there)
    rank_positive, above, before, together, num_nan = rank_among(
        i, group, positives, values, num_values, num_positives, formula, ramp, BLOCK, BLOCK_P
    )
    found = false_positives(i, group, positives, table, counted, num_positives, ramp, BLOCK, BLOCK_P)
    any_nan = (num_nan > 0) | (tl.load(counted.totals + 2 * num_positives + 1) > 0)
    bad = tl.where(any_nan, float("nan"), 0.0).to(tl.float64)
    rank, size = rank_positive + found, together
    if counted.num_groups is not None:
        together *= tl.load(counted.num_groups).to(tl.float64)
    # All programs write the same number.
    tl.store(ranks.poison, bad)
    if formula.name == "":
        tl.store(rows + i, found + bad, mask=there)
        tl.store(rows + num_positives + i, rank_positive + bad, mask=there)
        tl.store(rows + 2 * num_positives + i, (rank_positive + bad) + (found + bad), mask=there)
        tl.store(rows + 3 * num_positives + i, size, mask=there)
        tl.store(rows + 4 * num_positives + i, 1 / together + bad, mask=there)
    else:
        value, in_order = above, before
        if formula.above or formula.by_rank:
            value = tl.load(values + i, mask=there, other=0).to(tl.float64)
        if formula.sorts:
            in_order = sorting_errors(
                i,
                group,
                positives,
                values,
                rows,
                bad,
                rank - (1 - height_at_0(ramp)),
                together,
                num_positives,
                formula,
                ramp,
                BLOCK,
                BLOCK_P,
            )
        excess, first, second = evaluate(
            formula,
            found,
            rank_positive,
            value,
            above,
            in_order,
            size,
            together,
            height_at_0(ramp),
            num_positives,
            positives.groups is None,
            BLOCK,
        )
        tl.store(ranks.rank + i, rank + bad, mask=there)
        if formula.interpolated:
            tl.store(rows + FOUND * num_positives + i, found, mask=there)
            tl.store(rows + ERROR * num_positives + i, -first, mask=there)
            tl.store(rows + TOGETHER * num_positives + i, together, mask=there)
        else:
            store_sent(rows, i, excess, found, bad, num_positives, formula)
            tl.store(rows + FIRST * num_positives + i, first + bad, mask=there)
        if formula.terms > 1:
            tl.store(rows + SECOND * num_positives + i, second + bad, mask=there)
        if formula.above:
            tl.store(rows + PASSED * num_positives + i, 1 / (rank * together) + bad, mask=there)


@triton.jit(do_not_specialize=["num_positives"])
def interpolate_kernel(positives, ranks, num_positives, formula, BLOCK: tl.constexpr, BLOCK_P: tl.constexpr):
    i = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    there, rows = i < num_positives, ranks.rows
    bad = tl.load(ranks.poison)
    found = tl.load(rows + FOUND * num_positives + i, mask=there, other=0)
    together = tl.load(rows + TOGETHER * num_positives + i, mask=there, other=1)
    # The largest precision has the smallest error.
    highest = sum_over(i, positives, rows + ERROR * num_positives, num_positives, 4, None, BLOCK, BLOCK_P)
    error = -highest / together
    store_sent(rows, i, error, found, bad, num_positives, formula)
    tl.store(rows + FIRST * num_positives + i, error + bad, mask=there)


def rank(
    positives: Positives, table: Table, counted: Counted, values: Tensor | None, formula: Formula, delta: float
) -> Ranks:
    """The ranks of the positives.

    Args:
        positives, table: from ``place.place``.
        counted: counts of the negatives.
        values: ``[K, P]`` floats; a NaN in them makes everything NaN. A formula takes its values from the first row.
        formula: of the loss, or ``NONE``.
        delta: half width of the ramp.
    """
    logits = positives.logits
    num_pos = len(logits)
    rows = torch.empty(formula.num_rows, num_pos, dtype=torch.float64, device=logits.device)
    rank = torch.empty_like(logits) if formula.name else logits.new_empty(0)
    ranks = Ranks(rows, rank, torch.empty((), dtype=torch.float64, device=logits.device))
    compare(
        rank_kernel,
        # Without positives there may still be a NaN among the negatives.
        max(1, num_pos),
        logits,
        # With this many sums at once, larger blocks exceed the registers of some targets.
        num_warps=8 if formula.name else None,
        positives=positives,
        table=table,
        counted=counted,
        values=None if values is None else values.contiguous(),
        num_values=0 if values is None else len(values),
        ranks=ranks,
        num_positives=num_pos,
        formula=formula.constants,
        ramp=ramp_of(logits, delta),
    )
    if formula.interpolated:
        constants: dict[str, Any] = {"num_positives": num_pos, "formula": formula.constants}
        compare(interpolate_kernel, num_pos, logits, positives=positives, ranks=ranks, **constants)
    return ranks
