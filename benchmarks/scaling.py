"""What ranking across processes sends, and what that should cost: arithmetic, not a measurement.

    python -m benchmarks.scaling    print the table of docs/scaling.md

Times follow from a model of two numbers: how many bytes a second a process sends and receives, and how long a message
takes to arrive. The bytes are those that tests/test_group_training.py counts; they do not depend on the logits.
"""

from __future__ import annotations

import math

POSITIVES, BANDWIDTH, LATENCY, STEP = 120, 20e9, 5e-6, 0.25
"""Positives of a process, bytes a second in and out of it, seconds of a message, seconds of a step without the loss."""


def table() -> tuple[list[str], list[list[str]]]:
    """Columns and rows for some numbers of processes W, with aLRP Loss."""
    columns = ["processes", "positives", "sent by each, kB", "received, MB", "rings, ms", "trees, ms"]
    rows = []
    for size in (2, 8, 64, 256, 1024):
        # Each gives 16 numbers, and score and error of its positives, to two collectives that gather; and two integers
        # for each bucket to one that adds.
        gathered, buckets = 8 * (16 + 2 * POSITIVES), 8 * 2 * (2 * size * POSITIVES + 2)
        received = (size - 1) * gathered + buckets
        bytes_moved = (size - 1) * gathered + 2 * (size - 1) / size * buckets
        # Rings pass on what they get, W - 1 times to gather and 2 (W - 1) times to add. Trees need 2 log2(W) messages
        # one after another for each collective.
        messages = {"rings": 4 * (size - 1), "trees": 3 * 2 * math.ceil(math.log2(size))}
        rings, trees = (bytes_moved / BANDWIDTH + number * LATENCY for number in messages.values())
        numbers = [f"{size:,}", f"{size * POSITIVES:,}", f"{(gathered + buckets) / 1e3:,.1f}", f"{received / 1e6:.2f}"]
        rows.append([*numbers, f"{1e3 * rings:.2f}", f"{1e3 * trees:.2f}", f"{100 * rings / (STEP + rings):.1f} %"])
    return [*columns, "share of a step, rings"], rows


if __name__ == "__main__":
    from .report import print_table

    print_table("Ranking across processes, computed", *table())
