"""The results of an evaluation: numbers, not tensors; NaN if a number is not defined."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

__all__ = ["ClassMetrics", "DetectionMetrics", "Scores"]

COLUMNS = {
    "AP": "ap",
    "AP50": "ap50",
    "AP75": "ap75",
    "AP90": "ap90",
    "oLRP": "olrp",
    "oLRP Loc": "olrp_loc",
    "oLRP FP": "olrp_fp",
    "oLRP FN": "olrp_fn",
    "rho": "rho",
}
AT_THRESHOLD = {"LRP": "lrp", "LRP Loc": "lrp_loc", "LRP FP": "lrp_fp", "LRP FN": "lrp_fn"}


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The metrics of one class, or their means over classes. Each mean is over the classes that have that number."""

    ap_at: Mapping[float, float]
    """AP by IoU threshold: COCO's ten, tau and those asked for; as in COCO, interpolated and read at 101 recalls."""
    olrp: float
    """Optimal LRP: the lowest LRP error over all score thresholds. In [0, 1], 0 for a perfect detector."""
    olrp_loc: float
    """1 - IoU, averaged over the true positives at the optimal threshold; in [0, 1 - tau]."""
    olrp_fp: float
    """1 - precision at the optimal threshold."""
    olrp_fn: float
    """1 - recall at the optimal threshold."""
    rho: float
    """Spearman's correlation of score and IoU over the true positives; in [-1, 1]."""
    lrp: float = math.nan
    """LRP at ``score_threshold``; this and its three components are NaN without a threshold."""
    lrp_loc: float = math.nan
    lrp_fp: float = math.nan
    lrp_fn: float = math.nan

    @property
    def ap(self) -> float:
        """COCO's AP: the mean over the IoU thresholds 0.50, 0.55, ..., 0.95."""
        return sum(self.ap_at[(50 + 5 * i) / 100] for i in range(10)) / 10

    @property
    def ap50(self) -> float:
        return self.ap_at[0.5]

    @property
    def ap75(self) -> float:
        return self.ap_at[0.75]

    @property
    def ap90(self) -> float:
        return self.ap_at[0.9]

    def to_dict(self) -> dict[str, Any]:
        """All numbers by name, ready for JSON: dicts with text keys, ``None`` for NaN and infinities."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        averages = {name: getattr(self, name) for name in ("ap", "ap50", "ap75", "ap90")}
        return {name: _plain(value) for name, value in {**averages, **values}.items()}


@dataclass(frozen=True, kw_only=True)
class ClassMetrics(Scores):
    """The metrics of one class: all NaN if the class has no object to find; means leave out NaN."""

    category_id: int
    name: str
    num_ground_truth: int
    """Number of objects to find, without crowds."""
    num_detections: int
    """Number of detections that count, true or false."""
    olrp_threshold: float
    """The score that reaches oLRP: keep detections with this score or a higher one. NaN without true positives."""


@dataclass(frozen=True, kw_only=True)
class DetectionMetrics(Scores):
    """Means over the classes that have objects, and the classes themselves."""

    iou_type: str
    tau: float
    max_detections: int
    score_threshold: float | Mapping[int, float] | None
    per_class: Mapping[int, ClassMetrics]
    """By category id, in ascending order."""
    by_area: Mapping[str, Scores] = field(default_factory=dict)
    """Means over classes for the objects of each area range."""

    def table(self, *, per_class: bool = False) -> str:
        """Aligned text with a row for all objects, one for each area range and, with ``per_class``, one for each
        class."""
        columns = COLUMNS if self.score_threshold is None else COLUMNS | AT_THRESHOLD
        scores: list[tuple[str, Scores]] = [("all", self), *self.by_area.items()]
        if per_class:
            columns = {**columns, "threshold": "olrp_threshold"}
            scores += [(found.name, found) for found in self.per_class.values()]
        rows = [["", *columns]]
        rows += [[name, *(_text(getattr(one, column, None)) for column in columns.values())] for name, one in scores]
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
        return "\n".join("  ".join(line).rstrip() for line in lines)

    def __str__(self) -> str:
        return self.table()


def _text(value: float | None) -> str:
    """Blank if there is no such number, a dash if it is undefined."""
    if value is None:
        return ""
    return "-" if math.isnan(value) else f"{value:.4f}"


def _plain(value: Any) -> Any:
    if isinstance(value, Scores):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
