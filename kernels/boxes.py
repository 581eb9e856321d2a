"""Similarities and localisation errors of paired boxes with their derivatives, in one launch.

The values and the rules for empty boxes, equal coordinates and NaN are those of ``alrp_triton.boxes``, where the
sources of the formulas are named. Products and sums are rounded one by one, as in PyTorch, so that equal boxes have an
error of exactly 0.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .lanes import load
from .launch import on_device_of, tiles_in

KINDS = ("iou", "giou", "diou", "ciou")
_BLOCK = 128
_OF_V = tl.constexpr(0.4052847345693511)  # 4 / pi^2


class Boxes(NamedTuple):
    """Two tensors ``[P, 4]`` of paired boxes (x1, y1, x2, y2), or of the derivatives with respect to them."""

    pred: Any
    target: Any


class Side(NamedTuple):
    """Two boxes along one axis, with coordinates p1, p2 of the first and t1, t2 of the second."""

    pred: Any
    """Length of the first box."""
    pred_moves: Any
    """Its derivative with respect to p2; the negative of that with respect to p1."""
    target: Any
    target_moves: Any
    common: Any
    """Length of the intersection."""
    of_common: Any
    """Its derivatives with respect to p1, p2, t1, t2."""
    enclosing: Any
    """Length of the enclosing box."""
    of_enclosing: Any
    offset: Any
    """Distance of the centres; its derivatives are 1/2 for the first box and -1/2 for the second."""


@triton.jit
def divide(a, b):
    """a / b, rounded to nearest."""
    return a / b if a.dtype == tl.float64 else tl.div_rn(a, b)


@triton.jit
def above(a, b):
    """The derivative of max(a, b) with respect to a: equal numbers share it, and NaN passes."""
    return tl.where(a == b, 0.5, tl.where(a < b, 0.0, 1.0)).to(a.dtype)


@triton.jit
def larger(a, b):
    """max(a, b); NaN passes."""
    return tl.where((a != a) | (a > b), a, b)


@triton.jit
def smaller(a, b):
    """min(a, b); NaN passes."""
    return tl.where((a != a) | (a < b), a, b)


@triton.jit
def positive_part(x):
    """max(x, 0), and its derivative, which is 1 at 0; NaN passes."""
    return tl.where(x < 0, 0.0, x), tl.where(x < 0, 0.0, 1.0).to(x.dtype)


@triton.jit
def side_of(p1, p2, t1, t2):
    pred, pred_moves = positive_part(p2 - p1)
    target, target_moves = positive_part(t2 - t1)
    common, moves = positive_part(smaller(p2, t2) - larger(p1, t1))
    of_common = (-moves * above(p1, t1), moves * above(t2, p2), -moves * above(t1, p1), moves * above(p2, t2))
    p_end, t_end, p_begin, t_begin = larger(p1, p2), larger(t1, t2), smaller(p1, p2), smaller(t1, t2)
    enclosing = larger(p_end, t_end) - smaller(p_begin, t_begin)
    p_ends, t_ends = above(p_end, t_end), above(t_end, p_end)
    p_begins, t_begins = above(t_begin, p_begin), above(p_begin, t_begin)
    of_enclosing = (
        p_ends * above(p1, p2) - p_begins * above(p2, p1),
        p_ends * above(p2, p1) - p_begins * above(p1, p2),
        t_ends * above(t1, t2) - t_begins * above(t2, t1),
        t_ends * above(t2, t1) - t_begins * above(t1, t2),
    )
    offset = (p1 + p2 - t1 - t2) / 2
    return Side(pred, pred_moves, target, target_moves, common, of_common, enclosing, of_enclosing, offset)


@triton.jit
def ratio(numerator, denominator, SMALLEST: tl.constexpr):
    """The quotient, and its derivatives with respect to both; all 0 if the denominator is below ``SMALLEST``."""
    none = denominator < tl.full(denominator.shape, SMALLEST, denominator.dtype)
    denominator = tl.where(none, 1.0, denominator)
    quotient = divide(tl.where(none, 0.0, numerator), denominator)
    of_numerator = divide(tl.full(denominator.shape, 1.0, denominator.dtype), denominator)
    of_denominator = -divide(quotient, denominator)
    return quotient, tl.where(none, 0.0, of_numerator), tl.where(none, 0.0, of_denominator)


@triton.jit
def angle(width, height, SMALLEST: tl.constexpr):
    """atan(width / height) in [0, pi/2], and its derivatives with respect to both; pi/4 and 0 for a point."""
    square = width * width + height * height
    point = square < tl.full(square.shape, SMALLEST, square.dtype)
    w, h = tl.where(point, 1.0, width).to(tl.float64), tl.where(point, 1.0, height).to(tl.float64)
    turned = w > h
    tangent = tl.where(turned, h / w, w / h)
    # Half the angle three times, down to 0.1, where ten terms of the series are exact.
    for _ in tl.static_range(3):
        tangent = tangent / (1 + tl.sqrt(1 + tangent * tangent))
    square_of_tangent = tangent * tangent
    series = tl.zeros_like(tangent)
    for k in tl.static_range(10):
        series = 1.0 / (19 - 2 * k) - square_of_tangent * series
    found = 8 * tangent * series
    found = tl.where(turned, 1.5707963267948966 - found, found)
    square = w * w + h * h
    of_width, of_height = tl.where(point, 0.0, h / square), tl.where(point, 0.0, -w / square)
    return found.to(width.dtype), of_width.to(width.dtype), of_height.to(width.dtype)


@triton.jit
def times(share, x):
    """A share of a derivative; no share of NaN is 0."""
    return tl.where(share == 0, 0.0, share * x)


@triton.jit
def of_side(side, other, of_common, of_area, of_enclosing, of_offset, of_pred, of_target):
    """The derivatives with respect to the four coordinates along an axis.

    ``other`` is the other axis. The numbers are derivatives with respect to the intersection, the area of either box,
    and along this axis the enclosing length, the offset, and the lengths of both boxes.
    """
    common, half = of_common * other.common, of_offset / 2
    pred = times(side.pred_moves, of_area * other.pred + of_pred)
    target = times(side.target_moves, of_area * other.target + of_target)
    shares, ends = side.of_common, side.of_enclosing
    p1 = times(shares[0], common) + times(ends[0], of_enclosing) - pred + half
    p2 = times(shares[1], common) + times(ends[1], of_enclosing) + pred + half
    t1 = times(shares[2], common) + times(ends[2], of_enclosing) - target - half
    t2 = times(shares[3], common) + times(ends[3], of_enclosing) + target - half
    return p1, p2, t1, t2


@triton.jit
def sides_of(boxes, i, there, dtype: tl.constexpr):
    """Pairs of boxes along x and along y."""
    p, t = boxes.pred + 4 * i, boxes.target + 4 * i
    x = side_of(load(p, there, dtype), load(p + 2, there, dtype), load(t, there, dtype), load(t + 2, there, dtype))
    y = side_of(
        load(p + 1, there, dtype), load(p + 3, there, dtype), load(t + 1, there, dtype), load(t + 3, there, dtype)
    )
    return x, y


@triton.jit
def put(gradients, i, there, values, DIVISOR: tl.constexpr):
    """Store derivatives of the similarity, or of the error."""
    for k in tl.static_range(4):
        value = values[k]
        if DIVISOR > 0:
            value = divide(-value, tl.full(value.shape, DIVISOR, value.dtype))
        tl.store(gradients + 4 * i + k, value, mask=there)


@triton.jit(do_not_specialize=["num_pairs"])
def compare_boxes_kernel(
    boxes,
    values,
    gradients,
    num_pairs,
    KIND: tl.constexpr,
    DIVISOR: tl.constexpr,
    SMALLEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = i < num_pairs
    x, y = sides_of(boxes, i, there, values.dtype.element_ty)
    intersection = x.common * y.common
    union = x.pred * y.pred + x.target * y.target - intersection
    found, of_common, of_union = ratio(intersection, union, SMALLEST)
    zero = tl.zeros_like(found)
    x_enclosing, y_enclosing, x_offset, y_offset = zero, zero, zero, zero
    x_pred, y_pred, x_target, y_target = zero, zero, zero, zero
    if KIND == 1:
        area = x.enclosing * y.enclosing
        empty, of_empty, of_area = ratio(area - union, area, SMALLEST)
        found -= empty
        of_union += of_empty
        x_enclosing, y_enclosing = -(of_empty + of_area) * y.enclosing, -(of_empty + of_area) * x.enclosing
    if KIND >= 2:
        overlap = found
        square = x.offset * x.offset + y.offset * y.offset
        diagonal = x.enclosing * x.enclosing + y.enclosing * y.enclosing
        distance, of_square, of_diagonal = ratio(square, diagonal, SMALLEST)
        found -= distance
        x_enclosing, y_enclosing = -2 * of_diagonal * x.enclosing, -2 * of_diagonal * y.enclosing
        x_offset, y_offset = -2 * of_square * x.offset, -2 * of_square * y.offset
        if KIND == 3:
            target, x_target, y_target = angle(x.target, y.target, SMALLEST)
            pred, x_pred, y_pred = angle(x.pred, y.pred, SMALLEST)
            v = _OF_V * (target - pred) * (target - pred)
            rest = 1 - overlap + v
            # Of equal boxes this is 0 / 0; v is 0, so the factor does not matter. It is a constant in the gradient.
            alpha = divide(v, tl.where(rest == 0, 1.0, rest))
            found -= alpha * v
            turn = 2 * _OF_V * alpha * (target - pred)
            x_pred, y_pred, x_target, y_target = turn * x_pred, turn * y_pred, -turn * x_target, -turn * y_target
    if gradients.pred is not None:
        of_common -= of_union
        x1, x2, x3, x4 = of_side(x, y, of_common, of_union, x_enclosing, x_offset, x_pred, x_target)
        y1, y2, y3, y4 = of_side(y, x, of_common, of_union, y_enclosing, y_offset, y_pred, y_target)
        put(gradients.pred, i, there, (x1, y1, x2, y2), DIVISOR)
        put(gradients.target, i, there, (x3, y3, x4, y4), DIVISOR)
    if DIVISOR > 0:
        found = divide(1 - found, tl.full(found.shape, DIVISOR, found.dtype))
    tl.store(values + i, found, mask=there)


def compare_boxes(
    boxes: Boxes, kind: str, divisor: float, dtype: torch.dtype, differentiate: bool
) -> tuple[Tensor, Boxes]:
    """Similarities ``[P]``, or errors (1 - similarity) / divisor, and if asked for their derivatives.

    Args:
        boxes: of any floating-point dtypes.
        kind: one of :data:`KINDS`.
        divisor: 0 for the similarity.
        dtype: float32 or float64, in which everything is computed and returned.
        differentiate: whether to return the derivatives with respect to both boxes, ``[P, 4]`` each.
    """
    boxes = Boxes(*(tensor.contiguous() for tensor in boxes))
    num_pairs = len(boxes.pred)
    values = torch.empty(num_pairs, dtype=dtype, device=boxes.pred.device)
    gradients = Boxes(None, None)
    if differentiate:
        gradients = Boxes(*(torch.empty_like(tensor, dtype=dtype) for tensor in boxes))
    if num_pairs:
        with on_device_of(values):
            compare_boxes_kernel[(tiles_in(num_pairs, _BLOCK),)](
                boxes,
                values,
                gradients,
                num_pairs,
                KIND=KINDS.index(kind),
                DIVISOR=divisor,
                SMALLEST=torch.finfo(dtype).eps ** 2,
                BLOCK=_BLOCK,
                enable_fp_fusion=False,
            )
    return values, gradients
