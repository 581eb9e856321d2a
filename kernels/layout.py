"""The order in which a kernel reads a level: logits of any strides in row-major order, with labels, groups and
gradient.

Axes of size 1 are removed, and axes that are adjacent in memory in every tensor are merged. So contiguous logits have
one axis (two with class labels: the axis of the classes stays, with a step of 0 in the labels). Levels with at most
four axes are not copied; this includes a channel-first level ``[B, A C, H, W]`` viewed as ``[B, H, W, A, C]``.

The tuples of related kernel arguments are also here; :mod:`.lanes` reads them.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import lru_cache
from itertools import accumulate
from operator import mul
from typing import Any, NamedTuple

import torch
from torch import Tensor

MAX_AXES = 4
_MAX_INNER = 2**31 - 2**17


class Ramp(NamedTuple):
    """The ramp H(x) = clamp(x / (2 delta) + 1/2, 0, 1), as constants of a kernel."""

    delta: Any
    inverse_width: Any
    """1 / (2 delta), or 0 for delta = 0."""
    saturate: Any
    """Whether the target has one instruction to multiply, add and clamp."""


class Table(NamedTuple):
    """The 2P sorted ends of ramps (thresholds), in which both passes search each score; :mod:`.place` makes it.

    Bucket b >= 1 holds the scores from threshold b - 1 up to the next one; bucket 0 holds those below all thresholds.
    With groups, thresholds are sorted by group first, and bucket 0 holds the scores below all thresholds of their
    group.
    """

    thresholds: Any
    """``[4P + 1]``, float32 or float64: 2P thresholds, NaN last in its group; then NaN, which no score reaches. With
    groups, the highest and the lowest threshold of all are in the last two places, which no search reads."""
    cells: Any
    """See :mod:`.grid`. For scores in half precision without groups ``[65536, 2]``: the bucket of each value (an
    integer) and the bucket's lower end. Otherwise ``[1 + G + G / 8, 8]``: the first row holds the rounds of a search
    beyond the thresholds of a row (an integer), then slope, offset and highest value of the map from scores to cells.
    Each of the next G rows is a cell; after them come the first numbers of these rows once more (integers). With groups
    ``[1 + G, 8]``: the first row also has the number of cells of a group and the number of groups (integers)."""
    groups: Any = None
    """``[4P + 1]`` int64: the group of each threshold, the highest number beyond them; None for one ranking."""


class Positives(NamedTuple):
    """The P positives, in flat order."""

    logits: Any
    """``[P]``"""
    begin: Any
    """``[P]`` int64: the bucket in which each one's ramp begins."""
    end: Any
    """``[P]`` int64: the first bucket after its end."""
    groups: Any = None
    """``[P]`` int64, or None."""


class Levels(NamedTuple):
    """The levels of one launch: each field is a tuple with a value for each level. Integers are coded, see
    ``launch.number``; None is for steps of 1 and for missing tensors. Common properties are constants; a tuple made in
    a kernel would turn them into run-time numbers."""

    first_tile: Any
    logits: Any
    labels: Any
    gradient: Any
    groups: Any
    num_logits: Any
    first_index: Any
    sizes: Any
    logit_steps: Any
    label_steps: Any
    gradient_steps: Any
    group_steps: Any
    index_steps: Any
    """From a logit to its flat index; not used if ``ROW_MAJOR``."""
    UNIT: Any
    """The divisor of the numbers of logits."""
    AXES: Any
    CLASSES: Any
    """C if each row has a label, 0 if each logit has one."""
    CLASS_AXIS: Any
    """The axis of the classes, if each row has a label."""
    FLAT: Any
    """Whether logits and gradient are read and written in memory order."""
    ROW_MAJOR: Any
    """Whether the position of a logit in a level is its flat index."""


class Level(NamedTuple):
    """The level of one program. Sizes of the axes and steps of the tensors are innermost first."""

    tile: Any
    """The program's tile among those of the level."""
    logits: Any
    labels: Any
    gradient: Any
    groups: Any
    num_logits: Any
    first_index: Any
    """Flat index of its first logit."""
    sizes: Any
    logit_steps: Any
    label_steps: Any
    gradient_steps: Any
    group_steps: Any
    index_steps: Any


class Layout(NamedTuple):
    """Sizes of the remaining axes, and the steps of logits, labels, gradient and groups along them."""

    sizes: tuple[int, ...]
    steps: tuple[tuple[int, ...], ...]

    flat: bool
    """See :attr:`Levels.FLAT`."""
    index_steps: tuple[int, ...] | None
    """Of flat indices; None if positions are these."""
    class_axis: int
    """The axis of the classes; it is never merged."""

    @property
    def structure(self) -> Hashable:
        """What levels in one launch share."""
        return _structure_of(self)


class Walk(NamedTuple):
    """A level on the host: its tensors and their layout."""

    logits: Tensor
    labels: Tensor
    groups: Tensor | None
    layout: Layout
    classes: int
    """See :attr:`Levels.CLASSES`."""


def walk_over(logits: Tensor, labels: Tensor, groups: Tensor | None, in_memory_order: bool = False) -> Walk:
    """The layout of a level; levels with more than four axes are copied.

    Args:
        logits: any shape and strides (``[..., C]`` with class labels).
        labels: of the logits' shape, or without the last axis.
        groups: as the labels, or None.
        in_memory_order: whether to go through logits that are dense in memory as they lie there, in place of row-major
            order.
    """
    per_class = labels.dim() != logits.dim()
    tensors = [labels] if groups is None else [labels, groups]
    layout = _layout(
        logits.shape, logits.stride(), tuple(_steps(x, logits) for x in tensors), per_class, in_memory_order
    )
    if layout is None:
        return walk_over(logits.contiguous(), labels.contiguous(), None if groups is None else groups.contiguous())
    return Walk(logits, labels, groups, layout, logits.shape[-1] if per_class else 0)


def _steps(rows: Tensor, logits: Tensor) -> tuple[int, ...]:
    """The strides of a tensor in the logits' shape; it may lack the last axis."""
    return rows.stride() if rows.dim() == logits.dim() else (*rows.stride(), 0)


def _row_major(sizes: Sequence[int]) -> tuple[int, ...]:
    """Steps of dense axes, innermost first."""
    return (1, *accumulate(sizes[:-1], mul))


@lru_cache(maxsize=4096)
def _layout(
    shape: torch.Size,
    strides: tuple[int, ...],
    others: tuple[tuple[int, ...], ...],
    per_class: bool,
    in_memory_order: bool,
) -> Layout | None:
    """The layout of logits with the strides of labels and groups; None if too many axes remain."""
    gradient = torch.empty_like(torch.empty_strided(shape, strides, device="meta")).stride()
    labels, *groups = others
    index = _row_major(shape[::-1])[::-1]
    is_class = [False] * (len(shape) - 1) + [per_class]
    outermost_first = list(zip(shape, zip(index, strides, labels, gradient, *groups), is_class))
    if in_memory_order:
        outermost_first.sort(key=lambda axis: -axis[1][1])
    axes = [outermost_first.pop()]
    for size, steps, of_classes in reversed(outermost_first):
        inner, inner_steps, inner_of_classes = axes[-1]
        may_merge = not of_classes and not inner_of_classes
        if size == 1 and not of_classes:
            continue
        if inner == 1 and not inner_of_classes:
            axes[-1] = (size, steps, of_classes)
        elif may_merge and all(step == inner * inner_step for step, inner_step in zip(steps, inner_steps)):
            axes[-1] = (inner * size, inner_steps, False)
        else:
            axes.append((size, steps, of_classes))
    sizes, by_axis, classes = zip(*axes)
    index_steps, *of_tensors = zip(*by_axis)
    dense = _row_major(sizes)
    flat = of_tensors[0] == of_tensors[2] == dense
    fits = len(axes) <= MAX_AXES and all(size <= _MAX_INNER for size in sizes[:-1])
    if in_memory_order and not (flat and fits):
        return _layout(shape, strides, others, per_class, False)
    class_axis = classes.index(True) if per_class else 0
    return (
        Layout(sizes, tuple(of_tensors), flat, None if index_steps == dense else index_steps, class_axis)
        if fits
        else None
    )


@lru_cache(maxsize=4096)
def _structure_of(layout: Layout) -> Hashable:
    """Which steps are 1, the number of axes, and their order."""
    steps = [*layout.steps, layout.index_steps or ()]
    ones = tuple(step == 1 for each in steps for step in each)
    return ones, len(layout.sizes), layout.flat, layout.index_steps is None, layout.class_axis
