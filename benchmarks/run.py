"""Time the losses and their peers on inputs of real heads: cases x contenders, one CSV row each.

    python -m benchmarks.run --preset cpu --output cpu.csv
    python -m benchmarks.run --head lvis --regime early late --contender ours focal
    alrp-triton bench --preset smoke

A contender that claims to be exact is timed only if it is: its gradient is first compared with float64, on the case
itself or on a smaller one of its kind. Ratios carry over to other machines, times do not.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from alrp_triton.kernels.settings import cache_file

import alrp_triton
from alrp_triton import info

from . import kernel_times, report, rows, timing
from .claims import claims
from .measure import Setting, measure
from .peers import Contender, contenders, of_set
from .presets import PRESETS
from .rows import Row
from .tune import tune
from .workloads import DTYPES, HEADS, LAYOUTS, REAL, REGIMES, Case

_CHOICES: dict[str, Iterable[str]] = {"head": HEADS, "regime": [*REGIMES, *REAL], "dtype": DTYPES, "layout": LAYOUTS}
_NUMBERS = {"image": "height and width in pixels", "batch": "images", "positives": "P", "logits": "M, of flat cases"}
Plan = list[tuple[Case, list[Contender], int]]
"""Cases, their contenders, and how many repeats at the most."""


def plan(args: argparse.Namespace) -> Plan:
    """What to run, from the options.

    Raises:
        ValueError: if nothing is left.
    """
    given = {name: getattr(args, name) for name in (*_CHOICES, *_NUMBERS) if getattr(args, name) is not None}
    known, field = contenders(args.device), {"positives": "num_positives", "logits": "num_logits"}
    if args.preset is None:
        given.setdefault("head", ["retinanet"])
        fields = [field.get(name, name) for name in given]
        parts = {"all": tuple(Case(**dict(zip(fields, values))) for values in itertools.product(*given.values()))}
        given = {}
    else:
        parts = PRESETS[args.preset].parts
    planned: Plan = []
    for name, cases in parts.items():
        # A contender that is named takes part even if its set leaves it out.
        pool = known if args.contender and args.preset is None else of_set(name, args.device)
        chosen = [known[c] for c in pool if c in known and _named(c, args.contender, known)]
        repeats = 1 if name == "large" else args.repeats
        cases = tuple(case for case in cases if all(getattr(case, n) in values for n, values in given.items()))
        planned += [(case, chosen, repeats) for case in cases if chosen]
    if not planned:
        raise ValueError(f"nothing to run; contenders here: {'; '.join(known)}")
    return planned


def _named(contender: str, parts: Sequence[str] | None, known: Iterable[str]) -> bool:
    """Whether it is chosen: by its whole name, or by a part of it that is nobody's whole name."""
    return parts is None or any(p == contender or (p not in known and p in contender) for p in parts)


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
        group.add_argument(f"--{name}", nargs="+", type=int, help=meaning)
    parser.add_argument("--contender", nargs="+", help="only these, by name or part of a name")
    parser.add_argument("--device", type=torch.device, help="default: a GPU if there is one")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--clock", choices=timing.CLOCKS, default="wall", help="cpu: processor time of this process, with --threads 1"
    )
    parser.add_argument("--seconds", type=float, help="for the runs of a contender on a case (default: the preset's)")
    parser.add_argument("--repeats", type=int, help="runs at the most (default: the preset's)")
    parser.add_argument("--memory", action="store_true", help="on a CPU: measure memory in place of time")
    parser.add_argument("--output", type=Path, default=Path("alrp-triton-bench.csv"), help="default: %(default)s")
    parser.add_argument("--resume", action="store_true", help="skip what the output has for these versions and device")
    parser.add_argument(
        "--autotune", action="store_true", help="on a GPU: search launch settings for these cases and keep them"
    )
    parser.add_argument("--list", action="store_true", help="list cases and contenders, and end")
    args = parser.parse_args(argv)
    if args.device is None:
        args.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_cpu = args.device.type == "cpu"
    if args.clock == "cpu" and not (on_cpu and args.threads == 1):
        parser.error("--clock cpu needs --threads 1 on a CPU: threads that wait for others spin, which would count")
    if args.preset is None and all(getattr(args, name) is None for name in (*_CHOICES, *_NUMBERS)):
        args.preset = "cpu" if on_cpu else "h100"
    preset = PRESETS[args.preset or "full"]
    args.seconds = preset.seconds if args.seconds is None else args.seconds
    args.repeats = preset.repeats if args.repeats is None else args.repeats
    args.memory = args.memory or preset.memory
    if args.memory and not on_cpu:
        parser.error("--memory is for a CPU; on a GPU every run also measures memory")
    return args


def _machine(args: argparse.Namespace, command: str) -> dict[str, Any]:
    """The columns that say where and when."""
    name = report.cpu_name() if args.device.type == "cpu" else torch.cuda.get_device_properties(args.device).name
    return {
        "command": command,
        # Another clock makes it another device, whose times do not mix with the first's.
        "device": f"{name}, processor time" if args.clock == "cpu" else name,
        "kind": args.device.type,
        "threads": torch.get_num_threads(),
        "alrp_triton": alrp_triton.__version__,
        "commit": report.commit(),
        "torch": str(torch.__version__),
        "triton": info.collect()["versions"]["triton"],
        "python": platform.python_version(),
    }


def run(planned: Plan, setting: Setting, output: Path, resume: bool) -> Iterator[Row]:
    """Measure what is planned; each row is on disk before it is yielded. Resuming repeats failed rows."""
    done = {row.key for row in rows.read([output]) if row.status != "failed"} if resume and output.exists() else set()
    for case, chosen, repeats in planned:
        left = [contender for contender in chosen if setting.row(case, contender, status="").key not in done]
        for row in measure(case, left, setting._replace(repeats=repeats)) if left else ():
            rows.append(output, row)
            yield row


def main(argv: Sequence[str] | None = None, prog: str = "python -m benchmarks.run") -> int:
    """The exit status is 1 if this package was refused or failed, or if nothing could run."""
    args = parse(argv, prog)
    torch.set_num_threads(args.threads)
    try:
        planned = plan(args)
        if args.list:
            for case, chosen, repeats in planned:
                print(f"{case.name}{' (once)' if repeats == 1 else ''}: {'; '.join(c.name for c in chosen)}")
            return 0
        if args.output.exists():
            rows.read([args.output])  # fails now, not after the first case
        if args.device.type == "cuda":
            args.device = torch.device("cuda", args.device.index or 0)
            torch.cuda.set_device(args.device)
        if args.autotune:
            if args.device.type == "cpu":
                raise ValueError("--autotune needs a GPU: on the CPU no kernel is launched")
            gains = tune(dict.fromkeys(case for case, *_ in planned), args.device)
            title = f"Launch settings, kept in {cache_file()}"
            report.print_table(title, ["case", "kernel", "pinned", "", "found", ""], [gain.cells for gain in gains])
            return 0
        command = shlex.join([*prog.split(), *(sys.argv[1:] if argv is None else argv)])
        machine = _machine(args, command)
    except (ValueError, RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        print(f"{prog}: {error}", file=sys.stderr)
        return 1
    for name, value in machine.items():
        print(f"{name:>12}: {value}")
    if hasattr(os, "getloadavg"):
        print(f"{'load':>12}: {os.getloadavg()[0]:.1f} of {os.cpu_count()} cores, which others may use")
    bandwidth = timing.copy_bandwidth(args.device)
    print(f"copy bandwidth: {bandwidth / 1e9:.4g} GB/s, read and written\n")
    setting = Setting(args.device, machine, bandwidth, args.seconds, args.repeats, args.clock, args.memory)
    if args.device.type == "cuda" and args.preset in ("h100", "full"):
        found = {case.name: times for case, times in kernel_times.measured(args.device)}
        path = args.output.with_suffix(".kernels.json")
        kernel_times.write(path, machine, found)
        columns = ["case", "kernel", "ms", "model, ms"]
        report.print_table(f"Kernels, in {path}", columns, kernel_times.table(found, machine["device"]))
    made = []
    for row in run(planned, setting, args.output, args.resume):
        made.append(row)
        print(f"{report.name_of(row)}: {row.contender}: {row.status}", file=sys.stderr)
    report.print_rows(made)
    report.print_claims(claims(rows.read([args.output]) if args.resume else made))
    print(f"{len(made)} rows appended to {args.output}")
    wrong = [row for row in made if row.contender.startswith("ours") and row.status in ("refused", "failed")]
    for row in wrong:
        print(f"{row.status.upper()}: {row.contender}: {row.note}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
