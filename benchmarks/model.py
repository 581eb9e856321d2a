"""A model of the time on GPUs, computed from what was counted.

    python -m benchmarks.model [--logits M] [--positives P] [--dtype D] [--bounds] [--assumptions]

The counts are those of benchmarks/results/executed.json (:mod:`.gate`). A pass takes as long as the longest of its
bounds, if all that it does overlaps, and as long as their sum, if it does one after the other ("in turn"). Between the
passes each kernel takes a launch, and as long as its longest CTA alone. The model leaves out caches (each sector comes
from memory once in each pass), shared memory, waiting at barriers, and what a tile does for the positives in it. On a
GPU ``alrp-triton bench --preset h100`` measures the same cases. What a clock of an H200 does was measured.
"""

from __future__ import annotations

import argparse
import sys
from typing import NamedTuple

from alrp_triton.kernels.shared import MOST_WORDS

from .executed import BETWEEN, P_SIZED, PASSES, Case, Costs, Run, of_pass
from .gate import RECORD, Counted, recorded
from .report import print_table
from .workloads import DTYPES, REGIMES

LAUNCHES = {"forward": 9, "backward": 2}
"""Of the loss, for up to 4096 positives; ``python -m benchmarks.launches`` counts them."""
_SAID = "model"


class GPU(NamedTuple):
    """What a time is computed from."""

    counts_of: str  # the target whose counts are taken
    processors: float  # multiprocessors, or compute units
    gigahertz: float  # of the processors, and of the L2 cache
    issued: float  # instructions of 32 lanes that a processor begins in a clock
    sectors: float  # of 32 bytes, that a processor loads or stores in a clock
    terabytes: float  # a second, read and written, of a large copy
    atomics: float  # of 64 bits on different words of the L2 cache, in a clock of the whole GPU
    atomics_of_a_word: float  # of 64 bits on one word, in a clock
    clocks_alone: float
    """For each instruction of a warp, of a CTA that has a processor for itself and waits for its own results."""
    launch_microseconds: float  # from the end of a kernel to the first work of the next one, which was launched before
    published: tuple[str, ...] = ()
    """The numbers that the vendor published."""
    measured: tuple[str, ...] = ()
    """The numbers that were measured: benchmarks/results/h200. All others are guesses."""


_NVIDIA = ("processors", "issued")
_MEASURED = ("gigahertz", "sectors", "terabytes", "atomics", "atomics_of_a_word")
GPUS = {
    # Bandwidths are nine tenths of those published: 2.04 (80 GB), 3.35 and 8. The clock of an H100 is below the highest
    # published, as under load. A clock is taken to do what one of an H200 does.
    "A100": GPU("sm_80", 108, 1.41, 4, 2, 1.8, 44, 0.05, 2, 1.5, (*_NVIDIA, "gigahertz")),
    "H100": GPU("sm_90", 132, 1.7, 4, 2, 3.0, 44, 0.05, 2, 1.5, _NVIDIA),
    "H200": GPU("sm_90", 132, 1.97, 4, 2, 4.23, 44, 0.05, 2, 1.5, _NVIDIA, _MEASURED),
    "B200": GPU("sm_100", 148, 1.8, 4, 2, 7.2, 44, 0.05, 2, 1.5),
}


class Bounds(NamedTuple):
    """Milliseconds that one kernel takes at least, for each thing that it does."""

    bytes: float  # to and from memory
    instructions: float
    sectors: float  # to and from the caches
    atomics: float  # in all
    hottest: float  # atomics on one word

    @property
    def limit(self) -> str:
        """What takes longest."""
        return max(self._fields, key=lambda name: float(getattr(self, name)))


class Time(NamedTuple):
    """Milliseconds."""

    overlapping: float  # if all that a pass does overlaps
    in_turn: float  # if nothing does


def bounds_of(costs: Costs, gpu: GPU, num_logits: int) -> Bounds:
    """Of a kernel that goes through all logits."""
    clocks = 1e6 * gpu.gigahertz  # in a millisecond
    of_processors = clocks * gpu.processors
    return Bounds(
        bytes=num_logits * (costs.read + costs.written) / (1e9 * gpu.terabytes),
        instructions=num_logits * costs.instructions / (32 * gpu.issued * of_processors),
        sectors=num_logits * (costs.loaded + costs.stored) / (gpu.sectors * of_processors),
        atomics=num_logits * costs.atomics / (gpu.atomics * clocks),
        hottest=num_logits * costs.hottest / (gpu.atomics_of_a_word * clocks),
    )


def time_between(costs: Costs, gpu: GPU) -> float:
    """Milliseconds of a kernel between the passes: until its longest CTA ends, or until all instructions have begun."""
    clocks = 1e6 * gpu.gigahertz
    alone = (costs.longest or 0.0) * gpu.clocks_alone / clocks
    return max(alone, costs.instructions / (32 * gpu.issued * gpu.processors * clocks))


def floor(gpu: GPU, num_logits: int, dtype: str) -> float:
    """Milliseconds for what any such loss has to move: each logit read twice, its gradient written."""
    return 3 * DTYPES[dtype].itemsize * num_logits / (1e9 * gpu.terabytes)


class Problem(NamedTuple):
    """What the model is asked about."""

    num_logits: int
    num_positives: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.num_logits:,} logits, P = {self.num_positives}, {self.dtype}"

    def bounds(self, counted: Counted, gpu: GPU, regime: str) -> dict[str, Bounds]:
        """Of finding the positives, and of both passes."""
        costs = counted[Run(gpu.counts_of, Case(dtype=self.dtype).name, regime)]
        found = {name: of_pass(name, costs) for name in PASSES}
        return {name: bounds_of(of_each, gpu, self.num_logits) for name, of_each in found.items()}

    def times(self, counted: Counted, gpu: GPU, regime: str) -> dict[str, Time]:
        """Forward and backward."""
        finding, *passes = self.bounds(counted, gpu, regime).values()
        between = counted[Run(gpu.counts_of, BETWEEN, f"P = {self.num_positives}")].values()
        kernels = {"forward": [finding, passes[0]], "backward": [passes[1]]}
        found = {}
        for part, of_part in kernels.items():
            further = LAUNCHES[part] * gpu.launch_microseconds / 1e3
            if part == "forward":
                further += sum(time_between(costs, gpu) for costs in between)
            found[part] = Time(further + sum(map(max, of_part)), further + sum(map(sum, of_part)))
        return found


# Of which tables lie in shared memory, as where the passes were counted.
_POSITIVES = tuple(number for number in P_SIZED.values() if number < MOST_WORDS // 2)
# 8 images of 512 x 512 in RetinaNet.
PROBLEM = Problem(31_426_560, 1000, "float32")


def table(problem: Problem) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the table of docs/design/performance.md: time over the floor, and what limits both passes."""
    rows, counted = [], recorded()[1]
    for name, gpu in GPUS.items():
        row, limits, least = [name], [], floor(gpu, problem.num_logits, problem.dtype)
        for regime in REGIMES:
            both = Time(*map(sum, zip(*problem.times(counted, gpu, regime).values())))
            row.append(f"{both.overlapping / least:.1f} - {both.in_turn / least:.1f}")
            _, *passes = problem.bounds(counted, gpu, regime).values()
            limits.append(", ".join(bounds.limit for bounds in passes))
        rows.append([*row, "; ".join(limits)])
    columns = ["model: time over the floor, overlapping to in turn", *REGIMES]
    return [*columns, "limits of passes 1 and 2: early; middle; late"], rows


def print_assumptions() -> None:
    """All of them, and where each is from."""

    def cell(gpu: GPU, field: str) -> str:
        known = {"": ("counts_of",), " published": gpu.published, " measured": gpu.measured}
        return f"{getattr(gpu, field)}{next((name for name, fields in known.items() if field in fields), ' assumed')}"

    rows = [[f.replace("_", " "), *(cell(gpu, f) for gpu in GPUS.values())] for f in GPU._fields[:-2]]
    print_table(f"Assumptions of the model ({_SAID})", ["", *GPUS], rows)


def print_bounds(problem: Problem) -> None:
    """Each bound of both passes in milliseconds, and which one limits."""
    counted = recorded()[1]
    rows = [
        [f"{name}, {regime}: {part}", *(f"{value:.3f}" for value in bounds), bounds.limit]
        for name, gpu in GPUS.items()
        for regime in REGIMES
        for part, bounds in problem.bounds(counted, gpu, regime).items()
    ]
    print_table(f"Bounds in ms, model: {problem} ({_SAID})", ["", *Bounds._fields, "limit"], rows)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.model", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--logits", type=int, default=PROBLEM.num_logits, help="M, a multiple of 80 (default: %(default)s)"
    )
    parser.add_argument("--positives", type=int, choices=_POSITIVES, default=1000, help="P (default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="(default: %(default)s)")
    parser.add_argument("--bounds", action="store_true", help="also each bound of both passes by itself")
    parser.add_argument("--assumptions", action="store_true", help="also what is assumed of each GPU")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Print tables."""
    options = parse(arguments)
    if not RECORD.exists():
        sys.exit(f"the model needs the counts of a checkout, which are not at {RECORD}")
    problem = Problem(options.logits, options.positives, options.dtype)
    print_table(f"Model: {problem} ({_SAID})", *table(problem))
    if options.bounds:
        print_bounds(problem)
    if options.assumptions:
        print_assumptions()


if __name__ == "__main__":
    main()
