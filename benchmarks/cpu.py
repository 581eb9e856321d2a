"""Forward + backward on the CPU: aLRP Loss in linear time against the published loop and against focal loss.

    python -m benchmarks.cpu

All contenders of a regime take turns, in an order that alternates, and medians are compared: what else the machine does
meanwhile then meets all of them. Ratios carry over to other machines, times do not. On a machine that others use too,
``--threads 1 --clock cpu`` counts only the time this process itself ran; threads that wait for one another on cores
they do not have make wall-clock times, and ratios of them, meaningless.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from alrp_triton import alrp_loss
from alrp_triton.engine.backends import numba_installed

from .baselines import focal_loss, per_positive_loop
from .report import RESULTS, claim, environment, print_claims, print_environment, print_table, write
from .timing import take_turns
from .workloads import NUM_CLASSES, REGIMES, Workload, make_workload

# A 512 x 512 image in RetinaNet: 5456 places on five levels, 9 anchors each, 80 classes; 3.93 million logits.
NUM_LOGITS = 49_104 * NUM_CLASSES
# Far above what float32 leaves of the loop's own gradient (up to 3e-7), far below any mistake.
LARGEST_ERROR = 1e-6
SPEEDUP_TARGETS = {"early": 30, "middle": 15}
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


def run_ours(workload: Workload, labels: Tensor, backend: str = "torch") -> None:
    """Both components, both gradients: more than the other contenders compute."""
    out = alrp_loss(workload.logits, labels, workload.loc_errors, backend=backend)
    (out.cls + out.loc).backward()


def run_loop(workload: Workload, labels: Tensor) -> None:
    """The classification component and its gradient alone."""
    per_positive_loop(workload.logits, labels, workload.loc_errors)[0].backward()


def run_focal(workload: Workload, targets: Tensor) -> None:
    """On targets made beforehand."""
    focal_loss(workload.logits, targets).backward()


def gradient_error(workload: Workload) -> float:
    """Norm of the difference between our gradient and the loop's, relative to the loop's; of backends the worst."""
    gradients: list[Tensor] = []
    runs: list[Callable[[Workload, Tensor], None]] = [run_loop, run_ours]
    if numba_installed():
        runs.append(partial(run_ours, backend="numba"))
    for run in runs:
        workload.logits.grad = None
        run(workload, workload.logit_labels())
        assert workload.logits.grad is not None
        gradients.append(workload.logits.grad.double())
    loop, *ours = gradients
    return max(float((gradient - loop).norm() / loop.norm()) for gradient in ours)


def time_turns(
    contenders: dict[str, tuple[Callable[[], None], int]], logits: list[Tensor], clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of each run of each contender ``name: (run, repeats)`` in turns, without a gradient left of the last."""

    def timed(run: Callable[[], None]) -> float:
        for tensor in logits:
            tensor.grad = None
        begin = clock()
        run()
        return clock() - begin

    return take_turns({name: (partial(timed, run), repeats) for name, (run, repeats) in contenders.items()})


def compare(regime: str, args: argparse.Namespace) -> dict[str, Any]:
    """All contenders on one regime."""
    workload = make_workload(regime, args.logits, args.positives, args.seed)
    error = gradient_error(workload)
    if not error <= LARGEST_ERROR:
        sys.exit(f"{regime}: our gradient is off the loop's by {error:.1e} of its norm; not timing wrong results")
    per_logit = workload.logit_labels()
    targets = per_logit.to(workload.logits.dtype)
    contenders: dict[str, tuple[Callable[[], None], int]] = {
        "ours": (partial(run_ours, workload, per_logit), args.repeats),
        "ours, class labels": (partial(run_ours, workload, workload.class_labels), args.repeats),
        "focal": (partial(run_focal, workload, targets), args.repeats),
        "loop": (partial(run_loop, workload, per_logit), args.loop_repeats),
    }
    if numba_installed():
        contenders["ours, numba"] = (partial(run_ours, workload, per_logit, "numba"), args.repeats)
    run_focal(workload, targets)  # the others have run once already
    seconds = time_turns(contenders, [workload.logits], CLOCKS[args.clock])
    return {"regime": regime, "gradient_error": error, "seconds": seconds}


def scaling(regime: str, args: argparse.Namespace) -> dict[str, Any]:
    """Ours with ten times the positives."""
    few, many = args.positives, 10 * args.positives
    # The loop would take minutes here: gradients are compared on an eighth of the anchors.
    reduced = max(args.logits // NUM_CLASSES // 8, many) * NUM_CLASSES
    error = gradient_error(make_workload(regime, reduced, many, args.seed))
    if not error <= LARGEST_ERROR:
        sys.exit(f"{regime}, P = {many}: our gradient is off the loop's by {error:.1e} of its norm")
    workloads = {p: make_workload(regime, args.logits, p, args.seed) for p in (few, many)}
    contenders: dict[str, tuple[Callable[[], None], int]] = {}
    for p, workload in workloads.items():
        labels = workload.logit_labels()
        run_ours(workload, labels)
        contenders[str(p)] = (partial(run_ours, workload, labels), args.repeats)
    seconds = time_turns(contenders, [workload.logits for workload in workloads.values()], CLOCKS[args.clock])
    return {"regime": regime, "gradient_error": error, "seconds": seconds}


def _milliseconds(seconds: list[float]) -> str:
    return f"{1e3 * median(seconds):.0f}"


def parse(name: str, about: str, loop_repeats: int, **further: tuple[int, str]) -> argparse.Namespace:
    """The options of ``python -m benchmarks.<name>``, and the number of threads set.

    Args:
        name: of the module; results go to ``results/<name>.json``.
        about: what it does.
        loop_repeats: runs of a loop, by default.
        further: more options that take a number, with their defaults and what they mean.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=about)
    parser.add_argument("--logits", type=int, default=NUM_LOGITS, help="M, a multiple of 80 (default: %(default)s)")
    parser.add_argument("--positives", type=int, default=500, help="P (default: %(default)s)")
    for option, (default, meaning) in further.items():
        parser.add_argument(f"--{option}", type=int, default=default, help=f"{meaning} (default: %(default)s)")
    parser.add_argument("--regimes", nargs="+", choices=REGIMES, default=list(REGIMES))
    parser.add_argument("--repeats", type=int, default=15, help="runs of each contender (default: %(default)s)")
    parser.add_argument("--loop-repeats", type=int, default=loop_repeats, help="runs of a loop (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="what to count (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS / f"{name}.json")
    args = parser.parse_args()
    if args.clock == "cpu" and args.threads != 1:
        # A thread that waits for the others spins, and that would count.
        parser.error("--clock cpu needs --threads 1")
    torch.set_num_threads(args.threads)
    return args


def main() -> None:
    """Parse, check, time, print, write."""
    args = parse("cpu", __doc__.splitlines()[0], loop_repeats=3)
    about = environment("benchmarks.cpu")
    print_environment(about)

    claims, rows, compared = [], [], [compare(regime, args) for regime in args.regimes]
    for result in compared:
        regime, seconds = result["regime"], result["seconds"]
        middle = {name: median(values) for name, values in seconds.items()}
        speedup, to_focal = middle["loop"] / middle["ours"], middle["ours"] / middle["focal"]
        rows.append(
            [
                regime,
                *(_milliseconds(seconds[name]) for name in ("ours", "ours, class labels", "focal", "loop")),
                _milliseconds(seconds["ours, numba"]) if "ours, numba" in seconds else "-",
                f"{speedup:.1f}",
                f"{to_focal:.2f}",
                f"{middle['ours, class labels'] / middle['focal']:.2f}",
                f"{result['gradient_error']:.1e}",
            ]
        )
        if regime in SPEEDUP_TARGETS:
            claims.append(claim(f"loop / ours, {regime}", speedup, ">=", SPEEDUP_TARGETS[regime]))
        claims.append(claim(f"ours / focal, {regime}", to_focal, "<=", 1.5))
        if "ours, numba" in middle:
            compiled = middle["ours, numba"] / middle["focal"]
            claims.append(claim(f"ours, compiled / focal, {regime}", compiled, "<=", 1))
    print_table(
        f"Forward + backward, M = {args.logits:,}, P = {args.positives:,}",
        ["regime", "ours", "ours (c)", "focal", "loop", "numba", "loop/ours", "ours/focal", "ours (c)/focal", "error"],
        rows,
        f"Medians of {args.clock} milliseconds, which are this machine's, now. Error: our gradient against the loop's, "
        "relative norm.\nours: int8 labels for each logit; (c): class labels for each anchor; numba: ours, compiled.",
    )

    rows, scaled = [], [scaling(regime, args) for regime in args.regimes]
    for result in scaled:
        few, many = result["seconds"].values()
        growth = median(many) / median(few)
        rows.append([result["regime"], _milliseconds(few), _milliseconds(many), f"{growth:.2f}"])
        claims.append(claim(f"P = {10 * args.positives} / P = {args.positives}, {result['regime']}", growth, "<", 1.5))
    few, many = args.positives, 10 * args.positives
    print_table("Ours, ten times the positives", ["regime", f"P = {few} ms", f"P = {many} ms", "ratio"], rows)
    print_claims(claims)
    note = "seconds are machine-dependent; compare ratios within one run only"
    write(args.output, {"environment": about, "note": note, "compared": compared, "scaled": scaled, "claims": claims})


if __name__ == "__main__":
    main()
