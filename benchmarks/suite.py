"""Time aLRP Loss and its peers on inputs of real heads: cases x contenders, one CSV row each.

    python -m benchmarks.suite --preset cpu --output suite.csv
    alrp-triton bench --preset smoke

A contender that claims to be exact is timed only if its gradient is: held against float64 first, on the case itself or
on a smaller one of its kind. Ratios carry over to other machines, times do not. On a GPU, times are taken by events
between launches that the host has made ahead, and again by replay of a CUDA graph where one can be captured.
"""

from __future__ import annotations

import argparse
import itertools
import platform
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from alrp_triton import info, verify
from alrp_triton.engine.backends import BACKENDS, choose_backend

from . import rows, timing
from .measure import Setting, measure
from .peers import Contender, contenders, ours
from .presets import PRESETS, claims
from .report import environment, print_claims, print_environment
from .rows import Row
from .show import print_rows, progress_over
from .workloads import DTYPES, HEADS, LAYOUTS, REGIMES, Case

_CHOICES: dict[str, Iterable[str]] = {"head": HEADS, "regime": REGIMES, "dtype": DTYPES, "layout": LAYOUTS}
_NUMBERS = {"image": "height and width in pixels", "batch": "images", "num_positives": "P"}
Plan = list[tuple[Case, list[Contender], bool]]
"""Cases, their contenders, and whether one run is enough."""


def parse(argv: Sequence[str] | None, prog: str) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    about = "; ".join(f"{name}: {preset.about}" for name, preset in PRESETS.items())
    parser.add_argument("--preset", choices=PRESETS, help=f"{about} (default: cpu or h100, if no case is described)")
    group = parser.add_argument_group(
        "cases", "With --preset: only those of its cases. Without: all combinations of what is given."
    )
    for name, choices in _CHOICES.items():
        group.add_argument(f"--{name}", nargs="+", choices=choices)
    for name, meaning in _NUMBERS.items():
        option = "--positives" if name == "num_positives" else f"--{name}"
        group.add_argument(option, dest=name, nargs="+", type=int, help=meaning)
    parser.add_argument("--contender", nargs="+", help="only these, by name or part of a name")
    parser.add_argument("--device", type=torch.device, help="default: a GPU where there is one")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, help="for the runs of a contender on a case (default: the preset's)")
    parser.add_argument("--repeats", type=int, help="runs at the most (default: the preset's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("alrp-triton-bench.csv"), help="default: %(default)s")
    parser.add_argument("--resume", action="store_true", help="skip what the output has for these versions and device")
    parser.add_argument("--no-verify", action="store_true", help="on a GPU: no check of all backends beforehand")
    parser.add_argument("--list", action="store_true", help="list cases and contenders, and end")
    args = parser.parse_args(argv)
    if args.device is None:
        args.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    described = any(getattr(args, name) is not None for name in (*_CHOICES, *_NUMBERS))
    if args.preset is None and not described:
        args.preset = "cpu" if args.device.type == "cpu" else "h100"
    preset = PRESETS[args.preset or "full"]
    args.seconds = preset.seconds if args.seconds is None else args.seconds
    args.repeats = preset.repeats if args.repeats is None else args.repeats
    return args


def plan(args: argparse.Namespace) -> Plan:
    """What to run, from the options.

    Raises:
        ValueError: where nothing is left.
    """
    given = {name: getattr(args, name) for name in (*_CHOICES, *_NUMBERS) if getattr(args, name) is not None}
    known = contenders(args.device)
    chosen = [c for c in known.values() if args.contender is None or any(_names(p, c, known) for p in args.contender)]
    eager = [contender for contender in chosen if not contender.compiled]
    if args.preset is None:
        given.setdefault("head", ["retinanet"])
        cases = [Case(**dict(zip(given, values))) for values in itertools.product(*given.values())]
        planned = [(case, chosen, False) for case in cases]
    else:
        preset = PRESETS[args.preset]
        large = (ours(choose_backend("auto", args.device)), ours("numba"))
        planned = [(case, chosen, False) for case in preset.cases]
        planned += [(case, eager, False) for case in preset.sweeps]
        planned += [(case, [c for c in chosen if c.name in large], True) for case in preset.scale]
        planned = [entry for entry in planned if all(_of(entry[0], name) in values for name, values in given.items())]
    planned = [entry for entry in planned if entry[1]]
    if not planned:
        raise ValueError(f"nothing to run; contenders here: {', '.join(known)}")
    return planned


def _names(part: str, contender: Contender, known: Iterable[str]) -> bool:
    """Whether it is meant: by its whole name, or by a part that is nobody's whole name."""
    return part == contender.name or (part not in known and part in contender.name)


def _of(case: Case, name: str) -> Any:
    return case.positives if name == "num_positives" else getattr(case, name)


def _machine(device: torch.device, command: str) -> dict[str, Any]:
    about = environment("benchmarks.suite")
    name = about["cpu"] if device.type == "cpu" else torch.cuda.get_device_properties(device).name
    return {
        "command": command,
        "device": name,
        "kind": device.type,
        "threads": about["threads"],
        "alrp_triton": about["alrp_triton"],
        "commit": about["commit"],
        "torch": str(torch.__version__),
        "triton": info.collect()["versions"]["triton"],
        "python": platform.python_version(),
    }


def _verified(device: torch.device) -> bool:
    """Whether all backends agree with the reference on this device."""
    checks, _ = verify.plan(BACKENDS, [device])
    missed = [row for row in (check.run() for check in checks) if row.misses]
    for row in missed:
        print(f"MISS: {row.case}, {row.backend} on {row.device}: {'; '.join(row.misses)}")
    print(f"{len(checks)} checks against the reference, {len(missed)} missed")
    return not missed


def run(planned: Plan, setting: Setting, output: Path, resume: bool) -> Iterator[Row]:
    """Measure what is planned; each row is on disk before it is yielded. Failed rows are tried again on resuming."""
    done = {row.key for row in rows.read([output]) if row.status != "failed"} if resume and output.exists() else set()
    for case, chosen, once in planned:
        described = setting.machine | rows.describe(case)
        # Status and contender aside, these columns are all of a row's key.
        keys = {c.name: Row(date="", contender=c.name, exact=None, status="", **described).key for c in chosen}
        left = [contender for contender in chosen if keys[contender.name] not in done]
        for row in measure(case, left, setting, once) if left else ():
            rows.append(output, row)
            yield row


def main(argv: Sequence[str] | None = None, prog: str = "python -m benchmarks.suite") -> int:
    """Run the suite; the exit status is 1 where this package was refused or failed, or nothing could run."""
    args = parse(argv, prog)
    torch.set_num_threads(args.threads)
    try:
        planned = plan(args)
        if args.list:
            for case, chosen, once in planned:
                print(f"{case.name}{' (once)' if once else ''}: {'; '.join(c.name for c in chosen)}")
            return 0
        if args.output.exists():
            rows.read([args.output])  # rather now than after the first case
        on_gpu = args.device.type == "cuda"
        if on_gpu:
            args.device = torch.device("cuda", args.device.index or 0)
            torch.cuda.set_device(args.device)
        command = shlex.join([*prog.split(), *(sys.argv[1:] if argv is None else argv)])
        machine = _machine(args.device, command)
    except (ValueError, RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        print(f"{prog}: {error}", file=sys.stderr)
        return 1
    print_environment(environment("benchmarks.suite") | {"command": command, "device": machine["device"]})
    if on_gpu and not args.no_verify and not _verified(args.device):
        return 1
    bandwidth = timing.copy_bandwidth(args.device)
    print(f"copy bandwidth: {bandwidth / 1e9:.4g} GB/s, read and written\n")
    setting = Setting(args.device, machine, bandwidth, args.seconds, args.repeats, args.seed)
    total = sum(len(chosen) for _, chosen, _ in planned)
    made = list(progress_over(run(planned, setting, args.output, args.resume), total))
    print_rows(made)
    stated = claims(rows.read([args.output]) if args.resume else made)
    if stated:
        print_claims(stated)
    print(f"{len(made)} rows appended to {args.output}")
    wrong = [row for row in made if row.contender.startswith("ours") and row.status in ("refused", "failed")]
    for row in wrong:
        print(f"{row.status.upper()}: {row.contender}: {row.note}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
