"""Plots of the results: time over M and over P, with a panel for each device; and memory over the steps of the soak."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .peers import BUCKETED, FOCAL, FOCAL_COMPILED, LOOP, OURS_BOXES, OURS_COMPILED, ours
from .rows import Row
from .tables import by_device, sets_of
from .workloads import HEADS

# Colour and marker. The colours of Okabe and Ito, which colour-blind readers can tell apart; the marker repeats them.
_STYLES = {
    ours("triton"): ("#0072B2", "o"),
    ours("torch"): ("#0072B2", "s"),
    ours("numba"): ("#0072B2", "^"),
    ours("pairwise"): ("#56B4E9", "D"),
    OURS_BOXES: ("#009E73", "o"),
    OURS_COMPILED: ("#009E73", "^"),
    BUCKETED: ("#E69F00", "v"),
    "vectorised": ("#CC79A7", "P"),
    LOOP: ("#D55E00", "X"),
    FOCAL: ("#000000", "s"),
    FOCAL_COMPILED: ("#000000", "^"),
}
_LINES = {"float32": "-", "bfloat16": "--", "float16": ":"}


def along(rows: Sequence[Row], name: str) -> list[Row]:
    """Rows that differ in one number, ``"logits"`` or ``"positives"``, and in dtype and contender alone.

    Of several such sets it is the one with most different numbers, then with most rows, then with the larger of the
    other number; none if there are not two numbers.
    """
    fixed = {"logits": "positives", "positives": "logits"}[name]

    def size(rows: list[Row]) -> tuple[int, int, int]:
        return (len({getattr(row, name) for row in rows}), len(rows), getattr(rows[0], fixed))

    best = max(sets_of(rows, "head", "layout", "regime", fixed), key=size, default=[])
    return sorted(best, key=lambda row: int(getattr(row, name))) if len({getattr(r, name) for r in best}) > 1 else []


def draw(found: Sequence[Row], output: Path, name: str) -> list[Path]:
    """Draw the plots for which there are rows; returns the files."""
    devices = by_device(row for row in found if row.contender in _STYLES and not HEADS[row.head].model)
    written = []
    for number in ("logits", "positives"):
        shown = {device: rows for device, of in devices.items() if (rows := along(of, number))}
        if shown:
            figure, axes = _figure(len(shown), 7.5, 4.8)
            for ax, (device, rows) in zip(axes, shown.items()):
                _panel(ax, rows, number, device)
            written.append(_save(figure, output / f"{name}-{number}.png"))
    return written


def _figure(panels: int, width: float, height: float) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, panels, figsize=(width * panels, height), squeeze=False, layout="constrained")
    for ax in axes[0]:
        ax.grid(alpha=0.3)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes[0]


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without Matplotlib's version in it, the same rows give the same file.
    figure.savefig(path, dpi=120, metadata={"Software": None})
    return path


def _panel(ax: Any, rows: list[Row], name: str, device: str) -> None:
    unit, unit_name = _unit(rows, name)
    dtypes = list(dict.fromkeys(row.dtype for row in rows))
    for contender, (colour, marker) in _STYLES.items():
        for dtype in dtypes:
            line = [row for row in rows if (row.contender, row.dtype) == (contender, dtype)]
            if line:
                spreads = [(row.both_iqr if row.graph_ms is None else row.graph_iqr) or 0 for row in line]
                ax.errorbar(
                    [getattr(row, name) for row in line],
                    [(row.best_ms or 0) / unit for row in line],
                    yerr=[spread / 2 / unit for spread in spreads],
                    color=colour,
                    marker=marker,
                    markersize=5,
                    linestyle=_LINES[dtype],
                    # Of two lines of one colour the compiled one has white markers.
                    markerfacecolor="white" if marker == "^" else colour,
                    label=contender if len(dtypes) == 1 else f"{contender}, {dtype}",
                )
    fixed = f"P = {rows[0].positives:,}" if name == "logits" else f"M = {rows[0].logits:,}"
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_title(f"{device}\n{rows[0].head}, {rows[0].regime}, {', '.join(dtypes)}, {fixed}", fontsize=10)
    ax.set_xlabel("logits M" if name == "logits" else "positives P")
    ax.set_ylabel(f"forward + backward, {unit_name}")
    ax.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))


def _unit(of: list[Row], name: str) -> tuple[float, str]:
    """The unit of time in milliseconds, and its name: on a CPU, which other programs may use, our shortest time."""
    mine = [row for row in of if row.contender == ours("torch") and row.best_ms]
    if of[0].kind != "cpu" or not mine:
        return 1.0, "ms"
    first = min(mine, key=lambda row: int(getattr(row, name)))
    return first.best_ms or 1.0, f"in times of {first.contender} at {getattr(first, name):,}"


def draw_soak(samples: Path, path: Path) -> Path:
    """Resident memory, objects and tensors over the steps, from what tests/test_soak.py wrote."""
    with samples.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    panels = {"resident_mb": "resident memory, MB", "objects": "objects of Python", "tensors": "tensors alive"}
    figure, axes = _figure(len(panels), 4.6, 3.6)
    for ax, (name, label) in zip(axes, panels.items()):
        values = [float(row[name]) for row in rows]
        ax.plot([int(row["step"]) for row in rows], values, color="#0072B2", linewidth=1)
        # From 0, so that a growth is as large as it looks.
        ax.set_ylim(0, 1.2 * max(1, *values))
        ax.set_xlim(0)
        ax.set_xlabel("steps")
        ax.set_ylabel(label)
        ax.xaxis.set_major_formatter("{x:,.0f}")
        ax.yaxis.get_major_locator().set_params(integer=True)
        ax.yaxis.set_major_formatter("{x:,.0f}")
    return _save(figure, path)
