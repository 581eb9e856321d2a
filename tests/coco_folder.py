"""A small dataset in COCO's format, on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

NAMES = {7: "square", 9: "bar"}


def write_folder(path: Path, splits: tuple[str, ...] = ("train", "val", "test"), number: int = 6) -> Path:
    """Grey noise of 64 x 48 pixels with one bright object in each image but the last, which holds a crowd."""
    generator = np.random.default_rng(0)
    (path / "images").mkdir(parents=True)
    (path / "annotations").mkdir()
    for split in splits:
        images, annotations = [], []
        for k in range(number):
            # Ids that are neither positions nor in order.
            image_id = 100 - 7 * k
            file = f"{split}-{k}.png"
            images.append({"id": image_id, "file_name": file, "width": 64, "height": 48})
            category = (7, 9)[k % 2]
            x, y = (int(each) for each in generator.integers(2, 20, 2))
            width, height = (20, 20) if category == 7 else (34, 12)
            pixels = generator.integers(0, 90, (48, 64, 3), dtype=np.uint8)
            pixels[y : y + height, x : x + width] = (250, 200, 20) if category == 7 else (20, 80, 250)
            Image.fromarray(pixels).save(path / "images" / file)
            annotations.append(
                {
                    "id": k + 1,
                    "image_id": image_id,
                    "category_id": category,
                    "bbox": [float(x), float(y), float(width), float(height)],
                    "area": float(width * height),
                    "iscrowd": int(k == number - 1),
                }
            )
        # No image has an object of class 0, as some programs write it.
        categories = [{"id": 0, "name": "objects"}, *({"id": k, "name": name} for k, name in NAMES.items())]
        change(path, split, {"images": images, "annotations": annotations, "categories": categories})
    return path


def annotations_of(path: Path, split: str) -> dict[str, Any]:
    """The content of a split's file."""
    found: dict[str, Any] = json.loads((path / "annotations" / f"{split}.json").read_text(encoding="utf-8"))
    return found


def change(path: Path, split: str, content: Any) -> None:
    """Replace a split's file."""
    (path / "annotations" / f"{split}.json").write_text(json.dumps(content), encoding="utf-8")
