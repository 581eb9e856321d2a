"""LRP, its optimum over score thresholds, AP and rank correlation, from matched detections of one class, in numpy.

These functions take one class's detections after matching: the score of each, whether it is a true positive (matched
to an object of its own by an IoU of at least tau), and the IoU with that object. The caller leaves out ignored
detections. Unmatched objects count only in ``num_ground_truth``.

Sources: K. Oksuz, B. C. Cam, E. Akbas, S. Kalkan, "Localization Recall Precision (LRP): A New Performance Metric for
Object Detection", ECCV 2018; the same, "One Metric to Measure Them All: Localisation Recall Precision (LRP) for
Evaluating Visual Detection Tasks", TPAMI 2021 (arXiv:2011.10772).
"""

from __future__ import annotations

import math
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["LRPResult", "average_precision", "lrp", "optimal_lrp", "rank_correlation"]

Floats = NDArray[np.float64]
# An IoU of 0.7 in single precision is below 0.7 in double.
_ROUNDING = 1e-6


class LRPResult(NamedTuple):
    """LRP of the detections that a score threshold keeps, with components and counts. NaN if undefined."""

    lrp: float
    """In [0, 1], 0 for a perfect detector: the total matching error divided by its largest possible value."""
    loc: float
    """1 - IoU averaged over true positives, in [0, 1 - tau]; not divided by 1 - tau. NaN without true positives."""
    fp: float
    """Share of false detections, 1 - precision. NaN without detections."""
    fn: float
    """Share of missed objects, 1 - recall. NaN without ground truth."""
    threshold: float
    """Detections with this score or a higher one are kept."""
    num_true_positives: int
    num_false_positives: int
    num_false_negatives: int


def lrp(
    scores: ArrayLike,
    is_true_positive: ArrayLike,
    ious: ArrayLike,
    num_ground_truth: int,
    *,
    tau: float = 0.5,
    threshold: float = -math.inf,
) -> LRPResult:
    """LRP of the detections with a score of at least ``threshold``:

        LRP = (sum over true positives of (1 - IoU)/(1 - tau) + N_FP + N_FN) / (N_TP + N_FP + N_FN)

    Args:
        scores: [N], in any order; infinities are allowed.
        is_true_positive: [N], bool.
        ious: [N], in [tau, 1] for true positives; the others are not used.
        num_ground_truth: number of objects, at least the number of true positives.
        tau: the IoU from which a detection counts as a true positive, in [0, 1).
        threshold: lowest score to keep; by default all are kept.

    Returns:
        LRP is 1 if there are objects but no kept detections, and NaN if there are neither.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: different or wrong shapes, NaN scores, an IoU outside its range, fewer objects than true positives,
            ``tau`` outside [0, 1) or a NaN ``threshold``.
    """
    values, hits, overlaps = _checked(scores, is_true_positive, ious, num_ground_truth, tau)
    if not is_number(threshold):
        raise TypeError(f"threshold: expected a number, got {type(threshold).__name__}")
    if math.isnan(threshold):
        raise ValueError("threshold: expected a number, got NaN")
    kept = values >= threshold
    hits = hits & kept
    num_true = int(np.count_nonzero(hits))
    num_false = int(np.count_nonzero(kept)) - num_true
    return _result(float((1 - overlaps[hits]).sum()), num_true, num_false, num_ground_truth, tau, float(threshold))


def optimal_lrp(
    scores: ArrayLike, is_true_positive: ArrayLike, ious: ArrayLike, num_ground_truth: int, *, tau: float = 0.5
) -> LRPResult:
    """oLRP: the lowest LRP over all score thresholds, with its threshold.

    A threshold is one of the scores, so equal scores are kept or dropped together. If several thresholds have the same
    LRP, the highest is returned. Without a true positive every threshold has an LRP of 1, so none is the best:
    ``threshold``, ``loc`` and ``fp`` are NaN, ``fn`` is 1 and no detection counts. Without ground truth everything
    except the counts is NaN.

    Arguments and errors are those of :func:`lrp`.
    """
    values, hits, overlaps = _checked(scores, is_true_positive, ious, num_ground_truth, tau)
    if num_ground_truth == 0 or not hits.any():
        missed = 1.0 if num_ground_truth else math.nan
        return LRPResult(missed, math.nan, math.nan, missed, math.nan, 0, 0, num_ground_truth)
    # A threshold keeps whole runs of equal scores, so only the ends of runs are candidates.
    order, ends = _descending(values)
    num_true = np.cumsum(hits[order])[ends]
    num_false = ends + 1 - num_true
    loc_sums = np.cumsum(np.where(hits, 1 - overlaps, 0.0)[order])[ends]
    errors = (loc_sums / (1 - tau) + num_false + num_ground_truth - num_true) / (num_ground_truth + num_false)
    best = int(np.argmin(errors))
    threshold = float(values[order[ends[best]]])
    return _result(float(loc_sums[best]), int(num_true[best]), int(num_false[best]), num_ground_truth, tau, threshold)


def average_precision(
    scores: ArrayLike, is_true_positive: ArrayLike, num_ground_truth: int, *, recall_points: int | None = None
) -> float:
    """AP from interpolated precision: at each recall the highest precision at this recall or above.

    Args:
        scores, is_true_positive, num_ground_truth: as for :func:`lrp`.
        recall_points: ``None`` for the area under the curve; a number R >= 2 for the mean at the recalls 0, 1/(R - 1),
            ..., 1, which lies within 1/R of the area. COCO's AP has R = 101.

    Returns:
        In [0, 1]; NaN without ground truth. Equal scores are counted together; COCO's evaluation counts them one by
        one, in the order of the file.

    Raises:
        TypeError, ValueError: as :func:`lrp`, or ``recall_points`` is not an integer or is below 2.
    """
    values, hits, _ = _checked(scores, is_true_positive, None, num_ground_truth, 0.0)
    if recall_points is not None:
        if isinstance(recall_points, bool) or not isinstance(recall_points, int):
            raise TypeError(f"recall_points: expected an integer or None, got {type(recall_points).__name__}")
        if recall_points < 2:
            raise ValueError(f"recall_points: expected at least 2, got {recall_points}")
    if num_ground_truth == 0:
        return math.nan
    order, ends = _descending(values)
    num_true = np.cumsum(hits[order])[ends]
    recall = num_true / num_ground_truth
    precision = np.maximum.accumulate((num_true / (ends + 1))[::-1])[::-1]
    if recall_points is None:
        return float((np.diff(recall, prepend=0.0) * precision).sum())
    reached = np.searchsorted(recall, np.linspace(0.0, 1.0, recall_points), side="left")
    return float(np.append(precision, 0.0)[reached].mean())


def rank_correlation(scores: ArrayLike, ious: ArrayLike) -> float:
    """rho: Spearman's correlation of score and IoU: 1 if both give the same order of the true positives, -1 if the
    inverse.

    Equal values share the mean of their ranks; rho is the linear correlation of the ranks.

    Args:
        scores: [N], of true positives.
        ious: [N], their IoUs.

    Returns:
        In [-1, 1]; NaN for fewer than two, or if all scores or all IoUs are equal.

    Raises:
        TypeError: not numbers.
        ValueError: different or wrong shapes, or NaN.
    """
    first, second = _vector("scores", scores), _vector("ious", ious)
    if first.shape != second.shape:
        raise ValueError(f"ious: expected the shape of scores, {list(first.shape)}, got {list(second.shape)}")
    if len(first) < 2:
        return math.nan
    x, y = (ranks - ranks.mean() for ranks in (_mean_ranks(first), _mean_ranks(second)))
    scale = math.sqrt(float(x @ x) * float(y @ y))
    return min(max(float(x @ y) / scale, -1.0), 1.0) if scale else math.nan


def _result(
    loc_sum: float, num_true: int, num_false: int, num_ground_truth: int, tau: float, threshold: float
) -> LRPResult:
    num_missed = num_ground_truth - num_true
    total = num_ground_truth + num_false
    return LRPResult(
        lrp=_ratio(loc_sum / (1 - tau) + num_false + num_missed, total),
        loc=_ratio(loc_sum, num_true),
        fp=_ratio(num_false, num_true + num_false),
        fn=_ratio(num_missed, num_ground_truth),
        threshold=threshold,
        num_true_positives=num_true,
        num_false_positives=num_false,
        num_false_negatives=num_missed,
    )


def _ratio(numerator: float, denominator: int) -> float:
    return numerator / denominator if denominator else math.nan


def _descending(values: Floats) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """The order of descending scores, and the positions of the ends of runs of equal scores."""
    order = np.argsort(-values, kind="stable")
    ordered = values[order]
    # Compared, not subtracted, so that two infinities are equal.
    return order, np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True)[: len(ordered)])


def _mean_ranks(values: Floats) -> Floats:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: Floats = (np.cumsum(counts) - (counts - 1) / 2)[place]
    return ranks


def _vector(name: str, values: ArrayLike) -> Floats:
    try:
        array = np.asarray(values)
        if array.dtype.kind not in "iuf" and array.size:
            raise TypeError
        vector = array.astype(np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected real numbers [N], got {_kind(values)}") from None
    if vector.ndim != 1:
        raise ValueError(f"{name}: expected shape [N], got {list(vector.shape)}")
    if np.isnan(vector).any():
        raise ValueError(f"{name}: expected numbers, got NaN at {int(np.flatnonzero(np.isnan(vector))[0])}")
    return vector


def is_number(value: Any) -> bool:
    """Whether it is a real number of Python or numpy and not a bool."""
    return isinstance(value, Real) and not isinstance(value, bool)


def _kind(values: Any) -> str:
    return f"dtype {values.dtype}" if hasattr(values, "dtype") else type(values).__name__


def _checked(
    scores: ArrayLike, is_true_positive: ArrayLike, ious: ArrayLike | None, num_ground_truth: int, tau: float
) -> tuple[Floats, NDArray[np.bool_], Floats]:
    """All inputs as arrays, or an error that names the wrong one; IoUs are 0 if not given."""
    values = _vector("scores", scores)
    hits = np.asarray(is_true_positive)
    if hits.dtype != np.bool_ and hits.size:
        raise TypeError(f"is_true_positive: expected booleans [N], got {_kind(is_true_positive)}")
    hits = hits.astype(np.bool_)
    if isinstance(num_ground_truth, bool) or not isinstance(num_ground_truth, (int, np.integer)):
        raise TypeError(f"num_ground_truth: expected an integer, got {type(num_ground_truth).__name__}")
    if not is_number(tau):
        raise TypeError(f"tau: expected a number in [0, 1), got {type(tau).__name__}")
    if not 0 <= tau < 1:
        raise ValueError(f"tau: expected a number in [0, 1), got {tau}")
    if hits.shape != values.shape:
        raise ValueError(
            f"is_true_positive: expected the shape of scores, {list(values.shape)}, got {list(hits.shape)}"
        )
    num_true = int(np.count_nonzero(hits))
    if num_ground_truth < num_true:
        raise ValueError(f"num_ground_truth: expected at least the {num_true} true positives, got {num_ground_truth}")
    if ious is None:
        return values, hits, np.zeros_like(values)
    given = np.asarray(ious)
    if given.shape != values.shape:
        raise ValueError(f"ious: expected the shape of scores, {list(values.shape)}, got {list(given.shape)}")
    overlaps = np.zeros_like(values)
    overlaps[hits] = _vector("ious", given[hits])
    wrong = hits & ~((overlaps >= tau - _ROUNDING) & (overlaps <= 1 + _ROUNDING))
    if wrong.any():
        place = int(np.flatnonzero(wrong)[0])
        raise ValueError(f"ious: expected [tau, 1] = [{tau}, 1] for true positives, got {overlaps[place]} at {place}")
    return values, hits, np.clip(overlaps, tau, 1.0)
