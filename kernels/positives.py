"""Find the positives: one look at the labels, then an order that does not depend on which tile came first.

Tiles append what they find, in whatever order they come to it; then each positive counts how many of the others stand
before it, in O(P^2), which up to some thousand positives costs less than the launches of a sort.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .levels import Level, launch, level_of, make_level
from .walk import indices, load, make_walk, on_device_of, steps_to

# More positives than this are sorted.
_MOST_COUNTED = 1 << 13
ORDER = {"block": 64, "block_p": 32, "num_warps": 4}
"""Settings of the kernel that orders positives, of which there are too few to search for better ones."""


@triton.jit(do_not_specialize=["ignore_index", "first_index"])
def collect_kernel(
    tile,
    labels,
    logits,
    num_logits,
    size0,
    size1,
    size2,
    x_step0,
    x_step1,
    x_step2,
    x_step3,
    y_step0,
    y_step1,
    y_step2,
    y_step3,
    column_step,
    first_index,
    found,
    slots,
    scores,
    num_slots,
    ignore_index,
    AXES: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # In a launch over one level, a program's number is that of its tile.
    if tile is None:
        tile = tl.program_id(0)
    begin = tile.to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    i0, i1, i2, i3 = indices(begin, lane, size0, size1, size2, AXES, 0)
    there = begin + lane < num_logits
    x_at = steps_to(i0, i1, i2, i3, x_step0, x_step1, x_step2, x_step3, AXES)
    label = tl.load(labels + x_at, mask=there, other=0).to(tl.int64)
    if COLUMNS > 0:
        positive = there & (label >= 0) & (label < COLUMNS) & (label != ignore_index)
        invalid = there & ((label < 0) | (label > COLUMNS)) & (label != ignore_index)
    else:
        positive = there & (label == 1) & (label != ignore_index)
        invalid = there & ((label < 0) | (label > 1)) & (label != ignore_index)
    interest = tl.max(tl.where(invalid, 2, positive.to(tl.int32)))
    if interest > 1:
        tl.atomic_add(found + 1, 1, sem="relaxed")
    if interest > 0:
        one = positive.to(tl.int32)
        first = tl.atomic_add(found, tl.sum(one).to(tl.int64), sem="relaxed")
        slot = first + tl.cumsum(one, 0) - one
        kept = positive & (slot < num_slots)
        index, at = begin + lane, steps_to(i0, i1, i2, i3, y_step0, y_step1, y_step2, y_step3, AXES)
        if COLUMNS > 0:
            index = index * COLUMNS + label
            at += label * column_step
        tl.store(slots + slot, first_index + index, mask=kept)
        tl.store(scores + slot, load(logits + at, kept, scores.dtype.element_ty), mask=kept)


@triton.jit(do_not_specialize=["ignore_index"])
def collect_levels_kernel(
    walks,
    found,
    slots,
    scores,
    num_slots,
    ignore_index,
    POINTERS: tl.constexpr,
    ARGUMENTS: tl.constexpr,
    UNIT: tl.constexpr,
    AXES: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    collect_kernel(
        *level_of(tl.program_id(0), walks, POINTERS, ARGUMENTS, UNIT),
        found,
        slots,
        scores,
        num_slots,
        ignore_index,
        AXES,
        COLUMNS,
        BLOCK,
    )


@triton.jit
def order_kernel(
    found, slots, scores, pos_index, pos_logits, num_positives, BLOCK: tl.constexpr, BLOCK_P: tl.constexpr
):
    i = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    there = i < num_positives
    index = tl.load(slots + i, mask=there, other=0)
    place = tl.zeros([BLOCK_P], tl.int32)
    for begin in range(0, num_positives, BLOCK):
        k = begin + tl.arange(0, BLOCK)
        other = tl.load(slots + k, mask=k < num_positives, other=0x7FFFFFFFFFFFFFFF)
        # Slots that none has taken are alike.
        before = (other[None, :] < index[:, None]) | ((other[None, :] == index[:, None]) & (k[None, :] < i[:, None]))
        place += tl.sum(before.to(tl.int32), axis=1)
    mistaken = (tl.load(found) != num_positives) | (tl.load(found + 1) > 0)
    score = tl.load(scores + i, mask=there, other=0)
    tl.store(pos_index + place, index, mask=there)
    tl.store(pos_logits + place, tl.where(mistaken, float("nan"), score), mask=there)


def collect(
    levels: list[tuple[Tensor, Tensor]], num_positives: int, ignore_index: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Look for positives; synchronises nothing.

    Args:
        levels: logits ``[..., C]`` and class labels ``[...]``, or logits and labels of one shape; any strides.
        num_positives: P, how many are expected.
        ignore_index: the label of what is no positive, whatever it says.
        dtype: float32 or float64, of the logits to be returned.

    Returns:
        ``(pos_index [P] int64, pos_logits [P], found [2] int64)``: flat indices, ascending, with their logits; how many
        positives there are, and whether (> 0) any label is out of range. Of more than P some P are returned, of fewer
        the rest are zeros; then, or if a label is out of range, the logits are NaN.
    """
    device = levels[0][0].device
    workspace = torch.zeros(2 + num_positives, dtype=torch.int64, device=device)
    found, slots = workspace[:2], workspace[2:]
    scores = torch.empty(num_positives, dtype=dtype, device=device)
    pos_index, pos_logits = torch.empty_like(slots), torch.empty_like(scores)
    append(levels, found, slots, scores, ignore_index)
    with on_device_of(workspace):
        if num_positives > _MOST_COUNTED:
            pos_index, order = slots.sort()
            mistaken = (found[0] != num_positives) | (found[1] > 0)
            pos_logits = scores[order].masked_fill(mistaken, torch.nan)
        elif num_positives:
            order_kernel[(triton.cdiv(num_positives, ORDER["block_p"]),)](
                found,
                slots,
                scores,
                pos_index,
                pos_logits,
                num_positives,
                BLOCK=ORDER["block"],
                BLOCK_P=ORDER["block_p"],
                num_warps=ORDER["num_warps"],
            )
    return pos_index, pos_logits, found


def append(
    levels: list[tuple[Tensor, Tensor]], found: Tensor, slots: Tensor, scores: Tensor, ignore_index: int
) -> None:
    """Find positives in whatever order tiles come to them.

    Args:
        levels, ignore_index: see :func:`collect`.
        found: ``[2]`` int64 zeros, to become how many positives there are, and how many tiles hold a wrong label.
        slots: ``[P]`` int64 zeros, to be filled with flat indices.
        scores: ``[P]`` float32 or float64, to be filled with their logits.
    """
    first_index, labelled = 0, []
    for logits, labels in levels:
        if logits.numel():
            labelled.append(_labelled(logits, labels, first_index))
        first_index += logits.numel()
    with on_device_of(found):
        launch(
            "collect",
            (collect_kernel, collect_levels_kernel),
            labelled,
            lambda: {"found": torch.zeros_like(found), "slots": torch.empty_like(slots)},
            {
                "found": found,
                "slots": slots,
                "scores": scores,
                "num_slots": len(slots),
                "ignore_index": ignore_index,
            },
        )


def _labelled(logits: Tensor, labels: Tensor, first_index: int) -> Level:
    if labels.dim() == 0:
        logits, labels = logits[None], labels[None]
    per_class = labels.dim() != logits.dim()
    columns, column_step = (logits.shape[-1], logits.stride(-1)) if per_class else (0, 0)
    # Labels are walked over, and beside them the first logit of each row.
    rows = logits.select(-1, 0) if per_class else logits
    walk = make_walk(labels, rows)
    if walk.logits is not labels or walk.labels is not rows:
        # Copied, for having too many axes; then whole rows have to be.
        return _labelled(logits.contiguous(), labels.contiguous(), first_index)
    arguments = walk.arguments("x", "y")
    # A walk over rows has no columns of its own.
    del arguments["CLASSES"], arguments["FLAT"]
    pointers: dict[str, Tensor | None] = {"labels": walk.logits, "logits": walk.labels}
    return make_level(pointers, arguments | {"COLUMNS": columns}, column_step=column_step, first_index=first_index)
