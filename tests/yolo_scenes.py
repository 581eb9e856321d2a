"""Drawn data sets and tiny models for Ultralytics' trainers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

NAMES = ["red", "green"]

_BACKBONE = """\
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
    "pose": ("Pose, [nc, [4, 2]]", "Pose, [nc, [4, 2]]"),
}


def write_model(folder: Path, task: str = "detect", end2end: bool = False) -> str:
    """A model with strides 8 and 16; with ``end2end`` built as YOLO26, else as YOLO11. Returns its YAML file."""
    text = _BACKBONE.format(end2end=end2end, reg_max=1 if end2end else 16, head=_HEADS[task][end2end])
    if task == "pose":
        text = "kpt_shape: [4, 2]\n" + text
    path = folder / f"{'tiny26' if end2end else 'tiny11'}-{task}.yaml"
    path.write_text(text)
    return str(path)


def write_data(folder: Path, task: str = "detect", number: int = 8, side: int = 64, seed: int = 0) -> str:
    """Images with two bright rectangles each, whose colour is the class. Returns the data set's YAML file."""
    rng = np.random.default_rng(seed)
    for part in ("train", "val"):
        for name in ("images", "labels"):
            (folder / name / part).mkdir(parents=True, exist_ok=True)
        for index in range(number):
            image = rng.integers(0, 60, (side, side, 3), dtype=np.uint8)
            lines = []
            for kind in rng.integers(0, 2, 2):
                (w, h), (x, y) = rng.integers(side // 5, side // 3, 2), rng.integers(0, side - side // 3, 2)
                image[y : y + h, x : x + w, kind] = rng.integers(180, 256)
                corners = np.array([[x, y], [x + w, y], [x + w, y + h], [x, y + h]]) / side
                box = np.array([x + w / 2, y + h / 2, w, h]) / side
                values = {"detect": box, "pose": np.concatenate([box, corners.ravel()])}.get(task, corners.ravel())
                lines.append(f"{kind} " + " ".join(f"{value:.6f}" for value in values))
            Image.fromarray(image).save(folder / "images" / part / f"{index}.png")
            (folder / "labels" / part / f"{index}.txt").write_text("\n".join(lines))
    path = folder / f"{task}.yaml"
    shape = "kpt_shape: [4, 2]\n" if task == "pose" else ""
    path.write_text(f"path: {folder.resolve()}\ntrain: images/train\nval: images/val\n{shape}names: {NAMES}\n")
    return str(path)
