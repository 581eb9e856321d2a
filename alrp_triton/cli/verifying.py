"""The command ``verify``."""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from .. import info, verify
from ..engine.passes import BACKENDS, runs_triton, triton_installed, why_unavailable
from ..verify_cases import FULL, cases
from .printing import print_table


def add_verify(commands: Any) -> None:
    text = "Check every backend on every device against the float64 reference. The exit status is 1 on any miss."
    parser = commands.add_parser("verify", help="check the backends of this machine", description=text)
    parser.add_argument("--backend", action="append", choices=BACKENDS, help="check only this one; may be repeated")
    parser.add_argument("--device", action="append", type=_device, help="check only here (cuda:1); may be repeated")
    parser.add_argument("--interpret", action="store_true", help="run Triton's backends on the CPU, too, interpreted")
    parser.add_argument("--quick", action="store_true", help="smaller cases")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to FILE")
    parser.set_defaults(run=_verify)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{name!r} is no device") from None
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", 0)
    here = info.devices()
    if device not in here:
        raise argparse.ArgumentTypeError(f"{name!r} is not on this machine, which has {', '.join(map(str, here))}")
    return device


def _verify(arguments: argparse.Namespace) -> int:
    backends = arguments.backend or list(BACKENDS)
    devices = arguments.device or info.devices()
    checks, unavailable = verify.plan(backends, devices, quick=arguments.quick)
    cpu = torch.device("cpu")
    to_interpret = [b for b in backends if arguments.interpret and runs_triton(b) and why_unavailable(b, cpu)]
    unavailable = [(b, d, why) for b, d, why in unavailable if not (b in to_interpret and d.type == "cpu")]

    def run() -> Iterator[verify.Row]:
        yield from (check.run() for check in checks)
        if to_interpret:
            yield from verify.interpreted(to_interpret)

    rows = list(_with_progress(run(), len(checks) + len(to_interpret) * len(cases(FULL))))
    print(f"Relative errors against float64, at most {verify.BOUND:.0e}; in half precision, beyond rounding.")
    for title, group in itertools.groupby(rows, lambda row: f"{row.backend} on {row.device}"):
        print_table(title, _VERIFY_COLUMNS, map(_verify_cells, group))
    for row in rows:
        if row.misses:
            print(f"MISS: {row.case}, {row.backend} on {row.device}: {'; '.join(row.misses)}")
    for backend, device, reason in unavailable:
        print(f"not checked: {backend} on {device}: {reason}")
    if triton_installed() and any(device.type == "cpu" for _, device, _ in unavailable):
        print("To run the Triton backends on the CPU, in Triton's interpreter: alrp-triton verify --interpret")
    # Report a backend that the user names but that cannot run.
    unchecked = sorted(set(arguments.backend or ()) - {row.backend for row in rows})
    for backend in unchecked:
        print(f"MISS: {backend} could not be checked anywhere")
    misses = sum(bool(row.misses) for row in rows) + len(unchecked)
    print(f"{len(rows)} checks, {misses} missed")
    if arguments.json:
        _write_verify_json(arguments.json, rows, unavailable, misses)
    return 1 if misses else 0


_VERIFY_COLUMNS = ["case", "score gradient", "worst element", "loss, rank", "loc gradient", "same bits", "ms", ""]


def _verify_cells(row: verify.Row) -> list[str]:
    if row.failure:
        return [row.case, *"------", row.status]
    errors = (row.score_gradient, row.worst, max(row.cls, row.loc, row.rank), row.loc_gradient)
    same_bits = "yes" if row.same_bits else "no"
    return [row.case, *(f"{error:.1e}" for error in errors), same_bits, f"{row.milliseconds:.2f}", row.status]


def _write_verify_json(
    path: Path, rows: list[verify.Row], unavailable: list[tuple[str, torch.device, str]], misses: int
) -> None:
    # JSON has no infinity.
    values = [{k: None if v == math.inf else v for k, v in row._asdict().items()} for row in rows]
    machine = info.collect()
    report = {
        "versions": machine["versions"],
        "devices": machine["devices"],
        "bound": verify.BOUND,
        "misses": misses,
        "checks": [value | {"status": row.status, "misses": row.misses} for value, row in zip(values, rows)],
        "not_checked": [{"backend": b, "device": str(d), "reason": why} for b, d, why in unavailable],
    }
    path.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _with_progress(rows: Iterable[verify.Row], total: int) -> Iterator[verify.Row]:
    """The rows, with a progress bar on standard error if rich is installed."""
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        yield from rows
        return
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("verify", total=total)
        for row in rows:
            yield row
            progress.update(task, advance=1, description=f"{row.backend} on {row.device}: {row.case}")
