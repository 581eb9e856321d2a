"""What the supervised outputs of a DETR cost: all ranked in one call, and in a call for each.

    python -m benchmarks.layers [--outputs L] [--parts G] [--queries Q] [--classes C] [--batch B] [--objects N]

It measures a criterion alone, forward and backward, with random scores and boxes: L outputs of G parts with Q queries
each, in every part a query for each of N objects an image. The default is RT-DETR, of six decoder layers and the
encoder's proposals; RF-DETR has ``--outputs 5 --parts 13``. Launches are counted as in ``benchmarks.launches``, and
milliseconds of the host measured as in ``benchmarks.host``, of one thread, without kernels. Only times of one run may
be compared.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from alrp_triton import ALRPLoss, APLoss, NDCGLoss, RankSortLoss

from .counting import counting_gpu
from .host import without_kernels
from .launches import counting
from .report import print_table

CRITERIA: dict[str, Callable[..., nn.Module]] = {
    "ALRPLoss": ALRPLoss,
    "RankSortLoss": RankSortLoss,
    "APLoss": APLoss,
    "NDCGLoss": NDCGLoss,
}
SHAPE = {"outputs": 7, "parts": 1, "queries": 300, "classes": 80, "batch": 4, "objects": 7}


def iteration(criterion: nn.Module, together: bool, options: argparse.Namespace) -> Callable[[], None]:
    """Forward and backward; one ranking for each part of each output, in either case."""
    num_rankings, generator = options.outputs * options.parts, torch.Generator().manual_seed(0)
    num_rows, num_positives = options.batch * options.queries, options.batch * options.objects
    scores = torch.randn(num_rankings, num_rows, options.classes, generator=generator).requires_grad_()
    labels = torch.full((num_rankings, num_rows), options.classes)
    for image in range(options.batch):
        first = image * options.queries
        labels[:, first : first + options.objects] = torch.randint(
            options.classes, (num_rankings, options.objects), generator=generator
        )
    corners = torch.rand(num_rankings, num_positives, 2, generator=generator)
    target = torch.cat([corners, corners + 0.3], 2)
    predicted = (target + 0.02).requires_grad_()
    groups = torch.arange(num_rankings).repeat_interleave(num_rows)

    def call(logits: Tensor, labels: Tensor, predicted: Tensor, target: Tensor, **groups: Tensor) -> Any:
        if criterion.takes_boxes:
            return criterion(logits, labels, predicted, target, **groups).total
        return criterion(logits, labels, num_positives=len(predicted), **groups)

    def iterate() -> None:
        given = [scores.unbind(), labels.unbind(), predicted.unbind(), target.unbind()]
        if together:
            call(*(torch.cat(each) for each in given), groups=groups).backward()
        else:
            torch.stack([call(*each) for each in zip(*given)]).mean().backward()

    return iterate


def measure(make: Callable[..., nn.Module], together: bool, options: argparse.Namespace) -> list[str]:
    """Launches of this package's kernels, all launches, and milliseconds of a GPU's host, a median."""
    iterate = iteration(make(backend="triton"), together, options)
    with counting_gpu(90), counting() as counts:
        iterate()
    kernels = sum(count for name, count in counts.items() if name.endswith("_kernel"))
    times = []
    with without_kernels():
        for _ in range(options.repetitions + 3):
            begin = time.process_time()
            iterate()
            times.append(time.process_time() - begin)
    return [str(kernels), str(counts.total()), f"{1e3 * statistics.median(times[3:]):.1f}"]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.layers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in {**SHAPE, "repetitions": 20}.items():
        parser.add_argument(f"--{name}", type=int, default=value, help="default: %(default)s")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    options = parse(arguments)
    torch.set_num_threads(1)
    rows = []
    for name, make in CRITERIA.items():
        for how, together in {"one": True, "one for each": False}.items():
            rows.append([name if together else "", how, *measure(make, together, options)])
    columns = ["criterion", "calls", "kernels of this package", "all launches", "host of a GPU, ms"]
    print_table(f"{options.outputs} outputs of {options.parts} x {options.queries} queries", columns, rows)


if __name__ == "__main__":
    main()
