"""What the kernels may execute, recorded: a change for the worse has to change the record with it.

    python -m benchmarks.gate             compare with the record; exit status 1 if anything is worse
    python -m benchmarks.gate --record    write a new record

No GPU is needed: the kernels run on the virtual GPU, which counts (:mod:`.executed`). The same inputs give the same
counts, so that nothing is tolerated. They depend on the compiler: the record holds for one version of Triton.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import triton

from .executed import RUNS, Costs, Run
from .report import print_table
from .virtual import TARGETS

RECORD = Path(__file__).parent / "results" / "executed.json"
Counted = dict[Run, dict[str, Costs]]
"""By run and kernel."""


class Worse(NamedTuple):
    """One cost that has grown."""

    run: Run
    kernel: str
    cost: str
    before: float | None
    now: float | None

    def row(self) -> list[str]:
        """Of a table."""
        numbers = ("nothing" if number is None else f"{number:g}" for number in (self.before, self.now))
        return [f"{', '.join(self.run)}: {self.kernel}", self.cost.replace("_", " "), *numbers]


def worse(run: Run, before: dict[str, Costs], now: dict[str, Costs]) -> list[Worse]:
    """The costs that have grown. A kernel that there was not before is one, and so is one that is no longer seen."""
    found = []
    for kernel in before.keys() | now.keys():
        if kernel not in before or kernel not in now:
            found.append(Worse(run, kernel, "launches", float(kernel in before), float(kernel in now)))
            continue
        for cost, old, new in zip(Costs._fields, before[kernel], now[kernel]):
            if old is not None and (new is None or new > old):
                found.append(Worse(run, kernel, cost, old, new))
    return sorted(found, key=lambda entry: entry.kernel)


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
    path.write_text(f'{{"triton": "{triton.__version__}", "counted": [\n{lines}\n]}}\n', encoding="utf-8")
    print(f"written to {path}")


def compare(runs: list[Run], path: Path = RECORD) -> list[Worse]:
    """Count, and compare with the record.

    Raises:
        SystemExit: if the record is of another compiler, or not of all these runs.
    """
    version, before = recorded(path)
    if version != triton.__version__:
        sys.exit(f"the record is of Triton {version}, this is {triton.__version__}: counts do not compare")
    if missing := [run for run in runs if run not in before]:
        sys.exit(f"not recorded: {'; '.join(', '.join(run) for run in missing)}")
    return [entry for run in runs for entry in worse(run, before[run], run.costs())]


def main(arguments: list[str] | None = None) -> None:
    """Compare, or record."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gate", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--record", action="store_true", help="write a new record instead of comparing with it")
    parser.add_argument("--file", type=Path, default=RECORD, help="the record (default: %(default)s)")
    parser.add_argument("--target", choices=TARGETS, action="append", help="compare for this one (default: all)")
    options = parser.parse_args(arguments)
    if options.record:
        record(RUNS, options.file)
        return
    runs = [run for run in RUNS if options.target is None or run.target in options.target]
    if found := compare(runs, options.file):
        print_table("Worse than recorded", ["kernel", "cost", "recorded", "now"], [entry.row() for entry in found])
        sys.exit(1)
    print(f"{len(runs)} runs, nothing worse than recorded")


if __name__ == "__main__":
    main()
