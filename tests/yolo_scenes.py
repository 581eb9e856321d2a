"""Drawn data sets and tiny models for Ultralytics' trainers, which write only into temporary folders."""

from __future__ import annotations

import gc
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

# Read when Ultralytics is imported.
os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.mkdtemp(prefix="ultralytics"))
os.environ.setdefault("YOLO_AUTOINSTALL", "false")

NAMES = ["red", "green"]
SIDE = 64
TRAINING: dict[str, Any] = {
    **{"epochs": 2, "imgsz": SIDE, "batch": 2, "nbs": 2, "device": "cpu", "workers": 0, "plots": False},
    **{"optimizer": "AdamW", "lr0": 0.01, "warmup_epochs": 0, "mosaic": 0.0, "close_mosaic": 0, "verbose": False},
}
"""Arguments of ``train``."""

_MODEL = """\
nc: 2
end2end: {end2end}
reg_max: {reg_max}
backbone:
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, Conv, [32, 3, 2]]
  - [-1, 1, Conv, [32, 3, 2]]
  - [-1, 1, Conv, [32, 3, 2]]
head:
  - [[2, 3], 1, {head}]
"""
_HEADS = {
    "detect": ("Detect, [nc]", "Detect, [nc]"),
    "segment": ("Segment, [nc, 8, 16]", "Segment26, [nc, 8, 16]"),
    "obb": ("OBB, [nc, 1]", "OBB26, [nc, 1]"),
}


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A test that imports this has a quiet trainer, which does not collect garbage every epoch. Afterwards there is one
    thread again."""
    logging.getLogger("ultralytics").setLevel(logging.ERROR)
    monkeypatch.setattr(gc, "collect", lambda *_: 0)
    yield
    torch.set_num_threads(1)


def write_model(folder: Path, task: str = "detect", end2end: bool = False) -> str:
    """The YAML file of a model with strides 8 and 16: with the head of YOLO26 if ``end2end``, else of YOLO11."""
    path = folder / f"{'tiny26' if end2end else 'tiny11'}-{task}.yaml"
    path.write_text(_MODEL.format(end2end=end2end, reg_max=1 if end2end else 16, head=_HEADS[task][end2end]))
    return str(path)


def write_data(folder: Path, task: str = "detect", number: int = 8, seed: int = 0) -> str:
    """The YAML file of a data set: images with two bright rectangles each, whose colour is their class."""
    rng = np.random.default_rng(seed)
    for part in ("train", "val"):
        for name in ("images", "labels"):
            (folder / name / part).mkdir(parents=True, exist_ok=True)
        for index in range(number):
            image, lines = rng.integers(0, 60, (SIDE, SIDE, 3), dtype=np.uint8), []
            for kind in rng.integers(0, 2, 2):
                (w, h), (x, y) = rng.integers(SIDE // 5, SIDE // 3, 2), rng.integers(0, SIDE - SIDE // 3, 2)
                image[y : y + h, x : x + w, kind] = rng.integers(180, 256)
                box = x + w / 2, y + h / 2, w, h
                corners = x, y, x + w, y, x + w, y + h, x, y + h
                numbers = box if task == "detect" else corners
                lines.append(" ".join([str(kind), *(f"{value / SIDE:.6f}" for value in numbers)]))
            Image.fromarray(image).save(folder / "images" / part / f"{index}.png")
            (folder / "labels" / part / f"{index}.txt").write_text("\n".join(lines))
    path = folder / "data.yaml"
    path.write_text(f"path: {folder.resolve()}\ntrain: images/train\nval: images/val\nnames: {NAMES}\n")
    return str(path)
