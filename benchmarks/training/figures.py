"""The figures of an experiment."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle
from torch import Tensor
from torchvision.io import ImageReadMode, read_image
from torchvision.ops import box_iou

from .contenders import CONTENDERS
from .data import Dataset, Sample, Split
from .plan import Plan
from .run import Run

TRUTH, RIGHT, WRONG = "#FFFFFF", "#56B4E9", "#D55E00"
_IMAGES, _LOSSES = 4, 5


def draw(plan: Plan, dataset: Dataset, split: str, folder: Path) -> list[Path]:
    """Write what can be drawn of the runs there are; returns the files."""
    found = [draw_curves(plan, split, folder / "curves.png"), _detections(plan, dataset, split, folder)]
    return [path for path in found if path is not None]


def draw_curves(plan: Plan, split: str, path: Path) -> Path | None:
    """AP and oLRP by length of training, with the standard deviation."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    some = False
    for k, name in enumerate(plan.contenders):
        lengths = [length for length in plan.lengths if plan.records(name, length)]
        some |= bool(lengths)
        for one, key in zip(axes, ("ap", "olrp")):
            values = [[100 * record[split][key] for record in plan.records(name, length)] for length in lengths]
            deviations = [statistics.stdev(each) if len(each) > 1 else 0.0 for each in values]
            means = [statistics.mean(each) for each in values]
            style = {"marker": "osDv^<>"[k % 7], "linestyle": "-" if k < 10 else "--"}
            one.errorbar(lengths, means, deviations, label=CONTENDERS[name].title, capsize=3, linewidth=1.3, **style)
    for one, title in zip(axes, ("AP", "oLRP (lower is better)")):
        one.set(xscale="log", xlabel="passes over the training images", title=title)
        one.set_xticks(plan.lengths, [f"{length:g}" for length in plan.lengths], minor=False)
        one.minorticks_off()
        one.grid(alpha=0.3)
        one.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
    if some:
        figure.savefig(path, dpi=110)
    plt.close(figure)
    return path if some else None


def _detections(plan: Plan, dataset: Dataset, split: str, folder: Path) -> Path | None:
    """Detections of the first seed's longest runs, side by side: in all images together, as many as there are objects,
    the best first, since scores of ranking losses are no probabilities."""
    of_loss: dict[str, list[dict[str, Any]]] = {}
    for name in plan.contenders:
        for run in plan.runs(name, plan.lengths[-1])[:1]:
            file = detections_of(folder, run, split)
            if file.exists() and len(of_loss) < _LOSSES:
                of_loss[name] = json.loads(file.read_text(encoding="utf-8"))
    # Images with some objects tell more than those with one or a crowd.
    samples = sorted(dataset.splits[split].samples, key=lambda sample: not 2 <= len(sample.boxes) <= 12)[:_IMAGES]
    if not of_loss:
        return None
    size = (3.2 * len(samples), 2.9 * len(of_loss))
    figure, grid = plt.subplots(len(of_loss), len(samples), figsize=size, layout="constrained", squeeze=False)
    for row, (name, detections) in zip(grid, of_loss.items()):
        limit = _limit(detections, dataset.splits[split])
        by_image = defaultdict(list)
        for one in detections:
            if one["score"] >= limit:
                by_image[one["image_id"]].append(one)
        for axes, sample in zip(row, samples):
            _draw_image(axes, sample, by_image[sample.image_id], dataset.classes)
        row[0].set_title(f"{CONTENDERS[name].title}, from {limit:.2f}", loc="left", fontsize=9)
    path = folder / "detections.png"
    figure.savefig(path, dpi=80)
    plt.close(figure)
    return path


def detections_of(folder: Path, run: Run, split: str) -> Path:
    """The file of a run's detections."""
    return folder / "detections" / f"{run.key}-{split}.json"


def _limit(detections: list[dict[str, Any]], split: Split) -> float:
    scores = sorted((one["score"] for one in detections), reverse=True)
    number = sum(len(sample.boxes) for sample in split.samples)
    return float(scores[min(number, len(scores)) - 1]) if scores else 1.0


def _draw_image(axes: Any, sample: Sample, found: list[dict[str, Any]], classes: list[tuple[int, str]]) -> None:
    axes.imshow(read_image(str(sample.path), ImageReadMode.RGB).permute(1, 2, 0).numpy())
    axes.set_axis_off()
    for box in sample.boxes:
        _draw_box(axes, box, TRUTH, linestyle="--", linewidth=1.0)
    names = dict(classes)
    free = torch.ones(len(sample.boxes), dtype=torch.bool)
    numbers = torch.tensor([classes[label][0] for label in sample.labels.tolist()])
    for one in sorted(found, key=lambda one: -one["score"]):
        box = torch.tensor(one["bbox"])
        box[2:] += box[:2]
        ious = box_iou(box[None], sample.boxes)[0] * (free & (numbers == one["category_id"]))
        right = bool((ious >= 0.5).any())
        if right:
            free[ious.argmax()] = False
        colour = RIGHT if right else WRONG
        _draw_box(axes, box, colour, linewidth=1.6)
        axes.text(*box[:2].tolist(), names[one["category_id"]], fontsize=6, va="bottom",
                  bbox={"facecolor": colour, "edgecolor": "none", "pad": 0.6})  # fmt: skip


def _draw_box(axes: Any, box: Tensor, colour: str, **style: Any) -> None:
    x1, y1, x2, y2 = box.tolist()
    axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, **style))
