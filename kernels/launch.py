"""From levels to launches: levels of one structure share a launch, and each program finds its level.

A launch takes a tuple for each field, with a value for each level. A program compares its number with the first tiles
of the levels and selects its level; nothing is copied to the device.

Triton makes a new specialisation for integers that are 1, multiples of 16 or beyond 32 bits, and in tuples this cannot
be turned off. That would be one for nearly every image size. So steps of 1 are left out (their axes are part of the
structure), other integers n are passed as 2 n + 3, and a common factor of 16 is taken out of the numbers of logits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Sequence
from functools import cache, lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

from .lanes import INTERPRETED
from .layout import MAX_AXES, Layout, Level, Levels, Ramp, Walk
from .settings import Settings, architecture_of, pinned, settings_of

MOST_LEVELS = 8
"""Most levels in one launch; a program reads all arguments of each."""
_UNIT = 16


class Part(NamedTuple):
    """A level, and the index of its first logit among those of all levels."""

    walk: Walk
    gradient: Tensor | None
    first_index: int

    @property
    def structure(self) -> Hashable:
        """The properties that levels in one launch share."""
        kinds = tuple([x is not None and (x.dtype, x.data_ptr() % 16 == 0) for x in self.tensors])
        return kinds, self.walk.layout.structure, self.walk.classes

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.walk.logits, self.walk.labels, self.gradient, self.walk.groups


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Launches use the current device, which may differ from that of the tensor."""
    if INTERPRETED:
        return contextlib.nullcontext()
    guard: contextlib.AbstractContextManager[Any] = driver.active.get_device_interface().device(tensor.device)
    return guard


# Python compares equal objects faster if they are the same.
constant = lru_cache(maxsize=None, typed=True)(tl.constexpr)


def tiles_in(number: int, size: int) -> int:
    """The number of tiles of a size; ``triton.cdiv`` takes some microseconds."""
    return -(-number // size)


def ramp_of(logits: Tensor, delta: float) -> Ramp:
    """The ramp constants of a kernel for scores of this dtype and device."""
    return _ramp(delta, logits.dtype == torch.float32 and architecture_of(logits.device).startswith("sm_"))


@cache
def _ramp(delta: float, saturate: bool) -> Ramp:
    return Ramp(constant(delta), constant(0.5 / delta if delta else 0.0), constant(saturate))


def launch(
    kernel: Any,
    name: str,
    walks: Sequence[Walk],
    arguments: dict[str, Any],
    gradients: Sequence[Tensor] | None = None,
    by_row: bool = False,
) -> None:
    """Launch a kernel over all levels that are not empty: once for all of one structure, up to eight.

    Args:
        kernel: takes ``levels``, the arguments, and ``BLOCK``.
        name: its name among the launch settings.
        walks: the levels.
        arguments: arguments that all levels share.
        gradients: tensors that the kernel writes, of the logits' shape and with the strides of ``empty_like``.
        by_row: whether a tile consists of rows of logits that share a label, and not of logits.
    """
    for parts in join(walks, gradients):
        launch_parts(kernel, name, parts, arguments, by_row)


def launch_parts(
    kernel: Any,
    name: str,
    parts: list[Part],
    arguments: dict[str, Any],
    by_row: bool = False,
    columns: int = 1,
    in_rows: bool | None = None,
) -> None:
    """Launch a kernel once, as :func:`launch`.

    Args:
        columns: of the launch grid; tiles are numbered row by row. Some in the last row may not be there.
        in_rows: whether a program goes through all rows of its column; None for kernels that take no ``num_rows``.
    """
    first = parts[0].walk
    settings = settings_for(name, parts)
    block, num_warps = settings["block"], settings["num_warps"]
    num_tiles, levels = tiles_of(parts, block * first.classes if by_row and first.classes else block)
    rows = tiles_in(num_tiles, columns)
    if in_rows is not None:
        arguments = {**arguments, "num_rows": rows}
    grid = (columns,) if in_rows else (num_tiles,) if columns == 1 else (columns, rows)
    with on_device_of(first.logits):
        kernel[grid](levels=levels, **arguments, BLOCK=block, num_warps=num_warps)


_PROGRAMS_FOR_A_PROCESSOR = 4


@cache
def programs_at_once(device: torch.device) -> int:
    """How many programs of a kernel that goes through all tiles a GPU has room for; on the CPU as for one processor."""
    on_gpu = device.type == "cuda"
    processors = torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else 1
    return _PROGRAMS_FOR_A_PROCESSOR * processors


def settings_for(name: str, parts: list[Part]) -> Settings:
    """The settings of one launch."""
    return settings_of(name, parts[0].walk.logits, sum(part.walk.logits.numel() for part in parts))


def compare(
    kernel: Any, places: int, logits: Tensor, *, rows: int = 1, num_warps: int | None = None, **arguments: Any
) -> None:
    """Launch a kernel that compares a block of positives or buckets with all positives, for each row; ``logits`` gives
    the device."""
    settings = pinned("compare", architecture_of(logits.device))
    if places == 0:
        return
    with on_device_of(logits):
        kernel[(tiles_in(places, settings["block_p"]), rows)](
            **arguments,
            BLOCK=settings["block"],
            BLOCK_P=settings["block_p"],
            num_warps=num_warps or settings["num_warps"],
        )


def join(walks: Sequence[Walk], gradients: Sequence[Tensor] | None = None) -> list[list[Part]]:
    """The levels of each launch in order, without empty levels."""
    by_structure: dict[Hashable, list[Part]] = {}
    first_index = 0
    for i, walk in enumerate(walks):
        part = Part(walk, None if gradients is None else gradients[i], first_index)
        first_index += walk.logits.numel()
        if walk.logits.numel():
            by_structure.setdefault(part.structure, []).append(part)
    return [
        alike[begin : begin + MOST_LEVELS]
        for alike in by_structure.values()
        for begin in range(0, len(alike), MOST_LEVELS)
    ]


def tiles_of(parts: list[Part], size: int) -> tuple[int, Levels]:
    """The number of tiles of ``size`` logits, and the levels in the form that kernels take."""
    first = parts[0].walk
    places = tuple([(part.walk.layout, part.walk.logits.numel(), part.first_index) for part in parts])
    num_tiles, levels = _numbers_of(places, size, first.classes, first.groups is not None)
    logits, labels, gradient, groups = zip(*[part.tensors for part in parts])
    return num_tiles, levels._replace(logits=logits, labels=labels, gradient=gradient, groups=groups)


@lru_cache(maxsize=4096)
def _numbers_of(
    places: tuple[tuple[Layout, int, int], ...], size: int, classes: int, grouped: bool
) -> tuple[int, Levels]:
    """:func:`tiles_of` without tensors, from layouts, numbers of logits and first indices."""
    layouts, numels, first_indices = zip(*places)
    tiles = [tiles_in(numel, size) for numel in numels]
    unit = _UNIT if all(numel % _UNIT == 0 for numel in numels) else 1
    steps = [layout.steps if grouped else (*layout.steps, ()) for layout in layouts]
    logit_steps, label_steps, gradient_steps, group_steps = (_by_axis(of_tensor, 1) for of_tensor in zip(*steps))
    levels = Levels(
        first_tile=tuple(code(tile) for tile in accumulate(tiles[:-1], initial=0)),
        logits=None,
        labels=None,
        gradient=None,
        groups=None,
        num_logits=tuple(code(numel // unit) for numel in numels),
        first_index=tuple(map(code, first_indices)),
        sizes=_by_axis([layout.sizes for layout in layouts], None),
        logit_steps=logit_steps,
        label_steps=label_steps,
        gradient_steps=gradient_steps,
        group_steps=group_steps,
        index_steps=_by_axis([layout.index_steps or () for layout in layouts], 1),
        UNIT=constant(unit),
        AXES=constant(len(layouts[0].sizes)),
        CLASSES=constant(classes),
        CLASS_AXIS=constant(layouts[0].class_axis),
        FLAT=constant(layouts[0].flat),
        ROW_MAJOR=constant(layouts[0].index_steps is None),
    )
    return sum(tiles), levels


def _by_axis(levels: Sequence[tuple[int, ...]], left_out: int | None) -> tuple[tuple[int | None, ...], ...]:
    """For each axis the coded numbers of all levels; None for missing axes and for left-out steps."""
    rows = [tuple(None if n == left_out else code(n) for n in of_axis) for of_axis in zip(*levels)]
    return tuple(rows + [(None,) * len(levels)] * (MAX_AXES - len(rows)))


def code(value: int) -> int:
    """A code that is neither 1 nor a multiple of 16; see ``number``."""
    return 2 * value + 3


@triton.jit
def number(code):
    """Decodes a number of ``code``."""
    return (code >> 1) - 1


@triton.jit
def pick(values, program, first_tile):
    """The value of a program's level; 1 if the levels have none."""
    if values[0] is None:
        return 1
    else:
        picked = values[0]
        for k in tl.static_range(1, len(first_tile)):
            picked = tl.where(program >= number(first_tile[k]), values[k], picked)
        return picked


@triton.jit
def pick_number(values, program, first_tile):
    """:func:`pick` for coded numbers."""
    if values[0] is None:
        return 1
    else:
        return number(pick(values, program, first_tile))


@triton.jit
def pick_numbers(rows, program, first_tile):
    """:func:`pick_number` for each axis."""
    return (
        pick_number(rows[0], program, first_tile),
        pick_number(rows[1], program, first_tile),
        pick_number(rows[2], program, first_tile),
        pick_number(rows[3], program, first_tile),
    )


@triton.jit
def tile_of(program, first_tile):
    """A program's tile in its level."""
    if len(first_tile) == 1:
        return program
    else:
        return program - pick_number(first_tile, program, first_tile)


@triton.jit
def level_of(levels, program):
    """The level of a program. Triton before 3.7 cannot put a None into a tuple, so missing values are 1."""
    first_tile = levels.first_tile
    return Level(
        tile_of(program, first_tile),
        pick(levels.logits, program, first_tile),
        pick(levels.labels, program, first_tile),
        pick(levels.gradient, program, first_tile),
        pick(levels.groups, program, first_tile),
        pick_number(levels.num_logits, program, first_tile).to(tl.int64) * levels.UNIT,
        pick_number(levels.first_index, program, first_tile),
        pick_numbers(levels.sizes, program, first_tile),
        pick_numbers(levels.logit_steps, program, first_tile),
        pick_numbers(levels.label_steps, program, first_tile),
        pick_numbers(levels.gradient_steps, program, first_tile),
        pick_numbers(levels.group_steps, program, first_tile),
        pick_numbers(levels.index_steps, program, first_tile),
    )
