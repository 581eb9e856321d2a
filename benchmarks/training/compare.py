"""``alrp-triton compare``: train a detector with each loss on your data, and say which is better, and when."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

# Before torch starts its threads; the processes of the runs inherit it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from rich.console import Console
from rich.progress import Progress

from . import report
from .backbone import CHANNELS
from .contenders import CONTENDERS
from .data import Dataset, read
from .figures import detections_of
from .plan import Plan, Store
from .run import Experiment, Run, Setting
from .workers import Perform, Record, perform_missing

_LOSSES = ("focal", "ap", "rank-sort", "alrp")


def parse_arguments(arguments: Sequence[str] | None, prog: str) -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Train the same detector with several losses on data in COCO's format, each with its best learning "
        "rate, and compare them. Finished runs are kept: run the same command again after an interruption.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    data = parser.add_argument_group("data")
    data.add_argument("--train", type=Path, metavar="FILE", help="annotations to train on")
    data.add_argument("--val", type=Path, metavar="FILE", help="annotations that choose learning rates")
    data.add_argument("--test", type=Path, metavar="FILE", help="annotations for the tables; without, those of --val")
    data.add_argument("--images", type=Path, metavar="DIR", help="the folder of the images")
    data.add_argument("--data", type=Path, metavar="DIR", help="in place of these, DIR/annotations and DIR/images")
    what = parser.add_argument_group("what is compared")
    what.add_argument("--losses", "--loss", nargs="+", choices=CONTENDERS, default=list(_LOSSES), metavar="LOSS",
                      help=f"of {', '.join(CONTENDERS)}")  # fmt: skip
    what.add_argument("--schedule", type=float, nargs="+", default=[1.0, 4.0, 12.0], metavar="N",
                      help="lengths of the trainings, in passes over the images")  # fmt: skip
    what.add_argument("--seeds", type=int, default=3, metavar="N", help="trainings of each loss and length")
    what.add_argument("--rates", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2], metavar="RATE",
                      help="learning rates to try, with the middle length")  # fmt: skip
    network = parser.add_argument_group("network")
    network.add_argument("--backbone", choices=("efficientnet_lite0", "random"), default="efficientnet_lite0",
                         help="with weights of ImageNet, or without")  # fmt: skip
    network.add_argument("--frozen", type=int, choices=(0, *CHANNELS), default=8,
                         help="stages of the backbone, of eight, that are not trained")  # fmt: skip
    network.add_argument("--size", type=int, default=256, help="longer side of the images, in pixels")
    network.add_argument("--batch-size", type=int, default=16)
    network.add_argument("--backbone-factor", type=float, default=0.1, help="of its learning rate")
    parser.add_argument("--output", type=Path, default=Path("compare-output"), metavar="DIR",
                        help="folder of results, tables, figures and features")  # fmt: skip
    parser.add_argument("--results", type=Path, metavar="FILE", help="finished runs; by default OUTPUT/runs.jsonl")
    parser.add_argument("--jobs", type=int, default=1 if cuda else os.cpu_count() or 1, help="runs at a time")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--report", action="store_true", help="train nothing: tables and figures of what there is")
    options = parser.parse_args(arguments)
    if options.data is not None:
        options.images = options.images or options.data / "images"
        for split in ("train", "val", "test"):
            file = options.data / "annotations" / f"{split}.json"
            if getattr(options, split) is None and (split != "test" or file.exists()):
                setattr(options, split, file)
    if None in (options.train, options.val, options.images):
        parser.error("--train, --val and --images are needed, or --data")
    for name in ("schedule", "rates"):
        if min(getattr(options, name)) <= 0:
            parser.error(f"--{name}: expected numbers above 0")
    for name in ("seeds", "size", "batch_size", "jobs"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1")
    return options


def main(arguments: Sequence[str] | None = None, prog: str = "python -m benchmarks.training") -> int:
    """Train what is missing, then write tables and figures; returns the exit status."""
    options = parse_arguments(arguments, prog)
    # A file or a pipe has no width of its own.
    console = Console(width=None if sys.stdout.isatty() else 160)
    files = {name: file for name in ("train", "val", "test") if (file := getattr(options, name)) is not None}
    pretrained = options.backbone != "random"
    setting = Setting(options.size, options.frozen, options.batch_size, options.backbone_factor, pretrained)
    try:
        dataset = read(files, options.images)
        store = Store(options.results or options.output / "runs.jsonl", Run, vars(setting))
        plan = Plan(store, options.losses, options.rates, range(options.seeds), options.schedule)
        if not options.report:
            longest = max(options.schedule)
            make = partial(_performer, files, options.images, setting, options.output, options.device, longest)
            _prepare(dataset, setting, options.output, console)
            perform_missing(plan.missing, plan.number, make, partial(_keep, store), options.jobs, console)
    except (ImportError, OSError, TypeError, ValueError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 1
    report.write(plan, dataset, options.output, console)
    return 0


def _prepare(dataset: Dataset, setting: Setting, output: Path, console: Console) -> None:
    """Make the inputs, once for all processes."""
    with Progress(console=console, transient=True) as bars:
        tasks = {name: bars.add_task(name, total=len(split.samples)) for name, split in dataset.splits.items()}
        Experiment(dataset, setting, output / "inputs", lambda name, done: bars.update(tasks[name], completed=done))


def _performer(
    files: dict[str, Path], images: Path, setting: Setting, output: Path, device: str, longest: float
) -> Perform:
    experiment = Experiment(read(files, images), setting, output / "inputs")

    def perform(run: Run, progress: Callable[[float], None]) -> Record:
        def keep(split: str, detections: list[dict[str, Any]]) -> None:
            if run.seed == 0 and run.passes == longest:  # what the report draws
                path = detections_of(output, run, split)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(detections), encoding="utf-8")

        return experiment.perform(run, torch.device(device), progress, keep)

    return perform


def _keep(store: Store[Run], record: Record) -> str:
    run = store.add(record)
    splits = [split for split in ("val", "test") if split in record]
    shown = [f"{split} AP {record[split]['ap']:.3f} oLRP {record[split]['olrp']:.3f}" for split in splits]
    return f"{run.key}: {', '.join(shown)}, {record['training_seconds']:.0f} s"
