"""Pictures of what the suite measured: time over M, time over P, and share of the device's bandwidth.

    python -m benchmarks.plots benchmarks/results/suite-*.csv --output docs/images

A panel for each device that has the rows; a picture without a panel is not written.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import rows
from .peers import BUCKETED, FOCAL, FOCAL_COMPILED, LOOP, OURS_BOXES, OURS_COMPILED, ours
from .rows import Row
from .selection import along, by_device, regimes
from .workloads import REGIMES

# The palette of Okabe and Ito, which colour-blind readers can tell apart; the marker says it once more.
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


def draw(found: Sequence[Row], output: Path, name: str = "bench") -> list[Path]:
    """Write the pictures; returns the files."""
    import matplotlib

    matplotlib.use("Agg")
    devices = {device: [row for row in of if row.contender in _STYLES] for device, of in by_device(found).items()}
    over = {axis: {device: along(of, axis) for device, of in devices.items()} for axis in ("logits", "positives")}
    shares = {device: next(iter(regimes(of)), []) for device, of in devices.items()}
    output.mkdir(parents=True, exist_ok=True)
    written = []
    for what, chosen, panel in (
        ("logits", over["logits"], _over("logits")),
        ("positives", over["positives"], _over("positives")),
        ("bandwidth", shares, _share),
    ):
        shown = {device: of for device, of in chosen.items() if of}
        if shown:
            written.append(_picture(output / f"{name}-{what}.png", shown, panel))
    return written


def _picture(path: Path, shown: dict[str, list[Row]], panel: Any) -> Path:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(shown), figsize=(7.5 * len(shown), 4.8), squeeze=False, layout="constrained")
    for ax, (device, of) in zip(axes[0], shown.items()):
        panel(ax, of)
        ax.set_title(f"{device}\n{ax.get_title()}", fontsize=10)
        ax.grid(alpha=0.3)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    # Without the version that Matplotlib would note, the same rows give the same file.
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)
    return path


def _over(name: str) -> Any:
    def panel(ax: Any, of: list[Row]) -> None:
        dtypes = list(dict.fromkeys(row.dtype for row in of))
        unit, unit_name = _unit(of, name)
        for contender in _STYLES:
            for dtype in dtypes:
                line = [row for row in of if (row.contender, row.dtype) == (contender, dtype)]
                if line:
                    _draw_line(ax, name, line, contender if len(dtypes) == 1 else f"{contender}, {dtype}", unit)
        ax.set_xscale("log")
        ax.set_yscale("log")
        row = of[0]
        fixed = f"P = {row.positives:,}" if name == "logits" else f"M = {row.logits:,}"
        ax.set_title(f"{row.head}, {row.regime}, {', '.join(dtypes)}, {fixed}")
        ax.set_xlabel("logits M" if name == "logits" else "positives P")
        ax.set_ylabel(f"forward + backward, {unit_name}")

    return panel


def _unit(of: list[Row], name: str) -> tuple[float, str]:
    """What times are drawn in, as milliseconds: on a CPU, whose times others may share in, the least of ours."""
    mine = [row for row in of if row.contender == ours("torch") and row.best_ms]
    if of[0].kind != "cpu" or not mine:
        return 1.0, "ms"
    first = min(mine, key=lambda row: int(getattr(row, name)))
    return first.best_ms or 1.0, f"in times of {first.contender} at {getattr(first, name):,}"


def _draw_line(ax: Any, name: str, line: list[Row], label: str, unit: float) -> None:
    colour, marker = _STYLES[line[0].contender]
    spreads = [(row.both_iqr if row.graph_ms is None else row.graph_iqr) or 0 for row in line]
    ax.errorbar(
        [getattr(row, name) for row in line],
        [(row.best_ms or 0) / unit for row in line],
        yerr=[spread / 2 / unit for spread in spreads],
        color=colour,
        marker=marker,
        markersize=5,
        linestyle=_LINES[line[0].dtype],
        # Two of one colour, not compiled and compiled, differ in the marker's filling, too.
        markerfacecolor="white" if marker == "^" else colour,
        label=label,
    )


def _share(ax: Any, of: list[Row]) -> None:
    names = [contender for contender in _STYLES if any(row.contender == contender for row in of)]
    width = 0.8 / len(names)
    for k, contender in enumerate(names):
        shares = {row.regime: 100 * (row.bandwidth_share or 0) for row in of if row.contender == contender}
        places = [x + (k - (len(names) - 1) / 2) * width for x, regime in enumerate(REGIMES) if regime in shares]
        heights = [shares[regime] for regime in REGIMES if regime in shares]
        colour, marker = _STYLES[contender]
        hatch = "///" if marker == "^" else ""  # compiled
        ax.bar(places, heights, width, color=colour, hatch=hatch, edgecolor="white", label=contender)
    row = of[0]
    ax.set_yscale("log")
    ax.set_xticks(range(len(REGIMES)), list(REGIMES))
    ax.set_title(f"{row.head}, {row.dtype}, M = {row.logits:,}, P = {row.positives:,}")
    ax.set_ylabel("share of copy bandwidth, %")
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("")


def main(argv: Sequence[str] | None = None) -> int:
    """Read, draw, say what was written."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plots", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("csv", nargs="+", type=Path, help="what the suite wrote")
    parser.add_argument("--output", type=Path, default=Path("docs/images"), help="folder (default: %(default)s)")
    parser.add_argument("--name", default="bench", help="what the files' names begin with (default: %(default)s)")
    args = parser.parse_args(argv)
    written = draw(rows.read(args.csv), args.output, args.name)
    for path in written:
        print(f"written to {path}")
    if not written:
        print("nothing to draw: no rows with times that differ in M, P or regime", file=sys.stderr)
    return 0 if written else 1


if __name__ == "__main__":
    sys.exit(main())
