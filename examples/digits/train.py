"""Train a RetinaNet with a ranking loss on scenes of handwritten digits, and show what it learned.

    python examples/digits/train.py --output demo-output
    python examples/digits/train.py --loss own --output own-output

A minute or two on two CPU cores; a GPU is used if there is one. No downloads: the digits come with scikit-learn. The
test scenes show digits that no training scene contains.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import time
from pathlib import Path

# Before torch starts its threads: one that waits should sleep. Where all cores are taken, if only by the process that
# composes scenes, threads that spin keep the others from running, and an iteration can take ten times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import report
import torch
from detector import build_detector
from losses import LOSSES, TITLES
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from scenes import NUM_CLASSES, SIZE, DigitScenes
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.models.detection import RetinaNet

from alrp_triton.boxes import box_error

SHOWN_EVERY = 10  # iterations; each showing waits for the device

Batch = tuple[list[Tensor], list[dict[str, Tensor]]]


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--loss", choices=LOSSES, default="alrp", help="of the scores; alrp and rank-sort, also of boxes"
    )
    parser.add_argument("--iterations", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=16, help="scenes in an iteration")
    parser.add_argument("--learning-rate", type=float, default=4e-3, help="the highest of the schedule")
    parser.add_argument("--test-scenes", type=int, default=400)
    parser.add_argument("--workers", type=int, default=1, help="processes that compose scenes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder for metrics and picture")
    parser.add_argument("--checkpoint", action="store_true", help="also save the model's state_dict there")
    parser.add_argument("--save-logits", type=Path, metavar="FILE.npz", help="logits of three stages of training")
    parser.add_argument("--require-ap50", type=float, metavar="AP50", help="exit with status 1 below this, 0..1")
    options = parser.parse_args(arguments)
    if options.save_logits and options.loss != "alrp":
        parser.error("--save-logits needs --loss alrp, whose localisation errors it saves, too")
    return options


def collate(scenes: list[tuple[Tensor, dict[str, Tensor]]]) -> Batch:
    images, targets = zip(*scenes)
    return list(images), list(targets)


def to_device(batch: Batch, device: torch.device) -> Batch:
    images, targets = batch
    return [image.to(device) for image in images], [
        {name: value.to(device) for name, value in target.items()} for target in targets
    ]


class Stages:
    """The classification logits of one batch of held-out scenes early, in the middle and late in training."""

    def __init__(self, iterations: int, device: torch.device) -> None:
        scenes = DigitScenes("test", 2)
        self.batch = to_device(collate([scenes[i] for i in range(len(scenes))]), device)
        self.names = {0: "early", round(0.15 * iterations): "middle", iterations: "late"}
        self.arrays: dict[str, NDArray[np.generic]] = {}

    @torch.no_grad()
    def record(self, iteration: int, model: RetinaNet) -> None:
        """If a stage begins at ``iteration``: its logits [2, A, C], labels [2, A] and localisation errors [P]."""
        if iteration not in self.names:
            return
        inputs: list[tuple[Tensor, ...]] = []
        twin = copy.deepcopy(model).train()  # with a criterion of its own, whose weight may move
        twin.head.ranking_criterion.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments))
        twin(*self.batch)
        logits, labels, *boxes = inputs[0]
        errors = box_error(*boxes, twin.head.ranking_criterion.box_error, twin.head.ranking_criterion.tau)
        for name, value in (("logits", logits.half()), ("labels", labels.to(torch.int8)), ("loc_errors", errors)):
            self.arrays[f"{self.names[iteration]}_{name}"] = value.cpu().numpy()


def train(
    model: RetinaNet, options: argparse.Namespace, console: Console, stages: Stages | None
) -> dict[str, list[float]]:
    """Train in place; returns of every iteration the two loss components (loc weighted), the share of the positives
    without a false positive, the mean precision at the positives, and the weight of loc if it has one."""
    scenes = DigitScenes("train", options.iterations * options.batch_size, options.seed)  # each is seen once
    loader = DataLoader(scenes, options.batch_size, num_workers=options.workers, collate_fn=collate)
    optimizer = torch.optim.AdamW(model.parameters(), options.learning_rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(  # a short linear-like warmup, then a cosine down to nothing
        optimizer, options.learning_rate, options.iterations, pct_start=0.1
    )
    criterion = model.head.ranking_criterion
    criterion.monitor = True
    counted = ("share_solved", "precision", *(["weight"] if criterion.takes_boxes else []))
    shown = ("cls", "loc", *counted)
    history: list[Tensor] = []
    columns = [TextColumn(f"{report.NAMES.get(name, name)} [bold]{{task.fields[{name}]}}") for name in shown]
    with Progress(
        BarColumn(7), MofNCompleteColumn(), *columns, TimeRemainingColumn(compact=True), console=console
    ) as bar:
        task = bar.add_task("", total=options.iterations, **dict.fromkeys(shown, ""))
        model.train()
        for iteration, batch in enumerate(loader):
            if stages is not None:
                stages.record(iteration, model)
            losses = model(*to_device(batch, options.device))
            optimizer.zero_grad()
            sum(losses.values()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            optimizer.step()
            schedule.step()
            values = [losses["classification"], losses["bbox_regression"], *(criterion.stats[name] for name in counted)]
            history.append(torch.stack(values).detach())
            if iteration % SHOWN_EVERY == 0:
                bar.update(task, **{name: f"{value:.2f}" for name, value in zip(shown, history[-1].tolist())})
            bar.advance(task)
    if stages is not None:
        stages.record(options.iterations, model)
    return dict(zip(shown, torch.stack(history, 1).tolist()))


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    console = Console()
    torch.manual_seed(options.seed)
    model = LOSSES[options.loss](build_detector(NUM_CLASSES, SIZE).to(options.device))
    stages = Stages(options.iterations, options.device) if options.save_logits else None
    start = time.perf_counter()
    history = train(model, options, console, stages)
    seconds = time.perf_counter() - start

    test_scenes = DigitScenes("test", options.test_scenes, options.seed)
    with console.status(f"detecting in {len(test_scenes)} scenes of held-out digits"):
        detections = report.detect(model, test_scenes, options.device)
        precision = report.measure(detections, test_scenes)
    table = Table("AP", "AP50", "AP75", "oLRP", "training", title=f"{len(test_scenes)} scenes of held-out digits")
    table.add_row(*(f"{value:.3f}" for value in precision.values()), f"{seconds:.0f} s on {options.device}")
    console.print(table)

    options.output.mkdir(parents=True, exist_ok=True)
    summary = f"AP {precision['AP']:.2f}, AP50 {precision['AP50']:.2f}, AP75 {precision['AP75']:.2f}"
    title = f"RetinaNet trained with {TITLES[options.loss]}, on scenes of held-out handwritten digits: {summary}"
    report.draw(options.output / "detections.png", title, test_scenes, detections, history)
    metrics = {**precision, "training_seconds": round(seconds, 1)}
    settings = {name: value for name, value in vars(options).items() if isinstance(value, (int, float, str))}
    (options.output / "metrics.json").write_text(
        json.dumps({**metrics, "device": str(options.device), **settings, "history": history}, indent=1) + "\n",
        encoding="utf-8",
    )
    if options.checkpoint:
        torch.save(model.state_dict(), options.output / "detector.pt")
    if stages is not None:
        np.savez_compressed(options.save_logits, **stages.arrays)
    console.print(f"written to {options.output}/: " + ", ".join(sorted(file.name for file in options.output.iterdir())))

    if options.require_ap50 is not None and precision["AP50"] < options.require_ap50:
        console.print(f"[bold red]AP50 {precision['AP50']:.3f} is below the required {options.require_ap50:.3f}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
