"""The figures of the experiments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from ..training.plan import Record
from .schedule import Schedule
from .settings import ALRP, SETTINGS, TABLES

# Of Okabe and Ito, which colour-blind readers can tell apart.
COLOURS = ("#000000", "#E69F00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9")
BALANCED = ("cross-entropy", "focal", ALRP)


def draw(schedule: Schedule, folder: Path) -> list[Path]:
    """Write what can be drawn of the runs there are; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [_balance(schedule, folder), _weights(schedule, folder)]
    return [path for path in drawn if path is not None]


def _records(schedule: Schedule, name: str) -> list[Record]:
    records = schedule.store.records
    return [records[run] for run in schedule.runs(name) if run in records] if name in schedule.settings else []


def _axes(count: int) -> tuple[Any, Any]:
    figure, axes = plt.subplots(1, count, figsize=(5.2 * count, 3.6), layout="constrained", squeeze=False)
    for one in axes[0]:
        one.set(yscale="log", xlabel="iteration")
        one.grid(alpha=0.3)
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes[0]


def _lines(axes: Any, records: list[Record], column: str, colour: str, label: str) -> None:
    """The history of every seed, and a name for the first."""
    for record in records:
        history = record["history"]
        axes.plot(history["iteration"], history[column], color=colour, alpha=0.8, linewidth=1.1, label=label)
        label = "_"


def _balance(schedule: Schedule, folder: Path) -> Path | None:
    """Figure 4: gradient of negatives over gradient of positives, and the classification loss."""
    found = {name: _records(schedule, name) for name in BALANCED}
    if not all(found.values()):
        return None
    figure, (left, right) = _axes(2)
    for (name, records), colour in zip(found.items(), COLOURS):
        title = "aLRP Loss" if name == ALRP else SETTINGS[name].title.removesuffix(", L1")
        _lines(left, records, "balance", colour, title)
        _lines(right, records, "cls", colour, title)
    left.set(title="gradient of negatives over gradient of positives")
    right.set(title="classification loss")
    left.legend(frameon=False)
    return _save(figure, folder / "experiments-balance.png")


def _weights(schedule: Schedule, folder: Path) -> Path | None:
    """The self-balancing weight over training from each initial weight."""
    found = {name: _records(schedule, name) for name in TABLES[4]}
    if not all(found.values()):
        return None
    figure, (axes,) = _axes(1)
    for (name, records), colour in zip(found.items(), COLOURS):
        _lines(axes, records, "weight", colour, "50" if name == ALRP else SETTINGS[name].title)
    axes.set(title="self-balancing weight of the localisation part")
    axes.legend(title="initial weight", frameon=False)
    return _save(figure, folder / "experiments-weights.png")


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
