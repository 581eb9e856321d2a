"""Random scenes in COCO format, and COCO's matching and LRP once more, in plain Python from their definitions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

Record = dict[str, Any]
Images = list[dict[str, torch.Tensor]]


def truth(*boxes: list[float], label: int = 1, **more: Any) -> Record:
    """Ground truth of one image; ``more`` goes into each annotation."""
    objects = [{"image_id": 1, "category_id": label, "bbox": box, **more} for box in boxes]
    return {"images": [{"id": 1}], "annotations": objects, "categories": [{"id": 1, "name": "one"}]}


def found(*scored: tuple[float, list[float]], label: int = 1) -> list[Record]:
    """Detections in that image, of scores and boxes."""
    return [{"image_id": 1, "category_id": label, "score": score, "bbox": box} for score, box in scored]


def scene(
    seed: int,
    *,
    num_images: int = 6,
    num_classes: int = 3,
    max_objects: int = 6,
    max_detections: int = 15,
    crowds: float = 0.15,
    decimals: int | None = None,
) -> tuple[Record, list[Record]]:
    """Ground truth and detections, most of them near an object. The last category has no object.

    Args:
        decimals: what scores are rounded to, for ties.
    """
    rng = np.random.default_rng(seed)
    # Ids as they come in files: not from 0, and not in order.
    images = [{"id": int(i), "width": 400, "height": 400} for i in rng.permutation(num_images) + 10]
    objects: list[Record] = []
    detections: list[Record] = []
    for image in images:
        here = []
        for _ in range(rng.integers(0, max_objects + 1)):
            corner, sides = rng.uniform(0, 200, 2), np.exp(rng.uniform(np.log(8), np.log(190), 2))
            here.append((int(rng.integers(1, num_classes)), [*corner.tolist(), *sides.tolist()]))
        for label, box in here:
            crowd = int(rng.random() < crowds)
            objects.append(
                {
                    "id": len(objects),
                    "image_id": image["id"],
                    "category_id": label,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": crowd,
                }
            )
        for _ in range(rng.integers(0, max_detections + 1)):
            label, box = int(rng.integers(1, num_classes + 1)), [*rng.uniform(0, 200, 2), *rng.uniform(8, 150, 2)]
            if here and rng.random() < 0.8:
                label, near = here[rng.integers(len(here))]
                noise = rng.normal(size=4) * rng.exponential(0.12)
                box = [near[0] + noise[0] * near[2], near[1] + noise[1] * near[3]]
                box += [near[2] * math.exp(noise[2]), near[3] * math.exp(noise[3])]
            score = float(rng.random() if decimals is None else np.round(rng.random(), decimals))
            detections.append(
                {"image_id": image["id"], "category_id": label, "bbox": [float(x) for x in box], "score": score}
            )
    categories = [{"id": label, "name": f"class {label}"} for label in range(1, num_classes + 1)]
    return {"images": images, "annotations": objects, "categories": categories}, detections


def overlap(detection: list[float], truth: list[float], crowd: bool) -> float:
    """IoU of two boxes (x, y, width, height); with a crowd, the part of the detection that lies in it."""
    sides = [
        max(0.0, min(detection[i] + detection[i + 2], truth[i] + truth[i + 2]) - max(detection[i], truth[i]))
        for i in (0, 1)
    ]
    common = sides[0] * sides[1]
    area = detection[2] * detection[3]
    return common / (area if crowd else area + truth[2] * truth[3] - common)


def match(truth: Record, detections: list[Record], label: int, tau: float) -> tuple[list[float], int, int]:
    """IoUs of the true positives of one class, the number of false positives, and that of objects."""
    ious, num_false, num_objects = [], 0, 0
    for image in truth["images"]:
        mine = [a for a in truth["annotations"] if a["image_id"] == image["id"] and a["category_id"] == label]
        free = [a for a in mine if not a["iscrowd"]]
        num_objects += len(free)
        found = [d for d in detections if d["image_id"] == image["id"] and d["category_id"] == label]
        for detection in sorted(found, key=lambda d: -d["score"]):
            best = max(free, key=lambda a: overlap(detection["bbox"], a["bbox"], False), default=None)
            if best is not None and overlap(detection["bbox"], best["bbox"], False) >= tau:
                ious.append(overlap(detection["bbox"], best["bbox"], False))
                free.remove(best)
            elif not any(overlap(detection["bbox"], a["bbox"], True) >= tau for a in mine if a["iscrowd"]):
                num_false += 1
    return ious, num_false, num_objects


def lrp_by_definition(ious: list[float], num_false: int, num_objects: int, tau: float) -> float:
    num_missed = num_objects - len(ious)
    error = sum((1 - iou) / (1 - tau) for iou in ious) + num_false + num_missed
    return error / (len(ious) + num_false + num_missed)


def olrp_by_definition(truth: Record, detections: list[Record], label: int, tau: float) -> float:
    """The least LRP of all sets that a score threshold leaves, each of them matched anew; NaN without objects."""
    if not any(a["category_id"] == label and not a["iscrowd"] for a in truth["annotations"]):
        return math.nan
    thresholds = sorted({d["score"] for d in detections if d["category_id"] == label})
    kept = [[d for d in detections if d["score"] >= threshold] for threshold in [*thresholds, math.inf]]
    return min(lrp_by_definition(*match(truth, some, label, tau), tau) for some in kept)


def tensors(data: Record, detections: list[Record], dtype: torch.dtype = torch.float64) -> tuple[Images, Images]:
    """The same images as dicts of tensors, in the order of their ids; boxes as x, y, width, height."""
    preds, target = [], []
    for image in sorted(image["id"] for image in data["images"]):
        found = [item for item in detections if item["image_id"] == image]
        truth = [item for item in data["annotations"] if item["image_id"] == image]
        for items, images in ((found, preds), (truth, target)):
            entry = {
                "boxes": torch.tensor([item["bbox"] for item in items], dtype=dtype).reshape(-1, 4),
                "labels": torch.tensor([item["category_id"] for item in items], dtype=torch.int64),
            }
            if items is found:
                entry["scores"] = torch.tensor([item["score"] for item in items], dtype=dtype)
            else:
                entry["iscrowd"] = torch.tensor([item["iscrowd"] for item in items], dtype=torch.int64)
            images.append(entry)
    return preds, target
