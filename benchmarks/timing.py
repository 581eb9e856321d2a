"""Times, memory and launches of forward and backward, on the CPU and on a GPU: all that is timed is timed here."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch._C._autograd import DeviceType  # which torch.autograd has, too, but type checkers do not know

from .workloads import Inputs

Loss = Callable[[Inputs], Tensor]
Measured = TypeVar("Measured")
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
_LARGEST_LEAD = 0.05
_L2_TIMES, _MOST_INPUTS = 4, 16


class Stopwatch:
    """Milliseconds between marks; on a GPU by events, which nothing waits for until they are read."""

    def __init__(self, device: torch.device, clock: str = "wall") -> None:
        self.on_gpu, self._clock, self._marks = device.type == "cuda", CLOCKS[clock], list[Any]()

    def mark(self) -> None:
        """Note the time."""
        if self.on_gpu:
            self._marks.append(torch.cuda.Event(enable_timing=True))
            self._marks[-1].record()
        else:
            self._marks.append(self._clock())

    def read(self) -> list[float]:
        """The milliseconds from each mark to the next; forgets them."""
        marks, self._marks = self._marks, []
        if self.on_gpu:
            torch.cuda.synchronize()
            return [begin.elapsed_time(end) for begin, end in pairwise(marks)]
        return [1e3 * (end - begin) for begin, end in pairwise(marks)]


class Times(NamedTuple):
    """Milliseconds of each iteration."""

    forward: list[float]
    backward: list[float]


def middle(values: Sequence[float]) -> tuple[float, float]:
    """Median and interquartile range."""
    low, median, high = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75]).double())
    return float(median), float(high - low)


def repeats_for(seconds: float, budget: float, most: int) -> int:
    """How many runs of so many seconds fit a budget: at least 2, unless ``most`` is 1, and at most ``most``."""
    return min(most, max(2, int(budget / max(seconds, 1e-9))))


def take_turns(contenders: Mapping[str, tuple[Callable[[], Measured], int]]) -> dict[str, list[Measured]]:
    """What each run of each contender ``name: (run, repeats)`` returns.

    They take turns, in an order that alternates, so that other programs disturb all of them alike. Contenders with
    fewer repeats leave out the last rounds.
    """
    measured: dict[str, list[Measured]] = {name: [] for name in contenders}
    for turn in range(max((repeats for _, repeats in contenders.values()), default=0)):
        order = list(contenders.items())
        for name, (run, repeats) in order if turn % 2 == 0 else reversed(order):
            if turn < repeats:
                measured[name].append(run())
    return measured


def _marked_step(loss: Loss, inputs: Inputs, watch: Stopwatch) -> None:
    watch.mark()
    value = loss(inputs)
    watch.mark()
    value.backward()
    watch.mark()


def cpu_turns(contenders: dict[str, tuple[Loss, int]], inputs: Inputs, clock: str = "wall") -> dict[str, Times]:
    """Times of ``name: (loss, repeats)`` in turns."""
    watch = Stopwatch(torch.device("cpu"), clock)

    def run(loss: Loss) -> list[float]:
        inputs.clear()
        _marked_step(loss, inputs, watch)
        return watch.read()

    runs = {name: (partial(run, loss), repeats) for name, (loss, repeats) in contenders.items()}
    times = {name: Times(*map(list, zip(*measured))) for name, measured in take_turns(runs).items()}
    inputs.clear()
    return times


def num_rotating(device: torch.device, one: int) -> int:
    """How many inputs of ``one`` bytes, gradient included, together exceed the L2 cache several times over."""
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 1 << 26)
    return max(1, min(_MOST_INPUTS, math.ceil(_L2_TIMES * cache / max(1, one)) + 1))


def gpu_times(loss: Loss, inputs: Sequence[Inputs], repeats: int, *, waits: bool) -> tuple[Times, float]:
    """Times on the device by events, and milliseconds of an iteration by the wall clock. Call it warm.

    Before each iteration the device is kept busy for as long as the host takes to launch it, so that events measure
    what the device needs; but not if the host ``waits`` for the device within an iteration, and cannot launch ahead.
    """
    device = torch.device("cuda")
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for k in range(repeats):
        step(loss, inputs[k % len(inputs)])
    launched = time.perf_counter() - begin
    torch.cuda.synchronize()
    wall = (time.perf_counter() - begin) / repeats
    lead = 0.0 if waits else min(launched / repeats, _LARGEST_LEAD)
    watch = Stopwatch(device)
    for k in range(repeats):
        inputs[k % len(inputs)].clear()
        # Cycles at about 2 GHz; three times the host's own time leaves a margin.
        torch.cuda._sleep(int(3 * lead * 2e9))
        _marked_step(loss, inputs[k % len(inputs)], watch)
    found = watch.read()
    return Times(found[::3], found[1::3]), 1e3 * wall


def step(loss: Loss, inputs: Inputs) -> Tensor:
    """Forward and backward; returns the loss."""
    inputs.clear()
    value = loss(inputs)
    value.backward()
    return value


def graph_times(loss: Loss, inputs: Sequence[Inputs], repeats: int) -> list[float]:
    """Milliseconds of forward and backward in a CUDA graph that goes through all inputs once, for each input.

    Raises:
        RuntimeError: if that cannot be captured, saying why.
    """
    try:
        # A capture that fails may leave its own stream behind as the current one.
        with torch.cuda.stream(torch.cuda.current_stream()):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for given in inputs:
                    step(loss, given)
            torch.cuda.current_stream().wait_stream(stream)
            for given in inputs:
                given.clear()
            graph, watch = torch.cuda.CUDAGraph(), Stopwatch(torch.device("cuda"))
            with torch.cuda.graph(graph):
                for given in inputs:
                    loss(given).backward()
            graph.replay()
            for _ in range(repeats):
                watch.mark()
                graph.replay()
            watch.mark()
            return [milliseconds / len(inputs) for milliseconds in watch.read()]
    finally:
        for given in inputs:
            given.clear()


def gpu_memory(loss: Loss, inputs: Inputs) -> tuple[float, float]:
    """Largest megabytes allocated beyond the inputs, and beyond the inputs and the gradient of the scores."""
    inputs.clear()
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(loss, inputs)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    inputs.clear()
    return peak / 1e6, (peak - sum(level.nbytes for level in inputs.levels)) / 1e6


def launches(loss: Loss, inputs: Inputs) -> int | None:
    """What an iteration starts on the GPU: kernels, copies and fills; None if the profiler does not see them."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step(loss, inputs)
        torch.cuda.synchronize()
    inputs.clear()
    return len(on_device(profiler.events() or [])) or None


def on_device(events: Iterable[Any]) -> list[Any]:
    """Those of a profile that ran on the GPU: kernels, copies and fills."""
    return [e for e in events if e.device_type == DeviceType.CUDA and not getattr(e, "is_user_annotation", False)]


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of the best of several large copies."""
    size = 1 << (30 if device.type == "cuda" else 26)
    source, watch = torch.ones(size // 4, device=device), Stopwatch(device)
    target = torch.empty_like(source)
    for _ in range(11):
        target.copy_(source)
        watch.mark()
    return 2e3 * size / min(watch.read())
