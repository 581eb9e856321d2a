"""Datasets in COCO's format: images with boxes, checked before anything is trained."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alrp_triton.metrics.dataset import read_dataset

STRIDE = 64
"""Of the coarsest level of the detector; the canvas is a multiple of it."""


class Sample(NamedTuple):
    """An image, with the objects to find."""

    image_id: int | str
    path: Path
    width: int
    height: int
    boxes: Tensor
    """``[G, 4]``, (x1, y1, x2, y2) in pixels of the image; without crowds."""
    labels: Tensor
    """``[G]`` int64, from 0."""


class Split(NamedTuple):
    """One file of annotations."""

    path: Path
    samples: list[Sample]
    truth: dict[str, Any]
    """What detections are evaluated against, in COCO's format; crowds included."""


class Dataset(NamedTuple):
    """The splits of a dataset, and its classes."""

    splits: dict[str, Split]
    """By name: ``train``, ``val``, and perhaps ``test``."""
    classes: list[tuple[int, str]]
    """Category ids and names; a label is an index into them."""


def read(files: dict[str, Path], images: Path) -> Dataset:
    """Read and check a dataset.

    Args:
        files: annotations by split.
        images: the folder that the file names in the annotations start from.

    Raises:
        OSError, TypeError, ValueError: a file cannot be read, or what is in it is wrong; the message says where.
    """
    given: dict[str, Any] = {}
    found = {}
    for split, path in files.items():
        try:
            given[split] = json.loads(path.read_text(encoding="utf-8"))
            found[split] = read_dataset(given[split], [], "bbox")
        except (TypeError, ValueError) as error:  # the latter from the decoder of JSON or UTF-8, too
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"{path}: {error}") from None
    names: dict[int, str] = {}
    for data in found.values():
        names |= {category["id"]: str(category.get("name", category["id"])) for category in data.categories}
    with_objects = {
        split: {one["category_id"] for one in data.objects if not one["iscrowd"]} for split, data in found.items()
    }
    for split, present in with_objects.items():
        if not present:
            raise ValueError(f"{files[split]}: expected at least one object that is no crowd, got none")
        if missing := sorted(present - with_objects["train"]):
            listed = ", ".join(names.get(number, str(number)) for number in missing)
            raise ValueError(f"{files[split]}: expected classes with objects in {files['train']}, got also {listed}")
    # Classes that no file uses, as some programs write them, are left out.
    classes = [(number, names.get(number, str(number))) for number in sorted(with_objects["train"])]
    label_of = {number: label for label, (number, _) in enumerate(classes)}
    splits = {}
    for split, data in found.items():
        # read_dataset numbers the images anew.
        for image, original in zip(data.images, given[split]["images"]):
            image["id"] = original["id"]
        splits[split] = _split(files[split], data, images, label_of, classes)
    return Dataset(splits, classes)


def _split(path: Path, data: Any, folder: Path, label_of: dict[int, int], classes: list[tuple[int, str]]) -> Split:
    objects = [one for one in data.objects if one["category_id"] in label_of]
    # In the order of ids, as read_dataset numbers images.
    ids = sorted(image["id"] for image in data.images)
    by_image: defaultdict[int | str, list[dict[str, Any]]] = defaultdict(list)
    for i, one in enumerate(objects):
        one["image_id"] = ids[one["image_id"]]
        if not one["iscrowd"]:
            if min(one["bbox"][2:]) <= 0:
                raise ValueError(
                    f"{path}: annotation {one.get('id', i)}: expected a box with an area, got {one['bbox']}"
                )
            by_image[one["image_id"]].append(one)
    samples, missing = [], []
    for image in data.images:
        for key in ("file_name", "width", "height"):
            if key not in image:
                raise ValueError(f"{path}: image {image['id']}: expected the key {key!r}")
        file = folder / image["file_name"]
        if not file.is_file():
            missing.append(file)
        boxes = torch.tensor([one["bbox"] for one in by_image[image["id"]]], dtype=torch.float32).reshape(-1, 4)
        boxes = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
        labels = torch.tensor([label_of[one["category_id"]] for one in by_image[image["id"]]], dtype=torch.int64)
        samples.append(Sample(image["id"], file, int(image["width"]), int(image["height"]), boxes, labels))
    if missing:
        raise FileNotFoundError(f"{path}: {len(missing)} of {len(samples)} images are missing, first {missing[0]}")
    if not samples:
        raise ValueError(f"{path}: expected at least one image, got none")
    truth = {
        "images": data.images,
        "annotations": objects,
        "categories": [{"id": number, "name": name} for number, name in classes],
    }
    return Split(path, samples, truth)


def canvas_of(dataset: Dataset, size: int) -> tuple[int, int]:
    """Height and width of the canvas that holds every image if its longer side is ``size``."""
    sides = [0, 0]
    for split in dataset.splits.values():
        for sample in split.samples:
            scale = size / max(sample.width, sample.height)
            for k, side in enumerate((sample.height, sample.width)):
                sides[k] = max(sides[k], round(side * scale))
    height, width = (STRIDE * math.ceil(side / STRIDE) for side in sides)
    return height, width
