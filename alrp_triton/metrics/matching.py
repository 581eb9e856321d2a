"""Matching and AP by pycocotools; needs the extra ``metrics``."""

from __future__ import annotations

import contextlib
import io
import itertools
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from .dataset import Dataset, Record

__all__ = ["Matches", "match"]


class Matches(NamedTuple):
    """The detections of one class and area range that count as true or false, and the matches of the true ones."""

    scores: NDArray[np.float64]
    """[N]"""
    is_true_positive: NDArray[np.bool_]
    """[N], at tau."""
    ious: NDArray[np.float64]
    """[N], with the matched object; 0 for false positives."""
    num_ground_truth: int
    ap: NDArray[np.float64]
    """[T], AP at each IoU threshold; NaN without ground truth."""


def match(
    data: Dataset,
    iou_type: str,
    iou_thresholds: NDArray[np.float64],
    tau: float,
    max_detections: int,
    area_ranges: Mapping[str, tuple[float, float]],
) -> dict[tuple[int, str], Matches]:
    """The result of COCO's evaluation for each class, by category id and name of the area range."""
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports on every step
        evaluation = COCOeval(*_coco_objects(data, iou_type), iou_type)
        params = evaluation.params
        params.iouThrs = iou_thresholds
        params.maxDets = [max_detections]
        params.areaRng = [list(bounds) for bounds in area_ranges.values()]
        params.areaRngLbl = list(area_ranges)
        evaluation.evaluate()
        evaluation.accumulate()
    # [T, recalls, classes, areas, 1]; -1 for a class without ground truth.
    precision = evaluation.eval["precision"][..., 0]
    ap = np.where(precision < 0, np.nan, precision).mean(axis=1)
    at_tau = int(np.argmin(np.abs(iou_thresholds - tau)))
    columns = _columns(data.objects)
    # One entry for each class, area range and image, in this order; None if there is nothing.
    images = iter(evaluation.evalImgs)
    found = {}
    for k, category in enumerate(params.catIds):
        for a, area in enumerate(params.areaRngLbl):
            entries = [entry for entry in itertools.islice(images, len(params.imgIds)) if entry is not None]
            found[int(category), area] = Matches(*_matches(evaluation.ious, entries, at_tau, columns), ap[:, k, a])
    return found


def _columns(objects: list[Record]) -> NDArray[np.intp]:
    """The column of each object in the table of IoUs of its class and image, by id."""
    counts: Counter[tuple[int, int]] = Counter()
    columns = np.zeros(len(objects) + 1, dtype=np.intp)
    for record in objects:
        key = record["image_id"], record["category_id"]
        columns[record["id"]] = counts[key]
        counts[key] += 1
    return columns


def _matches(
    ious: Mapping[tuple[int, int], NDArray[np.float64]],
    entries: list[Record],
    at_tau: int,
    columns: NDArray[np.intp],
) -> tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.float64], int]:
    """Scores, true or false, and IoUs of the detections that count in one class and area range; number of objects that
    count."""
    if not entries:
        return np.zeros(0), np.zeros(0, dtype=np.bool_), np.zeros(0), 0
    # Ids of objects; 0 if there is none.
    matched = np.concatenate([entry["dtMatches"][at_tau] for entry in entries]).astype(np.intp)
    counts = np.concatenate([entry["dtIgnore"][at_tau] for entry in entries]) == 0
    ends = np.cumsum([len(entry["dtIds"]) for entry in entries])
    overlaps = np.zeros(len(matched))
    hits = np.flatnonzero(matched)
    for place, i in zip(hits.tolist(), np.searchsorted(ends, hits, side="right").tolist()):
        entry = entries[i]
        row = place - ends[i] + len(entry["dtIds"])
        overlaps[place] = ious[entry["image_id"], entry["category_id"]][row, columns[matched[place]]]
    scores = np.concatenate([entry["dtScores"] for entry in entries])
    num_ground_truth = int(np.count_nonzero(np.concatenate([entry["gtIgnore"] for entry in entries]) == 0))
    return scores[counts], matched[counts] > 0, overlaps[counts], num_ground_truth


def _coco_objects(data: Dataset, iou_type: str) -> tuple[COCO, COCO]:
    """Both sides for COCOeval, with new ids in order from 1, because it treats id 0 as no object."""
    truth, found = COCO(), COCO()
    for coco, records in ((truth, data.objects), (found, data.detections)):
        coco.dataset = {"images": data.images, "categories": data.categories, "annotations": records}
        for i, record in enumerate(records, start=1):
            record["id"] = i
        coco.createIndex()
    for record in data.detections:
        record["iscrowd"] = 0
        if iou_type == "bbox":
            record["area"] = record["bbox"][2] * record["bbox"][3]
    if iou_type == "segm":
        _encode("ground_truth['annotations']", truth, data.objects)
        _encode("detections", found, data.detections)
        for record in data.detections:
            record["area"] = float(mask.area(record["segmentation"]))
        for record in data.objects:
            record.setdefault("area", float(mask.area(record["segmentation"])))
    return truth, found


def _encode(name: str, coco: COCO, records: list[Record]) -> None:
    """Convert polygons and uncompressed run lengths to COCO's compressed run lengths."""
    for i, record in enumerate(records):
        runs = record["segmentation"]
        try:
            # pycocotools does not terminate on run lengths that do not cover the image.
            if isinstance(runs, Mapping) and isinstance(runs["counts"], list):
                height, width = runs["size"]
                if sum(runs["counts"]) != height * width:
                    raise ValueError(f"{sum(runs['counts'])} pixels in runs, {height} x {width} in 'size'")
            record["segmentation"] = coco.annToRLE(record)
        except Exception as error:  # pycocotools raises no more specific error for some
            problem = f"no {error}" if isinstance(error, KeyError) else error
            place = f"{name}[{i}]['segmentation']"
            raise ValueError(
                f"{place}: expected polygons or RLE, in an image with height and width, got {problem}"
            ) from None
