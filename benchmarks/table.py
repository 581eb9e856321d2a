"""The table of README.md, from what the suite measured.

    python -m benchmarks.table benchmarks/results/suite-*.csv [--readme README.md] [--check]

It takes the place of what stands between two HTML comments, ``<!-- benchmarks:begin -->`` and
``<!-- benchmarks:end -->``; ``--check`` only says whether anything would change.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from . import rows
from .peers import BUCKETED, FOCAL, FOCAL_COMPILED, LOOP, OURS_BOXES, OURS_COMPILED, ours
from .rows import Row
from .selection import by_device, regimes
from .show import number
from .workloads import REGIMES

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
_COLUMNS = {
    "loop": LOOP,
    "vectorised": "vectorised",
    "bucketed": BUCKETED,
    "focal": FOCAL,
    "focal, compiled": FOCAL_COMPILED,
    "ours, numba": ours("numba"),
}
# Focal loss comes with GIoU loss: what it is held against computes GIoU, too.
_AGAINST = {FOCAL: OURS_BOXES, FOCAL_COMPILED: OURS_COMPILED}


def markdown(found: Sequence[Row]) -> str:
    """A table for each device that has cases in several regimes."""
    tables = []
    for device, of in by_device(found).items():
        shown = regimes(of)
        lines = [line for one in shown for line in _lines(one)]
        if lines:
            about = max((row for one in shown for row in one), key=lambda row: row.date)
            threads = f", {about.threads} threads" if about.kind == "cpu" else ""
            versions = f"PyTorch {about.torch}, Triton {about.triton}, Python {about.python}"
            tables.append(f"{device}{threads}, {versions}, {about.date[:10]}; `{about.command}`:\n\n{_table(lines)}")
    if not tables:
        raise ValueError("no case of the rows was timed in several regimes")
    note = (
        "Forward + backward. ours: what `auto` chooses; of bandwidth: its share of what a copy reaches, counting each "
        "logit as read twice and its gradient as written once. The other columns: how many times as long as ours; "
        "focal loss with GIoU loss, against ours with GIoU errors, and where it is compiled both are. In brackets the "
        "error of a gradient that is not exact. Of a CPU, which others may share, there are no times."
    )
    return "\n".join([*tables, note])


def _lines(of: list[Row]) -> list[dict[str, str]]:
    """For each regime the cells by column."""
    lines = []
    for regime in REGIMES:
        found = {row.contender: row for row in of if row.regime == regime}
        mine = found.get(ours("triton")) or found.get(ours("torch"))
        if mine is None:
            continue
        line = {
            "head, logits, positives": f"{mine.head}, {mine.dtype}, {mine.logits / 1e6:.3g} M, {mine.positives:,}",
            "scores": regime,
            "ours, ms": "" if mine.kind == "cpu" else number(mine.best_ms),
            "of bandwidth": "" if mine.bandwidth_share is None else f"{100 * mine.bandwidth_share:.3g} %",
        }
        for column, name in _COLUMNS.items():
            line[column] = _ratio(found.get(name), found.get(_AGAINST.get(name, mine.contender)))
        lines.append(line)
    return lines


def _table(lines: Sequence[dict[str, str]]) -> str:
    """As Markdown, without columns in which nothing stands."""
    columns = [column for column in lines[0] if any(line[column] for line in lines)]
    rule = ["---" if column in ("scores", "head, logits, positives") else "---:" for column in columns]
    return "".join(map(_line, [columns, rule, *([line[column] for column in columns] for line in lines)]))


def _ratio(other: Row | None, mine: Row | None) -> str:
    """Time over time: by graphs where both have one, else by events or the clock."""
    if other is None or mine is None or other.both_ms is None or mine.both_ms is None:
        return ""
    ratio = other.both_ms / mine.both_ms
    if other.graph_ms and mine.graph_ms:
        ratio = other.graph_ms / mine.graph_ms
    error = f" ({other.error:.0e})" if other.exact is False and other.error is not None else ""
    return number(ratio) + error


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |\n"


def replaced(text: str, table: str) -> str:
    """The text with the table between its markers.

    Raises:
        ValueError: unless each marker is there once, in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"expected {BEGIN} and after it {END}, each once")
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def main(argv: Sequence[str] | None = None) -> int:
    """Write the table, or check it: the exit status is 1 where the file differs or cannot be written."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("csv", nargs="+", type=Path, help="what the suite wrote")
    parser.add_argument("--readme", type=Path, default=Path("README.md"), help="default: %(default)s")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the file differs")
    args = parser.parse_args(argv)
    text = args.readme.read_text(encoding="utf-8")
    try:
        new = replaced(text, markdown(rows.read(args.csv)))
    except ValueError as error:
        print(f"{args.readme}: {error}", file=sys.stderr)
        return 1
    if args.check:
        if new != text:
            command = " ".join(["python -m benchmarks.table", *map(str, args.csv)])
            print(f"{args.readme} differs from what {command} writes", file=sys.stderr)
        return int(new != text)
    args.readme.write_text(new, encoding="utf-8")
    print(f"written to {args.readme}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
