"""How a kernel walks one level: logits of any strides, in row-major order, beside their labels and groups.

Axes of size 1 vanish, and axes that follow each other in memory in every tensor become one, so that what is
contiguous has one axis (two with class labels, whose last axis holds the classes and takes no step in the labels). At
most four remain without a copy: enough for a channel-first level ``[B, A C, H, W]`` seen as ``[B, H W, A, C]``.

Positions are 64-bit. Within a tile, axis by axis from the innermost, they are 32-bit remainders: a tile begins at a
position whose 64-bit division is done once, on a scalar. The number of classes is a constant of the compiled kernel, so
that what is to be divided by it is multiplied instead; and logits that lie in memory as they are walked are addressed
by their position, several at a time.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

MAX_AXES = 4
_MAX_INNER = 2**31 - 2**17
_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")


class Walk(NamedTuple):
    """One level, ready to be launched over. Per axis, innermost first: its size, and its step in each tensor."""

    logits: Tensor
    labels: Tensor
    gradient: Tensor
    per_class: bool
    sizes: tuple[int, ...]
    steps: tuple[tuple[int, ...], ...]
    groups: Tensor | None = None

    @property
    def flat(self) -> bool:
        """Whether the walk's order is that of memory, in logits and gradient."""
        sizes, (logits, _, gradient, *_) = self.sizes, self.steps
        contiguous = [1]
        for size in sizes[:-1]:
            contiguous.append(contiguous[-1] * size)
        return logits == gradient == tuple(contiguous)

    @property
    def num_logits(self) -> int:
        return self.logits.numel()

    def arguments(self, *tensors: str) -> dict[str, int]:
        """The kernels' arguments for these of the tensors x (logits), y (labels), g (gradient), z (groups): sizes of
        all axes but the outermost, steps of all; 1 for axes and for groups that are not there. ``CLASSES`` is 0 where
        each logit has its own label."""
        pad = (1,) * (MAX_AXES - len(self.sizes))
        named = {f"size{i}": size for i, size in enumerate((*self.sizes, *pad)[:-1])}
        for name, steps in zip("xygz", (*self.steps, (1,) * len(self.sizes))):
            if name in tensors:
                named |= {f"{name}_step{i}": step for i, step in enumerate((*steps, *pad))}
        constants = {"AXES": len(self.sizes), "CLASSES": self.sizes[0] if self.per_class else 0, "FLAT": self.flat}
        return named | {"num_logits": self.num_logits} | constants


def make_walk(logits: Tensor, labels: Tensor, gradient: Tensor | None = None, groups: Tensor | None = None) -> Walk:
    """Describe a level. What has more than four axes is copied, and a gradient then replaced by a contiguous one.

    Args:
        logits: any shape and strides (``[..., C]`` with class labels).
        labels: of the logits' shape, or without the last axis.
        gradient: of the logits' shape, for a walk that writes it.
        groups: the ranking that each logit, or each row of logits, belongs to: integers of the logits' shape, or
            without the last axis, of any strides.
    """
    tensors = [logits, _spread(labels, logits), logits if gradient is None else gradient]
    if groups is not None:
        tensors.append(_spread(groups, logits))
    per_class = labels.dim() != logits.dim()
    axes = _merge(logits.shape, tuple(tensor.stride() for tensor in tensors), keep_last=per_class)
    if len(axes) > MAX_AXES or any(size > _MAX_INNER for size, _ in axes[:-1]):
        if gradient is not None:
            gradient = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        groups = None if groups is None else groups.contiguous()
        return make_walk(logits.contiguous(), labels.contiguous(), gradient, groups)
    sizes, steps = zip(*axes)
    return Walk(logits, labels, tensors[2], per_class, sizes, tuple(zip(*steps)), groups)


def _spread(rows: Tensor, logits: Tensor) -> Tensor:
    """A view in the logits' shape of what may lack their last axis, which then takes no step."""
    return rows if rows.dim() == logits.dim() else rows.unsqueeze(-1).expand(logits.shape)


def _merge(
    shape: torch.Size, strides: tuple[tuple[int, ...], ...], keep_last: bool
) -> list[tuple[int, tuple[int, ...]]]:
    """(size, steps) of each axis that is left, innermost first."""
    outermost_first = list(zip(shape, zip(*strides)))
    axes = [outermost_first.pop()]
    for size, steps in reversed(outermost_first):
        inner, inner_steps = axes[-1]
        may_merge = not (keep_last and len(axes) == 1)
        if size == 1:
            continue
        if may_merge and inner == 1:
            axes[-1] = (size, steps)
        elif may_merge and all(step == inner * inner_step for step, inner_step in zip(steps, inner_steps)):
            axes[-1] = (inner * size, inner_steps)
        else:
            axes.append((size, steps))
    return axes


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Launches go to the current device, which need not be the tensor's."""
    if _INTERPRETED.value:
        return contextlib.nullcontext()
    guard: contextlib.AbstractContextManager[Any] = driver.active.get_device_interface().device(tensor.device)
    return guard


@triton.jit
def indices(begin, lane, size0, size1, size2, AXES: tl.constexpr, CLASSES: tl.constexpr):
    """Place of positions ``begin + lane`` on each axis, innermost first; places on axes that are not there mean
    nothing."""
    if CLASSES > 0:
        size0 = CLASSES
    if AXES == 1:
        at = begin + lane
        return at, at, at, at
    else:
        rest0 = begin // size0
        i0 = (begin - rest0 * size0).to(tl.int32) + lane
        carry0 = i0 // size0
        i0 = i0 - carry0 * size0
        if AXES == 2:
            i1 = rest0 + carry0
            return i0, i1, i1, i1
        else:
            rest1 = rest0 // size1
            i1 = (rest0 - rest1 * size1).to(tl.int32) + carry0
            carry1 = i1 // size1
            i1 = i1 - carry1 * size1
            if AXES == 3:
                i2 = rest1 + carry1
                return i0, i1, i2, i2
            else:
                rest2 = rest1 // size2
                i2 = (rest1 - rest2 * size2).to(tl.int32) + carry1
                carry2 = i2 // size2
                i2 = i2 - carry2 * size2
                return i0, i1, i2, rest2 + carry2


@triton.jit
def advance(i0, i1, i2, i3, d0, d1, d2, d3, size0, size1, size2, AXES: tl.constexpr, CLASSES: tl.constexpr):
    """Places further on by a distance with the places ``d0`` to ``d3``: no divisions."""
    if CLASSES > 0:
        size0 = CLASSES
    i0 += d0
    if AXES == 1:
        return i0, i0, i0, i0
    else:
        carry0 = (i0 >= size0).to(tl.int32)
        i0 -= carry0 * size0
        i1 += d1 + carry0
        if AXES == 2:
            return i0, i1, i1, i1
        else:
            carry1 = (i1 >= size1).to(tl.int32)
            i1 -= carry1 * size1
            i2 += d2 + carry1
            if AXES == 3:
                return i0, i1, i2, i2
            else:
                carry2 = (i2 >= size2).to(tl.int32)
                i2 -= carry2 * size2
                return i0, i1, i2, i3 + d3 + carry2


@triton.jit
def steps_to(i0, i1, i2, i3, step0, step1, step2, step3, AXES: tl.constexpr):
    """64-bit distance from a tensor's first element to the one at these places."""
    at = i0.to(tl.int64) * step0
    if AXES > 1:
        at += i1.to(tl.int64) * step1
    if AXES > 2:
        at += i2.to(tl.int64) * step2
    if AXES > 3:
        at += i3.to(tl.int64) * step3
    return at


@triton.jit
def elements_of(position, i0, i1, i2, i3, step0, step1, step2, step3, AXES: tl.constexpr, FLAT: tl.constexpr):
    """:func:`steps_to`, or the position itself in a tensor that lies in memory as it is walked."""
    if FLAT:
        return position
    else:
        return steps_to(i0, i1, i2, i3, step0, step1, step2, step3, AXES)


@triton.jit
def is_negative(label, column, ignore_index, CLASSES: tl.constexpr):
    """Whether a logit is a negative, from the label of its row and its class, or from its own label."""
    if CLASSES > 0:
        return (label != column) & (label != ignore_index)
    else:
        return (label == 0) & (label != ignore_index)


@triton.jit
def is_positive(label, column, ignore_index, CLASSES: tl.constexpr):
    """Whether a logit is a positive, from the label of its row and its class, or from its own label."""
    if CLASSES > 0:
        return (label == column) & (label != ignore_index)
    else:
        return (label == 1) & (label != ignore_index)


@triton.jit
def load_groups(groups, at, mask, GROUPED: tl.constexpr):
    """The 64-bit ids of groups; without groups, something that means nothing."""
    if GROUPED:
        return tl.load(groups + at, mask=mask, other=0).to(tl.int64)
    else:
        return at


# Triton's interpreter converts bfloat16 by its own arithmetic, which takes 0 for 2^-126 and does not round to nearest.
# There, and there alone, the two functions below move the bits themselves.


@triton.jit
def load(pointers, mask, dtype: tl.constexpr):
    """Load scores as ``dtype``; 0 where masked."""
    if _INTERPRETED and pointers.dtype.element_ty == tl.bfloat16:
        bits = tl.load(pointers.to(tl.pointer_type(tl.int16), bitcast=True), mask=mask, other=0)
        return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return tl.load(pointers, mask=mask, other=0).to(dtype)


@triton.jit
def store(pointers, value, mask):
    """Store in the pointers' dtype, rounded to nearest even; to half precision by way of float32, as PyTorch does."""
    dtype: tl.constexpr = pointers.dtype.element_ty
    if dtype == tl.float64:
        tl.store(pointers, value.to(tl.float64), mask=mask)
    else:
        value = value.to(tl.float32)
        if _INTERPRETED and dtype == tl.bfloat16:
            bits = value.to(tl.int32, bitcast=True)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            rounded = tl.where(value == value, rounded, 0x7FC0).to(tl.int16)
            tl.store(pointers.to(tl.pointer_type(tl.int16), bitcast=True), rounded, mask=mask)
        else:
            tl.store(pointers, value.to(dtype), mask=mask)
