"""A fuzzer of all losses: every case gives the reference's answer or a clear error, and never changes its inputs.

    python tests/fuzz.py --cases 100000 --seed 0 --json fuzz.json   # goes on where an earlier run ended
    python tests/fuzz.py --seed 0 --case 1234 --backend torch       # one case, alone

A case is what its seed and index make of it, for the same list of backends. Cases run in processes of their own: one
that ends its process, or takes longer than ten minutes, is a failure like any other.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from dialect import KERNELS, backends
from fuzz_cases import draw_problem
from fuzz_processes import Record, run_many
from fuzz_run import OUTCOMES, describe, run_case


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0 if no case failed."""
    from rich.console import Console
    from rich.progress import track

    parser = argparse.ArgumentParser(description="Fuzz all losses against the float64 reference.")
    parser.add_argument("--cases", type=int, default=2000, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", action="append", help="may be repeated; by default all that run here, and auto")
    parser.add_argument("--case", type=int, help="run this index alone, in this process")
    parser.add_argument("--jobs", type=int, default=1, help="processes (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="file to keep what is done in, and to go on from")
    given = parser.parse_args(arguments)
    of, console = given.backend or default_backends(), Console(width=120)
    if given.case is not None:
        torch.set_num_threads(1)
        outcome = run_case(given.seed, given.case, of)
        problem = draw_problem(given.seed, given.case, of, small=KERNELS)
        console.print(outcome.text or describe(problem), markup=False, highlight=False, soft_wrap=True)
        console.print(f"case {outcome.index}: {outcome.member}, {outcome.backend}: {outcome.outcome}", markup=False)
        return int(outcome.outcome == "FAILED")
    record, begin = Record(given.seed, of, given.json), time.monotonic()
    remaining = given.cases - record.total
    for _ in track(run_many(record, given.cases, given.jobs), "fuzzing", total=max(remaining, 0), console=console):
        pass
    console.print(summary(record))
    for failure in sorted(record.failures)[:20]:
        repeat = f"--seed {given.seed} --case {failure.index} " + " ".join(f"--backend {b}" for b in of)
        console.print(
            f"\ncase {failure.index} ({failure.member}, {failure.backend}): {failure.text}\n{repeat}", markup=False
        )
    console.print(f"{record.total} cases, {len(record.failures)} failed, {time.monotonic() - begin:.0f} s")
    return int(bool(record.failures))


def default_backends() -> list[str]:
    """All that run here; those that do the work more often than those that judge or choose."""
    own = [backend for backend in backends() if backend != "reference"]
    return [*own * 4, *(["reference", "auto"] if not KERNELS else [])]


def summary(record: Record) -> Any:
    """How many cases of each member and backend were judged in which way."""
    from rich.table import Table

    table = Table("loss", "backend", *OUTCOMES, title=f"seed {record.seed}")
    for member, backend in sorted({key[:2] for key in record.counts}):
        table.add_row(member, backend, *(str(record.counts[member, backend, o]) for o in OUTCOMES))
    totals = [sum(n for key, n in record.counts.items() if key[2] == o) for o in OUTCOMES]
    table.add_section()
    table.add_row("all", "", *map(str, totals))
    return table


if __name__ == "__main__":
    sys.exit(main())
