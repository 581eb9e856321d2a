"""Memory over many steps: every member of the family in turn, forward and backward, with sizes that always change.

    python -m benchmarks.soak --steps 100000

Every few steps, after the collector of cycles has run, a row goes into the CSV file: the process's resident memory,
what Python holds, and how many tensors live; on a GPU what PyTorch has there. What grows is a leak. A run that was
stopped goes on where its file ends, as another process, whose memory is compared with itself alone; a file with all
its steps is only read. Its rows are drawn, and the growth after the warm-up of each process is held against bounds.
Linux only: the resident size comes from /proc.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import gc
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .memory import resident
from .report import RESULTS, claim, environment, print_claims, print_environment, print_table
from .soak_steps import take_step

# Growth in 10 000 steps that still counts as none. A leak of 1 kB in each step would be 10 MB; an object, or a tensor,
# that one of the twelve members keeps in each of its steps, 833 of them. The bar itself keeps an object or two.
LIMITS = {"resident_mb": 1.0, "objects": 400.0, "tensors": 10.0, "device_mb": 1.0}
# What the allocator takes or gives back at its pleasure, whatever the number of steps.
_ALLOCATOR_MB = 4.0
_NAMES = {
    "resident_mb": "MB of resident memory in 10 000 steps",
    "objects": "objects of Python in 10 000 steps",
    "tensors": "tensors in 10 000 steps",
    "device_mb": "MB of device memory in 10 000 steps",
}


@dataclasses.dataclass(frozen=True)
class Sample:
    """The state of a process after some steps."""

    process: int
    """0 for the first process that wrote into the file, 1 for the one that went on."""
    step: int
    seconds: float
    """Since the process began."""
    resident_mb: float
    objects: int
    """What the collector of cycles knows of."""
    tensors: int
    device_mb: float
    """What tensors on the GPU take; 0 without one."""
    device: str
    torch: str
    python: str


_FIELDS = {
    field.name: {"int": int, "float": float, "str": str}[str(field.type)] for field in dataclasses.fields(Sample)
}


def sample(process: int, step: int, seconds: float, device: torch.device) -> Sample:
    """Look at this process, when the collector has taken what is free."""
    gc.collect()
    objects = gc.get_objects()
    cuda = device.type == "cuda"
    return Sample(
        process,
        step,
        round(seconds, 1),
        round(resident("VmRSS") / 1e6, 2),
        len(objects),
        # By the type: isinstance asks for __class__, which proxies answer by importing things.
        sum(issubclass(type(thing), Tensor) for thing in objects),
        round(torch.cuda.memory_allocated(device) / 1e6, 2) if cuda else 0.0,
        torch.cuda.get_device_name(device) if cuda else "cpu",
        torch.__version__,
        platform.python_version(),
    )


def soak(
    step: Callable[[int], None], first: int, last: int, every: int, device: torch.device, process: int = 0
) -> Iterator[Sample]:
    """Take the steps ``first + 1`` to ``last``; a sample whenever ``every`` divides their number, and at the end."""
    began = time.perf_counter()
    for number in range(first + 1, last + 1):
        step(number)
        if number % every == 0 or number == last:
            yield sample(process, number, time.perf_counter() - began, device)


class Growth(NamedTuple):
    """How a quantity grew in a process."""

    amount: float
    steps: float

    @property
    def rate(self) -> float:
        """In 10 000 steps."""
        return self.amount / self.steps * 10_000


def growth(samples: Sequence[Sample], name: str, warm_up: int) -> Growth | None:
    """By how much a quantity grew, in that process where it grew fastest; None without eight samples of any.

    The warm-up of a process, its first steps, is left out. The median of the last third of its samples is compared with
    that of the first third, so that neither a peak nor a dip at either end decides.
    """
    found = []
    for process in {entry.process for entry in samples}:
        of = [entry for entry in samples if entry.process == process]
        before = of[0].step - (of[1].step - of[0].step if len(of) > 1 else 0)
        warm = [entry for entry in of if entry.step >= before + warm_up]
        if len(warm) >= 8:
            third = len(warm) // 3
            ends = [
                [statistics.median(getattr(entry, value) for entry in part) for value in ("step", name)]
                for part in (warm[:third], warm[-third:])
            ]
            found.append(Growth(ends[1][1] - ends[0][1], ends[1][0] - ends[0][0]))
    return max(found, key=lambda grown: grown.rate, default=None)


def verdict(samples: Sequence[Sample], warm_up: int) -> list[dict[str, Any]]:
    """Each growth against its limit.

    Raises:
        ValueError: for fewer than eight samples of a process after its warm-up.
    """
    claims = []
    for name, limit in LIMITS.items():
        grown = growth(samples, name, warm_up)
        if grown is None:
            raise ValueError(f"samples: expected 8 of a process after the warm-up of {warm_up} steps, got fewer")
        if name == "resident_mb":
            limit = max(limit, Growth(_ALLOCATOR_MB, grown.steps).rate)
        claims.append(claim(_NAMES[name], grown.rate, "<=", limit))
    return claims


def read(path: Path) -> list[Sample]:
    """The samples in a file, without what a killed process had begun to write; none where there is no file.

    Raises:
        ValueError: for a file with other columns.
    """
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        lines = file.read().splitlines(keepends=True)
    if lines and lines[0].strip().split(",") != list(_FIELDS):
        raise ValueError(f"{path} has other columns than this version writes: move it away")
    whole = [line for line in lines if line.endswith("\n")]
    if whole != lines:
        path.write_text("".join(whole), encoding="utf-8")
    return [Sample(**{name: convert(row[name]) for name, convert in _FIELDS.items()}) for row in csv.DictReader(whole)]


def append(path: Path, entry: Sample) -> None:
    """Add a row, and the header where the file is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        if file.tell() == 0:
            writer.writerow(_FIELDS)
        writer.writerow(dataclasses.astuple(entry))


def draw(samples: Sequence[Sample], path: Path) -> None:
    """A picture of resident memory, objects and tensors over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    panels = [("resident_mb", "resident memory, MB"), ("objects", "objects of Python"), ("tensors", "tensors alive")]
    if any(entry.device_mb for entry in samples):
        panels.append(("device_mb", "memory of tensors on the GPU, MB"))
    figure, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 3.6), layout="constrained")
    for ax, (name, label) in zip(axes, panels):
        for process in sorted({entry.process for entry in samples}):
            of = [entry for entry in samples if entry.process == process]
            ax.plot([entry.step for entry in of], [getattr(entry, name) for entry in of], color="#0072B2", linewidth=1)
        # From 0, so that a growth is as large as it looks.
        ax.set_ylim(0, 1.2 * max(1, *(getattr(entry, name) for entry in samples)))
        ax.set_xlim(0)
        ax.set_xlabel("steps")
        ax.set_ylabel(label)
        ax.xaxis.set_major_formatter("{x:,.0f}")
        ax.yaxis.set_major_locator(MaxNLocator(integer=True))
        ax.yaxis.set_major_formatter("{x:,.0f}")
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)
    print(f"written to {path}")


def _run(args: argparse.Namespace, last: Sample | None, device: torch.device) -> None:
    """Take the steps that the file lacks, with a bar. Nothing is kept here: neither samples, which go into the file,
    nor what the bar would remember of each step."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    def step(number: int) -> None:
        take_step(number, args.logits, args.positives, device, args.seed)

    first, process = (last.step, last.process + 1) if last else (0, 0)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("steps", total=args.steps, completed=first)
        for entry in soak(step, first, args.steps, args.every, device, process):
            append(args.csv, entry)
            state = f"steps, {entry.resident_mb:.0f} MB, {entry.tensors} tensors"
            bar.update(task, completed=entry.step, description=state)


def main(argv: Sequence[str] | None = None) -> int:
    """Run, draw and judge; returns 1 where something grows, 2 where that cannot be told, 130 if interrupted."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=100_000, help="in all (default: %(default)s)")
    parser.add_argument("--every", type=int, default=500, help="steps between two samples (default: %(default)s)")
    parser.add_argument("--warm-up", type=int, help="steps of a process left out (default: a fifth, at most 10 000)")
    parser.add_argument("--logits", type=int, default=10_000, help="M at most (default: %(default)s)")
    parser.add_argument("--positives", type=int, default=300, help="P at most (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--csv", type=Path, default=RESULTS / "soak.csv", help="samples (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("docs/images/soak.png"), help="picture of them")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    torch.set_num_threads(1)  # the tensors are small
    samples = read(args.csv)
    print_environment(environment("benchmarks.soak"))
    try:
        if not samples or samples[-1].step < args.steps:
            _run(args, samples[-1] if samples else None, device)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    samples = read(args.csv)
    every = [samples[len(samples) * k // 10] for k in range(10)] if len(samples) > 10 else list(samples)
    rows = [(f"{s.step:,}", f"{s.resident_mb:.1f}", s.objects, s.tensors, f"{s.device_mb:.1f}") for s in every]
    rows += [(f"{s.step:,}", f"{s.resident_mb:.1f}", s.objects, s.tensors, f"{s.device_mb:.1f}") for s in samples[-1:]]
    print_table("Memory", ["steps", "resident, MB", "objects", "tensors", "on the GPU, MB"], rows)
    draw(samples, args.output)
    try:
        claims = verdict(samples, min(args.steps // 5, 10_000) if args.warm_up is None else args.warm_up)
    except ValueError as error:
        print(f"no verdict: {error}; take more steps in one go", file=sys.stderr)
        return 2
    print_claims(claims)
    return 0 if all(entry["met"] for entry in claims) else 1


if __name__ == "__main__":
    sys.exit(main())
