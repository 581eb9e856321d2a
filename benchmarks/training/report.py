"""Tables on the terminal and in a document, and figures."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from . import calibrated, figures
from .data import Dataset
from .plan import Plan
from .tables import Table, findings, tables


def write(plan: Plan, dataset: Dataset, output: Path, console: Console) -> None:
    """Print the tables of what has been run, write them to ``output``/report.md, and draw figures beside it."""
    split = "test" if "test" in dataset.splits else "val"
    found = [*tables(plan, split), *(table for table in [calibrated.table(plan, dataset, output)] if table.rows)]
    for table in found:
        show(table, console)
    sentences = findings(plan, split)
    for sentence in sentences:
        console.print(sentence)
    if number := plan.number():
        console.print(f"{number} runs are missing")
    parts = [f"## {table.title}\n\n{table.markdown()}" for table in found]
    output.mkdir(parents=True, exist_ok=True)
    page = output / "report.md"
    page.write_text("\n\n".join(["# Losses compared", *sentences, *parts]) + "\n", encoding="utf-8")
    for path in [page, *figures.draw(plan, dataset, split, output)]:
        console.print(f"written: {path}")


def show(table: Table, console: Console) -> None:
    """Print a table."""
    shown = RichTable(title=table.title, title_justify="left", box=box.SIMPLE)
    for i, column in enumerate(table.columns):
        shown.add_column(column, justify="right" if i else "left", no_wrap=True)
    for row in table.rows:
        shown.add_row(*row)
    console.print(shown)
