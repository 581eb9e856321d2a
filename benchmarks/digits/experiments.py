"""The command of the experiments on digits: runs what is missing, beside one another, then writes the report."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

# As in examples/digits/train.py, before torch starts its threads; the processes of the runs inherit it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from rich.console import Console

from ..training.plan import Record, Store
from ..training.workers import Perform, perform_missing
from . import ROOT, report
from .run import Run, perform
from .schedule import Schedule
from .settings import SETTINGS, TABLES

RESULTS = ROOT / "benchmarks" / "results" / "digits" / "runs.jsonl"


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.digits", description=__doc__)
    parser.add_argument("--table", type=int, action="append", choices=TABLES, help="only this; may be repeated")
    parser.add_argument("--setting", action="append", choices=SETTINGS, help="only this one; may be repeated")
    parser.add_argument("--seeds", type=_at_least(1), default=3, help="runs of each setting")
    parser.add_argument("--iterations", type=_at_least(20), default=400, help="of each run, 20 or more")
    parser.add_argument("--jobs", type=_at_least(1), default=1 if cuda else os.cpu_count(), help="runs at a time")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FILE", help="where finished runs are kept")
    parser.add_argument("--report", action="store_true", help="train nothing: tables and figures of what there is")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of design/experiments.md and images/")
    return parser.parse_args(arguments)


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is less than {least}")
        return value

    return number


def schedule_of(options: argparse.Namespace) -> Schedule:
    """The schedule that the options describe, with what has been run so far."""
    tables = options.table or list(TABLES)
    names = options.setting or list(dict.fromkeys(name for table in tables for name in TABLES[table]))
    return Schedule(Store(options.results, Run), names, range(options.seeds), options.iterations)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    # What goes to a file or a pipe has no width of its own.
    console = Console(width=None if sys.stdout.isatty() else 120)
    schedule = schedule_of(options)
    if not options.report:
        make, keep = partial(_performer, options.device), partial(_keep, schedule)
        perform_missing(schedule.missing, schedule.number, make, keep, options.jobs, console)
    report.write(schedule, options.docs, console)
    return 0


def _performer(device: str) -> Perform:
    def perform_here(run: Run, progress: Callable[[float], None]) -> Record:
        return perform(run, torch.device(device), lambda iteration: progress(iteration / run.iterations))

    return perform_here


def _keep(schedule: Schedule, record: Record) -> str:
    run = schedule.store.add(record)
    found = f"AP {record['test']['ap']:.3f}, oLRP {record['test']['olrp']:.3f}"
    return f"{run.key}: {found}, validation AP {record['validation']['ap']:.3f}, {record['training_seconds']:.0f} s"
