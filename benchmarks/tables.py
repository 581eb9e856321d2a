"""The tables of docs/, from the results."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence

from . import model, scaling
from .counting import TARGETS
from .executed import BETWEEN, CASES, P_SIZED, Run, of_pass
from .gate import recorded
from .peers import BUCKETED, FOCAL, FOCAL_COMPILED, LOOP, LOOPS, MEMBERS, OURS_BOXES, OURS_COMPILED, ours
from .report import number
from .rows import Row
from .workloads import HEADS, REAL, REGIMES

_SHAPE = ("head", "batch", "layout", "dtype", "logits", "positives")


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 1) -> str:
    """A table, without columns that are empty in all rows."""
    rows = list(rows)
    kept = [k for k in range(len(columns)) if k < text_columns or any(row[k] for row in rows)]
    rule = ["---" if k < text_columns else "---:" for k in range(len(columns))]
    return "\n".join(
        f"| {' | '.join(line[k] for k in kept)} |".replace("|  |", "| |") for line in (columns, rule, *rows)
    )


def by_device(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows that have a time; of several runs on one device the last of each case and contender."""
    last: dict[Hashable, Row] = {}
    for row in rows:
        if row.both_ms is not None:
            key = tuple(getattr(row, name) for name in ("device", *_SHAPE, "regime", "contender"))
            last[key] = row
    return {of[0].device: of for of in sets_of(last.values(), "device")}


def sets_of(rows: Iterable[Row], *names: str) -> list[list[Row]]:
    """The rows, those with the same values in these columns together."""
    found: dict[Hashable, list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(getattr(row, name) for name in names), []).append(row)
    return list(found.values())


def regimes(rows: Iterable[Row]) -> list[list[Row]]:
    """Sets of rows that differ in regime and contender alone and have several regimes; the largest first."""
    several = [found for found in sets_of(rows, *_SHAPE) if len({row.regime for row in found}) > 1]
    return sorted(several, key=lambda found: (found[0].logits, found[0].positives), reverse=True)


def ratio(slow: Row | None, fast: Row | None) -> float | None:
    """Time over time, by graphs if both have one; None without both."""
    if slow is None or fast is None or not slow.both_ms or not fast.both_ms:
        return None
    return slow.graph_ms / fast.graph_ms if slow.graph_ms and fast.graph_ms else slow.both_ms / fast.both_ms


# Focal loss comes with GIoU loss, and is compared with ours with GIoU errors.
_COMPARED = {
    "loop": (LOOP, None),
    "vectorised": ("vectorised", None),
    "bucketed": (BUCKETED, None),
    "focal": (FOCAL, OURS_BOXES),
    "focal, compiled": (FOCAL_COMPILED, OURS_COMPILED),
    "ours, numba": (ours("numba"), None),
}


def costs(rows: Sequence[Row]) -> str:
    """A table for each device that has cases in several regimes."""
    tables = []
    for device, of in by_device(row for row in rows if not HEADS[row.head].model).items():
        shown, lines = [found for found in regimes(of) if not _is_family(found)], []
        for found in shown:
            for regime in REGIMES:
                by_name = {row.contender: row for row in found if row.regime == regime}
                if (mine := _mine(by_name.values())) is None:
                    continue
                size = f"{mine.head}, {mine.dtype}, {mine.logits / 1e6:.3g} M, {mine.positives:,}"
                share = "" if mine.bandwidth_share is None else f"{100 * mine.bandwidth_share:.3g} %"
                line = [size, regime, "" if mine.kind == "cpu" else number(mine.best_ms), share]
                for name, against in _COMPARED.values():
                    other = by_name.get(name)
                    of_ours = mine if against is None else by_name.get(against)
                    off = f" ({other.error:.0e})" if other and other.error and other.exact is False else ""
                    line.append(text + off if (text := number(ratio(other, of_ours))) else "")
                lines.append(line)
        if lines:
            about = max((row for found in shown for row in found), key=lambda row: row.date)
            threads = f", {about.threads} threads" if about.kind == "cpu" else ""
            versions = f"PyTorch {about.torch}, Triton {about.triton}, Python {about.python}"
            columns = ["head, logits, positives", "scores", "ours, ms", "of bandwidth", *_COMPARED]
            tables.append(f"{device}{threads}, {versions}, {about.date[:10]}:\n\n{markdown(columns, lines, 2)}\n")
    return "\n".join([*tables, _NOTE]) if tables else ""


_NOTE = (
    'Forward + backward. "Ours" is backend `triton` on a GPU and `torch` on a CPU, where `auto` takes `numba` if it is '
    'installed. "Of bandwidth" is the share of a copy\'s bandwidth that ours reaches; each logit counts as read twice '
    "and its gradient as written once. The other columns give the time of a contender divided by the time of ours. "
    "Focal loss runs with GIoU loss and is compared with ours with GIoU errors; in the compiled column both are "
    "compiled. Brackets hold the error of a gradient that is not exact. The table shows no times for a CPU, because "
    "other programs may have used it."
)


def _is_family(rows: Iterable[Row]) -> bool:
    return any(row.contender == "ours, NDCG" for row in rows)


def _mine(rows: Iterable[Row]) -> Row | None:
    """The row of backend triton; without one, that of backend torch."""
    by_name = {row.contender: row for row in rows}
    return by_name.get(ours("triton")) or by_name.get(ours("torch"))


def family(rows: Sequence[Row]) -> str:
    """The members of the family in units of aLRP Loss, and the published loops in units of ours."""
    found = list(filter(_is_family, regimes(rows)))
    if not found:
        return ""
    by_name = {(row.regime, row.contender): row for row in found[0]}
    lines = []
    for name in ("aLRP", *MEMBERS):
        for_regime = []
        for regime in REGIMES:
            alrp = _mine(row for row in found[0] if row.regime == regime)
            mine = alrp if name == "aLRP" else by_name.get((regime, f"ours, {name}"))
            loop = by_name.get((regime, LOOPS.get(name, "")))
            for_regime.append((number(ratio(mine, alrp)), number(ratio(loop, mine))))
        lines.append([name, *(cell for column in zip(*for_regime) for cell in column)])
    return markdown(["", *(f"{what}, {regime}" for what in ("of aLRP", "loop / ours") for regime in REGIMES)], lines)


def steps(rows: Sequence[Row]) -> str:
    """The loss's share of a training step."""
    lines = []
    for of in sets_of((row for row in rows if HEADS[row.head].model and row.both_ms), "head"):
        by_name = {row.contender: row for row in of}
        mine, compiled, loop = _mine(of), by_name.get(ours("numba")), by_name.get(LOOP)
        shares = [f"{100 * row.both_ms / row.wall_ms:.1f} %" if row else "" for row in (mine, compiled, loop)]  # type: ignore[operator]
        lines.append([of[0].head, of[0].note, *shares, number(ratio(loop, mine), 2)])
    columns = ["detector", "of the loss", "ours", "ours, numba", "published loop", "loop / ours"]
    return markdown(columns, lines, 2) if lines else ""


def executed(rows: Sequence[Row]) -> str:
    """What sm_90 executes for each logit, by regime."""
    _, counted = recorded()
    lines = []
    for name in ("pass 1", "pass 2"):
        costs = [of_pass(name, counted[Run("sm_90", next(iter(CASES)), regime)]) for regime in (*REGIMES, *REAL)]
        numbers = {
            "instructions": [f"{c.instructions:.0f}" for c in costs],
            "sectors of 32 bytes loaded": [f"{c.loaded:.2f}" for c in costs],
            "atomics": [f"{c.atomics:.3g}" for c in costs],
            "atomics on the hottest word": [f"{c.hottest:.3g}" for c in costs],
            "barriers, for 1000 logits": [f"{c.barriers:.1f}" for c in costs],
        }
        lines += [[f"{name}, {what}", *cells] for what, cells in numbers.items() if set(cells) != {"0"}]
    return markdown(["for each logit", *REGIMES, *REAL], lines)


def instructions(rows: Sequence[Row]) -> str:
    """Instructions a logit by case and target."""
    _, counted = recorded()
    lines = []
    for name, case in CASES.items():
        line = [f"{name}, a pair" if case.form == "pairwise" else name]
        for target in TARGETS:
            costs = [of_pass(part, counted[Run(target, name, "middle")]) for part in ("pass 1", "pass 2")]
            line.append(", ".join(f"{c.instructions:.3g}" for c in costs))
        lines.append(line)
    return markdown(["instructions a logit, passes 1 and 2", *TARGETS], lines)


def between(rows: Sequence[Row]) -> str:
    """The CTA that has most to do between the passes."""
    _, counted = recorded()
    of = [counted[Run("sm_90", BETWEEN, at)] for at in P_SIZED]
    lines = [
        [f"`{n}`", str(c.registers), *(f"{one[n].longest:,.0f}" for one in of), f"{(c.doubles or 0) / 1e6:,.0f}"]
        for n, c in of[-1].items()
    ]
    return markdown(["", "registers", *P_SIZED, "million float64 instructions of threads, P = 4096"], lines)


TABLES: dict[str, dict[str, Callable[[Sequence[Row]], str]]] = {
    "docs/losses.md": {"family": family},
    "docs/design/performance.md": {
        "benchmarks": costs,
        "executed": executed,
        "instructions": instructions,
        "between": between,
        "model": lambda rows: markdown(*model.table(model.PROBLEM)),
        "step-share": steps,
    },
    "docs/scaling.md": {"scaling": lambda rows: markdown(*scaling.table(), 0)},
}
"""By document and name."""
