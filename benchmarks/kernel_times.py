"""The time of each kernel of an iteration on a GPU, from PyTorch's profiler, beside the model's.

``alrp-triton bench --preset h100`` prints them first.
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from .gate import RECORD, recorded
from .model import GPUS, Problem
from .peers import contenders, ours
from .presets import LARGE, LARGE_HALF, SMALL
from .timing import Loss, num_rotating, on_device, step
from .workloads import REAL, REGIMES, Case, Inputs, make_inputs

_ITERATIONS = 20


SUBJECTS = (
    *(LARGE._replace(regime=regime) for regime in (*REGIMES, *REAL)),
    LARGE._replace(regime="middle", layout="levels"),
    LARGE_HALF._replace(regime="middle"),
    SMALL,
)


def by_kernel(events: Iterable[Any], iterations: int) -> dict[str, float]:
    """Milliseconds of an iteration by the names of kernels: medians over their runs, times their number in each."""
    runs: defaultdict[str, list[float]] = defaultdict(list)
    for event in on_device(events):
        runs[event.name].append(event.device_time / 1e3)
    return {name: statistics.median(times) * len(times) / iterations for name, times in runs.items()}


def times_of(loss: Loss, inputs: list[Inputs]) -> dict[str, float]:
    """Of a loss, over inputs that take turns."""
    from torch.profiler import ProfilerActivity, profile

    for given in inputs:
        step(loss, given)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for k in range(_ITERATIONS):
            step(loss, inputs[k % len(inputs)])
        torch.cuda.synchronize()
    return by_kernel(profiler.events() or [], _ITERATIONS)


def measured(device: torch.device) -> Iterator[tuple[Case, dict[str, float]]]:
    """All of them, one after the other."""
    loss = contenders(device)[ours("triton")].loss
    for case in SUBJECTS:
        one = 2 * case.bytes_moved // 3
        inputs = [make_inputs(case, device, seed) for seed in range(min(4, num_rotating(device, one)))]
        yield case, times_of(loss, inputs)


def modelled(case: Case, device_name: str) -> dict[str, float]:
    """The model's milliseconds of finding and of both passes, if it knows the GPU: the longest of their bounds."""
    gpu = next((gpu for name, gpu in GPUS.items() if name in device_name), None)
    # An installed package has no record.
    if gpu is None or not RECORD.exists() or case.head != LARGE.head or case.layout != "flat":
        return {}
    problem = Problem(case.logits, case.positives, case.dtype)
    bounds = problem.bounds(recorded()[1], gpu, case.regime)
    names = {"finding": "find_kernel", "pass 1": "count_kernel", "pass 2": "write_kernel"}
    return {names[part]: max(of_part) for part, of_part in bounds.items()}


def table(found: Mapping[str, Mapping[str, float]], device_name: str) -> list[list[str]]:
    """Rows: case, kernel, milliseconds, and the model's."""
    cases = {case.name: case for case in SUBJECTS}
    rows = []
    for name, times in found.items():
        model = modelled(cases[name], device_name)
        for kernel, milliseconds in sorted(times.items(), key=lambda item: -item[1]):
            # PyTorch's own are templates with long names.
            short = kernel.partition("(")[0].partition("<")[0].removeprefix("void ")
            rows.append([name, short, f"{milliseconds:.4f}", f"{model[kernel]:.4f}" if kernel in model else ""])
        rows.append([name, "all", f"{sum(times.values()):.4f}", ""])
    return rows


def write(path: Path, machine: Mapping[str, Any], found: Mapping[str, Mapping[str, float]]) -> None:
    """With device, versions and command."""
    path.write_text(json.dumps({"machine": dict(machine), "milliseconds": found}, indent=1) + "\n", encoding="utf-8")
