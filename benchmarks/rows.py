"""The suite's results: one CSV row for each case and contender, appended as soon as it is known."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .workloads import Case


@dataclasses.dataclass(frozen=True)
class Row:
    """One case and contender on one machine. None, an empty cell, is what was not or could not be measured."""

    # Where and when
    date: str
    command: str
    device: str
    kind: str  # cpu, cuda
    threads: int
    alrp_triton: str
    commit: str | None
    torch: str
    triton: str | None
    python: str
    # What
    head: str
    regime: str
    image: int
    batch: int
    dtype: str
    layout: str
    logits: int
    positives: int
    contender: str
    exact: bool | None
    # How it went
    status: str  # ok, refused, skipped, failed
    note: str = ""
    error: float | None = None  # of the score gradient, relative norm, against float64
    error_logits: int | None = None  # M and P of the case that the error was measured on
    error_positives: int | None = None
    forward_ms: float | None = None  # medians and interquartile ranges
    forward_iqr: float | None = None
    backward_ms: float | None = None
    backward_iqr: float | None = None
    both_ms: float | None = None
    both_iqr: float | None = None
    repeats: int | None = None
    wall_ms: float | None = None  # an iteration as the host sees it, launches included
    graph_ms: float | None = None  # forward and backward by replay of a CUDA graph
    graph_iqr: float | None = None
    graph_note: str = ""  # why there is none
    peak_mb: float | None = None  # beyond the inputs
    beyond_gradient_mb: float | None = None  # beyond the inputs and the gradient of the scores
    launches: int | None = None
    floor_bytes: int | None = None
    bandwidth_gbs: float | None = None  # of a copy on this device, in this run
    floor_ratio: float | None = None  # time over that of the floor at this bandwidth: of the graph where there is one
    bandwidth_share: float | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes it the same measurement when it is made again."""
        return tuple(getattr(self, name) for name in _KEY)

    @property
    def best_ms(self) -> float | None:
        """Time of the device for forward and backward: without gaps between launches where a graph was captured."""
        return self.both_ms if self.graph_ms is None else self.graph_ms


_FIELDS = {field.name: field.type for field in dataclasses.fields(Row)}
_MACHINE = ("device", "kind", "threads", "alrp_triton", "torch", "triton", "python")
_CASE = ("head", "regime", "image", "batch", "dtype", "layout", "logits", "positives")
_KEY = (*_MACHINE, *_CASE, "contender")


def describe(case: Case) -> dict[str, Any]:
    """The columns that say which case a row is of."""
    named = {name: getattr(case, name) for name in ("head", "regime", "image", "batch", "dtype", "layout")}
    return named | {"logits": case.logits, "positives": case.positives}


def append(path: Path, row: Row) -> None:
    """Add one row, and the header where the file is new.

    Raises:
        ValueError: for a file with other columns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists() or path.stat().st_size == 0
    if not new:
        _check_header(path)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(_FIELDS)
        writer.writerow(map(_cell, dataclasses.astuple(row)))


def read(paths: Iterable[Path]) -> list[Row]:
    """All rows, the last of each key, in the order in which they first came.

    Raises:
        ValueError: for a file with other columns.
    """
    rows: dict[tuple[Any, ...], Row] = {}
    for path in paths:
        _check_header(path)
        with path.open(newline="", encoding="utf-8") as file:
            for cells in csv.DictReader(file):
                if None in cells.values():
                    continue  # the last line of a run that was killed while it wrote
                row = Row(**{name: _value(_FIELDS[name], cell) for name, cell in cells.items()})
                rows[row.key] = row
    return list(rows.values())


def _check_header(path: Path) -> None:
    with path.open(newline="", encoding="utf-8") as file:
        header = next(csv.reader(file), [])
    if header != list(_FIELDS):
        raise ValueError(f"{path} has other columns than this version writes: move it away")


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _value(kind: Any, cell: str) -> Any:
    kinds = str(kind).split(" | ")
    if cell == "" and "None" in kinds:
        return None
    convert: dict[str, Callable[[str], Any]]
    convert = {"str": str, "int": int, "float": float, "bool": lambda text: text == "True"}
    return convert[kinds[0]](cell)
