"""Tables on the terminal and in docs/design/experiments.md, figures in docs/images."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from ..training.page import fill
from ..training.report import show
from . import figures
from .schedule import Schedule
from .tables import tables


def write(schedule: Schedule, docs: Path, console: Console) -> None:
    """Print the tables of what has been run, put them into ``docs``/design/experiments.md, and draw the figures.

    In the document a table stands between ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->``; what stood there goes.
    """
    found = tables(schedule)
    for table in found:
        show(table, console)
    missing = schedule.missing()
    if missing:
        console.print(f"{len(missing)} runs are missing, {missing[0].key} the first of them")
    page = docs / "design" / "experiments.md"
    if page.exists():
        page.write_text(fill(page.read_text(encoding="utf-8"), found), encoding="utf-8")
        console.print(f"written: {page}")
    for path in figures.draw(schedule, docs / "images"):
        console.print(f"written: {path}")
