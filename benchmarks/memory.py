"""Peak memory of aLRP Loss on the CPU beyond its inputs and the logits' gradient.

    python -m benchmarks.memory

Each case runs in a fresh process. Its inputs exist before the count begins, and a tiny call has loaded what PyTorch
loads at the first use of an operator (``--cold`` leaves that out). What the loss needs is the larger of two: the
largest resident size during forward, less the size before; and during backward, less the size before and the gradient.
Linux only: the resident sizes come from /proc.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from alrp_triton import alrp_loss

from .report import RESULTS, claim, environment, print_claims, print_environment, print_table, write
from .workloads import REGIMES, make_workload

LABELS = {"class": "class index for each anchor, int64", "logit": "0 or 1 for each logit, int8"}
TARGET_MB = 300


def resident(what: str) -> int:
    """Bytes of resident memory: ``"VmRSS"`` now, ``"VmHWM"`` at its peak."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(what + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status: no {what}")


def _reset_peak() -> None:
    """Let the peak begin anew; where that is not allowed the earlier peak stays, which can only add to the result."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError as error:
        print(f"cannot reset the peak ({error}); the result is an upper bound", file=sys.stderr)


def measure(regime: str, labels: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run one case in this process."""

    def run(num_logits: int, num_positives: int) -> dict[str, Any]:
        workload = make_workload(regime, num_logits, num_positives, args.seed)
        given = workload.class_labels if labels == "class" else workload.logit_labels()
        _reset_peak()
        before = resident("VmRSS")
        out = alrp_loss(workload.logits, given, workload.loc_errors, backend="torch")
        forward = resident("VmHWM") - before
        _reset_peak()
        (out.cls + out.loc).backward()
        backward = resident("VmHWM") - before
        assert workload.logits.grad is not None
        gradient = workload.logits.grad.nbytes
        return {
            "regime": regime,
            "labels": labels,
            "logits_mb": workload.logits.nbytes / 1e6,
            "labels_mb": given.nbytes / 1e6,
            "gradient_mb": gradient / 1e6,
            "before_mb": before / 1e6,
            "forward_mb": forward / 1e6,
            "backward_mb": (backward - gradient) / 1e6,
        }

    if not args.cold:
        run(800, 5)
    return run(args.logits, args.positives)


def main() -> None:
    """Start a process for each case; print and write what they measure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.splitlines()[0])
    parser.add_argument("--logits", type=int, default=100_000_000, help="M, a multiple of 80 (default: %(default)s)")
    parser.add_argument("--positives", type=int, default=1000, help="P (default: %(default)s)")
    parser.add_argument("--regimes", nargs="+", choices=REGIMES, default=list(REGIMES))
    parser.add_argument("--labels", nargs="+", choices=LABELS, default=list(LABELS))
    parser.add_argument("--cold", action="store_true", help="no call beforehand: count what PyTorch loads at first use")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS / "memory.json")
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.in_process:
        print(json.dumps(measure(args.regimes[0], args.labels[0], args)))
        return

    about = environment("benchmarks.memory")
    print_environment(about)
    command = [sys.executable, "-m", f"{__package__}.memory", "--in-process", *sys.argv[1:]]
    # glibc then writes to what it allocates, so that a gradient is resident at once: while its pages fill little by
    # little, something else as large could come and go unseen.
    settings = {**os.environ, "MALLOC_PERTURB_": "165"}
    results, rows = [], []
    for labels in args.labels:
        for regime in args.regimes:
            # Of an option given twice the last counts.
            case = [*command, "--regimes", regime, "--labels", labels]
            done = subprocess.run(case, check=True, stdout=subprocess.PIPE, encoding="utf-8", env=settings)
            result = json.loads(done.stdout)
            results.append(result)
            sizes = ("logits_mb", "labels_mb", "gradient_mb", "before_mb", "forward_mb", "backward_mb")
            rows.append([LABELS[labels], regime, *(f"{result[size]:.0f}" for size in sizes)])
    columns = ["labels", "regime", "logits", "labels", "gradient", "before", "+ forward", "+ backward"]
    title = f"Resident memory in MB, forward + backward, M = {args.logits:,}, P = {args.positives:,}"
    caption = "+: the peak's excess over before, in backward less the gradient; logits and labels are part of before"
    print_table(title, columns, rows, caption)
    largest = max(max(result["forward_mb"], result["backward_mb"]) for result in results)
    claims = [claim("MB beyond logits, labels and gradient", largest, "<", TARGET_MB)]
    print_claims(claims)
    write(args.output, {"environment": about, "results": results, "claims": claims})


if __name__ == "__main__":
    main()
