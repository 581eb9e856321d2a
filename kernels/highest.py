"""For each positive the highest logit of its row; a program for each positive."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .lanes import address, load, places
from .launch import code, join, level_of, on_device_of, pick_number, tiles_of
from .layout import Walk


@triton.jit(do_not_specialize=["ignore_index"])
def highest_kernel(levels, lengths, indices, found, ignore_index, BLOCK: tl.constexpr):
    k, lane = tl.program_id(0), tl.arange(0, BLOCK)
    index = tl.load(indices + k)
    level = level_of(levels, index)
    local = index - level.first_index
    # Levels of another structure have a launch of their own.
    if (local >= 0) & (local < level.num_logits):
        length = pick_number(lengths, index, levels.first_tile)
        row = local // length * length
        dtype: tl.constexpr = found.dtype.element_ty
        largest = tl.full([BLOCK], float("-inf"), dtype)
        for begin in range(0, length, BLOCK):
            at = places(levels, level, row + begin, lane, BLOCK)
            there = begin + lane < length
            logit = load(level.logits + address(at, level.logit_steps, levels.AXES), there, dtype)
            if levels.CLASSES == 0:
                labels = level.labels + address(at, level.label_steps, levels.AXES)
                there = there & (tl.load(labels, mask=there, other=0) != ignore_index)
            # A NaN stays, because no number is above it.
            largest = tl.where(there & ((logit > largest) | (logit != logit)), logit, largest)
        is_nan = tl.max((largest != largest).to(tl.int32)) > 0
        value = tl.max(tl.where(largest == largest, largest, float("-inf")))
        tl.store(found + k, tl.where(is_nan, float("nan"), value))


def highest(walks: Sequence[Walk], indices: Tensor, ignore_index: int, dtype: torch.dtype) -> Tensor:
    """For each positive the highest logit along the last axis that is not ignored; of a level with one axis its own.

    Args:
        walks: the levels.
        indices: ``[P]`` int64, flat indices.
        ignore_index: label of logits that do not count, if each logit has a label.
        dtype: float32 or float64.

    Returns:
        ``[P]``.
    """
    launches = join(walks) if len(indices) else []
    if not launches:
        return torch.zeros(len(indices), dtype=dtype, device=indices.device)
    found = torch.empty(len(indices), dtype=dtype, device=indices.device)
    for parts in launches:
        _, levels = tiles_of(parts, 1)
        logits = [part.walk.logits for part in parts]
        with on_device_of(found):
            highest_kernel[(len(indices),)](
                # A level is found by the index of its first logit, not by that of its first tile.
                levels._replace(first_tile=levels.first_index),
                tuple(code(x.shape[-1] if x.dim() > 1 else 1) for x in logits),
                indices.contiguous(),
                found,
                ignore_index,
                BLOCK=64 if logits[0].shape[-1] <= 64 else 128,
                num_warps=1,
            )
    return found
