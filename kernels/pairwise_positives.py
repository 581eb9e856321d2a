"""The positives' own gradients, where a launch of its own writes them: in the pairwise form."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .walk import Walk, elements_of, indices, on_device_of, store


@triton.jit
def positives_kernel(
    gradient,
    pos_index,
    pos_gradient,
    first_index,
    num_positives,
    num_logits,
    size0,
    size1,
    size2,
    g_step0,
    g_step1,
    g_step2,
    g_step3,
    AXES: tl.constexpr,
    CLASSES: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = lane < num_positives
    index = tl.load(pos_index + lane, mask=there, other=0) - first_index
    inside = there & (index >= 0) & (index < num_logits)
    value = tl.load(pos_gradient + lane, mask=inside, other=0)
    # Few enough to divide each 64-bit index along all axes.
    i0, i1, i2, i3 = indices(index, 0, size0, size1, size2, AXES, CLASSES)
    at = elements_of(index, i0, i1, i2, i3, g_step0, g_step1, g_step2, g_step3, AXES, FLAT)
    store(gradient + at, value, inside)


def write_positives(walks: list[Walk], pos_index: Tensor, pos_gradient: Tensor) -> None:
    """Write ``pos_gradient`` ``[P]`` at flat indices ``pos_index`` ``[P]`` (row-major, level after level)."""
    if len(pos_index) == 0:
        return
    first_index = 0
    with on_device_of(pos_index):
        for walk in walks:
            if walk.num_logits:
                positives_kernel[(triton.cdiv(len(pos_index), 256),)](
                    walk.gradient,
                    pos_index,
                    pos_gradient,
                    first_index,
                    len(pos_index),
                    **walk.arguments("g"),
                    BLOCK=256,
                )
            first_index += walk.num_logits
