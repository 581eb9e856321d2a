"""Which detections are true, the map that fits them best, and how far scores are from probabilities."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..metrics.dataset import read_dataset
from ..metrics.evaluation import EVERYTHING, check_settings, matcher
from ..metrics.measures import is_number
from .maps import Affine, Calibration, Floats, Isotonic, check_results, logit, sigmoid

if TYPE_CHECKING:
    from ..metrics.matching import Matches

__all__ = [
    "Pooled",
    "calibration_error",
    "check_iou",
    "expected_calibration_error",
    "fit",
    "fit_matched",
    "match",
    "matches_by_class",
    "pool",
]

# Weight of the prior of a, in detections.
_PRIOR = 0.01


class Pooled(NamedTuple):
    """The detections of several classes, as the functions of :mod:`alrp_triton.metrics` take them."""

    scores: Floats
    is_true_positive: NDArray[np.bool_]
    ious: Floats
    num_ground_truth: int


def fit(
    ground_truth: Any,
    detections: Any,
    *,
    method: str = "affine",
    per_class: bool = False,
    min_per_class: int = 10,
    iou: float = 0.5,
    iou_type: str = "bbox",
    max_detections: int = 100,
) -> Calibration:
    """The map from scores to the probability that a detection is a true positive, fitted on validation detections.

    Truth is that of COCO's matching at ``iou``. In each image and class the best ``max_detections`` count. Detections
    on crowds are left out, and so are those of a category that the dataset does not list. All detections have the same
    weight.

    ``"affine"`` is p = sigmoid(a logit(score) + b) by maximum likelihood (Platt, 1999). A weak prior keeps a > 0 and
    both finite for any data: one more detection at the mean logit that is half true, and 0.01 (a - log a) added to the
    negative log-likelihood. Without detections the map is the identity. Scores of exactly 0 or 1 do not count in this
    fit, since rounding has hidden their logits. ``"isotonic"`` is the monotone step function with the least squared
    error, as a line through the ends of its steps.

    Args:
        ground_truth, detections: as :func:`alrp_triton.metrics.evaluate` takes them, with scores in [0, 1] that come
            from a sigmoid.
        method: ``"affine"`` or ``"isotonic"``, which needs scikit-learn.
        per_class: also fit a map of its own for every class that has at least ``min_per_class`` true and as many false
            positives. The others take the common map.
        iou: the IoU from which a detection is a true positive, in (0, 1).
        iou_type: ``"bbox"`` or ``"segm"``.
        max_detections: number of detections of one class that count in one image.

    Raises:
        ImportError: pycocotools or scikit-learn is not installed; the message names the extra.
        OSError: a file cannot be read.
        TypeError, ValueError: an argument or a part of the data is wrong; the message says which.
    """
    _check_method(method, min_per_class)
    found = matches_by_class(ground_truth, detections, iou=iou, iou_type=iou_type, max_detections=max_detections)
    by_class = {category: (one.scores, one.is_true_positive) for category, one in found.items()}
    together = pool(found.values())
    return _fit((together.scores, together.is_true_positive), by_class if per_class else {}, method, min_per_class)


def fit_matched(
    scores: Any,
    is_true_positive: Any,
    categories: Any = None,
    *,
    method: str = "affine",
    min_per_class: int = 10,
) -> Calibration:
    """:func:`fit` for detections that the caller has matched with objects: in volumes, of rotated boxes, of keypoints.

    Args:
        scores: ``[N]``, in [0, 1], of a sigmoid; what ``numpy.asarray`` takes.
        is_true_positive: ``[N]`` bool.
        categories: ``[N]`` integers, if classes are to have maps of their own.
        method, min_per_class: as for :func:`fit`.

    Raises:
        ImportError: scikit-learn is not installed and ``method`` needs it.
        TypeError, ValueError: an argument is wrong; the message names it.
    """
    _check_method(method, min_per_class)
    values, hits = np.asarray(scores, np.float64), np.asarray(is_true_positive)
    if values.ndim != 1 or not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"scores: expected [N] numbers in [0, 1], got shape {list(values.shape)}")
    if hits.dtype != np.bool_:
        raise TypeError(f"is_true_positive: expected bools, got {hits.dtype}")
    of = np.zeros(len(values), np.int64) if categories is None else np.asarray(categories)
    if of.dtype.kind not in "iu":
        raise TypeError(f"categories: expected integers, got {of.dtype}")
    for name, one in (("is_true_positive", hits), ("categories", of)):
        if one.shape != values.shape:
            raise ValueError(f"{name}: expected the shape of scores, {list(values.shape)}, got {list(one.shape)}")
    ids = [] if categories is None else np.unique(of).tolist()
    return _fit((values, hits), {k: (values[of == k], hits[of == k]) for k in ids}, method, min_per_class)


Scored = tuple[Floats, NDArray[np.bool_]]


def _fit(together: Scored, by_class: dict[int, Scored], method: str, min_per_class: int) -> Calibration:
    """A map for all, and one for each class that has enough true and false positives."""
    curve = _METHODS[method]
    enough = {k: min(np.count_nonzero(hits), np.count_nonzero(~hits)) for k, (_, hits) in by_class.items()}
    own = {k: curve(*by_class[k]) for k, number in enough.items() if number >= min_per_class}
    return Calibration(curve(*together), own)


def _check_method(method: str, min_per_class: int) -> None:
    if method not in _METHODS:
        raise ValueError(f"method: expected 'affine' or 'isotonic', got {method!r}")
    if isinstance(min_per_class, bool) or not isinstance(min_per_class, Integral) or min_per_class < 1:
        raise ValueError(f"min_per_class: expected an integer of at least 1, got {min_per_class!r}")


def expected_calibration_error(
    ground_truth: Any,
    detections: Any,
    *,
    bins: int = 15,
    iou: float = 0.5,
    iou_type: str = "bbox",
    max_detections: int = 100,
) -> float:
    """ECE: the mean of |precision - mean score| over bins of equal width, weighted by their detections.

    C. Guo, G. Pleiss, Y. Sun, K. Weinberger, "On Calibration of Modern Neural Networks", ICML 2017. A bin has the
    detections with scores in (k/bins, (k+1)/bins]; the first also has those of 0. All classes are pooled.

    Args:
        bins: number of bins, at least 1.
        ground_truth, detections, iou, iou_type, max_detections: as for :func:`fit`.

    Returns:
        In [0, 1], 0 if scores are the precision in every bin; NaN without detections.

    Raises:
        ImportError, OSError, TypeError, ValueError: as :func:`fit`.
    """
    if isinstance(bins, bool) or not isinstance(bins, Integral) or bins < 1:
        raise ValueError(f"bins: expected an integer of at least 1, got {bins!r}")
    found = matches_by_class(ground_truth, detections, iou=iou, iou_type=iou_type, max_detections=max_detections)
    return calibration_error(pool(found.values()), int(bins))


def calibration_error(found: Pooled, bins: int = 15) -> float:
    if not len(found.scores):
        return float("nan")
    place = np.digitize(found.scores, np.linspace(0, 1, bins + 1)[1:-1], right=True)
    difference = np.bincount(place, weights=found.scores - found.is_true_positive)
    return float(np.abs(difference).sum() / len(found.scores))


def matches_by_class(
    ground_truth: Any, detections: Any, *, iou: float, iou_type: str, max_detections: int
) -> dict[int, Matches]:
    """Scores, truth and IoUs of the detections that count, by category id."""
    check_iou(iou)
    check_settings(iou_type, max_detections)
    by_coco = matcher()
    data = read_dataset(ground_truth, detections, iou_type)
    check_results(data.detections)
    found = by_coco(data, iou_type, np.array([float(iou)]), float(iou), max_detections, {"all": EVERYTHING})
    return {category: matches for (category, _), matches in found.items()}


def match(scores: Floats, ious: NDArray[Any], iou: float, max_detections: int) -> Pooled:
    """Of one class in one image, as COCO: the best detection first, each takes the free object of the highest IoU.

    Args:
        scores: ``[D]``.
        ious: ``[G, D]``, of the objects and the detections; they count from ``iou`` on, rounded to their dtype.
        max_detections: number of detections that count.
    """
    order = np.argsort(-scores, kind="stable")[:max_detections]
    free, found = np.where(ious >= iou, ious, 0)[:, order], np.zeros(len(order))
    for place in range(len(order) if len(free) else 0):
        best = free[:, place].argmax()
        found[place] = free[best, place]
        if found[place]:
            free[best] = 0
    return Pooled(scores[order], found > 0, found, len(ious))


def check_iou(iou: float) -> None:
    if not is_number(iou):
        raise TypeError(f"iou: expected a number in (0, 1), got {type(iou).__name__}")
    if not 0 < iou < 1:
        raise ValueError(f"iou: expected a number in (0, 1), got {iou}")


def pool(found: Iterable[Matches | Pooled]) -> Pooled:
    scores, hits, ious, totals = [np.zeros(0)], [np.zeros(0, dtype=np.bool_)], [np.zeros(0)], 0
    for one in found:
        scores.append(one.scores)
        hits.append(one.is_true_positive)
        ious.append(one.ious)
        totals += one.num_ground_truth
    return Pooled(np.concatenate(scores), np.concatenate(hits), np.concatenate(ious), totals)


def _affine(scores: Floats, hits: NDArray[np.bool_]) -> Affine:
    """Newton's method, with shorter steps where it needs them, on a strictly convex function."""
    inside = (scores > 0) & (scores < 1)
    x = logit(scores[inside])
    centre = x.mean() if len(x) else 0.0
    # p = sigmoid(a u + c); the last one belongs to the prior.
    u, y = np.append(x - centre, 0.0), np.append(hits[inside], 0.5)

    def error(ac: Floats) -> float:
        if ac[0] <= 0:
            return np.inf
        z = ac[0] * u + ac[1]
        return float((np.logaddexp(0, z) - y * z).sum() + _PRIOR * (ac[0] - np.log(ac[0])))

    ac = np.array([1.0, np.log(y.sum() / (1 - y).sum()) if len(x) else 0.0])
    for _ in range(200):
        p = sigmoid(ac[0] * u + ac[1])
        weights = p * (1 - p)
        gradient = np.array([(p - y) @ u + _PRIOR * (1 - 1 / ac[0]), (p - y).sum()])
        across = weights @ u
        hessian = np.array([[weights @ u**2 + _PRIOR / ac[0] ** 2, across], [across, weights.sum()]])
        step = np.linalg.solve(hessian, gradient)
        falls, length = gradient @ step, 1.0
        while length > 1e-12 and not error(ac - length * step) <= error(ac) - length * falls / 4:
            length /= 2
        if falls <= 1e-14 * len(u) or length <= 1e-12:
            break
        ac = ac - length * step
    return Affine(float(ac[0]), float(ac[1] - ac[0] * centre))


def _isotonic(scores: Floats, hits: NDArray[np.bool_]) -> Affine | Isotonic:
    try:
        from sklearn.isotonic import IsotonicRegression
    except ImportError as error:
        raise ImportError("scikit-learn is not installed: pip install 'alrp-triton[calibration]'") from error
    if not len(scores):
        return Affine()
    curve = IsotonicRegression(y_min=0, y_max=1).fit(logit(scores), hits.astype(np.float64))
    return Isotonic(tuple(curve.X_thresholds_.tolist()), tuple(curve.y_thresholds_.tolist()))


_METHODS = {"affine": _affine, "isotonic": _isotonic}
