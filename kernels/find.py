"""Find the positives in one pass over the labels.

Tiles append positives in any order; :mod:`.place` sorts them into flat order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .lanes import address, load, split, within
from .launch import launch, level_of
from .layout import Walk


@triton.jit
def places_of_rows(levels, level, begin, lane, BLOCK: tl.constexpr):
    """Positions of rows, or of logits if each has a label; 0 on the axis of the classes."""
    if levels.CLASSES == 0:
        return split(begin, lane, level.sizes[0], level.sizes[1], level.sizes[2], levels.AXES, BLOCK)
    elif levels.AXES == 1:
        return tl.zeros_like(lane), lane, lane, lane
    else:
        i1, i2, i3, _ = split(begin, lane, level.sizes[1], level.sizes[2], level.sizes[3], levels.AXES - 1, BLOCK)
        return tl.zeros_like(lane), i1, i2, i3


@triton.jit(do_not_specialize=["num_slots", "ignore_index"])
def find_kernel(levels, found, slots, scores, slot_groups, num_slots, ignore_index, BLOCK: tl.constexpr):
    level = level_of(levels, tl.program_id(0))
    begin, lane = level.tile.to(tl.int64) * BLOCK, tl.arange(0, BLOCK)
    at = places_of_rows(levels, level, begin, lane, BLOCK)
    # A constant for row labels, so that there is no division by a run-time number.
    columns: tl.constexpr = levels.CLASSES if levels.CLASSES > 0 else 1
    there = within(begin, lane, level.num_logits // columns, BLOCK)
    label = tl.load(level.labels + address(at, level.label_steps, levels.AXES), mask=there, other=0).to(tl.int64)
    counted = there & (label != ignore_index)
    if levels.CLASSES > 0:
        positive = counted & (label >= 0) & (label < columns)
        invalid = counted & ((label < 0) | (label > columns))
    else:
        positive = counted & (label == 1)
        invalid = counted & ((label < 0) | (label > 1))
    interest = tl.max(tl.where(invalid, 2, positive.to(tl.int32)))
    if interest > 1:
        tl.atomic_add(found + 1, 1, sem="relaxed")
    if interest > 0:
        one = positive.to(tl.int32)
        first = tl.atomic_add(found, tl.sum(one).to(tl.int64), sem="relaxed")
        slot = first + tl.cumsum(one, 0) - one
        kept = positive & (slot < num_slots)
        index, x_at = begin + lane, address(at, level.logit_steps, levels.AXES)
        z_at = address(at, level.group_steps, levels.AXES)
        if levels.CLASSES > 0:
            index = index * columns + label
            x_at += label * level.logit_steps[0]
            z_at += label * level.group_steps[0]
        tl.store(slots + slot, level.first_index + index, mask=kept)
        tl.store(scores + slot, load(level.logits + x_at, kept, scores.dtype.element_ty), mask=kept)
        if slot_groups is not None:
            tl.store(slot_groups + slot, tl.load(level.groups + z_at, mask=kept, other=0).to(tl.int64), mask=kept)


def find(
    walks: Sequence[Walk], num_positives: int, ignore_index: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Find positives, in any order; does not synchronise.

    Args:
        walks: the levels.
        num_positives: P, the expected number.
        ignore_index: the label of logits that are never positive.
        dtype: float32 or float64, of the logits to be returned.

    Returns:
        ``(index [P] int64, logits [P], groups [P] int64 or None, found [2] int64)``: flat indices, with their logits
        and groups; the number of positives, and whether (> 0) a label is out of range. If there are more than P, some P
        of them are returned; if fewer, the rest of each tensor is not set.
    """
    device = walks[0].logits.device
    found = torch.zeros(2, dtype=torch.int64, device=device)
    index = torch.empty(num_positives, dtype=torch.int64, device=device)
    logits = torch.empty(num_positives, dtype=dtype, device=device)
    groups = None if walks[0].groups is None else torch.empty_like(index)
    arguments = {
        "found": found,
        "slots": index,
        "scores": logits,
        "slot_groups": groups,
        "num_slots": num_positives,
        "ignore_index": ignore_index,
    }
    launch(find_kernel, "find", walks, arguments, by_row=True)
    return index, logits, groups, found
