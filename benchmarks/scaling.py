"""What ranking across processes sends, and what that should cost: arithmetic, not a measurement.

    python -m benchmarks.scaling [--positives 120] [--bandwidth 20] [--latency 5] [--step 250]

The bytes are those that tests/test_group.py counts. Times follow from a model of two numbers: each process sends and
receives at ``bandwidth``, and a message takes ``latency`` to arrive. Rings pass on what they get, W - 1 times to
gather and 2 (W - 1) times to add; trees need 2 log2(W) messages one after another for either.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from typing import NamedTuple

HEADER = 16  # numbers that each process tells first, 8 bytes each


class Traffic(NamedTuple):
    """Bytes that one process gives to each of the three collectives."""

    header: int
    positives: int
    buckets: int

    @property
    def total(self) -> int:
        return sum(self)


def traffic(num_positives: int, of_all: int, columns: int = 2) -> Traffic:
    """What one process sends for one evaluation of a loss; nothing in it depends on the number of logits.

    Args:
        num_positives: of the process that has most, to whose number all are padded.
        of_all: P of all processes.
        columns: numbers for each positive: its score, and what the loss takes beside it (one for aLRP).
    """
    return Traffic(8 * HEADER, 8 * columns * num_positives, 8 * 2 * (2 * of_all + 2))


def milliseconds(size: int, sent: Traffic, bandwidth: float, latency: float, *, rings: bool) -> float:
    """Time of the three collectives one after another, in the model above.

    Args:
        size: W, the number of processes.
        sent: by each.
        bandwidth: bytes per second in and out of a process.
        latency: seconds of a message.
        rings: whether what is passed on goes round all processes, or along a tree.
    """
    gathered = (size - 1) * (sent.header + sent.positives)
    added = 2 * (size - 1) / size * sent.buckets
    steps = 4 * (size - 1) if rings else 3 * 2 * math.ceil(math.log2(size))
    return 1e3 * ((gathered + added) / bandwidth + (steps * latency if size > 1 else 0))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__.splitlines()[0])
    parser.add_argument("--positives", type=int, default=120, help="of each process")
    parser.add_argument("--bandwidth", type=float, default=20.0, help="GB/s in and out of a process")
    parser.add_argument("--latency", type=float, default=5.0, help="microseconds of a message")
    parser.add_argument("--step", type=float, default=250.0, help="milliseconds of a training step without this")
    options = parser.parse_args(arguments)
    print(
        "| processes | positives | sent by each, kB | received, MB | rings, ms | trees, ms | share of a step, rings |"
    )
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for size in (2, 8, 64, 256, 1024):
        of_all = size * options.positives
        sent = traffic(options.positives, of_all)
        times = [
            milliseconds(size, sent, options.bandwidth * 1e9, options.latency * 1e-6, rings=rings)
            for rings in (True, False)
        ]
        received = (size - 1) * (sent.header + sent.positives) + sent.buckets
        print(
            f"| {size:,} | {of_all:,} | {sent.total / 1e3:,.1f} | {received / 1e6:.2f} | {times[0]:.2f} | "
            f"{times[1]:.2f} | {100 * times[0] / (options.step + times[0]):.1f} % |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
