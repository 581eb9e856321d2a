"""Pass 1: for each bucket count its negatives, and sum their offsets in fixed point.

All sums are 64-bit integers, so the order of tiles and atomics does not matter. If all scores of a tile lie in one
bucket, as early in training, there is no search, and one sum; in bucket 0, as late in training, there is nothing to
add.

Many logits share several tables, so that few atomics wait for one another: a tile adds to one of them. If a table gets
fewer than 2^17 logits, a word holds both the count of a bucket, in its upper 17 bits, and the sum of its offsets, in
units of 2^-30. Then a logit takes one atomic instead of two.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .lanes import (
    add_each,
    address,
    address_of_label,
    address_or_position,
    is_positive,
    load,
    places,
    takes_part,
    within,
)
from .launch import code, launch, level_of, number, on_device_of, ramp_of
from .layout import Table, Walk
from .search import anchor_of, find_bucket, groups_of, is_between, offset_from

# A word of a table with fewer than 2^17 logits.
_COUNT_BITS, _PACKED_FRACTION = 17, 30
_PACKED_BITS = tl.constexpr(_COUNT_BITS + _PACKED_FRACTION)
_ONE_PACKED = tl.constexpr(1 << _COUNT_BITS + _PACKED_FRACTION)
# A sum over a tile holds a count of at most 2^12 above units of at most 2^36 each.
_TILE_BITS, _ONE_OF_TILE = tl.constexpr(50), tl.constexpr(1 << 50)
_MOST_IN_A_TILE = 1 << 12
# From this many logits on, several tables cost little.
_MANY_LOGITS = 1 << 16
# Tables that are copied from and to, a part of what the logits take.
_BYTES_FOR_A_LOGIT = 1


class Tables(NamedTuple):
    """Tables of all buckets, to which tiles add."""

    words: Any
    """``[R, 2P + 2]`` int64, packed, or ``[R, 2, 2P + 2]`` as the totals."""
    number: Any
    """R, coded as the numbers of levels."""
    columns: Any
    """2P + 2, coded."""
    PACKED: Any


@triton.jit
def add_tile(table, bucket, both, tables):
    """Add a count and units in one sum."""
    if tables.PACKED:
        tl.atomic_add(table + bucket, both, mask=both > 0, sem="relaxed")
    else:
        count = both >> _TILE_BITS
        tl.atomic_add(table + bucket, count, mask=count > 0, sem="relaxed")
        units = both - (count << _TILE_BITS)
        tl.atomic_add(table + number(tables.columns) + bucket, units, mask=count > 0, sem="relaxed")


@triton.jit(do_not_specialize=["highest", "ignore_index"])
def count_kernel(levels, table, tables, num_nan, highest, scale, ignore_index, ramp, BLOCK: tl.constexpr):
    level = level_of(levels)
    begin, lane = level.tile.to(tl.int64) * BLOCK, tl.arange(0, BLOCK)
    at = places(levels, level, begin, lane)
    x_at = address_or_position(begin + lane, at, level.logit_steps, levels)
    there = within(begin, lane, level.num_logits, BLOCK)
    score = load(level.logits + x_at, there, table.thresholds.dtype.element_ty)
    label = tl.load(level.labels + address_of_label(at, levels, level), mask=there, other=0)
    counted = there & takes_part(label, ignore_index, levels.CLASSES) & ~is_positive(label, at[0], levels.CLASSES)

    anchor, low, high = anchor_of(levels, level, begin, table, number(tables.columns) // 2)
    # One reduction answers two questions; NaN are rare.
    beside = counted & ~is_between(score, low, high)
    nan = counted & (score != score)
    interest = tl.max(tl.where(nan, 2, beside.to(tl.int32)))
    if interest > 1:
        tl.atomic_add(num_nan, tl.sum(nan.to(tl.int32)).to(tl.int64), sem="relaxed")
    columns = number(tables.columns)
    row = (tl.program_id(0) % number(tables.number)).to(tl.int64)
    own = tables.words + row * (columns if tables.PACKED else 2 * columns)
    one: tl.constexpr = _ONE_PACKED if tables.PACKED else _ONE_OF_TILE
    if interest > 0:
        group = groups_of(level, address(at, level.group_steps, levels.AXES), there, table)
        bucket, floor = find_bucket(score, group, table, highest)
        reaches = counted & (bucket > 0)
        units = (offset_from(score, floor, ramp) * scale).to(tl.int64)
        if tables.PACKED:
            add_each(own + bucket, units + one, reaches, BLOCK)
        else:
            add_each(own + bucket, tl.full([BLOCK], 1, tl.int64), reaches, BLOCK)
            add_each(own + columns + bucket, units, reaches, BLOCK)
    elif anchor > 0:
        units = (offset_from(score, low, ramp) * scale).to(tl.int64)
        add_tile(own, anchor, tl.sum(tl.where(counted, units + one, 0)), tables)


@triton.jit(do_not_specialize=["shift"])
def fold_kernel(tables, totals, shift, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    columns = number(tables.columns)
    inside = column < columns
    there = (row < number(tables.number)) & inside[None, :]
    if tables.PACKED:
        words = tl.load(tables.words + row.to(tl.int64) * columns + column[None, :], mask=there, other=0)
        counts = words.to(tl.uint64, bitcast=True) >> _PACKED_BITS
        units = (words & (_ONE_PACKED - 1)) << shift
    else:
        words = tables.words + row.to(tl.int64) * (2 * columns) + column[None, :]
        counts = tl.load(words, mask=there, other=0)
        units = tl.load(words + columns, mask=there, other=0)
    tl.atomic_add(totals + column, tl.sum(counts.to(tl.int64), axis=0), mask=inside, sem="relaxed")
    tl.atomic_add(totals + columns + column, tl.sum(units, axis=0), mask=inside, sem="relaxed")


def tables_for(num_logits: int, num_levels: int, totals: Tensor, packed: bool) -> Tables | None:
    """Zeros for several tables, or None if the totals themselves serve better."""
    # Each launch may give a table one tile more than others, and each level has a tile that is not full.
    room = (1 << _COUNT_BITS) - 2 * num_levels * _MOST_IN_A_TILE
    if num_logits < _MANY_LOGITS or room < _MANY_LOGITS:
        return None
    num_tables = triton.cdiv(num_logits, room)
    words = num_tables * totals.numel() // (2 if packed else 1)
    if 8 * words > _BYTES_FOR_A_LOGIT * num_logits:
        return None
    return Tables(totals.new_zeros(words), code(num_tables), code(totals.shape[1]), tl.constexpr(packed))


def fold(tables: Tables, totals: Tensor, shift: int) -> None:
    """Add several tables to the totals."""
    rows, block, columns = 32, 128, totals.shape[1]
    num_tables = tables.words.numel() // (columns if tables.PACKED.value else 2 * columns)
    with on_device_of(totals):
        fold_kernel[(triton.cdiv(columns, block), triton.cdiv(num_tables, rows))](
            tables, totals, shift, ROWS=rows, BLOCK=block, num_warps=4
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
    num_logits, highest = sum(walk.logits.numel() for walk in walks), (totals.shape[1] - 2).bit_length()
    shift = int(math.log2(scale)) - _PACKED_FRACTION
    packed = may_pack and table.thresholds.dtype == torch.float32 and shift >= 0
    several = tables_for(num_logits, len(walks), totals, packed)
    tables = several or Tables(totals, code(1), code(totals.shape[1]), tl.constexpr(False))
    arguments = {
        "table": table,
        "tables": tables,
        "num_nan": totals[0, -1],
        "highest": 1 << highest >> 1,
        "scale": 2.0**_PACKED_FRACTION if tables.PACKED.value else scale,
        "ignore_index": ignore_index,
        "ramp": ramp_of(table.thresholds, delta),
    }
    launch(count_kernel, "count" if table.groups is None else "count_grouped", walks, arguments)
    if several is not None:
        fold(several, totals, shift)
