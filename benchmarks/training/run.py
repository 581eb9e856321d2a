"""One run: train a detector with one loss, evaluate it, and return all that tables and figures need."""

from __future__ import annotations

import datetime
import math
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor

import alrp_triton
from alrp_triton import SelfBalance
from alrp_triton.metrics import evaluate

from .backbone import EfficientNetLite0
from .contenders import CONTENDERS
from .data import Dataset, Split, canvas_of
from .detector import NINE, Anchors, Detector
from .inputs import Inputs

METRICS = ("ap", "ap50", "ap75", "ap90", "olrp", "olrp_loc", "olrp_fp", "olrp_fn", "rho")
_RECORDS = 60  # in the history of a run
_EVALUATED = 8  # images at a time
_NORM = 10.0  # gradients are clipped to
_WARM_UP = 0.1  # share of the iterations


@dataclass(frozen=True)
class Run:
    """What tells a run from the others of an experiment; ``passes`` over the training images."""

    contender: str
    learning_rate: float
    seed: int
    passes: float

    @property
    def key(self) -> str:
        """For people and file names."""
        return f"{self.contender}-rate{self.learning_rate:g}-passes{self.passes:g}-seed{self.seed}"


@dataclass(frozen=True)
class Setting:
    """What all runs of an experiment share."""

    size: int = 256
    frozen: int = 8
    batch_size: int = 16
    backbone_factor: float = 0.1
    pretrained: bool = True


class Experiment:
    """A dataset with the inputs of its detector.

    Args:
        dataset: with the splits ``train``, ``val`` and perhaps ``test``.
        setting: see there.
        cache: folder of inputs.
        progress: called with a split's name and the number of its images that are ready.
    """

    def __init__(
        self, dataset: Dataset, setting: Setting, cache: Path, progress: Callable[[str, int], None] = lambda *_: None
    ) -> None:
        self.dataset, self.setting = dataset, setting
        self.canvas = canvas_of(dataset, setting.size)
        backbone = self._backbone().eval()
        self.inputs = {
            name: Inputs(
                split,
                cache,
                backbone,
                setting.size,
                self.canvas,
                lambda done, name=name: progress(name, done),  # type: ignore[misc]
            )
            for name, split in dataset.splits.items()
        }

    def _backbone(self) -> EfficientNetLite0:
        return EfficientNetLite0(self.setting.pretrained, self.setting.frozen)

    def detector(self, seed: int, anchors: Anchors = NINE) -> Detector:
        """A new detector; the seed determines its weights beyond the backbone's."""
        torch.manual_seed(seed)
        detector = Detector(len(self.dataset.classes), self.canvas, self._backbone(), anchors)
        # Faster on CPUs and GPUs alike.
        detector.to(memory_format=torch.channels_last)
        return detector

    def train(
        self, run: Run, device: torch.device, watch: Callable[[float, Detector], None]
    ) -> tuple[Detector, dict[str, list[float]]]:
        """The trained detector, and the parts of the loss over training.

        Args:
            watch: called from time to time, and at the end, with the share that is done and the detector.
        """
        contender = CONTENDERS[run.contender]
        model = self.detector(run.seed, contender.anchors).to(device)
        criterion = contender.prepare(model)
        model.train()
        inputs, size = self.inputs["train"], self.setting.batch_size
        per_pass = max(1, len(inputs) // size)
        iterations = max(1, round(run.passes * per_pass))
        groups = model.parameter_groups(run.learning_rate, self.setting.backbone_factor)
        optimizer = torch.optim.AdamW(groups, run.learning_rate, weight_decay=1e-4)
        rates = [group["lr"] for group in groups]
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, iterations + 1, pct_start=_WARM_UP)
        balances = [part for part in criterion.modules() if isinstance(part, SelfBalance) and part.period is None]
        generator = torch.Generator().manual_seed(run.seed)
        history: dict[str, list[float]] = {"iteration": [], "cls": [], "loc": []}
        order: list[int] = []
        for iteration in range(iterations):
            if len(order) < size:
                order = torch.randperm(len(inputs), generator=generator).tolist()
                order *= math.ceil(size / len(order))
            batch, order = order[:size], order[size:]
            mirrored = (torch.rand(size, generator=generator) < 0.5).tolist()
            losses = model.losses(*inputs.batch(batch, mirrored, device))
            optimizer.zero_grad()
            torch.stack(list(losses.values())).sum().backward()
            torch.nn.utils.clip_grad_norm_([x for group in groups for x in group["params"]], _NORM)
            optimizer.step()
            schedule.step()
            if (iteration + 1) % per_pass == 0:
                for balance in balances:
                    balance.step_epoch()
            if iteration % max(1, iterations // _RECORDS) == 0 or iteration == iterations - 1:
                for name, value in zip(history, (iteration, losses["classification"], losses["bbox_regression"])):
                    history[name].append(float(f"{float(torch.as_tensor(value).detach()):.4g}"))
                watch((iteration + 1) / iterations, model)
        return model, history

    def detections(self, model: Detector, split: str, device: torch.device) -> list[dict[str, Any]]:
        """In COCO's format."""
        inputs, found = self.inputs[split], []
        model.eval()
        for begin in range(0, len(inputs), _EVALUATED):
            indices = list(range(begin, min(begin + _EVALUATED, len(inputs))))
            features, _ = inputs.batch(indices, [False] * len(indices), device)
            for index, each in zip(indices, model.detect(features, [inputs.shape(i) for i in indices])):
                found += self._in_coco(inputs, index, each)
        return found

    def _in_coco(self, inputs: Inputs, index: int, found: dict[str, Tensor]) -> list[dict[str, Any]]:
        boxes = found["boxes"].cpu().double() / inputs.scale(index)
        boxes[:, 2:] -= boxes[:, :2]
        image_id, classes = inputs.samples[index].image_id, self.dataset.classes
        columns = boxes.tolist(), found["scores"].tolist(), found["labels"].tolist()
        return [
            {
                "image_id": image_id,
                "category_id": classes[label][0],
                "bbox": [round(side, 2) for side in box],
                "score": score,
            }
            for box, score, label in zip(*columns)
        ]

    def perform(
        self,
        run: Run,
        device: torch.device,
        progress: Callable[[float], None],
        keep: Callable[[str, list[dict[str, Any]]], None] = lambda *_: None,
    ) -> dict[str, Any]:
        """Train and evaluate; returns the record of the run, of plain numbers and strings.

        Args:
            keep: called with the name of each split but ``train``, and the detections.
        """
        start = time.perf_counter()
        model, history = self.train(run, device, lambda share, _: progress(share))
        seconds = time.perf_counter() - start
        found = {}
        for name in [name for name in self.inputs if name != "train"]:
            detections = self.detections(model, name, device)
            found[name] = measure(self.dataset.splits[name], detections)
            keep(name, detections)
        return {
            **vars(run),
            **found,
            "history": history,
            "training_seconds": round(seconds, 1),
            "setting": vars(self.setting),
            **circumstances(device),
        }


def circumstances(device: torch.device) -> dict[str, Any]:
    """Device, versions and date, for a record."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "versions": {
            "alrp_triton": alrp_triton.__version__,
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "python": platform.python_version(),
        },
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }


def measure(split: Split, detections: list[dict[str, Any]]) -> dict[str, Any]:
    """The metrics of the tables, and AP and oLRP by class; None where one is undefined."""
    found = evaluate(split.truth, detections, area_ranges={})
    by_class = {one.name: [_plain(one.ap), _plain(one.olrp)] for one in found.per_class.values()}
    return {**{name: _plain(getattr(found, name)) for name in METRICS}, "by_class": by_class}


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 5)
