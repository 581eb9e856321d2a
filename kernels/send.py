"""Send: level and slope of each bucket from what the positives send, and the scalars of the loss.

For few enough positives to compare each bucket with all of them: one launch, without atomics. All in float64 until
    stored.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .formulas import Formula
from .launch import compare, ramp_of
from .layout import Positives, Table
from .ramp import exceeds, finite, floor_of, height_at
from .rank import FIRST, MISSORTED, PASSED, SECOND, SENT, WEIGHT, Ranks
from .sorting import received
from .sums import group_of, sum_over

SPREAD, SHARE = WEIGHT, SECOND
"""Rows of an unknown formula; they replace rows that it does not have."""


class Sent(NamedTuple):
    """The loss, and the inputs of pass 2."""

    first: Any
    """The first scalar, in the scores' dtype, like the others unless stated."""
    second: Any
    """The second scalar, or the first again."""
    lines: Any
    """``[2, 2P + 1]``: level and slope of each bucket, which are side by side."""
    own: Any
    """``[K, P]`` float64: the derivatives of the scalars with respect to the positives' own scores; K = 2 for a loss
    that sorts, else 1."""
    derivative: Any
    """``[P]``: the derivative of the second scalar with respect to the values, in their dtype or float32; for an
    unknown formula, that of the scalar with respect to the errors; ``[0]`` if there is none."""


@triton.jit
def sent_by(rows, i, inside, num_positives, formula):
    """The sum that each positive sends."""
    sent = tl.load(rows + SENT * num_positives + i, mask=inside, other=0)
    if formula.name == "":
        spread = tl.load(rows + SPREAD * num_positives + i, mask=inside, other=0)
        sent = tl.where(exceeds(spread, formula.eps), sent, 0.0)
    return sent


@triton.jit
def weights_of(rows, i, inside, num_positives, formula):
    """The error that each positive sends to a whole false positive."""
    if formula.name == "":
        sent = tl.load(rows + SENT * num_positives + i, mask=inside, other=0)
        spread = tl.load(rows + SPREAD * num_positives + i, mask=inside, other=0)
        return tl.where(exceeds(spread, formula.eps), sent / spread, 0.0)
    else:
        return tl.load(rows + WEIGHT * num_positives + i, mask=inside, other=0)


@triton.jit
def level_and_slope(
    bucket, positives, table, rows, num_positives, formula, ramp, BLOCK: tl.constexpr, BLOCK_P: tl.constexpr
):
    """g(t) = sum_i w_i H(t - p_i) in a block of buckets: its value at the floor, and its increase over 2 delta."""
    # Bucket 0 has no floor, and no ramp needs it.
    there = (bucket > 0) & (bucket <= 2 * num_positives)
    floor = floor_of(bucket, table.thresholds, there)[:, None]
    level = tl.zeros([BLOCK_P, BLOCK], tl.float64)
    slope = tl.zeros([BLOCK_P, BLOCK], tl.float64)
    if table.groups is not None:
        group = tl.load(table.groups + bucket - 1, mask=there, other=0)[:, None]
    for first in range(0, num_positives, BLOCK):
        i = first + tl.arange(0, BLOCK)
        inside = i < num_positives
        weight = weights_of(rows, i, inside, num_positives, formula)[None, :]
        begin = tl.load(positives.begin + i, mask=inside, other=0).to(tl.int32)[None, :]
        end = tl.load(positives.end + i, mask=inside, other=0).to(tl.int32)[None, :]
        begun, ended = bucket[:, None] >= begin, bucket[:, None] >= end
        if table.groups is not None:
            same = tl.load(positives.groups + i, mask=inside, other=0)[None, :] == group
            begun, ended = begun & same, ended & same
        under_way = begun & (bucket[:, None] < end)
        slope += tl.where(under_way, weight, 0.0)
        level += tl.where(ended, weight, 0.0)
        if ramp.inverse_width > 0:
            positive = finite(tl.load(positives.logits + i, mask=inside, other=0))[None, :]
            level += tl.where(under_way, weight * height_at(floor, positive, ramp), 0.0)
    return tl.sum(level, axis=1), tl.sum(slope, axis=1)


@triton.jit
def total_of(rows, row: tl.constexpr, num_positives, BLOCK: tl.constexpr):
    """The sum of a row."""
    total = tl.zeros([BLOCK], tl.float64)
    for begin in range(0, num_positives, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        total += tl.load(rows + row * num_positives + i, mask=i < num_positives, other=0)
    return tl.sum(total)


@triton.jit
def poison_of(rows, poison, num_positives, formula, BLOCK: tl.constexpr):
    """0, or NaN: from the ranks, and from the results of an unknown formula."""
    bad = tl.load(poison)
    if formula.name == "":
        nan = tl.zeros([BLOCK], tl.int32)
        for begin in range(0, num_positives, BLOCK):
            i = begin + tl.arange(0, BLOCK)
            added = tl.load(rows + FIRST * num_positives + i, mask=i < num_positives, other=0)
            sent = sent_by(rows, i, i < num_positives, num_positives, formula)
            nan |= (added != added).to(tl.int32) | (sent != sent).to(tl.int32)
        bad = tl.where(tl.max(nan) > 0, float("nan"), bad)
    return bad


@triton.jit
def derivative_of(i, positives, rows, values, num_positives, formula, ramp, BLOCK: tl.constexpr, BLOCK_P: tl.constexpr):
    """The derivative of the second scalar with respect to the values, or to the scores if the loss sorts; for an
    unknown formula with respect to its errors."""
    there = i < num_positives
    passed = rows + PASSED * num_positives
    if formula.sorts:
        group = group_of(positives, i, there)
        total = received(i, group, positives, values, passed, num_positives, ramp, BLOCK, BLOCK_P)
        total -= tl.load(rows + MISSORTED * num_positives + i, mask=there, other=0)
    elif formula.name == "":
        total = tl.load(rows + SHARE * num_positives + i, mask=there, other=0)
    else:
        kind: tl.constexpr = 3 if formula.receives == "sorted_received" else 1
        total = sum_over(i, positives, passed, num_positives, kind, ramp, BLOCK, BLOCK_P)
        if kind == 1:
            # Sums by ramps leave the positive itself out.
            total += tl.load(passed + i, mask=there, other=0)
    return total


@triton.jit(do_not_specialize=["num_positives", "num_processes"])
def send_kernel(
    positives,
    table,
    ranks,
    values,
    result,
    num_positives,
    num_processes,
    formula,
    ramp,
    BLOCK: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    place, rows = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P), ranks.rows
    bad = poison_of(rows, ranks.poison, num_positives, formula, BLOCK)
    scale = tl.full([], num_processes, tl.float64)
    if tl.program_id(1) == 0:
        num_buckets = 2 * num_positives + 1
        level, slope = level_and_slope(place, positives, table, rows, num_positives, formula, ramp, BLOCK, BLOCK_P)
        dtype: tl.constexpr = result.lines.dtype.element_ty
        tl.store(result.lines + 2 * place, ((level + bad) * scale).to(dtype), mask=place < num_buckets)
        tl.store(result.lines + 2 * place + 1, ((slope + bad) * scale).to(dtype), mask=place < num_buckets)
    else:
        if tl.program_id(0) == 0:
            total = total_of(rows, FIRST, num_positives, BLOCK) + bad
            tl.store(result.first, total.to(result.first.dtype.element_ty))
            if formula.terms > 1:
                total = total_of(rows, SECOND, num_positives, BLOCK) + bad
            tl.store(result.second, total.to(result.second.dtype.element_ty))
        there = place < num_positives
        sent = sent_by(rows, place, there, num_positives, formula)
        tl.store(result.own + place, (bad - sent) * scale, mask=there)
        if formula.terms > 1 or formula.name == "":
            derivative = derivative_of(place, positives, rows, values, num_positives, formula, ramp, BLOCK, BLOCK_P)
            derivative += bad
            if formula.sorts:
                tl.store(result.own + num_positives + place, derivative * scale, mask=there)
            else:
                tl.store(result.derivative + place, derivative.to(result.derivative.dtype.element_ty), mask=there)


def send(
    positives: Positives,
    table: Table,
    ranks: Ranks,
    values: Tensor | None,
    formula: Formula,
    delta: float,
    num_processes: int = 1,
) -> Sent:
    """The send step, and the loss.

    Args:
        positives, table: from ``place.place``.
        ranks: from ``rank.rank``. For an unknown formula the rows are what each positive sends, its sum over the
            negatives that share this, its term of the loss, and the derivative of the loss with respect to its error.
        values: ``[P]``, if the formula takes them, or the errors of an unknown formula.
        formula: of the loss; that of the empty name if it is unknown.
        delta: half width of the ramp.
        num_processes: factor of the derivatives with respect to scores.
    """
    logits = positives.logits
    num_pos, dtype = len(logits), formula.derivative_dtype(values)
    result = Sent(
        first=logits.new_empty(()),
        second=logits.new_empty(()),
        lines=logits.new_empty(2 * num_pos + 1, 2).t(),
        own=logits.new_empty(formula.num_scores, num_pos, dtype=torch.float64),
        derivative=logits.new_empty(num_pos if formula.has_derivative else 0, dtype=dtype),
    )
    compare(
        send_kernel,
        2 * num_pos + 1,
        logits,
        rows=2,
        positives=positives,
        table=table,
        ranks=ranks,
        values=None if values is None else values.contiguous(),
        result=result,
        num_positives=num_pos,
        num_processes=num_processes,
        formula=formula.constants,
        ramp=ramp_of(logits, delta),
    )
    return result
