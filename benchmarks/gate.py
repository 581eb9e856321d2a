"""The record of what the kernels execute: a change that makes them execute more has to change the record.

    python -m benchmarks.gate             compare with the record; exit status 1 if anything is worse
    python -m benchmarks.gate --show      count and print
    python -m benchmarks.gate --record    write a new record

It needs no GPU: the kernels run on a virtual GPU, which counts (:mod:`.executed`). The same inputs give the same
counts, and so it tolerates no difference. Counts depend on the compiler: the record is of one version of Triton.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

from .counting import TARGETS
from .executed import RUNS, Costs, Run
from .report import print_table

RECORD = Path(__file__).parent / "results" / "executed.json"
Counted = dict[Run, dict[str, Costs]]
"""By run and kernel."""


class Worse(NamedTuple):
    """One cost that has grown."""

    where: str
    cost: str
    before: float | None
    now: float | None


def worse(run: Run, before: dict[str, Costs], now: dict[str, Costs]) -> list[Worse]:
    """The costs that have grown. A kernel that is new, or that is no longer there, counts as one."""
    found = []
    for kernel in sorted(before.keys() | now.keys()):
        where = f"{', '.join(run)}: {kernel}"
        if kernel not in before or kernel not in now:
            found.append(Worse(where, "launches", float(kernel in before), float(kernel in now)))
            continue
        for cost, old, new in zip(Costs._fields, before[kernel], now[kernel]):
            if old is not None and (new is None or new > old):
                found.append(Worse(where, cost, old, new))
    return found


def recorded(path: Path = RECORD) -> tuple[str, Counted]:
    """The record: the version of Triton that it holds for, and what was counted."""
    content = json.loads(path.read_text(encoding="utf-8"))
    counted: Counted = {}
    for row in content["counted"]:
        run = Run(*(row[name] for name in Run._fields))
        counted.setdefault(run, {})[row["kernel"]] = Costs(**{name: row[name] for name in Costs._fields})
    return content["triton"], counted


def record(runs: list[Run], path: Path = RECORD) -> None:
    """Count, and write what was counted, a line for each kernel of each run."""
    rows: list[dict[str, Any]] = [
        {**run._asdict(), "kernel": kernel, **costs._asdict()} for run in runs for kernel, costs in run.costs().items()
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(row) for row in rows)
    path.write_text(f'{{"triton": "{_triton()}", "counted": [\n{lines}\n]}}\n', encoding="utf-8")
    print(f"written to {path}")


def _triton() -> str:
    import triton

    version: str = triton.__version__
    return version


def show(run: Run) -> None:
    """Count, and print a table with a column for each kernel."""
    costs, rows = run.costs(), []
    for name in Costs._fields:
        numbers = [getattr(of, name) for of in costs.values()]
        if any(number is not None for number in numbers):
            rows.append([name.replace("_", " "), *("" if number is None else f"{number:.5g}" for number in numbers)])
    print_table(f"Executed, {', '.join(run)}", ["", *costs], rows)


def compare(runs: list[Run], path: Path = RECORD) -> list[Worse]:
    """Count, and compare with the record.

    Raises:
        SystemExit: if the record is of another compiler, or not of all these runs.
    """
    version, before = recorded(path)
    if version != _triton():
        sys.exit(f"the record is of Triton {version}, this is {_triton()}: counts do not compare")
    if missing := [run for run in runs if run not in before]:
        sys.exit(f"not recorded: {'; '.join(', '.join(run) for run in missing)}")
    return [entry for run in runs for entry in worse(run, before[run], run.costs())]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--record", action="store_true", help="write a new record")
    what.add_argument("--show", action="store_true", help="print what is counted")
    parser.add_argument("--file", type=Path, default=RECORD, help="the record (default: %(default)s)")
    parser.add_argument("--target", choices=TARGETS, action="append", help="not with --record; may be repeated")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Compare, show or record."""
    options = parse(arguments)
    if options.record:
        record(RUNS, options.file)
        return
    runs = [run for run in RUNS if options.target is None or run.target in options.target]
    if options.show:
        for run in runs:
            show(run)
    elif found := compare(runs, options.file):
        print_table("Worse than recorded", ["kernel", "cost", "recorded", "now"], found)
        sys.exit(1)
    else:
        print(f"{len(runs)} runs, nothing worse than recorded")


if __name__ == "__main__":
    main()
