"""Matching and AP by pycocotools; needs the extra ``metrics``."""

from __future__ import annotations

import contextlib
import io
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
    """The detections of one class and area range that are true or false, by those with objects that count."""

    scores: NDArray[np.float64]
    """[N]"""
    is_true_positive: NDArray[np.bool_]
    """[N], at tau."""
    ious: NDArray[np.float64]
    """[N], with the matched object; 0 for false positives."""
    num_ground_truth: int
    ap: NDArray[np.float64]
    """[T], AP at each IoU threshold; NaN without ground truth."""


_NOTHING = (np.zeros(0), np.zeros(0, dtype=np.bool_), np.zeros(0), 0)


def match(
    data: Dataset,
    iou_type: str,
    iou_thresholds: NDArray[np.float64],
    tau: float,
    max_detections: int,
    area_ranges: Mapping[str, tuple[float, float]],
) -> dict[tuple[int, str], Matches]:
    """What COCO's evaluation makes of each class, by category id and name of the area range."""
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
    # One entry for each class, area range and image, in this order.
    images = iter(evaluation.evalImgs)
    found = {}
    for k, category in enumerate(params.catIds):
        for a, area in enumerate(params.areaRngLbl):
            parts = [_image_matches(evaluation, next(images), at_tau) for _ in params.imgIds]
            scores, hits, ious = (np.concatenate([_NOTHING[i], *(part[i] for part in parts)]) for i in range(3))
            num_ground_truth = sum(part[3] for part in parts)
            found[int(category), area] = Matches(scores, hits, ious, num_ground_truth, ap[:, k, a])
    return found


def _image_matches(
    evaluation: COCOeval, image: Record | None, at_tau: int
) -> tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.float64], int]:
    """Scores, true or false, and IoUs of the detections that count in one image, and how many objects count."""
    if image is None:
        return _NOTHING
    counts = ~image["dtIgnore"][at_tau].astype(np.bool_)
    matched = image["dtMatches"][at_tau]
    hits = (matched > 0) & counts
    ious = np.zeros(len(hits))
    if hits.any():
        # Rows are the detections as here; columns the objects in the order of the file, which is that of their ids,
        # whereas here those that are ignored come last.
        overlaps = evaluation.ious[image["image_id"], image["category_id"]]
        ious[hits] = overlaps[np.flatnonzero(hits), np.searchsorted(np.sort(image["gtIds"]), matched[hits])]
    num_ground_truth = int(np.count_nonzero(image["gtIgnore"] == 0))
    return np.asarray(image["dtScores"], dtype=np.float64)[counts], hits[counts], ious[counts], num_ground_truth


def _coco_objects(data: Dataset, iou_type: str) -> tuple[COCO, COCO]:
    """Both sides for COCOeval. Ids are given anew, in order from 1: it takes an object with id 0 for none."""
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
    """Polygons and uncompressed run lengths become COCO's compressed ones."""
    for i, record in enumerate(records):
        try:
            record["segmentation"] = coco.annToRLE(record)
        except Exception as error:  # pycocotools raises nothing more specific on some
            problem = f"no {error}" if isinstance(error, KeyError) else error
            place = f"{name}[{i}]['segmentation']"
            raise ValueError(
                f"{place}: expected polygons or RLE, in an image with height and width: {problem}"
            ) from None
