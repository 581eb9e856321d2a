"""Positives into their flat order, and the ends of their ramps into a sorted table: one launch, by counting.

Each positive counts what stands before it, and each end of a ramp what lies below it, in O(P^2): up to some thousand
positives that costs less than the launches of a sort.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .knots import launch, ramp_ends, sort_key
from .walk import on_device_of


class Arrangement(NamedTuple):
    """Positives in flat order, and where both passes look for a score."""

    pos_index: Tensor
    """``[P]`` int64, ascending."""
    pos_logits: Tensor
    """``[P]``; NaN, all of them, if their number is not P or a label is out of range."""
    thresholds: Tensor
    """``[4P + 1]``: sorted ends of ramps, then NaN; a search needs the first :func:`table_size`."""
    floors: Tensor
    """``[2P + 1]``: finite lower ends of the buckets, the lowest finite number first."""
    begin: Tensor
    """``[P]`` int64: the bucket in which each ramp begins."""
    end: Tensor
    """``[P]`` int64: the bucket in which it has ended."""


def table_size(num_positives: int) -> int:
    """Places of a padded table, the next power of two above 2P; at most 4P + 1."""
    return 1 << (2 * num_positives).bit_length()


@triton.jit
def finite_floor(threshold, LARGEST: tl.constexpr):
    """The lower end of a bucket in the thresholds' dtype; NaN counts as the largest number."""
    floor = tl.where(threshold == threshold, threshold, LARGEST)
    return tl.where(floor > LARGEST, LARGEST, tl.where(floor < -LARGEST, -LARGEST, floor))


@triton.jit
def arrange_kernel(
    scores,
    slots,
    found,
    pos_index,
    pos_logits,
    thresholds,
    floors,
    begin,
    end,
    num_positives,
    num_places,
    DELTA: tl.constexpr,
    BITS: tl.constexpr,
    LARGEST: tl.constexpr,
    ORDERED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    there = i < num_positives
    score = tl.load(scores + i, mask=there, other=0)
    if ORDERED:
        index = i
    else:
        index = tl.load(slots + i, mask=there, other=0)
        mistaken = (tl.load(found) != num_positives) | (tl.load(found + 1) > 0)
        score = tl.where(mistaken, float("nan"), score)
    lower, upper = ramp_ends(score, DELTA, BITS)
    lower_key, upper_key = sort_key(lower, BITS)[:, None], sort_key(upper, BITS)[:, None]
    earlier_ones = tl.zeros([BLOCK_P, BLOCK], tl.int32)
    below_lower = tl.zeros([BLOCK_P, BLOCK], tl.int32)
    below_upper = tl.zeros([BLOCK_P, BLOCK], tl.int32)
    for first in range(0, num_positives, BLOCK):
        k = first + tl.arange(0, BLOCK)
        other = k[None, :] < num_positives
        value = tl.load(scores + k, mask=k < num_positives, other=0)
        if ORDERED:
            earlier = k[None, :] < i[:, None]
        else:
            value = tl.where(mistaken, float("nan"), value)
            at = tl.load(slots + k, mask=k < num_positives, other=0)[None, :]
            # Slots that none has taken are alike.
            earlier = (at < index[:, None]) | ((at == index[:, None]) & (k[None, :] < i[:, None]))
            earlier_ones += (other & earlier).to(tl.int32)
        low, up = ramp_ends(value, DELTA, BITS)
        low, up = sort_key(low, BITS)[None, :], sort_key(up, BITS)[None, :]
        # Of equal knots, all that begin a ramp come before those that end one.
        before = ((low < lower_key) | ((low == lower_key) & earlier)).to(tl.int32) + (up < lower_key).to(tl.int32)
        below_lower += tl.where(other, before, 0)
        before = (low <= upper_key).to(tl.int32) + ((up < upper_key) | ((up == upper_key) & earlier)).to(tl.int32)
        below_upper += tl.where(other, before, 0)
    place = tl.sum(earlier_ones, axis=1)
    lower_place, upper_place = tl.sum(below_lower, axis=1), tl.sum(below_upper, axis=1)
    tl.store(thresholds + lower_place, lower, mask=there)
    tl.store(thresholds + upper_place, upper, mask=there)
    if ORDERED:
        place = i
    else:
        tl.store(pos_index + place, index, mask=there)
        tl.store(pos_logits + place, score, mask=there)
        tl.store(floors + 1 + lower_place, finite_floor(lower, LARGEST), mask=there)
        tl.store(floors + 1 + upper_place, finite_floor(upper, LARGEST), mask=there)
        if tl.program_id(0) == 0:
            tl.store(floors, tl.full([], -LARGEST, floors.dtype.element_ty))
            for first in range(2 * num_positives, num_places, BLOCK):
                at = first + tl.arange(0, BLOCK)
                nothing = tl.full([BLOCK], float("nan"), thresholds.dtype.element_ty)
                tl.store(thresholds + at, nothing, mask=at < num_places)
    tl.store(begin + place, lower_place.to(tl.int64) + 1, mask=there)
    tl.store(end + place, upper_place.to(tl.int64) + 1, mask=there)


@triton.jit
def table_kernel(thresholds, padded, floors, num_thresholds, places, LARGEST: tl.constexpr, BLOCK_P: tl.constexpr):
    place = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    threshold = tl.load(thresholds + place, mask=place < num_thresholds, other=float("nan"))
    tl.store(padded + place, threshold, mask=place < places)
    before = tl.load(thresholds + place - 1, mask=(place > 0) & (place <= num_thresholds), other=float("-inf"))
    tl.store(floors + place, finite_floor(before, LARGEST), mask=place <= num_thresholds)


def arrange(found: Tensor, slots: Tensor, scores: Tensor, delta: float) -> Arrangement:
    """Order positives and the ends of their ramps.

    Args:
        found: ``[2]`` int64: how many positives there are, and whether (> 0) any label is out of range.
        slots: ``[P]`` int64: flat indices in any order, 0 where none was found.
        scores: ``[P]`` float32 or float64: their logits, of any value where none was found.
        delta: half width of the ramp.
    """
    num_pos, device = len(slots), slots.device
    # Each by itself, so that all are aligned alike, whatever P is: a launch compiles anew for what is not.
    pos_index, begin, end = (torch.empty(num_pos, dtype=torch.int64, device=device) for _ in range(3))
    sizes = num_pos, 4 * num_pos + 1, 2 * num_pos + 1
    pos_logits, thresholds, floors = (torch.empty(size, dtype=scores.dtype, device=device) for size in sizes)
    result = Arrangement(pos_index, pos_logits, thresholds, floors, begin, end)
    constants = _constants(scores, delta) | {"ORDERED": False}
    # Without positives there is still the table's padding to be written.
    launch(arrange_kernel, max(1, num_pos), 1, scores, slots, found, *result, num_pos, len(thresholds), **constants)
    return result


def place_knots(pos_logits: Tensor, delta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Sort the ends of all ramps.

    Args:
        pos_logits: ``[P]`` scores p, float32 or float64.
        delta: half width of the ramp.

    Returns:
        ``(thresholds [2P], begin [P], end [P])``: p - delta and p + delta, rounded up to the dtype and sorted, NaN
        last; and from which place on, counted from 1, each ramp has begun, and ended (int64).
    """
    num_pos = len(pos_logits)
    thresholds = torch.empty(2 * num_pos, dtype=pos_logits.dtype, device=pos_logits.device)
    begin, end = (torch.empty(num_pos, dtype=torch.int64, device=pos_logits.device) for _ in range(2))
    constants = _constants(pos_logits, delta) | {"ORDERED": True}
    tensors = pos_logits, None, None, None, None, thresholds, None, begin, end
    launch(arrange_kernel, num_pos, 1, *tensors, num_pos, 2 * num_pos, **constants)
    return thresholds, begin, end


def _constants(scores: Tensor, delta: float) -> dict[str, Any]:
    info = torch.finfo(scores.dtype)
    return {"DELTA": delta, "BITS": info.bits, "LARGEST": info.max}


def search_table(thresholds: Tensor) -> tuple[Tensor, Tensor]:
    """What both passes look into, in one launch.

    Args:
        thresholds: ``[2P]``, ascending, NaN last.

    Returns:
        ``(padded [2^n], floors [2P + 1])``: the thresholds, and NaN up to the next power of two above 2P; the finite
        lower ends of the buckets, the lowest finite number first.
    """
    number = len(thresholds)
    padded = torch.empty(1 << number.bit_length(), dtype=thresholds.dtype, device=thresholds.device)
    floors = torch.empty(number + 1, dtype=thresholds.dtype, device=thresholds.device)
    largest = torch.finfo(thresholds.dtype).max
    with on_device_of(thresholds):
        table_kernel[(triton.cdiv(len(padded), 256),)](
            thresholds, padded, floors, number, len(padded), LARGEST=largest, BLOCK_P=256, num_warps=4
        )
    return padded, floors
