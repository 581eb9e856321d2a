"""Reads, checks and copies COCO-format ground truth and detections from files or Python objects."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

from .measures import is_number

__all__ = ["Dataset", "read_dataset", "read_results"]

Record = dict[str, Any]


class Dataset(NamedTuple):
    """Copies of the caller's objects, one level deep. Changes in them do not affect the caller's objects."""

    images: list[Record]
    categories: list[Record]
    objects: list[Record]
    """Annotations, with missing ``iscrowd`` and, for boxes, missing ``area`` filled in."""
    detections: list[Record]


def read_dataset(ground_truth: Any, detections: Any, iou_type: str) -> Dataset:
    """Both inputs of :func:`alrp_triton.metrics.evaluate`; its docstring describes them and the errors."""
    truth = _load("ground_truth", ground_truth)
    if not isinstance(truth, Mapping):
        hint = "; detections come second" if isinstance(truth, list) else ""
        raise TypeError(f"ground_truth: expected a COCO dataset, which is a dict, got {type(truth).__name__}{hint}")
    for key in ("images", "annotations"):
        if key not in truth:
            raise ValueError(f"ground_truth: expected the key {key!r}, got {', '.join(map(repr, truth)) or 'none'}")
    shape = "bbox" if iou_type == "bbox" else "segmentation"
    images = _records("ground_truth['images']", truth["images"], ("id",))
    objects = _records("ground_truth['annotations']", truth["annotations"], ("image_id", "category_id", shape))
    results = read_results(detections, ("image_id", "category_id", shape))
    places = _number_images(images)
    for name, records in (("ground_truth['annotations']", objects), ("detections", results)):
        for i, record in enumerate(records):
            _check_id(f"{name}[{i}]['category_id']", record["category_id"])
            image_id = record["image_id"]
            if not isinstance(image_id, (Integral, str)) or image_id not in places:
                raise ValueError(f"{name}[{i}]['image_id']: expected the id of an image, got {image_id!r}")
            record["image_id"] = places[image_id]
            if iou_type == "bbox":
                record["bbox"] = _box(f"{name}[{i}]['bbox']", record["bbox"])
    for i, record in enumerate(objects):
        if record.setdefault("iscrowd", 0) not in (0, 1):
            raise ValueError(f"ground_truth['annotations'][{i}]['iscrowd']: expected 0 or 1, got {record['iscrowd']!r}")
        if iou_type == "bbox":
            record.setdefault("area", record["bbox"][2] * record["bbox"][3])
        if "area" in record:
            record["area"] = _number(f"ground_truth['annotations'][{i}]['area']", record["area"])
    listed = truth.get("categories")
    if listed is None:
        listed = [{"id": category} for category in sorted({record["category_id"] for record in objects})]
    categories = _records("ground_truth['categories']", listed, ("id",))
    for i, category in enumerate(categories):
        _check_id(f"ground_truth['categories'][{i}]['id']", category["id"])
    known = {category["id"] for category in categories}
    if results and known.isdisjoint(record["category_id"] for record in results):
        warnings.warn(
            f"detections: expected some of the category ids of ground_truth, {_few(known)}, got "
            f"{_few({record['category_id'] for record in results})}, so that none can be right",
            stacklevel=3,
        )
    return Dataset(images, categories, objects, results)


def _few(ids: set[int]) -> str:
    first = sorted(ids)[:5]
    return ", ".join(map(str, first)) + (", ..." if len(ids) > len(first) else "")


def read_results(detections: Any, keys: tuple[str, ...]) -> list[Record]:
    """COCO results that have these keys and a score."""
    found = _load("detections", detections)
    if isinstance(found, Mapping):
        if "annotations" not in found:
            raise ValueError("detections: expected a list of results or the key 'annotations', got a dict without it")
        found = found["annotations"]
    results = _records("detections", found, (*keys, "score"))
    for i, record in enumerate(results):
        record["score"] = _number(f"detections[{i}]['score']", record["score"])
    return results


def _number_images(images: list[Record]) -> dict[Any, int]:
    """New ids 0, 1, ... of images by their old ids, in the order of COCO's evaluation, which is that of the old ids."""
    for i, image in enumerate(images):
        _check_id(f"ground_truth['images'][{i}]['id']", image["id"], text=True)
    ids = {image["id"] for image in images}
    if len({isinstance(image_id, str) for image_id in ids}) > 1:
        raise TypeError("ground_truth['images']: expected integers or text as ids, got both")
    places = {image_id: place for place, image_id in enumerate(sorted(ids))}
    for image in images:
        image["id"] = places[image["id"]]
    return places


def _load(name: str, source: Any) -> Any:
    if isinstance(source, (str, os.PathLike)):
        try:
            return json.loads(Path(source).read_text(encoding="utf-8"))
        except ValueError as error:  # from the decoder of UTF-8 or of JSON
            raise ValueError(f"{name}: expected JSON, got {os.fspath(source)}: {error}") from None
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


def _check_id(name: str, value: Any, *, text: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, (Integral, str) if text else Integral):
        raise TypeError(f"{name}: expected an integer{' or text' if text else ''}, got {value!r}")


def _box(name: str, value: Any) -> list[float]:
    try:
        box = [float(side) for side in value]
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected four numbers (x, y, width, height), got {value!r}") from None
    if len(box) != 4 or not all(map(math.isfinite, box)) or box[2] < 0 or box[3] < 0:
        raise ValueError(f"{name}: expected finite x, y, width >= 0 and height >= 0, got {value!r}")
    return box


def _number(name: str, value: Any) -> float:
    if not is_number(value):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    if math.isnan(value):
        raise ValueError(f"{name}: expected a number, got NaN")
    return float(value)
