"""The suite's rows on the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from .rows import Row


def progress_over(rows: Iterable[Row], total: int) -> Iterator[Row]:
    """The rows, with a bar on standard error while they come."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=total)
        for row in rows:
            yield row
            progress.update(task, advance=1, description=f"{name_of(row)}: {row.contender}")


def name_of(row: Row) -> str:
    """The case, in short."""
    size = f"M = {row.logits:,}, P = {row.positives:,}"
    return f"{row.head}, {size}, {row.regime}, {row.dtype}, {row.layout}"


def number(value: float | None, digits: int = 3) -> str:
    """A few significant digits, without an exponent; nothing for None."""
    if value is None:
        return ""
    decimals = 0 if value >= 10 ** (digits - 1) else digits - 1 if value >= 1 else digits
    return f"{value:,.{decimals}f}"


def print_rows(rows: Sequence[Row]) -> None:
    """One table for each case."""
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, highlight=False)
    for name in dict.fromkeys(map(name_of, rows)):
        table = Table(title=name, title_justify="left", pad_edge=False)
        for column in ("contender", "forward", "backward", "both ms", "+-", "graph ms", "x floor", "MB", "error"):
            table.add_column(column, justify="left" if column == "contender" else "right")
        table.add_column("", overflow="fold")
        for row in rows:
            if name_of(row) != name:
                continue
            times = (row.forward_ms, row.backward_ms, row.both_ms, row.both_iqr, row.graph_ms, row.floor_ratio)
            error = "" if row.error is None else f"{row.error:.1e}"
            note = row.note if row.status == "ok" else f"{row.status}: {row.note}"
            cells = [row.contender, *map(number, (*times, row.beyond_gradient_mb)), error, note]
            table.add_row(*cells, style="bold red" if row.status in ("refused", "failed") else None)
        # Piped into a file there is no terminal to fit.
        console.width = max(console.width, 140)
        console.print(table)
