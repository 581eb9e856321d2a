"""What the adapters of all frameworks report when they calibrate a detector."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..calibration import Calibration
from ..calibration.fitting import pool
from ..calibration.report import by_class, overall
from ..metrics import optimal_lrp

if TYPE_CHECKING:  # it imports pycocotools
    from ..metrics.matching import Matches

__all__ = ["CalibrationReport", "best_thresholds", "report_of"]


@dataclass(frozen=True)
class CalibrationReport:
    """What ``calibrate`` did; ``print`` shows the map, all classes together, and each class."""

    calibration: Calibration
    thresholds: dict[int, float]
    """As ``thresholds`` of the calibrated model."""
    overall: tuple[list[str], list[list[str]]]
    """Columns and rows, of text: calibration error, detections from 0.5 on and their precision and recall."""
    by_class: tuple[list[str], list[list[str]]]
    """Columns and rows, of text: detections and the best threshold of each class, before and after."""

    def __str__(self) -> str:
        return "\n\n".join([str(self.calibration), _aligned(*self.overall), _aligned(*self.by_class)])


def report_of(
    calibration: Calibration, before: dict[int, Matches], after: dict[int, Matches], iou: float
) -> CalibrationReport:
    """The report on detections before and after ``calibration``, by category id, matched at ``iou``."""
    tables = overall(before, after, iou), by_class(before, after, iou)
    return CalibrationReport(calibration, best_thresholds(after, iou), *tables)


def best_thresholds(found: Mapping[int, Matches], iou: float) -> dict[int, float]:
    """The score threshold of the lowest LRP, by category id; NaN without true positives."""
    return {category: optimal_lrp(*pool([one]), tau=iou).threshold for category, one in found.items()}


def _aligned(columns: list[str], rows: list[list[str]]) -> str:
    widths = [max(map(len, cells)) for cells in zip(columns, *rows)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)).rstrip() for row in (columns, *rows)]
    return "\n".join(lines)
