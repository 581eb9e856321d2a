"""One call from COCO-format ground truth and detections to AP, optimal LRP and rank correlation."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .dataset import read_dataset
from .measures import LRPResult, is_number, lrp, optimal_lrp, rank_correlation
from .results import ClassMetrics, DetectionMetrics, Scores

if TYPE_CHECKING:
    from .matching import Matches

__all__ = ["COCO_AREA_RANGES", "evaluate"]

COCO_AREA_RANGES: Mapping[str, tuple[float, float]] = MappingProxyType(
    {"small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, 1e10)}
)
"""COCO's ranges, in square pixels, including both bounds."""

EVERYTHING = (0.0, 1e10)
# The same bits as in COCO: its 0.9 is one unit in the last place below 0.9.
_COCO_THRESHOLDS = np.linspace(0.5, 0.95, 10)
_UNDEFINED = LRPResult(math.nan, math.nan, math.nan, math.nan, math.nan, 0, 0, 0)


def evaluate(
    ground_truth: str | os.PathLike[str] | Mapping[str, Any] | Any,
    detections: str | os.PathLike[str] | Sequence[Mapping[str, Any]] | Mapping[str, Any] | Any,
    *,
    iou_type: str = "bbox",
    tau: float = 0.5,
    max_detections: int = 100,
    iou_thresholds: Iterable[float] = (),
    score_threshold: float | Mapping[int, float] | None = None,
    area_ranges: Mapping[str, tuple[float, float]] = COCO_AREA_RANGES,
) -> DetectionMetrics:
    """AP, AP50, AP75, AP90, optimal LRP with its components, and rho, for every class and on average.

    pycocotools matches detections to objects by COCO's rules. In each image and class the best ``max_detections`` take,
    best first, the free object of the highest IoU. Detections on crowds are ignored, and so are detections outside an
    area range that match nothing in it. A class without objects does not count in a mean. The function prints nothing
    and changes no input.

    Args:
        ground_truth: a COCO dataset with ``images``, ``annotations`` and ``categories``, as a file, a dict or a
            pycocotools ``COCO`` object. Ids of annotations are not needed. Defaults are 0 for ``iscrowd``, that of the
            box or mask for ``area``, and those of the annotations for ``categories``.
        detections: COCO results, a list of dicts with ``image_id``, ``category_id``, ``score`` and ``bbox`` (x, y,
            width, height) or ``segmentation``; as a file, a list or a ``COCO`` object; may be empty. Detections of a
            category that the dataset does not list are left out.
        iou_type: ``"bbox"`` or ``"segm"``.
        tau: the IoU from which a detection is a true positive, for LRP and rho; in (0, 1).
        max_detections: number of detections of one class that count in one image.
        iou_thresholds: further thresholds of AP, in (0, 1]; ``ap_at`` has them, by keys with nine decimals.
        score_threshold: also give LRP at this score threshold, or at one for each category id; some ids may be missing,
            and NaN keeps nothing.
        area_ranges: by name, lowest and highest area of the objects of a row in ``by_area``; ``{}`` skips them.

    Raises:
        ImportError: pycocotools is not installed.
        OSError: a file cannot be read.
        TypeError, ValueError: an argument or a part of the data is wrong; the message says which.
    """
    thresholds, keys = _iou_thresholds(iou_thresholds, tau)
    check_settings(iou_type, max_detections)
    limits = _score_thresholds(score_threshold)
    ranges = {"all": EVERYTHING, **_checked_ranges(area_ranges)}
    match = matcher()
    data = read_dataset(ground_truth, detections, iou_type)
    names = {category["id"]: str(category.get("name", category["id"])) for category in data.categories}
    found: dict[str, dict[int, ClassMetrics]] = {name: {} for name in ranges}
    for (category, area), matches in match(data, iou_type, thresholds, tau, max_detections, ranges).items():
        limit = limits.get(category) if isinstance(limits, Mapping) else limits
        found[area][category] = _class_metrics(matches, keys, tau, limit, category, names[category])
    means = {area: _means(list(classes.values()), keys) for area, classes in found.items()}
    return DetectionMetrics(
        **means.pop("all"),
        iou_type=iou_type,
        tau=float(tau),
        max_detections=int(max_detections),
        score_threshold=limits,
        per_class=found["all"],
        by_area={area: Scores(**values) for area, values in means.items()},
    )


def matcher() -> Callable[..., dict[tuple[int, str], Matches]]:
    """:func:`alrp_triton.metrics.matching.match`, or an ``ImportError`` that names the extra."""
    try:
        from .matching import match
    except ImportError as error:
        raise ImportError("pycocotools is not installed: pip install 'alrp-triton[metrics]'") from error
    return match


def _class_metrics(
    matches: Matches, keys: Sequence[float], tau: float, limit: float | None, category: int, name: str
) -> ClassMetrics:
    scores, hits, ious, num_ground_truth, ap = matches
    best = optimal_lrp(scores, hits, ious, num_ground_truth, tau=tau)
    # A class without objects has no error for any detections.
    at_limit = _UNDEFINED
    if limit is not None and num_ground_truth:
        at_limit = lrp(scores, hits, ious, num_ground_truth, tau=tau, threshold=limit)
    return ClassMetrics(
        ap_at=dict(zip(keys, ap.tolist())),
        olrp=best.lrp,
        olrp_loc=best.loc,
        olrp_fp=best.fp,
        olrp_fn=best.fn,
        olrp_threshold=best.threshold,
        rho=rank_correlation(scores[hits], ious[hits]),
        lrp=at_limit.lrp,
        lrp_loc=at_limit.loc,
        lrp_fp=at_limit.fp,
        lrp_fn=at_limit.fn,
        category_id=category,
        name=name,
        num_ground_truth=num_ground_truth,
        num_detections=len(scores),
    )


def _means(classes: Sequence[Scores], keys: Sequence[float]) -> dict[str, Any]:
    names = ("olrp", "olrp_loc", "olrp_fp", "olrp_fn", "rho", "lrp", "lrp_loc", "lrp_fp", "lrp_fn")
    ap_at = {key: _mean(one.ap_at[key] for one in classes) for key in keys}
    return {"ap_at": ap_at, **{name: _mean(getattr(one, name) for one in classes) for name in names}}


def _mean(values: Iterable[float]) -> float:
    defined = [value for value in values if not math.isnan(value)]
    return math.fsum(defined) / len(defined) if defined else math.nan


def _iou_thresholds(further: Iterable[float], tau: float) -> tuple[NDArray[np.float64], list[float]]:
    """COCO's IoU thresholds, the further ones and tau, each once; and their keys in ``ap_at``."""
    if not is_number(tau):
        raise TypeError(f"tau: expected a number in (0, 1), got {type(tau).__name__}")
    if not 0 < tau < 1:
        raise ValueError(f"tau: expected a number in (0, 1), got {tau}")
    if isinstance(further, str) or not isinstance(further, Iterable):
        raise TypeError(f"iou_thresholds: expected numbers in (0, 1], got {type(further).__name__}")
    values = list(_COCO_THRESHOLDS)
    for value in [*further, tau]:
        if not is_number(value):
            raise TypeError(f"iou_thresholds: expected numbers in (0, 1], got {value!r}")
        if not 0 < value <= 1:
            raise ValueError(f"iou_thresholds: expected numbers in (0, 1], got {value}")
        if not any(math.isclose(value, other, rel_tol=1e-9) for other in values):
            values.append(value)
    return np.array(values), [round(float(value), 9) for value in values]


def check_settings(iou_type: str, max_detections: int) -> None:
    if iou_type not in ("bbox", "segm"):
        raise ValueError(f"iou_type: expected 'bbox' or 'segm', got {iou_type!r}")
    if isinstance(max_detections, bool) or not isinstance(max_detections, Integral):
        raise TypeError(f"max_detections: expected an integer, got {type(max_detections).__name__}")
    if max_detections < 1:
        raise ValueError(f"max_detections: expected at least 1, got {max_detections}")


def _score_thresholds(given: Any) -> float | dict[int, float] | None:
    if given is None:
        return None
    for limit in given.values() if isinstance(given, Mapping) else [given]:
        if not is_number(limit):
            raise TypeError(f"score_threshold: expected a number, or numbers by category id, got {limit!r}")
    if isinstance(given, Mapping):
        return {category: math.inf if math.isnan(limit) else float(limit) for category, limit in given.items()}
    if math.isnan(given):
        raise ValueError("score_threshold: expected a number, got NaN")
    return float(given)


def _checked_ranges(area_ranges: Mapping[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    if not isinstance(area_ranges, Mapping):
        raise TypeError(f"area_ranges: expected a dict of names to (lowest, highest), got {type(area_ranges).__name__}")
    for name, bounds in area_ranges.items():
        if name == "all":
            raise ValueError("area_ranges: expected names other than 'all', which is every object, got 'all'")
        if len(bounds) != 2 or not 0 <= bounds[0] <= bounds[1]:
            raise ValueError(f"area_ranges[{name!r}]: expected 0 <= lowest <= highest, got {bounds}")
    return dict(area_ranges)
