"""Which of many rows belong in one picture or table."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

from .rows import Row

_SHAPE = ("head", "layout", "dtype")


def by_device(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows that have a time; of several runs on one device the last of each case and contender."""
    last: dict[Hashable, Row] = {}
    for row in rows:
        if row.both_ms is not None:
            last[row.device, row.kind, _case(row), row.contender] = row
    found: dict[str, list[Row]] = {}
    for row in last.values():
        found.setdefault(row.device, []).append(row)
    return found


def _case(row: Row) -> tuple[Any, ...]:
    return (*(getattr(row, name) for name in _SHAPE), row.regime, row.logits, row.positives)


def along(rows: Sequence[Row], name: str) -> list[Row]:
    """Rows that differ in one number, ``"logits"`` or ``"positives"``, and in dtype and contender alone.

    Of several such sets, the one with most different numbers, then with most rows, then with the
    larger of the other number; none if there are not two.
    """
    fixed = {"logits": "positives", "positives": "logits"}[name]
    sets = _sets(rows, lambda row: (row.head, row.layout, row.regime, getattr(row, fixed)))

    def size(rows: list[Row]) -> tuple[int, int, int]:
        return (len({getattr(row, name) for row in rows}), len(rows), getattr(rows[0], fixed))

    best = max(sets, key=size, default=[])
    return sorted(best, key=lambda row: int(getattr(row, name))) if len({getattr(r, name) for r in best}) > 1 else []


def regimes(rows: Sequence[Row]) -> list[list[Row]]:
    """Sets of rows that differ in regime and contender alone, where there are several regimes; the largest first."""
    sets = _sets(rows, lambda row: (*(getattr(row, name) for name in _SHAPE), row.logits, row.positives))
    several = [rows for rows in sets if len({row.regime for row in rows}) > 1]
    return sorted(several, key=lambda rows: (rows[0].logits, rows[0].positives), reverse=True)


def _sets(rows: Sequence[Row], key: Callable[[Row], Hashable]) -> list[list[Row]]:
    found: dict[Hashable, list[Row]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return list(found.values())
