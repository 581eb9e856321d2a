"""COCO-format ground truth and detections, from files or Python objects, checked and copied."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Dataset", "read_dataset"]

Record = dict[str, Any]


class Dataset(NamedTuple):
    """Copies, one level deep, of what the caller passed: nothing that is added to them reaches the caller's objects."""

    images: list[Record]
    categories: list[Record]
    objects: list[Record]
    """Annotations, with ``iscrowd`` and, for boxes, ``area`` filled in where they were missing."""
    detections: list[Record]


def read_dataset(ground_truth: Any, detections: Any, iou_type: str) -> Dataset:
    """Both inputs of :func:`alrp_triton.metrics.evaluate`, whose docstring says what they may be and what is raised."""
    truth = _load("ground_truth", ground_truth)
    if not isinstance(truth, Mapping):
        raise TypeError(f"ground_truth: expected a COCO dataset, which is a dict, got {type(truth).__name__}")
    for key in ("images", "annotations"):
        if key not in truth:
            raise ValueError(f"ground_truth: expected the key {key!r}, got {', '.join(map(repr, truth)) or 'none'}")
    found = _load("detections", detections)
    if isinstance(found, Mapping):
        if "annotations" not in found:
            raise ValueError("detections: expected a list of results, or a dict with the key 'annotations'")
        found = found["annotations"]
    shape = "bbox" if iou_type == "bbox" else "segmentation"
    images = _records("ground_truth['images']", truth["images"], ("id",))
    objects = _records("ground_truth['annotations']", truth["annotations"], ("image_id", "category_id", shape))
    results = _records("detections", found, ("image_id", "category_id", shape, "score"))
    # Without a list of categories, those that have an object.
    listed = truth.get("categories")
    if listed is None:
        listed = [{"id": category} for category in sorted({item["category_id"] for item in objects})]
    categories = _records("ground_truth['categories']", listed, ("id",))
    known = {image["id"] for image in images}
    for name, records in (("ground_truth['annotations']", objects), ("detections", results)):
        for i, item in enumerate(records):
            if item["image_id"] not in known:
                raise ValueError(f"{name}[{i}]['image_id']: {item['image_id']!r} is not among the images")
            if iou_type == "bbox":
                _check_box(f"{name}[{i}]['bbox']", item["bbox"])
    for item in objects:
        item.setdefault("iscrowd", 0)
        if iou_type == "bbox":
            item.setdefault("area", item["bbox"][2] * item["bbox"][3])
    for i, item in enumerate(results):
        _check_number(f"detections[{i}]['score']", item["score"])
    return Dataset(images, categories, objects, results)


def _load(name: str, source: Any) -> Any:
    if isinstance(source, (str, os.PathLike)):
        try:
            return json.loads(Path(source).read_text(encoding="utf-8"))
        except ValueError as error:  # of the decoder, of UTF-8 or of JSON
            raise ValueError(f"{name}: {os.fspath(source)} is not JSON: {error}") from None
    # A pycocotools COCO object.
    return getattr(source, "dataset", source)


def _records(name: str, values: Any, keys: tuple[str, ...]) -> list[Record]:
    if not isinstance(values, Sequence) or isinstance(values, (str, bytes)):
        raise TypeError(f"{name}: expected a list of dicts, got {type(values).__name__}")
    for i, value in enumerate(values):
        if not isinstance(value, Mapping):
            raise TypeError(f"{name}[{i}]: expected a dict, got {type(value).__name__}")
        for key in keys:
            if key not in value:
                raise ValueError(f"{name}[{i}]: expected the key {key!r}, got {', '.join(map(repr, value)) or 'none'}")
    return [dict(value) for value in values]


def _check_box(name: str, box: Any) -> None:
    try:
        sides = [float(side) for side in box]
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected four numbers (x, y, width, height), got {box!r}") from None
    if len(sides) != 4 or not all(map(math.isfinite, sides)) or sides[2] < 0 or sides[3] < 0:
        raise ValueError(f"{name}: expected finite x, y, width >= 0 and height >= 0, got {box!r}")


def _check_number(name: str, value: Any) -> None:
    try:
        number = math.nan if isinstance(value, (str, bytes)) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if math.isnan(number):
        raise ValueError(f"{name}: expected a number, got {value!r}")
