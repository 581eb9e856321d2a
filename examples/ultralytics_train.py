"""YOLO11n on drawn shapes: trained with Rank & Sort Loss, interrupted, resumed, calibrated, asked and exported.

It needs the extra ultralytics, takes some minutes on a CPU and writes into ./shapes.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from ultralytics import YOLO

from alrp_triton.integrations.ultralytics import calibrate, use_rank_sort

ROOT, SIDE = Path("shapes").resolve(), 128
IMAGES = ROOT / "images" / "val"
ASKED: dict[str, Any] = {"imgsz": SIDE, "device": "cpu", "verbose": False, "project": str(ROOT / "runs")}


def draw(number: int) -> str:
    """Images of squares and circles; returns the data set's YAML file."""
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for name in ("images", "labels"):
            (ROOT / name / part).mkdir(parents=True, exist_ok=True)
        for index in range(number):
            image, lines = Image.fromarray(rng.integers(0, 90, (SIDE, SIDE, 3), dtype=np.uint8)), []
            for kind in rng.integers(0, 2, 3):
                size, (x, y) = int(rng.integers(16, 40)), rng.integers(0, SIDE - 40, 2).tolist()
                shape = ImageDraw.Draw(image).ellipse if kind else ImageDraw.Draw(image).rectangle
                shape((x, y, x + size, y + size), fill=tuple(rng.integers(120, 256, 3).tolist()))
                place = (x + size / 2, y + size / 2, size, size)
                lines.append(" ".join([str(kind), *(f"{value / SIDE:.6f}" for value in place)]))
            image.save(ROOT / "images" / part / f"{index}.png")
            (ROOT / "labels" / part / f"{index}.txt").write_text("\n".join(lines), encoding="utf-8")
    path = ROOT / "data.yaml"
    path.write_text(f"path: {ROOT}\ntrain: images/train\nval: images/val\nnames: [square, circle]\n", encoding="utf-8")
    return str(path)


def report(name: str, yolo: YOLO, data: str) -> None:
    """mAP of all detections, and what is shown at the default confidence."""
    precision = yolo.val(data=data, conf=0.0, plots=False, **ASKED).box
    boxes = [found.boxes for found in yolo.predict(str(IMAGES), **ASKED)]
    shown = f"{sum(map(len, boxes))} detections in {sum(len(one) > 0 for one in boxes)} of {len(boxes)} images"
    print(f"{name}: mAP {precision.map:.4f}, mAP50 {precision.map50:.4f}, {shown}", flush=True)


def stop(trainer: Any) -> None:
    """As if the machine had failed, in the middle of the training."""
    if trainer.epoch + 1 == trainer.epochs // 2:
        raise KeyboardInterrupt


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--model", default="yolo11n.yaml")
    arguments.add_argument("--epochs", type=int, default=30)
    asked = arguments.parse_args()
    data, yolo = draw(64), use_rank_sort(YOLO(asked.model))
    yolo.add_callback("on_fit_epoch_end", stop)
    try:
        yolo.train(data=data, epochs=asked.epochs, batch=16, nbs=16, mosaic=0.0, plots=False, **ASKED)
    except KeyboardInterrupt:
        last = yolo.trainer.last
        print(f"interrupted; {last}", flush=True)
    yolo = use_rank_sort(YOLO(last))
    yolo.train(resume=True)
    yolo = YOLO(yolo.trainer.best)
    report("before", yolo, data)
    print(calibrate(yolo, data, **ASKED))
    report("after", yolo, data)
    yolo.save(ROOT / "calibrated.pt")
    exported = YOLO(yolo.export(format="torchscript", imgsz=SIDE, device="cpu"), task="detect")
    found = exported.predict(str(IMAGES), rect=False, **ASKED)
    print(f"exported: {sum(len(one.boxes) for one in found)} detections")


if __name__ == "__main__":
    main()
