"""The time of each kernel of an iteration on a GPU, from PyTorch's profiler, beside the model's.

``alrp-triton bench --preset h100`` prints them after its rows. They answer what the counts cannot: whether tables that
logits share and a channel-first layout cost what they should.
"""

from __future__ import annotations

import contextlib
import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from alrp_triton.kernels import count

from .gate import RECORD, recorded
from .model import GPUS, Problem
from .peers import contenders, ours
from .presets import LARGE, LARGE_HALF
from .timing import Loss, num_rotating, on_device, step
from .workloads import REGIMES, Case, Inputs, make_inputs

_ITERATIONS = 20


class Subject(NamedTuple):
    """What is timed."""

    case: Case
    one_table: bool = False  # all logits add to the same words

    @property
    def name(self) -> str:
        return f"{self.case.name}{', one table' if self.one_table else ''}"


SUBJECTS = (
    *(Subject(LARGE._replace(regime=regime)) for regime in REGIMES),
    Subject(LARGE._replace(regime="middle"), one_table=True),
    Subject(LARGE._replace(regime="late"), one_table=True),
    Subject(LARGE._replace(regime="middle", layout="levels")),
    Subject(LARGE_HALF._replace(regime="middle")),
)


@contextlib.contextmanager
def _tables_of(subject: Subject) -> Iterator[None]:
    with patch.object(count, "_MANY_LOGITS", 1 << 62) if subject.one_table else contextlib.nullcontext():
        yield


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


def measured(device: torch.device) -> Iterator[tuple[Subject, dict[str, float]]]:
    """All of them, one after the other."""
    loss = contenders(device)[ours("triton")].loss
    for subject in SUBJECTS:
        one = 2 * subject.case.bytes_moved // 3
        inputs = [make_inputs(subject.case, device, seed) for seed in range(min(4, num_rotating(device, one)))]
        with _tables_of(subject):
            yield subject, times_of(loss, inputs)


def modelled(subject: Subject, device_name: str) -> dict[str, float]:
    """The model's milliseconds of finding and of both passes, if it knows the GPU: the longest of their bounds."""
    gpu = next((gpu for name, gpu in GPUS.items() if name in device_name), None)
    # An installed package has no record.
    if gpu is None or not RECORD.exists() or subject.one_table or subject.case.layout != "flat":
        return {}
    problem = Problem(subject.case.logits, subject.case.positives, subject.case.dtype)
    bounds = problem.bounds(recorded()[1], gpu, subject.case.regime)
    names = {"finding": "find_kernel", "pass 1": "count_kernel", "pass 2": "write_kernel"}
    return {names[part]: max(of_part) for part, of_part in bounds.items()}


def table(found: Mapping[str, Mapping[str, float]], device_name: str) -> list[list[str]]:
    """Rows: subject, kernel, milliseconds, and the model's."""
    subjects = {subject.name: subject for subject in SUBJECTS}
    rows = []
    for name, times in found.items():
        model = modelled(subjects[name], device_name)
        for kernel, milliseconds in sorted(times.items(), key=lambda item: -item[1]):
            rows.append([name, kernel, f"{milliseconds:.4f}", f"{model[kernel]:.4f}" if kernel in model else ""])
        rows.append([name, "all", f"{sum(times.values()):.4f}", ""])
    return rows


def write(path: Path, machine: Mapping[str, Any], found: Mapping[str, Mapping[str, float]]) -> None:
    """With device, versions and command."""
    path.write_text(json.dumps({"machine": dict(machine), "milliseconds": found}, indent=1) + "\n", encoding="utf-8")
