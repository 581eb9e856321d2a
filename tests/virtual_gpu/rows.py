"""An instruction of the engine, as it is put together."""

from __future__ import annotations

from typing import NamedTuple

NO_PARTS = (-1,) * 8


class Row(NamedTuple):
    """An instruction; what its fields mean says core/types.h, and ``layout.INSTRUCTION`` has the same ones."""

    op: int
    guard: int = -1
    negated: int = 0
    a: int = -1
    b: int = -1
    c: int = -1
    e: int = -1
    d: int = -1
    parts: tuple[int, ...] = NO_PARTS
    num_parts: int = 1
    size: int = 0
    register_size: int = 0
    address_size: int = 8
    is_signed: int = 0
    space: int = 0
    how: int = 0
    target: int = 0
    offset: int = 0
