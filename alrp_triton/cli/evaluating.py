"""The commands ``evaluate`` and ``calibrate``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from .printing import print_table


def add_evaluate(commands: Any) -> None:
    text = "AP, optimal LRP with its components, and the rank correlation of score and IoU, from files in COCO format."
    parser = commands.add_parser("evaluate", help="AP and LRP of detections in COCO format", description=text)
    _add_files(parser)
    parser.add_argument("--tau", type=float, default=0.5, help="IoU from which a detection is a true positive; 0.5")
    parser.add_argument("--score-threshold", type=float, metavar="S", help="also give LRP of detections that score S")
    parser.add_argument("--per-class", action="store_true", help="also show each class, with its best score threshold")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all numbers, of each class, to FILE")
    parser.set_defaults(run=_evaluate)


def _add_files(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ground_truth", type=Path, metavar="GT.json", help="dataset: images, annotations, categories")
    parser.add_argument(
        "detections", type=Path, metavar="DT.json", help="results: a list of boxes or masks with scores"
    )
    parser.add_argument("--iou-type", choices=("bbox", "segm"), default="bbox", help="what is compared; bbox")
    parser.add_argument("--max-detections", type=int, default=100, metavar="N", help="of each class in an image; 100")


def _evaluate(arguments: argparse.Namespace) -> int:
    from ..metrics import evaluate

    try:
        metrics = evaluate(
            arguments.ground_truth,
            arguments.detections,
            iou_type=arguments.iou_type,
            tau=arguments.tau,
            max_detections=arguments.max_detections,
            score_threshold=arguments.score_threshold,
        )
        if arguments.json:
            text = json.dumps(metrics.to_dict(), indent=1, allow_nan=False)
            arguments.json.write_text(text + "\n", encoding="utf-8")
    except (ImportError, OSError, TypeError, ValueError) as error:
        print(f"alrp-triton evaluate: {error}", file=sys.stderr)
        return 1
    print(metrics.table(per_class=arguments.per_class))
    return 0


def add_calibrate(commands: Any) -> None:
    text = """Fit a map from scores to probabilities on validation detections, and show how well scores suit a
    threshold before and after, on the same detections."""
    parser = commands.add_parser("calibrate", help="make scores of detections probabilities", description=text)
    _add_files(parser)
    parser.add_argument("--iou", type=float, default=0.5, help="IoU from which a detection is a true positive; 0.5")
    parser.add_argument("--method", choices=("affine", "isotonic"), default="affine", help="kind of map; affine")
    parser.add_argument("--per-class", action="store_true", help="a map for each class with enough detections")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the map to FILE, as JSON")
    parser.set_defaults(run=_calibrate)


def _calibrate(arguments: argparse.Namespace) -> int:
    from .. import calibration
    from ..calibration.report import before_and_after, by_class, overall

    names = ("iou", "iou_type", "max_detections")
    settings = {name: getattr(arguments, name) for name in names}
    files = arguments.ground_truth, arguments.detections
    try:
        found = calibration.fit(*files, method=arguments.method, per_class=arguments.per_class, **settings)
        matches = before_and_after(*files, found, **settings)
        if arguments.output:
            text = json.dumps(found.to_dict(), indent=1, allow_nan=False)
            arguments.output.write_text(text + "\n", encoding="utf-8")
    except (ImportError, OSError, TypeError, ValueError) as error:
        print(f"alrp-triton calibrate: {error}", file=sys.stderr)
        return 1
    print(found)
    print()
    print_table("Detections of all classes", *overall(*matches, arguments.iou))
    if arguments.per_class:
        print_table("Thresholds of optimal LRP", *by_class(*matches, arguments.iou))
    return 0
