"""The suite's rows on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

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
    """One table for each case; cases of a single row stand together in another."""
    by_case: dict[str, list[Row]] = {}
    for row in rows:
        by_case.setdefault(name_of(row), []).append(row)
    single = [(f"{name}: {of[0].contender}", of[0]) for name, of in by_case.items() if len(of) == 1]
    for name, of in by_case.items():
        if len(of) > 1:
            _print_table(name, [(row.contender, row) for row in of])
    if single:
        _print_table("", single)


_COLUMNS: dict[str, Callable[[Row], str]] = {
    "forward": lambda row: number(row.forward_ms),
    "backward": lambda row: number(row.backward_ms),
    "both ms": lambda row: number(row.both_ms),
    "+-": lambda row: number(row.both_iqr),
    "wall ms": lambda row: number(row.wall_ms),
    "graph ms": lambda row: number(row.graph_ms),
    "x floor": lambda row: number(row.floor_ratio),
    "launches": lambda row: "" if row.launches is None else str(row.launches),
    "+MB": lambda row: number(row.beyond_gradient_mb),
    "error": lambda row: "" if row.error is None else f"{row.error:.1e}",
    "note": lambda row: "; ".join(
        filter(
            None, ["" if row.status == "ok" else row.status, row.note, row.graph_note and f"no graph: {row.graph_note}"]
        )
    ),
}
"""Medians, +- their interquartile range; +MB: memory beyond inputs and gradient. Empty columns are left out."""


def _print_table(title: str, rows: Sequence[tuple[str, Row]]) -> None:
    from rich.console import Console
    from rich.table import Table

    columns = {name: cell for name, cell in _COLUMNS.items() if any(cell(row) for _, row in rows)}
    table = Table("", title=title, title_justify="left", pad_edge=False)
    for name in columns:
        table.add_column(name, justify="left" if name == "note" else "right", overflow="fold")
    for name, row in rows:
        style = "bold red" if row.status in ("refused", "failed") else None
        table.add_row(name, *(cell(row) for cell in columns.values()), style=style)
    console = Console(markup=False, highlight=False)
    # Piped into a file there is no terminal to fit.
    console.width = max(console.width, 140)
    console.print(table)
