"""The order in which a kernel reads a level: logits of any strides in row-major order, with labels, groups and
gradient.

Axes of size 1 are removed, and axes that are adjacent in memory in every tensor are merged. So contiguous logits have
one axis (two with class labels: the axis of the classes stays, with a step of 0 in the labels). Levels with at most
four axes are not copied; this includes a channel-first level ``[B, A C, H, W]`` viewed as ``[B, H, W, A, C]``.

The tuples of related kernel arguments are also here; :mod:`.lanes` reads them.
"""

from __future__ import annotations

from collections.abc import Hashable
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
    groups, the lowest threshold of all is in the last place, which no search reads."""
    cells: Any
    """Not used with groups; see :mod:`.grid`. For scores in half precision ``[65536, 2]``: the bucket of each value (an
    integer) and the bucket's lower end. For other scores ``[G + 1, 8]``: the first row holds the rounds of a search
    beyond the thresholds of a row (an integer), then slope, offset and highest value of the map from scores to cells.
    Each further row is a cell."""
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
    UNIT: Any
    """The divisor of the numbers of logits."""
    AXES: Any
    CLASSES: Any
    """C if each row has a label, 0 if each logit has one."""
    FLAT: Any
    """Whether logits and gradient are read and written in memory order."""


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


class Layout(NamedTuple):
    """Sizes of the remaining axes, and the steps of logits, labels, gradient and groups along them."""

    sizes: tuple[int, ...]
    steps: tuple[tuple[int, ...], ...]

    flat: bool
    """See :attr:`Levels.FLAT`."""
    structure: Hashable
    """What levels in one launch share: which steps are 1, the number of axes, and whether they are flat."""


class Walk(NamedTuple):
    """A level on the host: its tensors and their layout."""

    logits: Tensor
    labels: Tensor
    groups: Tensor | None
    layout: Layout
    classes: int
    """See :attr:`Levels.CLASSES`."""


def walk_over(logits: Tensor, labels: Tensor, groups: Tensor | None) -> Walk:
    """The layout of a level; levels with more than four axes are copied.

    Args:
        logits: any shape and strides (``[..., C]`` with class labels).
        labels: of the logits' shape, or without the last axis.
        groups: as the labels, or None.
    """
    per_class = labels.dim() != logits.dim()
    tensors = [labels] if groups is None else [labels, groups]
    layout = _layout(logits.shape, logits.stride(), tuple(_steps(x, logits) for x in tensors), per_class)
    if layout is None:
        return walk_over(logits.contiguous(), labels.contiguous(), None if groups is None else groups.contiguous())
    return Walk(logits, labels, groups, layout, logits.shape[-1] if per_class else 0)


def _steps(rows: Tensor, logits: Tensor) -> tuple[int, ...]:
    """The strides of a tensor in the logits' shape; it may lack the last axis."""
    return rows.stride() if rows.dim() == logits.dim() else (*rows.stride(), 0)


@lru_cache(maxsize=4096)
def _layout(
    shape: torch.Size, strides: tuple[int, ...], others: tuple[tuple[int, ...], ...], per_class: bool
) -> Layout | None:
    """The layout of logits with the strides of labels and groups; None if too many axes remain."""
    gradient = torch.empty_like(torch.empty_strided(shape, strides, device="meta")).stride()
    labels, *groups = others
    outermost_first = list(zip(shape, zip(strides, labels, gradient, *groups)))
    axes = [outermost_first.pop()]
    for size, steps in reversed(outermost_first):
        inner, inner_steps = axes[-1]
        may_merge = not (per_class and len(axes) == 1)
        if size == 1:
            continue
        if may_merge and inner == 1:
            axes[-1] = (size, steps)
        elif may_merge and all(step == inner * inner_step for step, inner_step in zip(steps, inner_steps)):
            axes[-1] = (inner * size, inner_steps)
        else:
            axes.append((size, steps))
    if len(axes) > MAX_AXES or any(size > _MAX_INNER for size, _ in axes[:-1]):
        return None
    sizes, by_axis = zip(*axes)
    steps = tuple(zip(*by_axis))
    contiguous = (1, *accumulate(sizes[:-1], mul))
    flat = steps[0] == steps[2] == contiguous
    return Layout(sizes, steps, flat, (tuple(step == 1 for each in steps for step in each), len(sizes), flat))
