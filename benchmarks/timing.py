"""Times, memory and launches of forward and backward, on the CPU and on a GPU."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch._C._autograd import DeviceType  # of which torch.autograd, which has it, does not tell a type checker

from .workloads import Inputs

Loss = Callable[[Inputs], Tensor]
Measured = TypeVar("Measured")
_LARGEST_LEAD = 0.05
_L2_TIMES, _MOST_INPUTS = 4, 16


class Times(NamedTuple):
    """Milliseconds of each iteration."""

    forward: list[float]
    backward: list[float]
    both: list[float]

    def middle(self) -> list[tuple[float, float]]:
        """Median and interquartile range of each of the three."""
        return [middle(values) for values in self]


def middle(values: Sequence[float]) -> tuple[float, float]:
    """Median and interquartile range."""
    low, median, high = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75]).double())
    return float(median), float(high - low)


def repeats_for(seconds: float, budget: float, most: int) -> int:
    """How many runs of so many seconds fit a budget: at least 2, at most ``most``."""
    return max(2, min(most, int(budget / max(seconds, 1e-9))))


def take_turns(contenders: Mapping[str, tuple[Callable[[], Measured], int]]) -> dict[str, list[Measured]]:
    """What each run of each contender ``name: (run, repeats)`` returns. They take turns in an order that alternates.

    What else the machine does meanwhile then meets all of them; those with fewer repeats sit later rounds out.
    """
    measured: dict[str, list[Measured]] = {name: [] for name in contenders}
    for turn in range(max((repeats for _, repeats in contenders.values()), default=0)):
        order = list(contenders.items())
        for name, (run, repeats) in order if turn % 2 == 0 else reversed(order):
            if turn < repeats:
                measured[name].append(run())
    return measured


def cpu_turns(contenders: dict[str, tuple[Loss, Inputs, int]]) -> dict[str, Times]:
    """Wall-clock times of ``name: (loss, inputs, repeats)`` in turns."""
    runs = {name: (partial(_timed_step, loss, inputs), n) for name, (loss, inputs, n) in contenders.items()}
    times = {name: Times(*map(list, zip(*measured))) for name, measured in take_turns(runs).items()}
    for _, inputs, _ in contenders.values():
        inputs.clear()
    return times


def _timed_step(loss: Loss, inputs: Inputs) -> tuple[float, float, float]:
    inputs.clear()
    begin = time.perf_counter()
    value = loss(inputs)
    between = time.perf_counter()
    value.backward()
    end = time.perf_counter()
    return 1e3 * (between - begin), 1e3 * (end - between), 1e3 * (end - begin)


def num_rotating(device: torch.device, one: int) -> int:
    """How many inputs of ``one`` bytes, gradient included, together exceed the L2 cache several times over."""
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 1 << 26)
    return max(1, min(_MOST_INPUTS, math.ceil(_L2_TIMES * cache / max(1, one)) + 1))


def gpu_times(loss: Loss, inputs: Sequence[Inputs], repeats: int, *, waits: bool) -> tuple[Times, float]:
    """Times on the device, and milliseconds of an iteration by the wall clock.

    By events, so that the host never waits. Before each iteration the device is kept busy for as long as the host takes
    to launch it: the events then tell what the device needs. What an iteration takes where the host cannot get ahead is
    the second result. Call it warm.

    Args:
        loss: what to time, with its backward.
        inputs: what it takes, in turn.
        repeats: iterations.
        waits: whether the host waits for the device within an iteration: it then cannot launch ahead.
    """
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for k in range(repeats):
        _step(loss, inputs[k % len(inputs)])
    launched = time.perf_counter() - begin
    torch.cuda.synchronize()
    wall = (time.perf_counter() - begin) / repeats
    lead = 0.0 if waits else min(launched / repeats, _LARGEST_LEAD)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(3)] for _ in range(repeats)]
    for k, (start, between, end) in enumerate(events):
        given = inputs[k % len(inputs)]
        given.clear()
        # Cycles at about 2 GHz; three times the host's own time, for what else comes between.
        torch.cuda._sleep(int(3 * lead * 2e9))
        start.record()
        value = loss(given)
        between.record()
        value.backward()
        end.record()
    torch.cuda.synchronize()
    forward, backward = [s.elapsed_time(b) for s, b, _ in events], [b.elapsed_time(e) for _, b, e in events]
    return Times(forward, backward, [s.elapsed_time(e) for s, _, e in events]), 1e3 * wall


def _step(loss: Loss, inputs: Inputs) -> None:
    inputs.clear()
    loss(inputs).backward()


def graph_times(loss: Loss, inputs: Sequence[Inputs], repeats: int) -> list[float]:
    """Milliseconds of forward and backward in a CUDA graph that goes through all inputs once, for each input.

    Raises:
        RuntimeError: where that cannot be captured, saying why.
    """
    # A capture that fails may leave its own stream behind as the current one.
    with torch.cuda.stream(torch.cuda.current_stream()):
        return _graph_times(loss, inputs, repeats)


def _graph_times(loss: Loss, inputs: Sequence[Inputs], repeats: int) -> list[float]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for given in inputs:
            _step(loss, given)
    torch.cuda.current_stream().wait_stream(stream)
    for given in inputs:
        given.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for given in inputs:
            loss(given).backward()
    graph.replay()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    for given in inputs:
        given.clear()
    return [start.elapsed_time(end) / len(inputs) for start, end in events]


def gpu_memory(loss: Loss, inputs: Inputs) -> tuple[float, float]:
    """Largest megabytes allocated beyond the inputs, and beyond the inputs and the gradient of the scores."""
    inputs.clear()
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss(inputs).backward()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    gradient = sum(level.nbytes for level in inputs.levels)
    inputs.clear()
    return peak / 1e6, (peak - gradient) / 1e6


def launches(loss: Loss, inputs: Inputs) -> int | None:
    """What an iteration starts on the GPU: kernels, copies and fills; None where the profiler does not see them."""
    from torch.profiler import ProfilerActivity, profile

    inputs.clear()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        loss(inputs).backward()
        torch.cuda.synchronize()
    inputs.clear()
    events: Any = profiler.events() or []
    seen = [e for e in events if e.device_type == DeviceType.CUDA and not getattr(e, "is_user_annotation", False)]
    return len(seen) or None


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of the best of several large copies."""
    size = 1 << (30 if device.type == "cuda" else 26)
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    seconds: list[float] = []
    for _ in range(10):
        with _stopwatch(device, seconds):
            target.copy_(source)
    return 2 * size / min(seconds)


@contextmanager
def _stopwatch(device: torch.device, seconds: list[float]) -> Iterator[None]:
    if device.type != "cuda":
        begin = time.perf_counter()
        yield
        seconds.append(time.perf_counter() - begin)
        return
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    yield
    end.record()
    end.synchronize()
    seconds.append(start.elapsed_time(end) / 1e3)
