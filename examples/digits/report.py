"""What the detector learned: COCO's average precision, and a picture of detections and loss curves."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scenes import NUM_CLASSES, DigitScenes
from torch import Tensor
from torchvision.models.detection import RetinaNet
from torchvision.ops import box_convert, box_iou

matplotlib.use("Agg")
from matplotlib import pyplot as plt

Detections = list[dict[str, Tensor]]  # for each scene "boxes" [n, 4], "labels" [n] and "scores" [n], best first
TRUTH, RIGHT, WRONG = "#ffd400", "#35d05b", "#ff5a4d"


@torch.inference_mode()
def detect(model: RetinaNet, scenes: DigitScenes, device: torch.device, batch_size: int = 50) -> Detections:
    """The model's detections on every scene, on the CPU."""
    model.eval()
    detections: Detections = []
    for start in range(0, len(scenes), batch_size):
        images = [scenes[i][0].to(device) for i in range(start, min(start + batch_size, len(scenes)))]
        detections += [{name: value.cpu() for name, value in found.items()} for found in model(images)]
    return detections


def average_precision(detections: Detections, scenes: DigitScenes) -> dict[str, float]:
    """COCO's AP (mean over IoU 0.50 to 0.95), AP50 and AP75, each in 0..1."""
    truth, found = [], []
    for image, detected in enumerate(detections):
        target = scenes[image][1]
        for box, label in zip(box_convert(target["boxes"], "xyxy", "xywh").tolist(), target["labels"].tolist()):
            common = {"image_id": image, "category_id": label, "bbox": box}
            truth.append({**common, "id": len(truth) + 1, "area": box[2] * box[3], "iscrowd": 0})
        boxes = box_convert(detected["boxes"], "xyxy", "xywh").tolist()
        for box, label, score in zip(boxes, detected["labels"].tolist(), detected["scores"].tolist()):
            found.append({"image_id": image, "category_id": label, "bbox": box, "score": score})

    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports on every step
        coco = COCO()
        coco.dataset = {
            "images": [{"id": image} for image in range(len(detections))],
            "categories": [{"id": label} for label in range(NUM_CLASSES)],
            "annotations": truth,
        }
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(found) if found else COCO(), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {name: float(value) for name, value in zip(("AP", "AP50", "AP75"), evaluation.stats)}


def draw(
    path: Path,
    title: str,
    scenes: DigitScenes,
    detections: Detections,
    history: dict[str, list[float]],
    min_score: float = 0.5,
) -> None:
    """Save a picture: the first eight scenes with their detections, and beside them the course of training.

    Args:
        history: one value an iteration for each of ``cls``, ``loc`` (weighted) and ``weight``.
        min_score: detections with a lower score are not drawn.
    """
    figure = plt.figure(figsize=(17, 8), layout="constrained")
    figure.suptitle(title, fontsize=15, fontweight="bold")
    left, right = figure.subfigures(1, 2, width_ratios=(2.1, 1))
    for index, axes in enumerate(left.subplots(2, 4).flat):
        _draw_scene(axes, *scenes[index], detections[index], min_score)
    left.legend(
        handles=[
            Rectangle((0, 0), 1, 1, fill=False, edgecolor=TRUTH, linestyle="--", label="ground truth"),
            Rectangle((0, 0), 1, 1, fill=False, edgecolor=RIGHT, linewidth=2, label="right class, IoU of at least 0.5"),
            Rectangle((0, 0), 1, 1, fill=False, edgecolor=WRONG, linewidth=2, label="false detection"),
            Line2D([], [], linestyle="", label=f"labels: class and score, from {min_score:g} upwards"),
        ],
        loc="outside lower center",
        ncols=4,
        facecolor="#555555",
        labelcolor="white",
    )

    losses, weight = right.subplots(2, 1, sharex=True, height_ratios=(1.6, 1))
    for name, label, colour in (("cls", "classification", "#1f77b4"), ("loc", "localisation, weighted", "#d95f02")):
        losses.plot(history[name], color=colour, alpha=0.25, linewidth=0.8)
        losses.plot(_smoothed(history[name]), color=colour, linewidth=2, label=label)
    losses.set(title="the two components of aLRP Loss", ylabel="loss", ylim=(0, 1.5))
    losses.legend()
    weight.plot(history["weight"], color="#444444", linewidth=1.5)
    weight.set(title="self-balancing weight of the localisation loss", xlabel="iteration", ylabel="weight")
    weight.set(yscale="log", xlim=(0, len(history["cls"])))
    for axes in (losses, weight):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _draw_scene(axes: Axes, image: Tensor, target: dict[str, Tensor], found: dict[str, Tensor], min_score: float) -> None:
    axes.imshow(image[0], cmap="gray", vmin=0, vmax=1, extent=(0, image.shape[2], image.shape[1], 0))
    axes.set_axis_off()
    unmatched = (box_iou(found["boxes"], target["boxes"]) >= 0.5) & (found["labels"][:, None] == target["labels"])
    for i in range(int((found["scores"] >= min_score).sum())):
        right = bool(unmatched[i].any())
        if right:  # best score first, and each digit can be found once
            unmatched[:, unmatched[i].int().argmax()] = False
        _draw_box(axes, found["boxes"][i], RIGHT if right else WRONG, linewidth=2)
        x, y = found["boxes"][i, :2].tolist()
        text = axes.text(x, max(y - 1, 6), f"{found['labels'][i]}  {found['scores'][i]:.2f}", color="white", fontsize=9)
        text.set_path_effects([withStroke(linewidth=2.5, foreground="black")])
    for box in target["boxes"]:
        _draw_box(axes, box, TRUTH, linewidth=1.2, linestyle="--")


def _draw_box(axes: Axes, box: Tensor, colour: str, **style: object) -> None:
    x1, y1, x2, y2 = box.tolist()
    axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, **style))


def _smoothed(values: list[float], window: int = 25) -> list[float]:
    """Mean of the last ``window`` values up to each."""
    return [sum(values[max(0, i + 1 - window) : i + 1]) / min(i + 1, window) for i in range(len(values))]
