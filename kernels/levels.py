"""Levels of one structure in one launch.

Of each argument such a launch takes a tuple with a value for each level. A program finds its level by comparing its
number with the levels' first tiles, and selects; nothing is copied to the device.

Triton compiles a kernel anew for integers that are 1, multiples of 16 or beyond 32 bits, in tuples always. For several
levels that were a kernel for nearly every size of image. So ones are left out (their places are part of the
structure), other integers n go as 2 n + 3, and of the numbers of logits a common unit of 16 is taken out.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .configurations import choose

MOST_LEVELS = 8
"""In one launch; of each, a program looks at every argument."""
_UNIT = 16
# Of the size of an axis, so that its code has 32 bits, as divisions by it have.
_MOST_CODED = 2**30 - 2


class Level(NamedTuple):
    """A level's own arguments, by name."""

    pointers: dict[str, Tensor | None]
    integers: dict[str, int]
    """``num_logits`` (what a launch is over) among them."""
    constants: dict[str, Any]

    @property
    def num_logits(self) -> int:
        return self.integers["num_logits"]

    @property
    def ones(self) -> tuple[bool, ...]:
        """Which integers are 1 by the level's layout, rather than by its size or place."""
        return tuple(value == 1 and name not in ("num_logits", "first_index") for name, value in self.integers.items())

    @property
    def structure(self) -> Hashable:
        """What levels in one launch have in common."""
        kinds = tuple(x is not None and (x.dtype, x.data_ptr() % 16 == 0) for x in self.pointers.values())
        return kinds, self.ones, tuple(self.constants.items())

    @property
    def may_be_joined(self) -> bool:
        return all(value <= _MOST_CODED for name, value in self.integers.items() if name.startswith("size"))


def make_level(pointers: dict[str, Tensor | None], arguments: dict[str, int], **integers: int) -> Level:
    """A level of what :meth:`Walk.arguments` says, and of further integers; all in the order of the kernel's own."""
    constants = {name: value for name, value in arguments.items() if name.isupper()}
    own = {name: value for name, value in arguments.items() if not name.isupper()}
    return Level(pointers, {"num_logits": own.pop("num_logits"), **own, **integers}, constants)


def launch(
    kernel: str,
    functions: tuple[Any, Any],
    levels: list[Level],
    rehearsal: Callable[[], dict[str, Tensor]],
    given: dict[str, Any],
) -> None:
    """Launch a kernel over all levels that are not empty: once for all of one structure, up to eight.

    Args:
        kernel: its name among the launch settings.
        functions: its device function, and the same for several levels.
        levels: of either kind of labels, in any layout.
        rehearsal: further arguments in the place of those that a search for settings must not touch.
        given: arguments that all levels share.
    """
    for joined in join(levels):
        run = partial(_run, functions, joined, given)
        first = next(iter(joined[0].pointers.values()))
        assert first is not None
        num_logits = sum(level.num_logits for level in joined)
        run(choose(kernel, first, lambda run=run, **settings: run(settings | rehearsal()), num_logits))


def join(levels: list[Level]) -> list[list[Level]]:
    """The levels of each launch, in their order; without the empty ones."""
    by_structure: dict[Hashable, list[Level]] = {}
    for i, level in enumerate(levels):
        if level.num_logits:
            by_structure.setdefault(level.structure if level.may_be_joined else i, []).append(level)
    return [
        alike[begin : begin + MOST_LEVELS]
        for alike in by_structure.values()
        for begin in range(0, len(alike), MOST_LEVELS)
    ]


def _run(functions: tuple[Any, Any], levels: list[Level], given: dict[str, Any], settings: dict[str, Any]) -> None:
    one, several = functions
    arguments = given | levels[0].constants | settings
    arguments["BLOCK"] = block = arguments.pop("block")
    tiles = [triton.cdiv(level.num_logits, block) for level in levels]
    if len(levels) == 1:
        one[(tiles[0],)](None, **levels[0].pointers, **levels[0].integers, **arguments)
        return
    unit = _UNIT if all(level.num_logits % _UNIT == 0 for level in levels) else 1
    first_tile = tuple(_code(tile) for tile in accumulate(tiles[:-1], initial=0))
    pointers = zip(*(level.pointers.values() for level in levels))
    integers = zip(*(_coded(level, unit) for level in levels))
    walks = (first_tile, *pointers, *integers)
    counts = {"POINTERS": len(levels[0].pointers), "ARGUMENTS": len(walks)}
    several[(sum(tiles),)](walks, **counts, UNIT=unit, **arguments)


def _code(value: int) -> int:
    """Neither 1 nor a multiple of 16; see ``number``."""
    return 2 * value + 3


def _coded(level: Level, unit: int) -> list[int | None]:
    """The level's integers, the number of logits in units, and None for the ones of its layout."""
    integers = level.integers | {"num_logits": level.num_logits // unit}
    return [None if one else _code(value) for value, one in zip(integers.values(), level.ones)]


@triton.jit
def number(code):
    """What was coded by ``_code``."""
    return (code >> 1) - 1


@triton.jit
def pick(values, program, first_tile):
    """The value of the level that a program is in; 1 where the levels have none."""
    if values[0] is None:
        return 1
    else:
        picked = values[0]
        for k in tl.static_range(1, len(values)):
            picked = tl.where(program >= number(first_tile[k]), values[k], picked)
        return picked


@triton.jit
def level_of(program, walks, POINTERS: tl.constexpr, ARGUMENTS: tl.constexpr, UNIT: tl.constexpr):
    """A program's tile in its level, and that level's arguments: pointers, number of logits, further integers.
    Triton 3.5 cannot take the length of a tuple that holds a None, which is why it comes as ARGUMENTS."""
    first_tile = walks[0]
    level = (program - number(pick(first_tile, program, first_tile)),)
    for i in tl.static_range(1, ARGUMENTS):
        value = pick(walks[i], program, first_tile)
        if i > POINTERS and walks[i][0] is not None:
            value = number(value)
        if i == POINTERS + 1:
            value = value.to(tl.int64) * UNIT
        level += (value,)  # type: ignore[assignment]
    return level
