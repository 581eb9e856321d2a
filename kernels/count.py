"""Pass 1: for each bucket count its negatives, and sum their offsets in fixed point.

All sums are 64-bit integers, so the order of tiles and atomics does not matter. If all scores of a tile lie in one
bucket, as early in training, there is no search, and one sum; in bucket 0, as late in training, there is nothing to
add.

Many logits share several tables, so that few atomics wait for one another: a tile adds to one of them. If a table gets
fewer than 2^17 logits, a word holds both the count of a bucket, in its upper 17 bits, and the sum of its offsets, in
units of 2^-30, rounded. Then a logit takes one atomic instead of two.

On NVIDIA's GPUs such a table lies in shared memory if it is small enough (:mod:`.shared`). Then a program counts all
tiles of its table.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .grid import numbers_of
from .lanes import (
    add_each,
    address,
    address_or_position,
    kinds,
    load,
    places,
    within,
)
from .launch import (
    code,
    constant,
    join,
    launch_parts,
    level_of,
    number,
    on_device_of,
    programs_at_once,
    ramp_of,
    tiles_in,
)
from .layout import Table, Walk
from .search import anchor_of, find_bucket, groups_of, is_between, offset_from
from .settings import architecture_of
from .shared import MOST_WORDS, add_one_to_words, add_to_words, clear_words, copy_search, declare, store_words

# A word of a table with fewer than 2^17 logits.
_COUNT_BITS, _PACKED_FRACTION = 17, 30
_PACKED_BITS = tl.constexpr(_COUNT_BITS + _PACKED_FRACTION)
_ONE_PACKED = tl.constexpr(1 << _COUNT_BITS + _PACKED_FRACTION)
# A sum over a tile holds a count of at most 2^12 above units of at most 2^36 each.
_TILE_BITS, _ONE_OF_TILE = tl.constexpr(50), tl.constexpr(1 << 50)
_MOST_IN_A_TILE = 1 << 12
# From this many logits on, several tables cost little.
_MANY_LOGITS = 1 << 16
# A program with a table in shared memory begins and ends with all of it.
_FEWEST_IN_A_PROGRAM = 1 << 13
# Tables that are copied from and to, a part of what the logits take.
_BYTES_FOR_A_LOGIT = 1


class Tables(NamedTuple):
    """Tables of all buckets, to which tiles add."""

    words: Any
    """``[R, 2P + 2]`` int64, packed, or ``[R, 2, 2P + 2]`` as the totals."""
    step: Any
    """Words from a table to the next, coded as the numbers of levels; 0 if there is one for all tiles."""
    columns: Any
    """2P + 2, coded."""
    PACKED: Any
    SHARED: Any
    """Whether each program fills its table in shared memory, and stores it in the end."""


@triton.jit
def in_units(offset, scale, tables):
    """Offsets in fixed point: cut off, as on a CPU, or rounded, where units are larger."""
    return (offset * scale + (0.5 if tables.PACKED else 0.0)).to(tl.int64)


@triton.jit
def add_tile(table, bucket, both, tables):
    """Add a count and units in one sum."""
    if tables.SHARED:
        add_one_to_words(bucket, both)
    elif tables.PACKED:
        tl.atomic_add(table + bucket, both, mask=both > 0, sem="relaxed")
    else:
        count = both >> _TILE_BITS
        tl.atomic_add(table + bucket, count, mask=count > 0, sem="relaxed")
        units = both - (count << _TILE_BITS)
        tl.atomic_add(table + number(tables.columns) + bucket, units, mask=count > 0, sem="relaxed")


@triton.jit(do_not_specialize=["ignore_index", "num_rows"])
def count_kernel(levels, table, tables, scale, ignore_index, num_rows, ramp, BLOCK: tl.constexpr):
    own = tables.words + tl.program_id(0).to(tl.int64) * number(tables.step)
    SEARCH: tl.constexpr = tables.SHARED and table.groups is None and levels.logits[0].dtype.element_ty == tl.float32
    if tables.SHARED:
        declare(SEARCH)
        clear_words(BLOCK)
        if SEARCH:
            num_cells = 4 * number(tables.columns)
            numbers = numbers_of(table.cells, num_cells).to(tl.pointer_type(tl.int32), bitcast=True)
            copy_search(table.thresholds, numbers, num_cells, BLOCK)
        tl.debug_barrier()
        for row in range(num_rows):
            count_tile(levels, row, own, table, tables, scale, ignore_index, ramp, SEARCH, BLOCK)
        tl.debug_barrier()
        store_words(own, number(tables.columns), BLOCK)
    else:
        count_tile(levels, tl.program_id(1), own, table, tables, scale, ignore_index, ramp, SEARCH, BLOCK)


@triton.jit
def count_tile(
    levels,
    row,
    own,
    table,
    tables,
    scale,
    ignore_index,
    ramp,
    SEARCH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Count the tile of a program in a row of the launch grid. ``SEARCH``: whether shared memory has the thresholds."""
    level = level_of(levels, row * tl.num_programs(0) + tl.program_id(0))
    begin, lane = level.tile.to(tl.int64) * BLOCK, tl.arange(0, BLOCK)
    at = places(levels, level, begin, lane, BLOCK)
    x_at = address_or_position(begin + lane, at, level.logit_steps, levels)
    there = within(begin, lane, level.num_logits, BLOCK)
    score = load(level.logits + x_at, there, table.thresholds.dtype.element_ty)
    takes_part, positive = kinds(levels, level, begin, lane, at, there, ignore_index, BLOCK)
    counted = there & takes_part & ~positive

    columns = number(tables.columns)
    anchor, low, high = anchor_of(levels, level, begin, table, columns - 1, SEARCH)
    one: tl.constexpr = _ONE_PACKED if tables.PACKED else _ONE_OF_TILE
    if tl.max((counted & ~is_between(score, low, high)).to(tl.int32)) > 0:
        group = groups_of(level, address(at, level.group_steps, levels.AXES), there, table)
        bucket, floor = find_bucket(score, group, table, level.logits.dtype.element_ty, SEARCH)
        # NaN have the last column.
        bucket = tl.where(score == score, bucket, columns - 1)
        reaches = counted & (bucket > 0)
        units = in_units(offset_from(score, floor, ramp), scale, tables)
        if tables.SHARED:
            add_to_words(bucket, units + one, reaches)
        elif tables.PACKED:
            add_each(own + bucket, units + one, reaches, BLOCK)
        else:
            add_each(own + bucket, tl.full([BLOCK], 1, tl.int64), reaches, BLOCK)
            add_each(own + columns + bucket, units, reaches, BLOCK)
    elif anchor > 0:
        units = in_units(offset_from(score, low, ramp), scale, tables)
        add_tile(own, anchor, tl.sum(tl.where(counted, units + one, 0)), tables)


@triton.jit(do_not_specialize=["num_tables", "shift"])
def fold_kernel(tables, num_tables, totals, shift, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    columns = number(tables.columns)
    inside = column < columns
    there = (row < num_tables) & inside[None, :]
    places = tables.words + row.to(tl.int64) * number(tables.step) + column[None, :]
    if tables.PACKED:
        words = tl.load(places, mask=there, other=0)
        counts = words.to(tl.uint64, bitcast=True) >> _PACKED_BITS
        units = (words & (_ONE_PACKED - 1)) << shift
    else:
        counts = tl.load(places, mask=there, other=0)
        units = tl.load(places + columns, mask=there, other=0)
    tl.atomic_add(totals + column, tl.sum(counts.to(tl.int64), axis=0), mask=inside, sem="relaxed")
    tl.atomic_add(totals + columns + column, tl.sum(units, axis=0), mask=inside, sem="relaxed")


def number_of_tables(num_logits: int, num_levels: int, step: int) -> int:
    """The number of tables of ``step`` words each; 0 if the totals themselves serve better."""
    # Each launch may give a table one tile more than others, and each level has a tile that is not full.
    room = (1 << _COUNT_BITS) - 2 * num_levels * _MOST_IN_A_TILE
    num_tables = tiles_in(num_logits, max(1, room))
    too_large = 8 * num_tables * step > _BYTES_FOR_A_LOGIT * num_logits
    return 0 if num_logits < _MANY_LOGITS or room < _MANY_LOGITS or too_large else num_tables


def tables_for(num_logits: int, num_levels: int, totals: Tensor, packed: bool) -> tuple[Tables, int]:
    """Several tables, zeros if tiles add to them, and their number; or the totals and 0."""
    columns = totals.shape[1]
    step = columns if packed else 2 * columns
    num_tables = number_of_tables(num_logits, num_levels, step)
    if num_tables == 0:
        return Tables(totals, code(0), code(columns), constant(False), constant(False)), 0
    shared = packed and columns <= MOST_WORDS and architecture_of(totals.device).startswith("sm_")
    if shared:
        num_tables = max(num_tables, min(programs_at_once(totals.device), num_logits // _FEWEST_IN_A_PROGRAM))
    words = totals.new_empty(num_tables, step) if shared else totals.new_zeros(num_tables, step)
    step = step if num_tables > 1 else 0
    return Tables(words, code(step), code(columns), constant(packed), constant(shared)), num_tables


def fold(tables: Tables, num_tables: int, totals: Tensor, shift: int) -> None:
    """Add several tables to the totals."""
    rows, block = 32, 128
    with on_device_of(totals):
        fold_kernel[(tiles_in(totals.shape[1], block), tiles_in(num_tables, rows))](
            tables, num_tables, totals, shift, ROWS=rows, BLOCK=block, num_warps=4
        )


def count(
    walks: Sequence[Walk],
    table: Table,
    totals: Tensor,
    delta: float,
    scale: float,
    ignore_index: int,
    may_pack: bool = True,
) -> None:
    """Pass 1 over all levels.

    Args:
        walks: the levels. With groups, a score counts only in the buckets of its group.
        table: of the positives' ramps.
        totals: ``[2, 2P + 2]`` int64, contiguous, to which is added: the number of negatives in each bucket, and the
            sum of their offsets in units; in the last column the number of NaN, and nothing. Bucket 0 is left out.
        delta: half width of the ramp.
        scale: units of the fixed point in 1, a power of two.
        ignore_index: label of logits that are not counted.
        may_pack: whether the sums of many offsets may be in units of 2^-30. Float64 offsets never are.
    """
    num_logits = sum(walk.logits.numel() for walk in walks)
    shift = int(math.log2(scale)) - _PACKED_FRACTION
    packed = may_pack and table.thresholds.dtype == torch.float32 and shift >= 0
    tables, num_tables = tables_for(num_logits, len(walks), totals, packed)
    arguments = {
        "table": table,
        "tables": tables,
        "scale": 2.0**_PACKED_FRACTION if tables.PACKED.value else scale,
        "ignore_index": ignore_index,
        "ramp": ramp_of(table.thresholds, delta),
    }
    name = "count" if table.groups is None else "count_grouped"
    for parts in join(walks):
        launch_parts(count_kernel, name, parts, arguments, columns=max(1, num_tables), in_rows=tables.SHARED.value)
        if tables.SHARED.value:
            fold(tables, num_tables, totals, shift)
    if num_tables and not tables.SHARED.value:
        fold(tables, num_tables, totals, shift)
