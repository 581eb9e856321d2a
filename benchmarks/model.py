"""A model of the time on GPUs, computed from what was counted. Nothing it says has been measured.

    python -m benchmarks.model [--logits M] [--positives P] [--dtype D] [--bounds] [--assumptions]

The counts are those of benchmarks/results/executed.json (:mod:`.gate`), the numbers of each GPU those of :mod:`.gpus`.
A pass takes as long as the longest of its bounds, if all that it does overlaps, and as long as their sum, if it does
one after the other ("in turn"). Between the passes each kernel takes a launch, and as long as its longest CTA alone.

Not in it: caches (each sector comes from memory once in each pass), banks of shared memory and of the L1 cache, waiting
at barriers, and what a tile does for the positives in it.

Where there is a GPU, it is measured too, and printed beside what the model says of it.
"""

from __future__ import annotations

import argparse
import sys
from typing import NamedTuple

import torch

from .counted import Case
from .executed import BETWEEN, P_SIZED, Costs, Run
from .gate import RECORD, Counted, recorded
from .gpus import GPU, GPUS, STAND_INS, named
from .measured import measured_milliseconds
from .report import print_table
from .workloads import DTYPES, REGIMES

LAUNCHES = {"forward": 6, "backward": 2}
"""Of the loss, for up to 4096 positives; ``python -m benchmarks.launches`` counts them."""
PASSES = {"forward": ("collect_kernel", "bucket_kernel"), "backward": ("gradient_kernel",)}
_NAMES = {"bucket_kernel": "pass 1", "gradient_kernel": "pass 2"}
_SAID = "model, nothing measured"
# 8 images of 512 x 512.
_RETINANET = 31_426_560


class Bounds(NamedTuple):
    """Milliseconds that one kernel takes at least, for each thing that it does."""

    bytes: float
    """To and from memory."""
    instructions: float
    sectors: float
    """To and from the caches."""
    atomics: float
    """In all."""
    hottest: float
    """Atomics on one word."""

    @property
    def limit(self) -> str:
        """What takes longest."""
        return max(self._fields, key=lambda name: float(getattr(self, name)))


class Time(NamedTuple):
    """Milliseconds."""

    overlapping: float
    """If all that a pass does overlaps."""
    in_turn: float
    """If nothing does."""

    def plus(self, other: Time) -> Time:
        """One after the other."""
        return Time(self.overlapping + other.overlapping, self.in_turn + other.in_turn)


def bounds_of(costs: Costs, gpu: GPU, num_logits: int) -> Bounds:
    """Of a kernel that goes through all logits."""
    clocks = 1e6 * gpu.gigahertz.value  # in a millisecond
    of_processors = clocks * gpu.processors.value
    return Bounds(
        bytes=num_logits * (costs.read + costs.written) / (1e9 * gpu.terabytes.value),
        instructions=num_logits * costs.instructions / (32 * gpu.issued.value * of_processors),
        sectors=num_logits * (costs.loaded + costs.stored) / (gpu.sectors.value * of_processors),
        atomics=num_logits * costs.atomics / (gpu.atomics.value * clocks),
        hottest=num_logits * costs.hottest / (gpu.atomics_of_a_word.value * clocks),
    )


def time_between(costs: Costs, gpu: GPU) -> float:
    """Milliseconds of a kernel between the passes: until its longest CTA ends, or until all instructions have begun."""
    clocks = 1e6 * gpu.gigahertz.value
    alone = (costs.longest or 0.0) * gpu.clocks_alone.value / clocks
    return max(alone, costs.instructions / (32 * gpu.issued.value * gpu.processors.value * clocks))


def floor(gpu: GPU, num_logits: int, dtype: str) -> float:
    """Milliseconds for what any such loss has to move: each logit read twice, its gradient written."""
    return 3 * DTYPES[dtype].itemsize * num_logits / (1e9 * gpu.terabytes.value)


class Problem(NamedTuple):
    """What the model is asked about."""

    num_logits: int
    num_positives: int
    dtype: str

    def passes(self, counted: Counted, gpu: GPU, regime: str) -> dict[str, Costs]:
        """What goes through all logits, by kernel."""
        return counted[Run(gpu.counts_of, Case(dtype=self.dtype).name, regime)]

    def bounds(self, counted: Counted, gpu: GPU, regime: str) -> dict[str, Bounds]:
        """Of the same."""
        return {
            name: bounds_of(costs, gpu, self.num_logits) for name, costs in self.passes(counted, gpu, regime).items()
        }

    def times(self, counted: Counted, gpu: GPU, regime: str) -> dict[str, Time]:
        """Forward and backward."""
        bounds = self.bounds(counted, gpu, regime)
        between = counted[Run(gpu.counts_of, BETWEEN, f"P = {self.num_positives}")]
        found = {}
        for part, kernels in PASSES.items():
            further = LAUNCHES[part] * gpu.launch_microseconds.value / 1e3
            if part == "forward":
                further += sum(time_between(costs, gpu) for costs in between.values())
            time = Time(further, further)
            for kernel in kernels:
                time = time.plus(Time(max(bounds[kernel]), sum(bounds[kernel])))
            found[part] = time
        return found


def print_assumptions() -> None:
    """All of them, and where each is from."""
    rows = [[field.replace("_", " "), *(str(getattr(gpu, field)) for gpu in GPUS.values())] for field in GPU._fields]
    print_table(f"Assumptions of the model ({_SAID})", ["", *GPUS], rows)


def print_bounds(counted: Counted, problem: Problem) -> None:
    """Each bound of both passes, and which one limits."""
    rows = []
    for name, gpu in GPUS.items():
        for regime in REGIMES:
            for kernel, bounds in problem.bounds(counted, gpu, regime).items():
                if kernel in _NAMES:
                    numbers = (f"{value:.3f}" for value in bounds)
                    rows.append([f"{name}, {regime}: {_NAMES[kernel]}", *numbers, bounds.limit])
    title = f"Bounds in ms, model: {_title(problem)} ({_SAID})"
    print_table(title, ["", *Bounds._fields, "limit"], rows, _caption())


def print_times(counted: Counted, problem: Problem) -> None:
    """Predicted times over the byte floor."""
    rows = []
    for name, gpu in GPUS.items():
        least = floor(gpu, problem.num_logits, problem.dtype)
        for regime in REGIMES:
            forward, backward = problem.times(counted, gpu, regime).values()
            both = forward.plus(backward)
            numbers = (f"{x:.3f}" for x in (least, forward.overlapping, backward.overlapping, both.overlapping))
            ratios = (f"{time / least:.1f}" for time in both)
            bounds = problem.bounds(counted, gpu, regime)
            rows.append([f"{name}, {regime}", *numbers, *ratios, *(bounds[kernel].limit for kernel in _NAMES)])
    columns = [
        "",
        "floor",
        "forward",
        "backward",
        "both",
        "/ floor",
        "in turn / floor",
        "limit, pass 1",
        "limit, pass 2",
    ]
    print_table(f"Times in ms, model: {_title(problem)} ({_SAID})", columns, rows, _caption())


def print_beside_measured(counted: Counted, problem: Problem, name: str) -> None:
    """What this machine's GPU takes, beside what the model says."""
    rows = []
    for regime in REGIMES:
        found = measured_milliseconds(regime, problem.num_logits, problem.num_positives, problem.dtype)
        for part, time in problem.times(counted, GPUS[name], regime).items():
            rows.append([f"{regime}: {part}", f"{found[part]:.3f}", *(f"{value:.3f}" for value in time)])
    device = torch.cuda.get_device_name()
    title = f"Measured beside the model's ms of {name}, on {device}: {_title(problem)}"
    print_table(title, ["", "measured", "model", "model, in turn"], rows)


def _title(problem: Problem) -> str:
    return f"{problem.num_logits:,} logits, P = {problem.num_positives}, {problem.dtype}"


def _caption() -> str:
    return f"model: {'; '.join(STAND_INS.values())}"


def main(arguments: list[str] | None = None) -> None:
    """Print tables."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.model", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    numbers = list(P_SIZED.values())
    parser.add_argument("--logits", type=int, default=_RETINANET, help="M, a multiple of 80 (default: %(default)s)")
    parser.add_argument("--positives", type=int, choices=numbers, default=1000, help="P (default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="(default: %(default)s)")
    parser.add_argument("--bounds", action="store_true", help="also each bound of both passes by itself")
    parser.add_argument("--assumptions", action="store_true", help="also what is assumed of each GPU")
    options = parser.parse_args(arguments)
    if not RECORD.exists():
        sys.exit(f"the model needs the counts of a checkout, which are not at {RECORD}")
    _, counted = recorded()
    problem = Problem(options.logits, options.positives, options.dtype)
    print_times(counted, problem)
    if options.bounds:
        print_bounds(counted, problem)
    if options.assumptions:
        print_assumptions()
    if torch.cuda.is_available():
        name = named(torch.cuda.get_device_name())
        if name is None:
            print(f"the model has no numbers of {torch.cuda.get_device_name()}: nothing to measure beside")
        else:
            print_beside_measured(counted, problem, name)


if __name__ == "__main__":
    main()
