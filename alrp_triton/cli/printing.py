"""Prints tables, by rich if it is installed."""

from __future__ import annotations

import sys
from collections.abc import Iterable


def print_table(title: str, columns: list[str], rows: Iterable[list[str]]) -> None:
    """Print by rich if it is installed, otherwise as plain text in aligned columns."""
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        lines = [columns, *rows] if any(columns) else list(rows)
        widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
        print(title)
        for line in lines:
            print("  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())
        print()
        return
    table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False, show_header=any(columns))
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*row, style="bold red" if row[-1] == "MISS" else None)
    # A file or pipe has no width.
    Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 120).print(table)
