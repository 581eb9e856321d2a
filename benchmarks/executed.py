"""What the kernels execute on a GPU, counted without one: instructions, memory sectors, atomics, barriers.

    python -m benchmarks.executed [--target sm_90] [--case NAME]

The losses run on the virtual GPU of the tests, forward and backward. Each machine instruction that ptxas makes of a
kernel counts as often as the PTX that it comes from has run (:mod:`.machine`). Nothing here is a time.

Two runs tell what a logit costs from what a positive does: one where all rows of logits but the last ones have a
positive, and one with as many rows again that have none. Their difference, over the logits added, does not depend on
how many there are.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

from .counted import CASES, Case, launches
from .machine import assemble, executed
from .report import print_table
from .virtual import TARGETS, Result
from .workloads import NUM_CLASSES, REGIMES

_KERNELS = {
    "linear": ("collect", "bucket", "gradient"),
    "pairwise": ("pairwise_count", "pairwise_gradient"),
}
"""By the beginnings of their names: those that go through all logits."""

BETWEEN = "between the passes"
P_SIZED = {f"P = {number}": number for number in (300, 1000)}
"""Numbers of positives for which the kernels between the passes are counted."""


class Costs(NamedTuple):
    """What one kernel costs. Of each, less is better; None is what does not apply.

    Of a kernel that goes through all logits ``instructions`` to ``barriers`` are for each logit (barriers for each
    1000, the instructions of the pairwise form for each pair), of one between the passes they are those of the launch.
    """

    instructions: float
    """Of machine code, of single threads: 32 for each of a warp, whether all its lanes take part or not."""
    loaded: float
    """Sectors of 32 bytes of global memory that loads of a warp touch, wherever they are found."""
    stored: float
    read: float
    """Bytes: different sectors, as if each came once from memory."""
    written: float
    atomics: float
    """Of single lanes, on global memory."""
    hottest: float
    """Atomics on the word that gets most."""
    barriers: float
    """Of a CTA."""
    registers: int
    spill_bytes: int
    shared_bytes: int
    for_a_positive: float | None = None
    """Instructions beyond those for its logit, where each row has a positive."""
    longest: float | None = None
    """Warp instructions of the CTA that has most."""


class Run(NamedTuple):
    """What is counted at once."""

    target: str
    """Such as ``sm_90``."""
    case: str
    """One of :data:`CASES`, or :data:`BETWEEN`."""
    at: str
    """A regime, or one of :data:`P_SIZED`."""

    def costs(self) -> dict[str, Costs]:
        """By kernel."""
        if self.case == BETWEEN:
            return _between(P_SIZED[self.at], TARGETS[self.target])
        return _passes(CASES[self.case], self.at, TARGETS[self.target])


# Levels and groups change what there is to do for a logit in the same way whatever the scores.
RUNS = [
    Run(target, name, at)
    for target in TARGETS
    for name, places in [
        *((name, ["middle"] if case.levels > 1 or case.grouped else list(REGIMES)) for name, case in CASES.items()),
        (BETWEEN, list(P_SIZED)),
    ]
    for at in places
]


def _passes(case: Case, regime: str, target: int) -> dict[str, Costs]:
    rows = (case.rows, 2 * case.rows)
    fewer, more = (_through_all(case, launches(case, regime, target, n, case.positives)) for n in rows)
    return {name: _difference(case, target, fewer[name], more[name], case.rows * NUM_CLASSES) for name in more}


def _through_all(case: Case, results: list[Result]) -> dict[str, Result]:
    """By name, which gets a number where there are several launches: of the pairwise form's, each leaves out the blocks
    that are the other's."""
    found = [result for result in results if result.name.startswith(_KERNELS[case.form])]
    names = [result.name for result in found]
    numbered = [f" {names[:k].count(name) + 1}" if names.count(name) > 1 else "" for k, name in enumerate(names)]
    return {name + number: result for name, number, result in zip(names, numbered, found)}


def _between(num_positives: int, target: int) -> dict[str, Costs]:
    results = launches(Case(), "middle", target, Case().rows, num_positives)
    return {result.name: _whole(result, target) for result in results if not result.name.startswith(_KERNELS["linear"])}


def _totals(result: Result, target: int) -> dict[str, float]:
    """Of a launch."""
    by_opcode = executed(result, assemble(result.program.ptx, target))
    sectors, lanes = result.by_class("sectors"), result.by_class("lanes")
    barriers = sum(number for opcode, number in by_opcode.items() if opcode.startswith("BAR"))
    return {
        "instructions": 32 * sum(by_opcode.values()),
        "loaded": sectors.get("ld.global", 0),
        "stored": sectors.get("st.global", 0),
        "read": 32 * result.sectors_read,
        "written": 32 * result.sectors_written,
        "atomics": lanes.get("atom.global", 0),
        "hottest": result.most_atomics,
        "barriers": barriers / result.num_warps,
    }


def _difference(case: Case, target: int, fewer: Result, more: Result, num_logits: int) -> Costs:
    """The costs of each of ``num_logits`` logits more."""
    if fewer.program.ptx != more.program.ptx:
        raise ValueError(f"{more.name}: compiled anew for other sizes, so that no difference tells what a logit costs")
    before, after = _totals(fewer, target), _totals(more, target)
    each = {name: (after[name] - before[name]) / num_logits for name in after}
    for_a_positive = (before["instructions"] - num_logits * each["instructions"]) / case.positives
    each["hottest"] = after["hottest"] / (2 * num_logits)
    each["barriers"] *= 1000
    if case.form == "linear":
        return _costs(each, more, target, for_a_positive=for_a_positive)
    each["instructions"] /= case.positives
    return _costs(each, more, target)


def _whole(result: Result, target: int) -> Costs:
    """The costs of a launch."""
    totals = _totals(result, target)
    in_machine_code = totals["instructions"] / (32 * result.warp_instructions)
    return _costs(totals, result, target, longest=int(result.cta_total.max()) * in_machine_code)


def _costs(numbers: dict[str, float], result: Result, target: int, **further: float) -> Costs:
    machine = assemble(result.program.ptx, target)
    return Costs(
        **{name: float(f"{number:.5g}") for name, number in (numbers | further).items()},  # type: ignore[arg-type]
        registers=machine.registers,
        spill_bytes=machine.spill_bytes,
        shared_bytes=result.shared,
    )


def main() -> None:
    """Print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=TARGETS, default="sm_90", help="(default: %(default)s)")
    names = "; ".join([*CASES, BETWEEN])
    parser.add_argument(
        "--case", choices=[*CASES, BETWEEN], action="append", metavar="CASE", help=f"{names} (default: all)"
    )
    options = parser.parse_args()
    for run in RUNS:
        if run.target == options.target and run.case in (options.case or [run.case]):
            print_costs(run, run.costs())


def print_costs(run: Run, costs: dict[str, Costs]) -> None:
    """A table: a column for each kernel."""
    rows = []
    for name in Costs._fields:
        numbers = [getattr(of, name) for of in costs.values()]
        if any(number is not None for number in numbers):
            rows.append([name.replace("_", " "), *("" if number is None else f"{number:.5g}" for number in numbers)])
    print_table(f"Executed, {', '.join(run)}", ["", *costs], rows)


if __name__ == "__main__":
    main()
