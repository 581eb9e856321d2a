"""Where the search for a bucket begins: for scores in half precision a table of all values, otherwise a grid.

There are 65,536 numbers in half precision, so the bucket of each can be looked up.

In a grid over the thresholds the cell of a score tells its bucket, up to a few comparisons. Cells have equal width. The
map from scores to cells is monotone in floating point, and thresholds go through the same map. So every threshold in a
lower cell is below the score, and every threshold in a higher cell is above it. A cell holds the number of thresholds
before it and its first thresholds. The fullest cell says how many comparisons are left; kernels read this number from
memory, so no host waits for it. A program that keeps the thresholds in shared memory takes of the cells the numbers
alone, which also lie side by side.

With groups the cells are shared out evenly among all integers from the lowest group to the highest. If these are more
than the cells, there is one cell for all, and the comparisons that are left compare groups, too.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.target_info import is_cuda

from .lanes import INTERPRETED
from .launch import on_device_of, tiles_in
from .layout import Table
from .ramp import finite_floor

_BLOCK = 256
_INTERPRETED = tl.constexpr(INTERPRETED)
_CELLS_FOR_A_POSITIVE, _CELLS_FOR_GROUPS = 8, 1 << 12
# Numbers in half precision.
_VALUES = 1 << 16


def shape_of_cells(num_positives: int, dtype: torch.dtype, grouped: bool) -> tuple[int, int]:
    """The shape of ``Table.cells`` for scores of this dtype."""
    if dtype.itemsize == 2 and not grouped:
        return _VALUES, 2
    num_cells = _num_cells(num_positives, grouped)
    return 1 + num_cells + (0 if grouped else num_cells // 8), 8


def _num_cells(num_positives: int, grouped: bool) -> int:
    return _CELLS_FOR_A_POSITIVE * (num_positives + 1) + _CELLS_FOR_GROUPS * grouped


@triton.jit
def cell_of(score, slope, offset, top):
    """The cell of each score, 0 for NaN."""
    place = tl.fma(score, tl.zeros_like(score) + slope, tl.zeros_like(score) + offset)
    return tl.where(place > 0, tl.minimum(place, top), 0.0).to(tl.int32)


@triton.jit
def row_of(cells, cell):
    """The row of a cell: the number of thresholds before it, the last of them, and the next six."""
    row = cells + 8 + 8 * cell
    if not _INTERPRETED and is_cuda() and cells.dtype.element_ty == tl.float32:
        return tl.inline_asm_elementwise(
            "ld.global.v4.b32 {$0, $1, $2, $3}, [$8]; ld.global.v4.b32 {$4, $5, $6, $7}, [$8 + 16];",
            "=r,=f,=f,=f,=f,=f,=f,=f,l",
            [row.to(tl.int64)],
            dtype=(tl.int32,) + (tl.float32,) * 7,
            is_pure=True,
            pack=1,
        )
    else:
        before = tl.load(row)
        before = before.to(tl.int64 if before.dtype == tl.float64 else tl.int32, bitcast=True).to(tl.int32)
        t0, t1, t2 = tl.load(row + 2), tl.load(row + 3), tl.load(row + 4)
        t3, t4, t5 = tl.load(row + 5), tl.load(row + 6), tl.load(row + 7)
        return before, tl.load(row + 1), t0, t1, t2, t3, t4, t5


@triton.jit
def numbers_of(cells, num_cells):
    """Where the numbers of thresholds before each cell lie side by side."""
    return cells + 8 + 8 * num_cells


@triton.jit
def rounds_in_numbers(rounds):
    """Of a binary search from these numbers: a cell has up to 5 + 2^rounds thresholds, where the first six are compared
    before the rounds."""
    return tl.maximum(rounds + 1, 3) + (rounds == 2).to(tl.int32)


@triton.jit
def is_below(integer, limit):
    """Whether 0 <= integer < limit, for 64-bit integers that may have overflowed."""
    return integer.to(tl.uint64, bitcast=True) < limit.to(tl.uint64)


@triton.jit
def integer_at(cells, place: tl.constexpr):
    """An integer of the first row: 0, the rounds of a search beyond the thresholds of a row; with groups 4, how many
    cells each group has, and 5, the number of groups that have them."""
    kind: tl.constexpr = tl.int64 if cells.dtype.element_ty == tl.float64 else tl.int32
    return tl.load(cells.to(tl.pointer_type(kind), bitcast=True) + place).to(tl.int32)


@triton.jit
def share_out(groups, num_thresholds, num_cells):
    """How many cells each group has, 0 if there are more groups than cells; the number of groups; the lowest one."""
    lowest = tl.load(groups)
    others = tl.load(groups + num_thresholds - 1, mask=num_thresholds > 0, other=0) - lowest
    if (num_thresholds > 0) & is_below(others, num_cells):
        num_groups = others.to(tl.int32) + 1
        cells_of_group = num_cells // num_groups
    else:
        num_groups = num_cells * 0
        cells_of_group = num_cells * 0
    return cells_of_group, num_groups, lowest


@triton.jit
def line_over(table, num_thresholds, num_cells):
    """Slope, offset and highest place of the map to cells, for any thresholds. The slope is positive and finite. With
    groups it is that to the cells of one."""
    # With groups the highest and the lowest threshold of all are in the last two places.
    first = 2 * num_thresholds if table.groups is not None else 0
    low = finite_floor(tl.load(table.thresholds + first))
    last = (2 * num_thresholds if table.groups is not None else num_thresholds) - 1
    high = finite_floor(tl.load(table.thresholds + last, mask=num_thresholds > 0, other=0))
    cells = num_cells.to(low.dtype)
    slope = 0.5 * cells / tl.maximum(0.5 * high - 0.5 * low, 2.0**-100)
    return slope, -low * slope, cells - 1


@triton.jit
def cell_of_threshold(threshold, table, at, there, slope, offset, top, cells_of_group, first_group):
    """The cell of each threshold, and whether it has one: with groups NaN, which are the last of their group, are in
    the last cell of it."""
    cell = cell_of(threshold, slope, offset, top)
    if table.groups is not None:
        slot = (tl.load(table.groups + at, mask=there, other=0) - first_group).to(tl.int32)
        return tl.where(threshold == threshold, cell, top.to(tl.int32)) + slot * cells_of_group, there
    else:
        return cell, threshold == threshold


@triton.jit(do_not_specialize=["num_thresholds", "num_cells", "highest"])
def lay_kernel(table, num_thresholds, num_cells, highest, BLOCK: tl.constexpr):
    kind: tl.constexpr = tl.int64 if table.cells.dtype.element_ty == tl.float64 else tl.int32
    cells, numbers = table.cells, table.cells.to(tl.pointer_type(kind), bitcast=True)
    cells_of_group, first_group, one_cell = 0, 0, False
    cells_of_each = num_cells
    if table.groups is not None:
        cells_of_group, num_groups, first_group = share_out(table.groups, num_thresholds, num_cells)
        cells_of_each = tl.maximum(cells_of_group, 1)
        one_cell = cells_of_group == 0
        if tl.program_id(0) == 0:
            tl.store(numbers + 4, cells_of_group.to(kind))
            tl.store(numbers + 5, num_groups.to(kind))
    slope, offset, top = line_over(table, num_thresholds, cells_of_each)
    if tl.program_id(0) == 0:
        tl.store(cells + 1, slope)
        tl.store(cells + 2, offset)
        tl.store(cells + 3, top)
    cell = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    before = tl.zeros([BLOCK], tl.int32)
    step = highest
    while step > 0:
        at = before + (step - 1)
        threshold = tl.load(table.thresholds + at)
        other, known = cell_of_threshold(
            threshold, table, at, at < num_thresholds, slope, offset, top, cells_of_group, first_group
        )
        before += tl.where(known & (other < cell), step, 0)
        step = step // 2
    rounds, more = 0, 1
    while more > 0:
        at = before + 5 + (1 << rounds)
        threshold = tl.load(table.thresholds + at, mask=at < num_thresholds, other=float("nan"))
        other, known = cell_of_threshold(
            threshold, table, at, at < num_thresholds, slope, offset, top, cells_of_group, first_group
        )
        more = tl.max((known & (other == cell)).to(tl.int32))
        if one_cell:
            more = ((1 << rounds) <= num_thresholds).to(tl.int32)
        rounds += more
    if rounds > 0:
        tl.atomic_max(numbers, tl.full([], 0, kind) + rounds, sem="relaxed")
    row, there = cells + 8 + 8 * cell.to(tl.int64), cell < num_cells
    number = before.to(kind).to(slope.dtype, bitcast=True)
    floor = tl.load(table.thresholds + before - 1, mask=before > 0, other=float("-inf"))
    if table.groups is not None:
        group = first_group + cell // cells_of_each
        own = (before > 0) & (tl.load(table.groups + before - 1, mask=before > 0, other=0) == group) & (not one_cell)
        floor = tl.where(own, floor, float("nan"))
    tl.store(row, number, mask=there)
    tl.store(row + 1, floor, mask=there)
    if table.groups is None:
        tl.store(numbers_of(cells, num_cells) + cell, number, mask=there)
    for k in tl.static_range(6):
        at = before + k
        inside = there & (at < num_thresholds)
        threshold = tl.load(table.thresholds + at, mask=inside, other=float("nan"))
        if table.groups is not None:
            other, _ = cell_of_threshold(threshold, table, at, inside, slope, offset, top, cells_of_group, first_group)
            threshold = tl.where((other == cell) & (not one_cell), threshold, float("nan"))
        tl.store(row + 2 + k, threshold, mask=there)


@triton.jit
def value_of(index, KIND: tl.constexpr):
    """The numbers in half precision with these bits, float32."""
    if tl.bfloat16 == KIND:
        return (index << 16).to(tl.float32, bitcast=True)
    else:
        return index.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def index_of_value(score, KIND: tl.constexpr):
    """The bits of numbers that are in half precision, as indices."""
    if tl.bfloat16 == KIND:
        return (score.to(tl.uint32, bitcast=True) >> 16).to(tl.int32)
    else:
        return score.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.int32)


@triton.jit(do_not_specialize=["highest"])
def lay_values_kernel(thresholds, cells, highest, KIND: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = value_of(index, KIND)
    bucket = tl.zeros([BLOCK], tl.int32)
    step = highest
    while step > 0:
        bucket += tl.where(value >= tl.load(thresholds + bucket + (step - 1)), step, 0)
        step = step // 2
    floor = tl.load(thresholds + bucket - 1, mask=bucket > 0, other=float("-inf"))
    tl.store(cells + 2 * index, bucket.to(tl.float32, bitcast=True))
    tl.store(cells + 2 * index + 1, floor)


def lay(table: Table, dtype: torch.dtype) -> Table:
    """The table with what a search for scores of this dtype begins from. Cells that are given must begin with 0."""
    thresholds, num_thresholds, cells = table.thresholds, len(table.thresholds) // 2, table.cells
    highest, grouped = 1 << num_thresholds.bit_length() >> 1, table.groups is not None
    if cells is None:
        cells = thresholds.new_zeros(shape_of_cells(num_thresholds // 2, dtype, grouped))
    table = table._replace(cells=cells)
    with on_device_of(thresholds):
        if dtype.itemsize == 2 and not grouped:
            kind = tl.bfloat16 if dtype == torch.bfloat16 else tl.float16
            lay_values_kernel[(_VALUES // _BLOCK,)](thresholds, cells, highest, KIND=kind, BLOCK=_BLOCK, num_warps=4)
        else:
            num_cells = _num_cells(num_thresholds // 2, grouped)
            lay_kernel[(tiles_in(num_cells, _BLOCK),)](
                table, num_thresholds, num_cells, highest, BLOCK=_BLOCK, num_warps=4
            )
    return table
