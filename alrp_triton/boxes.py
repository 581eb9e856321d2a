"""Similarities of paired boxes, and localisation errors for the aLRP loss.

All functions take two tensors `[P, 4]` of boxes `(x1, y1, x2, y2)`, or `[P, 6]` of boxes in volumes
`(x1, y1, z1, x2, y2, z2)`, and return `[P]`; row i of both is pair i. They are differentiable in both arguments, do not
make the host wait, and are finite for finite boxes with coordinates up to about 1e18 (1e12 in volumes):

- An inverted box (x2 < x1, ...) is empty: that side has length 0.
- A ratio with no denominator (two empty boxes have no union, two equal points no enclosing box) is 0, with gradient 0.
  So two empty boxes, equal or not, have an IoU of 0. An area counts as 0 if it is below that of a square whose side is
  the dtype's machine epsilon (1.2e-7 for float32), a volume if it is below that of such a cube.
- A box without width and height counts as a square in CIoU's aspect term.
- NaN coordinates give NaN, in the result and in the gradient.

float16 and bfloat16 boxes are computed in float32, float64 boxes in float64; a pair of different dtypes in the wider.
On a GPU with Triton one kernel computes values and derivatives of boxes `[P, 4]`, and backward is one multiplication;
there they cannot be differentiated twice.

Sources: GIoU, Rezatofighi et al., CVPR 2019 (arXiv:1902.09630); DIoU and CIoU, Zheng et al., AAAI 2020
(arXiv:1911.08287).
"""

import functools
import math
import operator
from collections.abc import Callable

import torch
from torch import Tensor

from .engine import doubts, operators, passes
from .engine.hints import for_no_tensor
from .engine.inputs import plain
from .engine.transforms import transformed

__all__ = ["BoxError", "box_error", "ciou", "diou", "giou", "iou"]

BoxError = str | Callable[[Tensor, Tensor], Tensor]
"""How boxes are compared: `"iou"`, `"giou"`, `"diou"`, `"ciou"`, or a function of the two tensors of boxes."""

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def box_error(pred_boxes: Tensor, target_boxes: Tensor, kind: BoxError, tau: float) -> Tensor:
    """Localisation error of each predicted box, the E_loc of Oksuz et al., NeurIPS 2020 (arXiv:2009.13592).

    With S the similarity named by `kind`, the error is (1 - S)/(1 - tau) for `"iou"` and (1 - S)/2/(1 - tau) for
    `"giou"`, `"diou"` and `"ciou"`. It is 0 for equal boxes of positive area, never negative, and at most
    1/(1 - tau); only `"ciou"` reaches 1.25/(1 - tau), because its S reaches -1.5. The error exceeds 1 if the similarity
    is below the limit of tau. It is not clamped, so every box has a gradient.

    Args:
        pred_boxes: `[P, 4]` or `[P, 6]`, float16, bfloat16, float32 or float64; P may be 0.
        target_boxes: of the same shape, on the same device. It also gets a gradient if it requires one.
        kind: `"iou"`, `"giou"`, `"diou"`, `"ciou"`, or a callable that takes both tensors (half precision already
            converted to float32) and returns `[P]` errors. `tau` does not apply to these.
        tau: the IoU from which a detection counts as a true positive, in [0, 1).

    Returns:
        `[P]`, float32 or float64.

    Raises:
        TypeError: an argument of the wrong type or dtype, or a callable that returns no floating-point tensor.
        ValueError: wrong or different shapes, different devices, an unknown `kind`, `"ciou"` of boxes in volumes, which
            have no aspect ratio, `tau` outside [0, 1), or a callable whose result is not of shape `[P]` on the boxes'
            device.
    """
    check_box_error(kind, tau)
    if isinstance(kind, str):
        # IoU is in [0, 1]; the others reach -1, so they are divided by 2.
        similarity_range = 1 if kind == "iou" else 2
        return _compare(pred_boxes, target_boxes, kind, similarity_range * (1 - tau))
    dtype = _check(pred_boxes, target_boxes)
    errors = kind(plain(pred_boxes).to(dtype), plain(target_boxes).to(dtype))
    if not isinstance(errors, Tensor):
        raise TypeError(f"box_error: expected the callable to return a tensor [P], got {type(errors).__name__}")
    if errors.dtype not in _DTYPES:
        raise TypeError(f"box_error: expected the callable to return floating-point errors, got {errors.dtype}")
    if errors.shape != pred_boxes.shape[:1] or errors.device != pred_boxes.device:
        raise ValueError(
            f"box_error: expected the callable to return shape [{pred_boxes.shape[0]}] on {pred_boxes.device}, "
            f"got {list(errors.shape)} on {errors.device}"
        )
    return errors


def check_box_error(kind: BoxError, tau: float) -> None:
    """Raise the error that `box_error` raises for these two arguments with any boxes."""
    if isinstance(tau, bool) or not isinstance(tau, (int, float)):
        raise TypeError(f"tau: expected a number in [0, 1), got {type(tau).__name__}")
    if not 0 <= tau < 1:
        raise ValueError(f"tau: expected a number in [0, 1), got {tau}")
    if isinstance(kind, str):
        if kind not in _SIMILARITIES:
            raise ValueError(
                f"box_error: expected one of {', '.join(map(repr, _SIMILARITIES))} or a callable, got {kind!r}"
            )
    elif not callable(kind):
        raise TypeError(f"box_error: expected a string or a callable, got {type(kind).__name__}")


def iou(pred_boxes: Tensor, target_boxes: Tensor) -> Tensor:
    """Intersection over union of each pair, in [0, 1].

    Args, dtypes and errors are those of `box_error`, also for the three functions below.
    """
    return _compare(pred_boxes, target_boxes, "iou")


def giou(pred_boxes: Tensor, target_boxes: Tensor) -> Tensor:
    """Generalised IoU of each pair, in [-1, 1]: IoU - (C - U)/C, with the area or volume of the union, U, and of the
    enclosing box, C."""
    return _compare(pred_boxes, target_boxes, "giou")


def diou(pred_boxes: Tensor, target_boxes: Tensor) -> Tensor:
    """Distance IoU of each pair, in [-1, 1]: IoU - d^2/c^2.

    d is the distance of the two centres, c the diagonal of the enclosing box.
    """
    return _compare(pred_boxes, target_boxes, "diou")


def ciou(pred_boxes: Tensor, target_boxes: Tensor) -> Tensor:
    """Complete IoU of each pair `[P, 4]`, in [-1.5, 1]: DIoU - alpha v.

    v = 4/pi^2 (atan(w_target/h_target) - atan(w_pred/h_pred))^2, and alpha = v/(1 - IoU + v), a factor that is a
    constant in the gradient, as in Zheng et al. The gradient of v is exact.
    """
    return _compare(pred_boxes, target_boxes, "ciou")


def _compare(pred_boxes: Tensor, target_boxes: Tensor, kind: str, divisor: float = 0.0) -> Tensor:
    """Similarities, or errors (1 - similarity) / divisor."""
    dtype = _check(pred_boxes, target_boxes)
    pred_boxes, target_boxes = plain(pred_boxes), plain(target_boxes)
    in_volumes = pred_boxes.shape[1] == 6
    if in_volumes and kind == "ciou":
        raise ValueError(
            "pred_boxes: expected shape [P, 4] for 'ciou', got boxes in volumes, which have no aspect ratio"
        )
    if passes.kernels_take(pred_boxes.device) and not in_volumes and not transformed(pred_boxes, target_boxes):
        differentiate = torch.is_grad_enabled() and (pred_boxes.requires_grad or target_boxes.requires_grad)
        values: Tensor = operators.compare_boxes(pred_boxes, target_boxes, kind, divisor, differentiate)[0]
        return values
    found = _SIMILARITIES[kind](pred_boxes.to(dtype), target_boxes.to(dtype))
    return (1 - found) / divisor if divisor else found


def _iou(pred: Tensor, target: Tensor) -> Tensor:
    return _overlap(pred, target)[0]


def _giou(pred: Tensor, target: Tensor) -> Tensor:
    overlap, union = _overlap(pred, target)
    enclosing = _content(_enclosing_sides(pred, target))
    # After rounding, a union may be (1 + e) times its enclosing area. The IoU is then too small by about the same
    # amount that the second term adds, so the result stays at most 1.
    return overlap - _ratio(enclosing - union, enclosing, _num_axes(pred))


def _diou(pred: Tensor, target: Tensor) -> Tensor:
    return _iou(pred, target) - _centre_distance(pred, target)


def _ciou(pred: Tensor, target: Tensor) -> Tensor:
    overlap = _iou(pred, target)
    v = (4 / math.pi**2) * (_aspect_angle(target) - _aspect_angle(pred)) ** 2
    with torch.no_grad():
        denominator = 1 - overlap + v
        # For equal boxes this is 0/0; v is 0, so alpha does not matter.
        alpha = v / denominator.masked_fill(denominator == 0, 1.0)
    return overlap - _centre_distance(pred, target) - alpha * v


_SIMILARITIES = {"iou": _iou, "giou": _giou, "diou": _diou, "ciou": _ciou}


# The branches below use masked_fill(x < bound, ...) and not clamp. A comparison with NaN is false, so NaN stays in the
# value and (unlike with clamp) in the gradient. At the bound there is a gradient, so that a box of width 0 can grow.


def _positive_part(x: Tensor) -> Tensor:
    return x.masked_fill(x < 0, 0.0)


def _ratio(numerator: Tensor, denominator: Tensor, num_axes: int = 2) -> Tensor:
    """`numerator / denominator`; 0 with gradient 0 if the denominator is below the area of a square with side eps, or
    the volume of a cube."""
    none = denominator < torch.finfo(denominator.dtype).eps ** num_axes
    # Both are masked before the division, because an infinite gradient in an unused branch would become NaN.
    return numerator.masked_fill(none, 0.0) / denominator.masked_fill(none, 1.0)


def _num_axes(boxes: Tensor) -> int:
    return boxes.shape[1] // 2


def _ends(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """The corners with the smallest and with the largest coordinates, `[P, D]` each."""
    return boxes[:, : _num_axes(boxes)], boxes[:, _num_axes(boxes) :]


def _sides(boxes: Tensor) -> tuple[Tensor, ...]:
    """Width, height, and depth if there is one, `[P]` each."""
    low, high = _ends(boxes)
    return _positive_part(high - low).unbind(-1)


def _content(sides: tuple[Tensor, ...]) -> Tensor:
    """The area or the volume of boxes with these sides; the gradient of `prod` would wait for the device."""
    return functools.reduce(operator.mul, sides)


def _overlap(pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and content of the union, `[P]` each."""
    lows, highs = zip(_ends(pred), _ends(target))
    intersection = _content(_positive_part(torch.minimum(*highs) - torch.maximum(*lows)).unbind(-1))
    union = _content(_sides(pred)) + _content(_sides(target)) - intersection
    return _ratio(intersection, union, _num_axes(pred)), union


def _enclosing_sides(pred: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """The sides, `[P]` each, of the smallest box around all corners of both; an inverted box has its largest coordinate
    first. So the diagonal is at least the distance of the centres.
    """
    lows = [torch.minimum(*_ends(boxes)) for boxes in (pred, target)]
    highs = [torch.maximum(*_ends(boxes)) for boxes in (pred, target)]
    return (torch.maximum(*highs) - torch.minimum(*lows)).unbind(-1)


def _centre_distance(pred: Tensor, target: Tensor) -> Tensor:
    """Squared distance of the centres divided by the squared diagonal of the enclosing box, in [0, 1]."""
    (pred_low, pred_high), (target_low, target_high) = _ends(pred), _ends(target)
    offset = (pred_low + pred_high - target_low - target_high) / 2
    squares = [side**2 for side in _enclosing_sides(pred, target)]
    return _ratio((offset**2).sum(-1), functools.reduce(operator.add, squares))


def _aspect_angle(boxes: Tensor) -> Tensor:
    """atan(width / height), in [0, pi/2], also for a height of 0."""
    width, height = _sides(boxes)
    point = width**2 + height**2 < torch.finfo(boxes.dtype).eps ** 2
    # atan2's gradient divides by width^2 + height^2.
    return torch.atan2(width.masked_fill(point, 1.0), height.masked_fill(point, 1.0))


def _check(pred_boxes: Tensor, target_boxes: Tensor) -> torch.dtype:
    """The compute dtype, or an error that names the wrong argument. Reads values only for ``ALRP_TRITON_DEBUG=1``."""
    for name, boxes in (("pred_boxes", pred_boxes), ("target_boxes", target_boxes)):
        if not isinstance(boxes, Tensor):
            hint = "; torch.cat puts those of images together" if isinstance(boxes, list) else for_no_tensor(boxes)
            raise TypeError(f"{name}: expected a tensor [P, 4] or [P, 6], got {type(boxes).__name__}{hint}")
        if boxes.dtype not in _DTYPES:
            raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {boxes.dtype}; .float() them")
        if boxes.ndim != 2 or boxes.shape[1] not in (4, 6):
            dense = boxes.ndim > 2 and boxes.shape[-1] in (4, 6)
            hint = "; alrp_triton.at_positives picks those of the positives" if dense else ""
            raise ValueError(f"{name}: expected shape [P, 4] or [P, 6], got {list(boxes.shape)}{hint}")
    if pred_boxes.shape != target_boxes.shape:
        expected, given = list(pred_boxes.shape), list(target_boxes.shape)
        hint = "; an object counts once for each of its positives: objects[matched]"
        raise ValueError(f"target_boxes: expected the shape of pred_boxes, {expected}, got {given}{hint}")
    if pred_boxes.device != target_boxes.device:
        raise ValueError(
            f"target_boxes: expected the device of pred_boxes, {pred_boxes.device}, got {target_boxes.device}"
        )
    if doubts.asked() and not transformed(target_boxes):
        doubts.warn_of_boxes(target_boxes)
    return torch.promote_types(torch.promote_types(pred_boxes.dtype, target_boxes.dtype), torch.float32)
