"""What a calibration did: tables, which are columns and rows of text."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from ..metrics.measures import LRPResult, lrp, optimal_lrp
from .fitting import Pooled, calibration_error, matches_by_class, pool
from .maps import Calibration

if TYPE_CHECKING:
    from ..metrics.matching import Matches

__all__ = [
    "CalibrationReport",
    "before_and_after",
    "best_thresholds",
    "by_class",
    "check_matches",
    "overall",
    "report_of",
]

Found: TypeAlias = "Mapping[int, Matches | Pooled]"
Table: TypeAlias = tuple[list[str], list[list[str]]]
_USUAL = 0.5


@dataclass(frozen=True)
class CalibrationReport:
    """What ``calibrate`` of an integration did; ``print`` shows the map, all classes together, and each class."""

    calibration: Calibration
    thresholds: dict[int, float]
    """As ``thresholds`` of the calibrated model."""
    overall: Table
    """Columns and rows, of text: calibration error, detections from 0.5 on and their precision and recall."""
    by_class: Table
    """Columns and rows, of text: detections and the best threshold of each class, before and after."""

    def __str__(self) -> str:
        return "\n\n".join([str(self.calibration), _aligned(*self.overall), _aligned(*self.by_class)])


def check_matches(found: Found, iou: float) -> None:
    """Whether a model's detections can be calibrated.

    Raises:
        ValueError: there are no objects.

    Warns:
        UserWarning: no detection is one of them.
    """
    together = pool(found.values())
    if not together.num_ground_truth:
        raise ValueError("data: expected at least one object, got none")
    if not together.is_true_positive.any():
        warnings.warn(
            f"data: expected detections of its objects, got none of IoU {iou} or more among {len(together.scores)}: "
            "is the model trained, and do labels and boxes fit it?",
            stacklevel=4,
        )


def report_of(calibration: Calibration, before: Found, after: Found, iou: float) -> CalibrationReport:
    """The report on a model's detections and on the same ones calibrated, by category id, matched at ``iou``."""
    return CalibrationReport(
        calibration, best_thresholds(after, iou), overall(before, after, iou), by_class(before, after, iou)
    )


def best_thresholds(found: Found, iou: float) -> dict[int, float]:
    """The score threshold of each class with the lowest LRP; NaN for a class without true positives."""
    return {category: _best(pool([one]), iou).threshold for category, one in found.items()}


def before_and_after(
    ground_truth: Any, detections: Any, calibration: Calibration, **settings: Any
) -> tuple[dict[int, Matches], dict[int, Matches]]:
    """The matches of detections and of calibrated ones, by category id; settings as for :func:`.fit`."""
    before = matches_by_class(ground_truth, detections, **settings)
    return before, matches_by_class(ground_truth, calibration.apply(detections), **settings)


def overall(before: Found, after: Found, iou: float) -> Table:
    """ECE; number, precision and recall of the detections from 0.5 on; optimal LRP, as if there were one class."""
    rows = []
    for name, matches in (("before", before), ("after", after)):
        found = pool(matches.values())
        best, usual = _best(found, iou), lrp(*found, tau=iou, threshold=_USUAL)
        kept = usual.num_true_positives + usual.num_false_positives
        numbers = (calibration_error(found), 1 - usual.fp, 1 - usual.fn, best.lrp, best.threshold)
        ece, *others = map(_text, numbers)
        rows.append([name, str(len(found.scores)), ece, str(kept), *others])
    above = f">= {_USUAL}"
    return ["", "detections", "ECE", above, f"precision {above}", f"recall {above}", "oLRP", "its threshold"], rows


def by_class(before: Found, after: Found, iou: float) -> Table:
    rows = []
    for category, found in before.items():
        num_true = int(found.is_true_positive.sum())
        counts = num_true, len(found.scores) - num_true
        best = [_best(pool([one]), iou) for one in (found, after[category])]
        rows.append([str(category), *map(str, counts), _text(best[0].lrp), *(_text(one.threshold) for one in best)])
    return ["class", "true", "false", "oLRP", "threshold before", "after"], rows


def _best(found: Any, iou: float) -> LRPResult:
    return optimal_lrp(*found, tau=iou)


def _text(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4g}"


def _aligned(columns: list[str], rows: list[list[str]]) -> str:
    widths = [max(map(len, cells)) for cells in zip(columns, *rows)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)).rstrip() for row in (columns, *rows)]
    return "\n".join(lines)
