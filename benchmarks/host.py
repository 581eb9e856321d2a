"""Measure what an iteration costs the host of a GPU, without one: microseconds of forward and backward.

    python -m benchmarks.host [--repetitions N] [--profile NAME]

Kernels are compiled, and then do nothing when they are launched. What is left is Python, PyTorch's dispatcher and
Triton's binder. The call of the driver itself is left out, some microseconds for each launch. The few operations of
PyTorch on tensors of the size of the positives run on the CPU. Times are medians of one thread; only those of one run
may be compared.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import pstats
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest.mock import patch

import torch
from alrp_triton.kernels import launch, settings

from .counting import TESTS
from .launches import CRITERIA, LOSSES, Loss, given_to
from .report import print_table

_LEVELS = (1, 5)
_POSITIVES, _NEGATIVES = 300, 22_000


@contextlib.contextmanager
def without_kernels(target: int = 90) -> Iterator[None]:
    """Within, the package takes tensors of the CPU for those of a GPU, and launches nothing."""
    if not (TESTS / "virtual_gpu").is_dir():
        raise SystemExit(f"this needs a checkout of the repository, for the virtual GPU in its folder tests: {TESTS}")
    if str(TESTS) not in sys.path:
        sys.path.append(str(TESTS))
    from virtual_gpu.compiling import CompileOnly  # type: ignore[import-not-found]
    from virtual_gpu.driver import active  # type: ignore[import-not-found]
    from virtual_gpu.harness import as_on_a_gpu  # type: ignore[import-not-found]

    class Nothing:
        def __init__(self, *_: Any) -> None:
            pass

        def __call__(self, *_: Any) -> None:
            pass

    driver = CompileOnly(target)
    driver.launcher_cls = Nothing  # type: ignore[assignment]
    # A GPU's name is looked up once.
    name = lambda device: f"sm_{target}"  # noqa: E731
    with (
        active(driver, assemble=False),
        as_on_a_gpu(),
        patch.object(settings, "architecture_of", name),
        patch.object(launch, "architecture_of", name),
    ):
        yield


def _iteration(loss: Loss, num_levels: int) -> Callable[[], tuple[float, float]]:
    """Seconds of forward and of backward."""
    given = given_to(_POSITIVES, num_levels, _NEGATIVES)

    def iterate() -> tuple[float, float]:
        begin = time.perf_counter()
        returned = loss(given)
        between = time.perf_counter()
        scalars = [value for value in returned if value.requires_grad]
        torch.autograd.backward(scalars, [torch.ones_like(scalar) for scalar in scalars])
        return between - begin, time.perf_counter() - between

    return iterate


def times(loss: Loss, num_levels: int, repetitions: int) -> tuple[float, float]:
    """Microseconds of forward and of backward, medians."""
    iterate = _iteration(loss, num_levels)
    for _ in range(5):
        iterate()
    forward, backward = zip(*(iterate() for _ in range(repetitions)))
    return 1e6 * statistics.median(forward), 1e6 * statistics.median(backward)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, or a profile."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.host", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repetitions", type=int, default=300, help="of each (default: %(default)s)")
    parser.add_argument("--profile", choices=[*LOSSES, *CRITERIA], help="print where the time of this one goes")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    losses = LOSSES | CRITERIA
    with without_kernels():
        if options.profile:
            iterate, profile = _iteration(losses[options.profile], _LEVELS[-1]), cProfile.Profile()
            iterate()
            profile.enable()
            for _ in range(options.repetitions):
                iterate()
            profile.disable()
            pstats.Stats(profile).sort_stats("tottime").print_stats(40)
            return
        rows = []
        for name, loss in losses.items():
            cells = [times(loss, levels, options.repetitions) for levels in _LEVELS]
            rows.append([name, *(f"{number:.0f}" for pair in cells for number in (*pair, sum(pair)))])
    parts = ("forward", "backward", "both")
    columns = [f"{part}, {levels} level{'s'[: levels - 1]}" for levels in _LEVELS for part in parts]
    print_table("Microseconds of the host, kernels left out", ["loss or criterion", *columns], rows)


if __name__ == "__main__":
    main()
