"""All that is shown of results: tables on the terminal, tables of docs/, and plots.

    python -m benchmarks.report                rewrite the tables and draw the plots from benchmarks/results
    python -m benchmarks.report --check        write nothing; exit status 1 if a table differs
    python -m benchmarks.report FILE.csv ...   from these results of benchmarks.run

A table of a document stands between ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->``. A table for which there are no
results is left as it is.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .rows import Row, read


def commit() -> str | None:
    """The checkout's commit, "-dirty" if tracked files differ from it; None outside a checkout."""
    describe = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, encoding="utf-8", check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def cpu_name() -> str:
    """Of this machine."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], caption: str | None = None) -> None:
    """A table on the terminal. Its first column and notes are text, the other columns numbers."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    for k, column in enumerate(columns):
        table.add_column(column, justify="left" if k == 0 or column == "note" else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(str, row))
    console = Console(markup=False, highlight=False)
    # A pipe has no width to fit.
    console.width = max(console.width, 140)
    console.print(table)


def number(value: float | None, digits: int = 3) -> str:
    """A few significant digits, without an exponent; nothing for None."""
    if value is None:
        return ""
    decimals = 0 if value >= 10 ** (digits - 1) else digits - 1 if value >= 1 else digits
    return f"{value:,.{decimals}f}"


def name_of(row: Row) -> str:
    """The case, in short."""
    return f"{row.head}, M = {row.logits:,}, P = {row.positives:,}, {row.regime}, {row.dtype}, {row.layout}"


_COLUMNS: dict[str, Callable[[Row], str]] = {
    "": lambda row: row.contender,
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
        part
        for part in (row.status.replace("ok", ""), row.note, row.graph_note and f"no graph: {row.graph_note}")
        if part
    ),
}
"""Medians; +- is their interquartile range; +MB is memory beyond inputs and gradient. Empty columns are left out."""


def print_rows(rows: Sequence[Row]) -> None:
    """One table for each case."""
    for name in dict.fromkeys(map(name_of, rows)):
        of = [row for row in rows if name_of(row) == name]
        columns = {title: cell for title, cell in _COLUMNS.items() if any(map(cell, of))}
        print_table(name, list(columns), [[cell(row) for cell in columns.values()] for row in of])


def print_claims(claims: Sequence[tuple[str, float, str, float]]) -> None:
    """What was measured against what is claimed: a name, the number, ``"<="`` or ``">="``, and the target."""
    if claims:
        met = {"<=": lambda a, b: a <= b, ">=": lambda a, b: a >= b}
        rows = [(name, f"{x:.2f}", f"{how} {to:g}", "yes" if met[how](x, to) else "NO") for name, x, how, to in claims]
        print_table("Claims", ["claim", "measured", "target", "met"], rows)


def replaced(text: str, name: str, table: str) -> str:
    """The text with the table of this name between its marks.

    Raises:
        ValueError: unless each mark is there once, in order.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"expected {begin} and after it {end}, each once")
    return f"{text.partition(begin)[0]}{begin}\n{table.strip()}\n{end}{text.partition(end)[2]}"


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "csv", nargs="*", type=Path, help="default: those of benchmarks/results that benchmarks.run wrote"
    )
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a table differs")
    parser.add_argument("--root", type=Path, default=Path(), help="of a checkout (default: this folder)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Write tables and plots; the exit status is 1 if a table differs or cannot be written."""
    from .plots import draw, draw_soak
    from .tables import TABLES

    args = parse(argv)
    results = args.root / "benchmarks" / "results"
    paths = args.csv or sorted(results.glob("suite-*.csv"))
    found, differ = read(paths), False
    for page, tables in TABLES.items():
        path = args.root / page
        if not path.exists():  # outside a checkout there are only plots
            continue
        old = new = path.read_text(encoding="utf-8")
        try:
            for name, table in tables.items():
                new = replaced(new, name, made) if (made := table(found)) else new
        except ValueError as error:
            print(f"{path}: {error}", file=sys.stderr)
            return 1
        if new != old:
            differ = True
            print(f"{path}: {'differs from the results' if args.check else 'written'}")
            if not args.check:
                path.write_text(new, encoding="utf-8")
    if args.check:
        return int(differ)
    images = args.root / "docs" / "images"
    drawn = [picture for path in paths for picture in draw(read([path]), images, path.stem.removeprefix("suite-"))]
    if not args.csv:
        drawn.append(draw_soak(results / "soak.csv", images / "soak.png"))
    for picture in drawn:
        print(f"{picture}: written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
