"""Search launch settings for the passes over all logits, on a GPU: what ``alrp-triton bench --autotune`` does.

Each pass is timed by itself with every candidate, on the cases that are asked for. The fastest settings are kept in the
file that trainings read, under the kernel, the device, the dtype and the class of sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from alrp_triton.kernels import settings
from alrp_triton.kernels.settings import Settings
from torch import Tensor

from alrp_triton.engine import Counted, Levels, operators

from .workloads import Case, make_inputs

Timed = Callable[[Callable[[], object]], float]
"""Milliseconds of a call."""


class Gain(NamedTuple):
    """What a search has found for one kernel and case."""

    case: str
    kernel: str
    pinned: Settings
    pinned_ms: float
    found: Settings
    found_ms: float

    @property
    def cells(self) -> list[str]:
        """Of a table."""
        described = [" ".join(f"{k}={v}" for k, v in chosen.items()) for chosen in (self.pinned, self.found)]
        times = f"{self.pinned_ms:.4g} ms", f"{self.found_ms:.4g} ms"
        return [self.case, self.kernel, described[0], times[0], described[1], times[1]]


def passes_of(
    case: Case, device: torch.device, grouped: bool = False
) -> tuple[Tensor, dict[str, Callable[[], object]]]:
    """The logits, and by the names of their settings the three passes of a loss, each to be called by itself."""
    inputs = make_inputs(case, device)
    levels = Levels([x.detach() for x in inputs.levels], inputs.class_labels, inputs.images if grouped else [])
    tensors = levels[:4]  # as operators take them
    num_positives, given = len(inputs.loc_errors), (1.0, "triton")
    counted = Counted(levels, num_positives, delta=1.0, backend="triton")
    placed, suffix = counted.placed, "_grouped" if grouped else ""
    table, own = operators.present(*placed.table), operators.present(placed.logits, placed.groups)
    lines = torch.zeros(2, 2 * num_positives + 1, device=device)
    gradients = torch.zeros(1, num_positives, dtype=torch.float64, device=device)
    factors, sent = [torch.ones((), device=device)], (counted.indices, lines, gradients)
    return levels.logits[0], {
        "find": lambda: operators.find(*tensors, num_positives, False, "num_positives", "triton"),
        f"count{suffix}": lambda: operators.count(*tensors, table, own, placed.totals, case.logits, *given),
        f"write{suffix}": lambda: operators.write(factors, *tensors, table, *sent, *given),
    }


def tune(cases: Iterable[Case], device: torch.device, timed: Timed | None = None) -> Iterator[Gain]:
    """Search on each case, of one ranking and of one for each image, and keep the fastest settings."""
    if timed is None:
        from triton.testing import do_bench_cudagraph

        def timed(call: Callable[[], object]) -> float:
            # In a graph, since the host takes longer for a pass than most GPUs.
            return float(do_bench_cudagraph(call, rep=50, return_mode="median"))

    done = set[str]()
    for case in cases:
        for grouped in (False, True):
            logits, calls = passes_of(case, device, grouped)
            for kernel, call in calls.items():
                key = settings.key_of(kernel, logits, case.logits)
                if key in done:
                    continue
                done.add(key)
                times = settings.search(kernel, lambda call=call: timed(call))
                pinned = settings.pinned(kernel, settings.architecture_of(device))
                before = next(milliseconds for milliseconds, candidate in times if candidate == pinned)
                fastest, found = times[0]
                if fastest < float("inf"):
                    settings.keep({key: found})
                yield Gain(case.name, kernel, pinned, before, found, fastest)
