"""What the kernels cost: instructions, memory sectors, atomics and barriers of each logit. Nothing here is a time.

The losses run on a virtual GPU, forward and backward (:mod:`.counting`). Two runs tell what a logit costs from what a
positive costs: in one all rows of logits except the last ones have a positive, and the other has as many rows again,
without positives. Their difference over the logits added does not depend on how many there are.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from alrp_triton import alrp_loss, ape_loss

from .counting import TARGETS, Result, assemble, counting_gpu, executed
from .workloads import DTYPES, NUM_CLASSES, REAL, REGIMES, draw_real_positives, real_negatives

# The kernels that go through all logits, by the beginnings of their names. No other module names a kernel.
PASSES = {
    "finding": ("find",),
    "pass 1": ("count", "pairwise_count"),
    "pass 2": ("write", "pairwise_write"),
}
_THROUGH_ALL = {"linear": tuple(names[0] for names in PASSES.values()), "pairwise": ("pairwise_",)}
BETWEEN, BETWEEN_APE = "between the passes", "between the passes of APE Loss"
P_SIZED = {f"P = {number}": number for number in (300, 1000, 4096)}
"""Numbers of positives for which the kernels between the passes are counted."""
# Rows of a level, without those that are added. Tiles of any block size end with them.
_ROWS = {"linear": 1024, "pairwise": 256}
_POSITIVES = {"linear": 1000, "pairwise": 256}
_NUM_GROUPS, _ROWS_OF_A_GROUP = 8, 128
_DOUBLE = re.compile(r"D(ADD|MUL|FMA|SETP|MNMX)|.*\bF64\b")
# Images, at least 2, and the height, width and anchors of each level; what makes their classes channels, and back.
_PLACES, _TURN = (-1, 32, 8, 2), (0, 3, 4, 1, 2)


def _of_rows(num_rows: int) -> Tensor:
    return torch.arange(num_rows) // _ROWS_OF_A_GROUP % _NUM_GROUPS


GROUPS: dict[str, Callable[[int], Tensor]] = {
    "rows": _of_rows,
    "rows, far apart": lambda rows: _of_rows(rows) * 10**9,
    "classes": lambda rows: torch.arange(NUM_CLASSES).expand(rows, NUM_CLASSES),
}


class Case(NamedTuple):
    """What is run."""

    form: str = "linear"  # or `pairwise`
    levels: int = 1
    groups: str = ""  # one of GROUPS
    dtype: str = "float32"
    channels_first: bool = False  # views of what convolutions write: `[B, H, W, A, C]` of memory `[B, A C, H, W]`

    @property
    def name(self) -> str:
        """A short description."""
        levels = f"{self.levels} levels" if self.levels > 1 else "1 level"
        further = ["channels first"] * self.channels_first + [f"groups of {self.groups}"] * bool(self.groups)
        return ", ".join([self.form, levels, *further, self.dtype])

    @property
    def positives(self) -> int:
        """P."""
        return _POSITIVES[self.form]

    @property
    def rows(self) -> int:
        """Of all levels, without those that are added."""
        return _ROWS[self.form] * self.levels


CASES = {
    case.name: case
    for case in (
        Case(),
        Case(dtype="bfloat16"),
        Case(levels=5),
        Case(levels=5, channels_first=True),
        *(Case(groups=name) for name in GROUPS),
        Case("pairwise"),
    )
}


class Costs(NamedTuple):
    """What one kernel costs. Less of each is better; None is what does not apply.

    ``instructions`` to ``barriers`` are for each logit if the kernel goes through all logits (barriers for each 1000,
    and instructions of the pairwise form for each pair), and for the launch if it runs between the passes.
    """

    instructions: float  # of machine code, of single threads: 32 for each warp, even if some of its lanes take no part
    loaded: float  # sectors of 32 bytes of global memory that loads of a warp touch, in memory or a cache
    stored: float
    read: float  # bytes: different sectors, as if each came once from memory
    written: float
    atomics: float  # of single lanes, on global memory
    hottest: float  # atomics on the word that gets most
    barriers: float  # of a CTA
    registers: int
    spill_bytes: int
    shared_bytes: int
    for_a_positive: float | None = None  # instructions beyond those for its logit, in rows that have one positive each
    longest: float | None = None  # warp instructions of the CTA that has most
    doubles: float | None = None  # instructions with float64 numbers, which some GPUs execute 64 times slower


class Run(NamedTuple):
    """What is counted at once."""

    target: str  # such as `sm_90`
    case: str  # one of CASES, BETWEEN or BETWEEN_APE
    at: str  # a regime, or one of P_SIZED

    def costs(self) -> dict[str, Costs]:
        """By kernel."""
        if self.case in (BETWEEN, BETWEEN_APE):
            return _between(P_SIZED[self.at], TARGETS[self.target], self.case == BETWEEN_APE)
        return _passes(CASES[self.case], self.at, TARGETS[self.target])


# What levels and groups change does not depend on the scores, so that one regime is enough for them.
RUNS = [
    Run(target, name, at)
    for target in TARGETS
    for name, places in [
        *((name, ["middle"] if case.levels > 1 or case.groups else list(REGIMES)) for name, case in CASES.items()),
        (Case().name, list(REAL)),
        (BETWEEN, list(P_SIZED)),
        (BETWEEN_APE, ["P = 1000"]),
    ]
    for at in places
]


def make_problem(regime: str, num_rows: int, num_positives: int) -> tuple[Tensor, Tensor, Tensor]:
    """``[rows, C]`` logits, the rows' classes and the positives' errors; the first rows have one positive each.

    Fewer rows are the beginning of more. They are drawn in float64, so that differences between processors vanish when
    they are rounded to float32.
    """
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    classes = torch.randint(NUM_CLASSES, (num_positives,), generator=generator)
    if regime in REAL:
        errors = torch.rand(num_positives, generator=generator)
        scores = draw_real_positives(regime, num_positives, generator)
        logits = real_negatives(regime, num_rows * NUM_CLASSES).view(num_rows, NUM_CLASSES).clone()
    else:
        (mean, deviation), (of_positives, deviation_of_positives) = REGIMES[regime]
        scores = draw(num_positives) * deviation_of_positives + of_positives
        errors = torch.rand(num_positives, generator=generator)
        logits = torch.cat([draw(256, NUM_CLASSES) for _ in range(-(-num_rows // 256))])[:num_rows] * deviation + mean
    logits[torch.arange(num_positives), classes] = scores.to(logits.dtype)
    labels = torch.full((num_rows,), NUM_CLASSES)
    labels[:num_positives] = classes
    return logits.float(), labels, errors


def launches(
    case: Case, regime: str, target: int, num_rows: int, num_positives: int, ape: bool = False
) -> list[Result]:
    """The launches of a step of aLRP Loss, or of APE Loss: forward and backward."""
    logits, labels, errors = make_problem(regime, num_rows, num_positives)
    x, y = list(logits.to(DTYPES[case.dtype]).tensor_split(case.levels)), list(labels.tensor_split(case.levels))
    if case.channels_first:
        x = [level.view(*_PLACES, NUM_CLASSES).permute(_TURN).contiguous().permute(_TURN) for level in x]
        y = [level.view(_PLACES) for level in y]
    z = list(GROUPS[case.groups](num_rows).tensor_split(case.levels)) if case.groups else None
    backend = "triton" if case.form == "linear" else "pairwise"
    x = [level.detach().clone().requires_grad_() for level in x]
    with counting_gpu(target) as device:
        if ape:
            ape_loss(x, y, 1 - errors, groups=z, backend=backend).total.backward()
        else:
            alrp_loss(x, y, errors.requires_grad_(), groups=z, backend=backend).total.backward()
    return list(device.results)


def _passes(case: Case, regime: str, target: int) -> dict[str, Costs]:
    rows = (case.rows, 2 * case.rows)
    fewer, more = (_through_all(case, launches(case, regime, target, n, case.positives)) for n in rows)
    return {name: _difference(case, target, fewer[name], more[name], case.rows * NUM_CLASSES) for name in more}


def _through_all(case: Case, results: list[Result]) -> dict[str, Result]:
    """By name, with a number if there are several launches: in the pairwise form each launch handles some blocks."""
    found = [result for result in results if result.name.startswith(_THROUGH_ALL[case.form])]
    names = [result.name for result in found]
    numbered = [f" {names[:k].count(name) + 1}" if names.count(name) > 1 else "" for k, name in enumerate(names)]
    return {name + number: result for name, number, result in zip(names, numbered, found)}


def _between(num_positives: int, target: int, ape: bool) -> dict[str, Costs]:
    results = launches(Case(), "middle", target, max(Case().rows, num_positives), num_positives, ape)
    return {
        result.name: _whole(result, target) for result in results if not result.name.startswith(_THROUGH_ALL["linear"])
    }


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
    by_opcode = executed(result, assemble(result.program.ptx, target))
    doubles = 32 * sum(number for opcode, number in by_opcode.items() if _DOUBLE.match(opcode))
    return _costs(totals, result, target, longest=int(result.cta_total.max()) * in_machine_code, doubles=doubles)


def _costs(numbers: dict[str, float], result: Result, target: int, **further: float) -> Costs:
    machine = assemble(result.program.ptx, target)
    return Costs(
        **{name: float(f"{number:.5g}") for name, number in (numbers | further).items()},  # type: ignore[arg-type]
        registers=machine.registers,
        spill_bytes=machine.spill_bytes,
        shared_bytes=result.shared,
    )


def of_pass(name: str, counted: dict[str, Costs]) -> Costs:
    """The costs of a key of :data:`PASSES`, of its first launch if it has several."""
    return next(costs for kernel, costs in counted.items() if kernel.startswith(PASSES[name]))
