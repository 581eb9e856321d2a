"""LRP, the errors of a detector, from COCO-format ground truth and detections."""

from .evaluation import COCO_AREA_RANGES, evaluate
from .measures import LRPResult, average_precision, lrp, optimal_lrp, rank_correlation
from .results import ClassMetrics, DetectionMetrics, Scores

__all__ = [
    "COCO_AREA_RANGES",
    "ClassMetrics",
    "DetectionMetrics",
    "LRPResult",
    "Scores",
    "average_precision",
    "evaluate",
    "lrp",
    "optimal_lrp",
    "rank_correlation",
]
