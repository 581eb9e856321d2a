"""Sums over the positives that rank together, for each of them; and the running maximum.

O(P^2) work, without a sort or a scan. Each program compares a block of positives with all others, always in the same
order, so results have the same bits in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import compare, ramp_of
from .layout import Positives
from .ramp import heights

SUMS = ("above", "received", "sorted", "sorted_received", "running_max")
"""Kinds of :func:`sums`; kernels take their indices."""


@triton.jit
def group_of(positives, i, there):
    """Groups of a block of positives; without groups the value has no meaning."""
    if positives.groups is not None:
        return tl.load(positives.groups + i, mask=there, other=0)
    else:
        return i


@triton.jit
def ranked_together(positives, k, group, num_positives):
    """The mask of positives k in the groups ``[I]``: ``[1, K]`` or ``[I, K]``."""
    there = (k < num_positives)[None, :]
    if positives.groups is not None:
        there = there & (tl.load(positives.groups + k, mask=k < num_positives, other=0)[None, :] == group[:, None])
    return there


@triton.jit
def sum_over(i, positives, values, num_positives, KIND: tl.constexpr, ramp, BLOCK: tl.constexpr, BLOCK_P: tl.constexpr):
    """For each of a block of positives a sum over all positives, or the running maximum; see :func:`sums`."""
    group = group_of(positives, i, i < num_positives)
    own, place = tl.load(positives.logits + i, mask=i < num_positives, other=0)[:, None], i[:, None]
    if KIND == 4:
        result = tl.full([BLOCK_P, BLOCK], float("-inf"), tl.float64)
    else:
        result = tl.zeros([BLOCK_P, BLOCK], tl.float64)
    for first in range(0, num_positives, BLOCK):
        k = first + tl.arange(0, BLOCK)
        inside = ranked_together(positives, k, group, num_positives)
        other = tl.load(positives.logits + k, mask=k < num_positives, other=0)[None, :]
        value = tl.load(values + k, mask=k < num_positives, other=0).to(tl.float64)[None, :]
        k = k[None, :]
        if KIND < 2:
            h = heights(other, own, ramp) if KIND == 0 else heights(own, other, ramp)
            result += tl.where(inside & (k != place) & (h > 0), value * h, 0.0)
        elif KIND == 2:
            counts = inside & ((other > own) | ((other == own) & (k >= place)))
            result += tl.where(counts, value, 0.0)
        else:
            counts = inside & ((other < own) | ((other == own) & (k <= place)))
            if KIND == 3:
                result += tl.where(counts, value, 0.0)
            else:
                # A NaN stays, because no number is above it.
                larger = counts & ((value > result) | (value != value))
                result = tl.where(larger, value, result)
    if KIND == 4:
        is_nan = tl.max((result != result).to(tl.int32), axis=1) > 0
        total = tl.max(tl.where(result == result, result, float("-inf")), axis=1)
        total = tl.where(is_nan, float("nan"), total)
    else:
        total = tl.sum(result, axis=1)
    return total


@triton.jit(do_not_specialize=["num_positives"])
def sums_kernel(
    positives, values, poison, sums, num_positives, KIND: tl.constexpr, ramp, BLOCK: tl.constexpr, BLOCK_P: tl.constexpr
):
    i = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    total = sum_over(i, positives, values, num_positives, KIND, ramp, BLOCK, BLOCK_P)
    tl.store(sums + i, total + tl.load(poison), mask=i < num_positives)


def sums(positives: Positives, values: Tensor, poison: Tensor, kind: str, delta: float) -> Tensor:
    """For each positive a sum over the positives. In H(p_k - p_i) the difference of equal infinities is 0.

    Args:
        positives: see ``place.place``; with groups, sums are over those of one group.
        values: ``[P]`` float64, the v.
        poison: float64 scalar tensor; it is added to every sum.
        kind: ``"above"``: sum over k != i of v_k H(p_k - p_i); ``"received"``: for k the sum over i != k of
            v_i H(p_k - p_i); ``"sorted"``: sum of v_k over i and the positives before it in descending order (the later
            of equal ones is first); ``"sorted_received"``: over i and the positives after it; ``"running_max"``: the
            largest of the latter, NaN if one is.
        delta: half width of the ramp.

    Returns:
        ``[P]`` float64.
    """
    values = values.contiguous()
    result = torch.empty_like(values)
    compare(
        sums_kernel,
        len(values),
        positives.logits,
        positives=positives,
        values=values,
        poison=poison,
        sums=result,
        num_positives=len(values),
        KIND=SUMS.index(kind),
        ramp=ramp_of(positives.logits, delta),
    )
    return result
