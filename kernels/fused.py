"""The P-sized steps between the two passes, for losses whose formula the kernels know: after what each positive sends
and adds to the loss (``errors``), the sums of that, for every bucket, every positive, and the loss, in one kernel."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arrange import Arrangement
from .coefficients import level_and_slope
from .errors import FIRST, MANY_SUMS, MISSORTED, OWN, PASSED, SECOND, WEIGHT, errors_kernel, interpolate_kernel
from .formulas import FORMULAS
from .knots import launch, ramp_constants
from .pairs import pair_constants
from .ranks import KINDS, sum_over
from .sorting import received_by
from .walk import on_device_of


class Outcome(NamedTuple):
    """What a loss comes to, and what pass 2 needs."""

    first: Tensor
    """The first scalar, in the compute dtype, as are the others unless said otherwise."""
    second: Tensor
    """The second scalar, or the first again."""
    rank: Tensor
    """``[P]``"""
    received: Tensor
    """``[P]``: the derivative of the second scalar with respect to the values, in their dtype or float32; of one that
    sorts, with respect to the positives' own scores, in float64."""
    coefficients: Tensor
    """``[2, 2P + 1]``: level and slope of each bucket."""
    rows: Tensor
    """Float64: some rows ``[P]``, of which the first are the gradients of the positives' own scores; and 0, or NaN."""


@triton.jit
def store_sum(rows, row: tl.constexpr, into, num_positives, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of a row, and of the number after all rows, which is 0 or NaN."""
    total = tl.zeros([BLOCK], tl.float64)
    for begin in range(0, num_positives, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        total += tl.load(rows + row * num_positives + i, mask=i < num_positives, other=0)
    value = tl.sum(total) + tl.load(rows + ROWS * num_positives)
    tl.store(into, value.to(into.dtype.element_ty))


@triton.jit(do_not_specialize=["num_positives"])
def finish_kernel(
    pos_logits,
    thresholds,
    begin,
    end,
    values,
    rows,
    coefficients,
    received,
    first,
    second,
    num_positives,
    TERMS: tl.constexpr,
    RECEIVES: tl.constexpr,
    SORTS: tl.constexpr,
    ROWS: tl.constexpr,
    SATURATE: tl.constexpr,
    DELTA: tl.constexpr,
    INVERSE_WIDTH: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    place = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    if tl.program_id(1) == 0:
        num_buckets = 2 * num_positives + 1
        there = place < num_buckets
        level, slope = level_and_slope(
            place,
            there,
            pos_logits,
            thresholds,
            begin,
            end,
            rows + WEIGHT * num_positives,
            rows,
            rows,
            num_positives,
            DELTA,
            INVERSE_WIDTH,
            LARGEST,
            False,
            0.0,
            BLOCK,
            BLOCK_P,
        )
        bad = tl.load(rows + ROWS * num_positives)
        dtype: tl.constexpr = coefficients.dtype.element_ty
        tl.store(coefficients + place, (level + bad).to(dtype), mask=there)
        tl.store(coefficients + num_buckets + place, (slope + bad).to(dtype), mask=there)
    else:
        if tl.program_id(0) == 0:
            store_sum(rows, FIRST, first, num_positives, ROWS, BLOCK)
            store_sum(rows, SECOND if TERMS > 1 else FIRST, second, num_positives, ROWS, BLOCK)
        if TERMS > 1:
            there = place < num_positives
            own = tl.load(pos_logits + place, mask=there, other=0)
            passed = rows + PASSED * num_positives
            if SORTS:
                value = tl.load(values + place, mask=there, other=0)
                total = received_by(
                    own,
                    value,
                    place,
                    pos_logits,
                    values,
                    place,
                    passed,
                    num_positives,
                    INVERSE_WIDTH,
                    SATURATE,
                    False,
                    BLOCK,
                    BLOCK_P,
                )
                total -= tl.load(rows + MISSORTED * num_positives + place, mask=there, other=0)
            else:
                total = sum_over(place, own, pos_logits, passed, num_positives, RECEIVES, INVERSE_WIDTH, BLOCK, BLOCK_P)
                if RECEIVES < 2:
                    # Sums by ramps leave the positive itself out.
                    total += tl.load(passed + place, mask=there, other=0)
            total += tl.load(rows + ROWS * num_positives)
            tl.store(received + place, total.to(received.dtype.element_ty), mask=there)


def num_rows(formula: str) -> int:
    """Rows of :attr:`Outcome.rows`."""
    how = FORMULAS[formula]
    return 6 if how.sorts else 5 if how.terms > 1 or how.interpolated else 3


def received_dtype(formula: str, values: torch.dtype | None) -> torch.dtype:
    """The dtype of :attr:`Outcome.received`, from that of the values."""
    if FORMULAS[formula].sorts:
        return torch.float64
    return torch.float32 if values is None else torch.promote_types(values, torch.float32)


def constants_of(formula: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of the first and the last kernel that say what a formula needs."""
    how = FORMULAS[formula]
    receives = KINDS.index(how.receives) if how.receives else None
    both = {"ROWS": num_rows(formula), "SORTS": how.sorts}
    needs = {"FORMULA": formula, "ABOVE": how.above, "SORTED": how.in_order, "INTERPOLATED": how.interpolated}
    return needs | both, {"TERMS": how.terms, "RECEIVES": receives} | both


@triton.jit(do_not_specialize=["num_positives"])
def own_kernel(rows, received, first, second, own, num_positives, BLOCK_P: tl.constexpr):
    i = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    there = i < num_positives
    ranking = tl.load(rows + OWN * num_positives + i, mask=there, other=0) * tl.load(first).to(tl.float64)
    sorting = tl.load(received + i, mask=there, other=0) * tl.load(second).to(tl.float64)
    tl.store(own + i, ranking + sorting, mask=there)


def own_gradient(rows: Tensor, received: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """The gradient of the positives' own scores, ``[P]`` float64, of a loss that sorts.

    Args:
        rows, received: of its :class:`Outcome`.
        first, second: scalars, the upstream gradients of its two terms.
    """
    own = torch.empty_like(received)
    with on_device_of(rows):
        if len(own):
            own_kernel[(triton.cdiv(len(own), 256),)](
                rows, received, first, second, own, len(own), BLOCK_P=256, num_warps=4
            )
    return own


def evaluate_loss(
    arrangement: Arrangement,
    totals: Tensor,
    unit: float,
    values: Tensor | None,
    formula: str,
    delta: float,
    eps: float,
) -> Outcome:
    """A loss from what pass 1 counted.

    Args:
        arrangement: the positives and their ramps.
        totals: ``[2, 2P + 2]`` int64, counts and offsets of the buckets; ``[0, -1]`` counts NaN.
        unit: of the offsets, a power of two.
        values: ``[P]``, any float dtype, where the formula takes them; a NaN in them makes everything NaN.
        formula: a name in :data:`FORMULAS`.
        delta: half width of the ramp.
        eps: a positive with at most this many false positives sends nothing.
    """
    how, pos_logits = FORMULAS[formula], arrangement.pos_logits
    num_pos, device, dtype = len(pos_logits), pos_logits.device, pos_logits.dtype
    if values is not None:
        values = values.to(torch.promote_types(values.dtype, torch.float32)).contiguous()
    rank = torch.empty(num_pos, dtype=dtype, device=device)
    table = pos_logits, arrangement.thresholds, arrangement.begin, arrangement.end
    ramps = ramp_constants(pos_logits, delta)
    ramps |= pair_constants(pos_logits, ramps["INVERSE_WIDTH"])
    of_errors, of_finish = (constants | ramps for constants in constants_of(formula))
    size = num_rows(formula)
    rows = torch.empty(size * num_pos + 1, dtype=torch.float64, device=device)
    given = *table, totals, values, rows, rank
    # Without positives there may still be a NaN.
    launch(errors_kernel, max(1, num_pos), 1, *given, num_pos, unit, EPS=eps, settings=MANY_SUMS, **of_errors)
    if how.interpolated:
        launch(interpolate_kernel, num_pos, 1, pos_logits, rows, num_pos, ROWS=size, EPS=eps)
    first, second = (torch.empty((), dtype=dtype, device=device) for _ in range(2))
    coefficients = torch.empty(2, 2 * num_pos + 1, dtype=dtype, device=device)
    dtype = received_dtype(formula, None if values is None else values.dtype)
    received = torch.empty(num_pos if how.terms > 1 else 0, dtype=dtype, device=device)
    tensors = *table, values, rows, coefficients, received, first, second
    launch(finish_kernel, 2 * num_pos + 1, 2, *tensors, num_pos, **of_finish)
    return Outcome(first, second, rank, received, coefficients, rows)
