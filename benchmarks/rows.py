"""The results: one CSV row for each case and contender, appended as soon as it is known."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .workloads import Case


@dataclasses.dataclass(frozen=True)
class Row:
    """One case and contender on one machine. None, an empty cell, is what was not measured."""

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
    wall_ms: float | None = None  # an iteration as the host sees it; of a whole model the training step
    graph_ms: float | None = None  # forward and backward by replay of a CUDA graph
    graph_iqr: float | None = None
    graph_note: str = ""  # why there is none
    peak_mb: float | None = None  # beyond the inputs
    beyond_gradient_mb: float | None = None  # beyond the inputs and the gradient of the scores
    launches: int | None = None
    floor_bytes: int | None = None
    bandwidth_gbs: float | None = None  # of a copy on this device, in this run
    floor_ratio: float | None = None  # time over that of the floor at this bandwidth, of the graph if there is one
    bandwidth_share: float | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for two measurements of the same thing on the same machine and versions."""
        return tuple(getattr(self, name) for name in _KEY)

    @property
    def best_ms(self) -> float | None:
        """Time of the device for forward and backward: of the graph, without gaps between launches, if there is one."""
        return self.both_ms if self.graph_ms is None else self.graph_ms


_FIELDS = {field.name: str(field.type).split(" | ") for field in dataclasses.fields(Row)}
CASE = ("head", "regime", "image", "batch", "dtype", "layout", "logits", "positives")
_KEY = ("device", "kind", "threads", "alrp_triton", "torch", "triton", "python", *CASE, "contender")
_CONVERT: dict[str, Callable[[str], Any]] = {
    "str": str,
    "int": int,
    "float": float,
    "bool": lambda cell: cell == "True",
}


def describe(case: Case) -> dict[str, Any]:
    """The columns that say which case a row is of."""
    return {name: getattr(case, name) for name in CASE}


def append(path: Path, row: Row) -> None:
    """Add one row, and the header if the file is new. A line that a killed run left unfinished ends first.

    Raises:
        ValueError: for a file with other columns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    old = path.read_bytes() if path.exists() else b""
    if old:
        _check_header(path)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        if not old:
            writer.writerow(_FIELDS)
        elif not old.endswith(b"\n"):
            file.write("\n")
        # The writer turns None into an empty cell.
        writer.writerow(f"{x:.6g}" if isinstance(x, float) else x for x in dataclasses.astuple(row))


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
                if None not in cells.values():  # as in the last line of a run that was killed while it wrote
                    row = Row(**{name: _value(_FIELDS[name], cell) for name, cell in cells.items()})
                    rows[row.key] = row
    return list(rows.values())


def _check_header(path: Path) -> None:
    with path.open(newline="", encoding="utf-8") as file:
        header = next(csv.reader(file), [])
    if header != list(_FIELDS):
        raise ValueError(f"{path} has other columns than this version writes: move it away")


def _value(kinds: list[str], cell: str) -> Any:
    return None if cell == "" and "None" in kinds else _CONVERT[kinds[0]](cell)
