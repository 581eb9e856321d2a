"""``python -m benchmarks.training.page``: tables and curves of docs/design/photographs.md, from the kept results."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from . import figures
from .contenders import CONTENDERS
from .plan import Plan, Store
from .run import Run, Setting
from .tables import Table, findings, tables

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "training"
PAGE = ROOT / "docs" / "design" / "photographs.md"
LOSSES = [name for name, contender in CONTENDERS.items() if contender.rate_of is None]
VARIANTS = ["alrp", *(name for name, contender in CONTENDERS.items() if contender.rate_of == "alrp")]
# Learning rates of a backbone whose upper half is trained, for one of neck and head.
FACTORS = (0.01, 0.1, 1.0)
# Comparisons of all losses at all lengths: with curves and tables of classes and rates.
WHOLE = ("bccd", "voc07")


def plans() -> dict[str, Plan]:
    """The comparisons by name: of losses; at one length, of variants of aLRP Loss and of rates of the backbone."""
    bccd = Store(RESULTS / "bccd.jsonl", Run, vars(Setting(size=320)))
    voc = Store(RESULTS / "voc07.jsonl", Run, vars(Setting(size=256)))
    rates = {"bccd": [3e-3, 1e-2, 3e-2], "voc": [1e-3, 3e-3, 1e-2]}
    found = {
        "bccd": Plan(bccd, LOSSES, rates["bccd"], range(5), [1, 4, 12]),
        "voc07": Plan(voc, LOSSES, rates["voc"], range(3), [1, 3, 9]),
        "bccd-variants": Plan(bccd, VARIANTS, rates["bccd"], range(3), [4]),
    }
    for factor in FACTORS:
        setting = Setting(size=320, frozen=4, backbone_factor=factor)
        store = Store(RESULTS / f"bccd-backbone-{factor:g}.jsonl", Run, vars(setting))
        losses = ["focal", "ap", "rank-sort", "alrp"]
        found[f"bccd-backbone-{factor:g}"] = Plan(store, losses, rates["bccd"], range(3), [4])
    return found


def content() -> list[Table]:
    """All tables of the page."""
    found = []
    for name, plan in plans().items():
        for table in tables(plan, "test"):
            if name in WHOLE or table.name.startswith("passes"):
                found.append(Table(f"{name}-{table.name}", table.title, table.columns, table.rows))
    return found


def fill(text: str, found: Sequence[Table]) -> str:
    """The text with each table between ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->``; what stood there goes.

    Raises:
        ValueError: a table has no place in it.
    """
    for table in found:
        place = re.compile(rf"(<!-- {table.name}:begin -->\n).*?(<!-- {table.name}:end -->)", re.DOTALL)
        if not place.search(text):
            raise ValueError(f"no place for {table.name}")
        text = place.sub(lambda match, table=table: f"{match[1]}{table.markdown()}\n{match[2]}", text)  # type: ignore[misc]
    return text


def main() -> None:
    """Write the page and its figures, and print what follows from the tables."""
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8"), content()), encoding="utf-8")
    for name, plan in plans().items():
        if name in WHOLE:
            figures.draw_curves(plan, "test", ROOT / "docs" / "images" / f"photographs-{name}.png")
        for sentence in findings(plan, "test"):
            print(f"{name}: {sentence}")
        print(f"{name}: {plan.number()} runs are missing")


if __name__ == "__main__":
    main()
