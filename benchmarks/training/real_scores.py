"""Train a detector on photographs, and keep its scores early, in the middle and late in training.

    python -m benchmarks.training.real_scores --data FOLDER [--iterations N]

The folder has ``images``, ``annotations/train.json`` and ``annotations/test.json``, in COCO's format. The detector is
torchvision's RetinaNet on EfficientNet-Lite0 (:mod:`.backbone`), with Rank & Sort Loss. What is kept are numbers: for
one image of the test split all logits, in the order of memory, and for several images those of the positives
(``results/scores.npz``).
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.io import ImageReadMode, read_image
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator

from alrp_triton import RankSortLoss
from alrp_triton.integrations.torchvision import use_loss

from ..workloads import RECORDED
from .backbone import MEAN, STD, EfficientNetLite0, Pyramid

Sample = tuple[Tensor, dict[str, Tensor]]
_BATCH, _LEARNING_RATE, _IMAGES_OF_POSITIVES = 8, 1e-3, 24
# Iterations after which scores are kept, as shares of all.
_STAGES = {"early": 0.01, "middle": 0.15, "late": 1.0}


class Photographs:
    """Images with boxes and classes from 0, without crowds."""

    def __init__(self, folder: Path, split: str) -> None:
        about: dict[str, Any] = json.loads((folder / "annotations" / f"{split}.json").read_text(encoding="utf-8"))
        number = {category["id"]: k for k, category in enumerate(about["categories"])}
        boxes: defaultdict[int, list[list[float]]] = defaultdict(list)
        for one in about["annotations"]:
            if not one["iscrowd"]:
                x, y, width, height = one["bbox"]
                boxes[one["image_id"]].append([x, y, x + width, y + height, number[one["category_id"]]])
        self.num_classes = len(number)
        self._images = [(folder / "images" / image["file_name"], boxes[image["id"]]) for image in about["images"]]
        self._images = [(path, found) for path, found in self._images if found]

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Sample:
        path, boxes = self._images[index]
        image = read_image(str(path), ImageReadMode.RGB).float() / 255
        numbers = torch.tensor(boxes)
        return image, {"boxes": numbers[:, :4], "labels": numbers[:, 4].long()}


class Keeping(RankSortLoss):
    """The loss, which keeps the scores of its last call."""

    seen: tuple[Tensor, Tensor]

    def forward(self, logits: Any, labels: Any, *boxes: Any, **named: Any) -> Any:
        """As of the loss."""
        together = [[levels] if isinstance(levels, Tensor) else levels for levels in (logits, labels)]
        self.seen = (
            torch.cat([x.detach().reshape(-1, x.shape[-1]) for x in together[0]]),
            torch.cat([y.reshape(-1) for y in together[1]]),
        )
        return super().forward(logits, labels, *boxes, **named)


def detector(num_classes: int) -> tuple[RetinaNet, Keeping]:
    """Of images whose longer side is 256, with its loss."""
    sizes = tuple(tuple(int(size * 2 ** (k / 3)) for k in range(3)) for size in (16, 32, 64, 128, 192))
    model = RetinaNet(
        Pyramid(EfficientNetLite0(frozen=4)),
        num_classes,
        min_size=256,
        max_size=256,
        image_mean=[MEAN] * 3,
        image_std=[STD] * 3,
        anchor_generator=AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5),
    )
    criterion = Keeping()
    use_loss(model, criterion)
    return model, criterion


def scores_of(model: RetinaNet, criterion: Keeping, samples: Sequence[Sample]) -> dict[str, Tensor]:
    """The logits of the first image, without its positives, and the logits of the positives of all images."""
    positives, negatives = [], torch.empty(0)
    for k, (image, target) in enumerate(samples):
        with torch.no_grad():
            model([image], [target])
        logits, labels = criterion.seen
        is_positive = labels[:, None] == torch.arange(logits.shape[1])
        positives.append(logits[is_positive])
        if k == 0:
            # What replaces positives and ignored anchors are scores of the row before, so that the order stays.
            usable = (labels == logits.shape[1]).nonzero().squeeze(1)
            rows = torch.searchsorted(usable, torch.arange(len(labels)), right=True).sub(1).clamp(min=0)
            negatives = logits[usable[rows]].reshape(-1)
    return {"negatives": negatives, "positives": torch.cat(positives)}


def train(folder: Path, iterations: int, seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    """The scores of all stages, in half precision."""
    torch.manual_seed(seed)
    images, others = Photographs(folder, "train"), Photographs(folder, "test")
    model, criterion = detector(images.num_classes)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=_LEARNING_RATE, weight_decay=1e-4)
    kept: dict[str, np.ndarray[Any, Any]] = {}
    stages = {max(1, round(share * iterations)): name for name, share in _STAGES.items()}
    samples = [others[k] for k in range(_IMAGES_OF_POSITIVES)]
    for iteration in range(1, iterations + 1):
        rate = _LEARNING_RATE * min(1.0, iteration / 50) * (0.1 if iteration > 0.8 * iterations else 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = [images[int(k)] for k in torch.randint(len(images), (_BATCH,))]
        losses = model(*map(list, zip(*batch)))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        nn.utils.clip_grad_norm_(trained, 10.0)
        optimizer.step()
        if iteration % 20 == 0:
            print(iteration, {name: round(float(loss.detach()), 3) for name, loss in losses.items()}, flush=True)
        if iteration in stages:
            for kind, scores in scores_of(model, criterion, samples).items():
                kept[f"{stages[iteration]} {kind}"] = scores.half().numpy()
    return kept


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, and write what is kept."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training.real_scores",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--iterations", type=int, default=1500)
    parser.add_argument("--output", type=Path, default=RECORDED)
    options = parser.parse_args(arguments)
    np.savez_compressed(options.output, **train(options.data, options.iterations))  # type: ignore[arg-type]
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
