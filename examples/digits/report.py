"""What the detector learned: average precision and LRP error, and a picture of detections and loss curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from scenes import NUM_CLASSES, SIZE
from torch import Tensor
from torchvision.models.detection import RetinaNet
from torchvision.ops import box_convert, box_iou

from alrp_triton.metrics import evaluate

matplotlib.use("Agg")
from matplotlib import pyplot as plt

Detections = list[dict[str, Tensor]]  # for each scene "boxes" [n, 4], "labels" [n] and "scores" [n], best first
NAMES = {"share_solved": "solved"}  # where there is little room
TRUTH, RIGHT, WRONG = "#ffd400", "#35d05b", "#ff5a4d"


class Scenes(Protocol):
    """A sequence of images [1, SIZE, SIZE] with targets, such as :class:`scenes.DigitScenes`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]: ...


@torch.inference_mode()
def detect(model: RetinaNet, scenes: Scenes, device: torch.device, batch_size: int = 50) -> Detections:
    """The model's detections on every scene, on the CPU."""
    model.eval()
    detections: Detections = []
    for start in range(0, len(scenes), batch_size):
        images = [scenes[i][0].to(device) for i in range(start, min(start + batch_size, len(scenes)))]
        detections += [{name: value.cpu() for name, value in found.items()} for found in model(images)]
    return detections


def to_coco(detections: Detections, scenes: Scenes) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Ground truth and detections in COCO's format; a scene's number is its image's id."""
    truth: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    for image, detected in enumerate(detections):
        target = scenes[image][1]
        for box, label in zip(box_convert(target["boxes"], "xyxy", "xywh").tolist(), target["labels"].tolist()):
            common = {"image_id": image, "category_id": label, "bbox": box}
            truth.append({**common, "id": len(truth) + 1, "area": box[2] * box[3], "iscrowd": 0})
        boxes = box_convert(detected["boxes"], "xyxy", "xywh").tolist()
        for box, label, score in zip(boxes, detected["labels"].tolist(), detected["scores"].tolist()):
            found.append({"image_id": image, "category_id": label, "bbox": box, "score": score})
    dataset = {
        "images": [{"id": image} for image in range(len(detections))],
        "categories": [{"id": label} for label in range(NUM_CLASSES)],
        "annotations": truth,
    }
    return dataset, found


def measure(detections: Detections, scenes: Scenes) -> dict[str, float]:
    """COCO's AP (mean over IoU 0.50 to 0.95), AP50 and AP75, and optimal LRP (the lower the better); each in 0..1."""
    found = evaluate(*to_coco(detections, scenes))
    return {"AP": found.ap, "AP50": found.ap50, "AP75": found.ap75, "oLRP": found.olrp}


def draw(path: Path, title: str, scenes: Scenes, detections: Detections, history: dict[str, list[float]]) -> None:
    """Save a picture: detections in the first eight scenes with two digits or more, and beside them the training.

    A ranking loss orders the scores but does not calibrate them, so what is drawn follows from the order: over all
    ``scenes``, as many of the best detections as there are digits.

    Args:
        history: one value an iteration for each of ``cls`` and ``loc`` (weighted), ``share_solved``, ``precision``,
            and, for losses with boxes, ``weight``.
    """
    targets = [scenes[i][1] for i in range(len(scenes))]
    scores = torch.cat([found["scores"] for found in detections]).sort(descending=True).values
    num_drawn = min(sum(len(target["labels"]) for target in targets), len(scores))
    min_score = scores[num_drawn - 1].item() if num_drawn else 1.0
    shown = [i for i, target in enumerate(targets) if len(target["labels"]) >= 2][:8]

    figure = plt.figure(figsize=(17, 7.2), layout="constrained")
    figure.suptitle(title, fontsize=15, fontweight="bold")
    halves: Any = figure.subfigures(1, 2, width_ratios=(2.1, 1))
    left, right = halves
    for index, axes in zip(shown, left.subplots(2, 4).flat):
        _draw_scene(axes, *scenes[index], detections[index], min_score)
    frames = (
        (TRUTH, "--", "ground truth"),
        (RIGHT, "-", "found: right class, IoU of 0.5 or more"),
        (WRONG, "-", "false"),
    )
    left.legend(
        handles=[
            Rectangle((0, 0), 1, 1, fill=False, edgecolor=colour, linestyle=line, linewidth=2, label=label)
            for colour, line, label in frames
        ],
        title=f"class and score; drawn from {min_score:.2f} upwards, where there are as many detections as digits",
        loc="outside lower center",
        ncols=len(frames),
        fontsize=11,
        frameon=False,
    )

    balanced = "weight" in history
    panels = right.subplots(2 + balanced, 1, sharex=True, height_ratios=(1.6, 1, 1)[: 2 + balanced])
    losses, ranking = panels[:2]
    curves = (
        (losses, "cls", "classification", "#1f77b4"),
        (losses, "loc", "localisation", "#d95f02"),
        (ranking, "precision", "precision at a positive", "#1f77b4"),
        (ranking, "share_solved", "positives without a false positive", "#35a05b"),
    )
    for axes, name, label, colour in curves:
        axes.plot(history[name], color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(_smoothed(history[name]), color=colour, linewidth=2, label=label)
        axes.legend(frameon=False)
    losses.set(title="the two components of the loss, as they are minimised", ylabel="loss", yscale="log")
    ranking.set(title="the ranking of the batch", ylabel="mean, share", ylim=(0, 1))
    if balanced:
        panels[2].plot(history["weight"], color="#444444", linewidth=1.5)
        panels[2].set(title="self-balancing weight of the localisation loss", ylabel="weight", yscale="log")
    panels[-1].set(xlabel="iteration", xlim=(0, len(history["cls"])))
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _draw_scene(
    axes: Axes, image: Tensor, target: dict[str, Tensor], found: dict[str, Tensor], min_score: float
) -> None:
    axes.imshow(image[0].numpy(), cmap="gray", vmin=0, vmax=1, extent=(0, SIZE, SIZE, 0))
    axes.set_axis_off()
    for box in target["boxes"]:
        _draw_box(axes, box, TRUTH, linewidth=1.5, linestyle="--")
    match = (box_iou(found["boxes"], target["boxes"]) >= 0.5) & (found["labels"][:, None] == target["labels"])
    for i in range(int((found["scores"] >= min_score).sum())):
        colour = WRONG
        if match[i].any():  # best score first, and a digit is found only once
            colour = RIGHT
            match[:, match[i].int().argmax()] = False
        _draw_box(axes, found["boxes"][i], colour, linewidth=2)
        x, top, _, bottom = found["boxes"][i].tolist()
        right = colour == RIGHT
        axes.text(  # labels of false detections go below, off those of what they lie on
            x,
            top if right else bottom,
            f"{found['labels'][i]}  {found['scores'][i]:.2f}",
            fontsize=9,
            va="bottom" if right else "top",
            bbox={"facecolor": colour, "edgecolor": "none", "pad": 1.2},
        )


def _draw_box(axes: Axes, box: Tensor, colour: str, **style: Any) -> None:
    x1, y1, x2, y2 = box.tolist()
    axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, **style))


def _smoothed(values: list[float], window: int = 25) -> list[float]:
    """Mean of the last ``window`` values up to each."""
    return [sum(values[max(0, i + 1 - window) : i + 1]) / min(i + 1, window) for i in range(len(values))]
