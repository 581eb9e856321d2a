"""The lanes of a tile: addresses of their logits, labels and gradients, and loads and stores.

Positions are 64-bit. Within a tile they are 32-bit remainders, axis by axis from the innermost; the 64-bit division for
the first position of a tile is done once, on a scalar. The number of classes is a constant of the compiled kernel, so a
division by it becomes a multiplication. Logits in memory order are addressed by position, with vectorised loads.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl
from triton.language.extra.cuda import num_threads
from triton.language.target_info import is_cuda

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def quotient(i, size, LANES: tl.constexpr):
    """i // size for 32-bit numbers 0 <= i < size + LANES."""
    if LANES == 0:
        return i * 0
    else:
        if size >= LANES:
            found = (i >= size).to(tl.int32)
        else:
            # 2^31 / size, rounded up: exact, since i size is below 2^31.
            inverse = (0x7FFFFFFF // size + 1).to(tl.uint32)
            found = tl.umulhi((2 * i).to(tl.uint32), tl.zeros_like(i).to(tl.uint32) + inverse).to(tl.int32)
        return found


@triton.jit
def split(begin, lane, size0, size1, size2, AXES: tl.constexpr, LANES: tl.constexpr):
    """Indices of positions ``begin + lane`` on each axis, innermost first; those on missing axes have no meaning.
    ``lane`` is below LANES, or 0."""
    if AXES == 1:
        at = begin + lane
        return at, at, at, at
    else:
        rest0 = begin // size0
        i0 = (begin - rest0 * size0).to(tl.int32) + lane
        carry0 = quotient(i0, size0, LANES)
        i0 = i0 - carry0 * size0
        if AXES == 2:
            i1 = rest0 + carry0
            return i0, i1, i1, i1
        else:
            rest1 = rest0 // size1
            i1 = (rest0 - rest1 * size1).to(tl.int32) + carry0
            carry1 = quotient(i1, size1, LANES)
            i1 = i1 - carry1 * size1
            if AXES == 3:
                i2 = rest1 + carry1
                return i0, i1, i2, i2
            else:
                rest2 = rest1 // size2
                i2 = (rest1 - rest2 * size2).to(tl.int32) + carry1
                carry2 = quotient(i2, size2, LANES)
                i2 = i2 - carry2 * size2
                return i0, i1, i2, rest2 + carry2


@triton.jit
def within(begin, lane, number, BLOCK: tl.constexpr):
    """The mask of active lanes of a tile, for this number of elements. Compared in 32 bits. The limit is a select, so
    the compiler knows that 16 divides it if 16 divides the number."""
    rest = number - begin
    return lane < tl.where(rest < BLOCK, rest, BLOCK).to(tl.int32)


@triton.jit
def places(levels, level, begin, lane, LANES: tl.constexpr):
    """:func:`split` over all axes of a level. The number of classes is a constant."""
    of_classes: tl.constexpr = levels.CLASS_AXIS if levels.CLASSES > 0 else -1
    size0 = levels.CLASSES if of_classes == 0 else level.sizes[0]
    size1 = levels.CLASSES if of_classes == 1 else level.sizes[1]
    size2 = levels.CLASSES if of_classes == 2 else level.sizes[2]
    return split(begin, lane, size0, size1, size2, levels.AXES, LANES)


@triton.jit
def address(at, steps, AXES: tl.constexpr):
    """64-bit distance from a tensor's first element to the element at these indices."""
    distance = at[0].to(tl.int64) * steps[0]
    for axis in tl.static_range(1, AXES):
        distance += at[axis].to(tl.int64) * steps[axis]
    return distance


@triton.jit
def address_of_label(at, levels, level):
    """The address of a logit's label; row labels have no step along the classes."""
    if levels.CLASSES > 0:
        distance = at[0].to(tl.int64) * 0
        for axis in tl.static_range(levels.AXES):
            if axis != levels.CLASS_AXIS:
                distance += at[axis].to(tl.int64) * level.label_steps[axis]
        return distance
    else:
        return address(at, level.label_steps, levels.AXES)


@triton.jit
def address_or_position(position, at, steps, levels):
    """:func:`address`, or the position itself for tensors in memory order."""
    if levels.FLAT:
        return position
    else:
        return address(at, steps, levels.AXES)


@triton.jit
def kinds(levels, level, begin, lane, at, there, ignore_index, BLOCK: tl.constexpr):
    """Whether logits are negatives or positives (not ignored), and whether those are positives."""
    # As many neighbours as a thread loads at once; if they have the same row, its label is read once for them.
    WIDTH: tl.constexpr = 128 // level.logits.dtype.element_ty.primitive_bitwidth
    if levels.FLAT and levels.CLASSES > 0 and levels.CLASS_AXIS == 0 and levels.CLASSES % WIDTH == 0:
        part = tl.arange(0, BLOCK // WIDTH)
        begin, classes = begin // WIDTH, tl.full([], levels.CLASSES // WIDTH, tl.int32)
        of_part = split(begin, part, classes, level.sizes[1], level.sizes[2], levels.AXES, BLOCK // WIDTH)
        rows = level.labels + address_of_label(of_part, levels, level)
        label = tl.load(rows, mask=within(begin, part, level.num_logits // WIDTH, BLOCK // WIDTH), other=0)
        # The class among these; other numbers for none of them and for ignored rows.
        past = label.to(tl.int64) - WIDTH * of_part[0].to(tl.int64)
        code = tl.where((past >= 0) & (past < WIDTH), past.to(tl.int32), WIDTH)
        code = tl.where(label == ignore_index, WIDTH + 1, code)
        code = tl.reshape(tl.broadcast_to(code[:, None], [BLOCK // WIDTH, WIDTH]), [BLOCK])
        return code <= WIDTH, code == lane % WIDTH
    else:
        label = tl.load(level.labels + address_of_label(at, levels, level), mask=there, other=0)
        return takes_part(label, ignore_index, levels.CLASSES), is_positive(
            label, at[levels.CLASS_AXIS], levels.CLASSES
        )


@triton.jit
def takes_part(label, ignore_index, CLASSES: tl.constexpr):
    """Whether a logit is a negative or a positive (not ignored), from the label of its row or its own label."""
    if CLASSES > 0:
        return label != ignore_index
    else:
        return ((label == 0) | (label == 1)) & (label != ignore_index)


@triton.jit
def is_positive(label, column, CLASSES: tl.constexpr):
    """Whether a logit that is not ignored is a positive, from the label of its row and its class, or from its own
    label."""
    return label == (column if CLASSES > 0 else 1)


# Triton's interpreter converts bfloat16 incorrectly: it takes 0 for 2^-126 and does not round to nearest. Only there,
# the two functions below convert the bits themselves.


@triton.jit
def load(pointers, mask, dtype: tl.constexpr):
    """Load scores as ``dtype``; 0 where masked."""
    if _INTERPRETED and pointers.dtype.element_ty == tl.bfloat16:
        bits = tl.load(pointers.to(tl.pointer_type(tl.int16), bitcast=True), mask=mask, other=0)
        return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return tl.load(pointers, mask=mask, other=0).to(dtype)


@triton.jit
def load_pair(pointers):
    """The two numbers at each of these addresses, which are multiples of their size; together if they are float32."""
    if not _INTERPRETED and is_cuda() and pointers.dtype.element_ty == tl.float32:
        return tl.inline_asm_elementwise(
            "ld.global.v2.b32 {$0, $1}, [$2];",
            "=f,=f,l",
            [pointers.to(tl.int64)],
            dtype=(tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    else:
        return tl.load(pointers), tl.load(pointers + 1)


@triton.jit
def store(pointers, value, mask):
    """Store in the pointers' dtype, rounded to nearest even; to half precision through float32, as PyTorch does."""
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


@triton.jit
def add_each(pointers, value, mask, BLOCK: tl.constexpr):
    """Add each lane's 64-bit integer. Triton's own atomics first move all lanes through shared memory, even those that
    are masked; the instruction itself may only be used if no two threads have the same lane."""
    if not _INTERPRETED and is_cuda() and num_threads() <= BLOCK:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $3, 0; @p red.relaxed.gpu.global.add.u64 [$1], $2; mov.u32 $0, 0; }",
            "=r,l,l,r",
            [pointers.to(tl.int64), value, mask.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        tl.atomic_add(pointers, value, mask=mask, sem="relaxed")
