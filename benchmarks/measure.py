"""One case, all its contenders: which of them may be timed, and what that gives."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from . import memory, rows, step_share, timing
from .accuracy import Judge, why_refused, why_wrong
from .peers import COMPILED, Contender
from .rows import Row
from .workloads import HEADS, Case, Inputs, make_inputs


class Setting(NamedTuple):
    """What all cases of a run share."""

    device: torch.device
    machine: dict[str, Any]  # the columns that say where and when
    bandwidth: float  # of a copy, bytes a second
    seconds: float
    repeats: int
    clock: str = "wall"
    memory: bool = False
    reference_pairs: float | None = None

    def row(self, case: Case, contender: Contender, **columns: Any) -> Row:
        """A row of the results."""
        date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        which = {"contender": contender.name, "exact": contender.exact}
        return Row(**{"date": date, **self.machine, **rows.describe(case), **which, **columns})


class _Admitted(NamedTuple):
    """A contender that may be timed."""

    contender: Contender
    repeats: int
    known: dict[str, Any]  # the columns that are known already


def measure(case: Case, chosen: Sequence[Contender], setting: Setting) -> Iterator[Row]:
    """Rows of one case, each as soon as it is known; a contender that fails gets a row that says why."""
    if HEADS[case.head].model:
        yield from step_share.measure(case, chosen, setting)
        return
    try:
        inputs = make_inputs(case, setting.device)
        judge = Judge(case, setting.device, setting.reference_pairs)
    except (ValueError, RuntimeError) as error:  # numbers that do not fit together, or do not fit into memory
        yield from (setting.row(case, contender, status="skipped", note=_reason(error)) for contender in chosen)
        return
    if any(contender.name in COMPILED for contender in chosen):
        # Each shape is compiled anew, and PyTorch stops compiling after a number of them.
        torch.compiler.reset()
    admitted = []
    for contender in chosen:
        found = _admit(contender, case, inputs, judge, setting)
        if isinstance(found, Row):
            yield found
        elif setting.memory:
            peak, beyond = memory.cpu_memory(case, contender.name)
            columns = {"peak_mb": peak, "beyond_gradient_mb": beyond, **found.known}
            yield setting.row(case, contender, status="ok", **columns)
        elif setting.device.type == "cuda":
            yield _on_gpu(found, inputs, setting)
        else:
            admitted.append(found)
    turns = {found.contender.name: (found.contender.loss, found.repeats) for found in admitted}
    times = timing.cpu_turns(turns, inputs, setting.clock)
    for found in admitted:
        yield _timed(found, case, setting, _summary(times[found.contender.name]))


def _reason(error: BaseException) -> str:
    """The first line of what an error says."""
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0][:200]}"


def _admit(contender: Contender, case: Case, inputs: Inputs, judge: Judge, setting: Setting) -> _Admitted | Row:
    """A warm contender whose gradient is right, or the row that says why it is not timed."""
    limit, work = contender.largest_work[setting.device.type == "cuda"], contender.work(case)
    if work > limit:
        note = f"work {work:.1e}, at most {limit:.1e} is timed"
        return setting.row(case, contender, status="skipped", note=note)
    known: dict[str, Any] = {}
    watch = timing.Stopwatch(setting.device)
    try:
        if (error := judge.error(contender)) is not None:
            known = {"error": error, "error_logits": judge.case.logits, "error_positives": judge.case.positives}
        if (why := why_refused(contender, error)) is not None:
            return setting.row(case, contender, status="refused", note=why, **known)
        for _ in range(2):  # the first run loads and compiles
            watch.read()
            watch.mark()
            value = timing.step(contender.loss, inputs)
            watch.mark()
        if (why := why_wrong(contender, inputs, value)) is not None:
            return setting.row(case, contender, status="refused", **{**known, "note": why})
    except Exception as error:
        return setting.row(case, contender, status="failed", **{**known, "note": _reason(error)})
    finally:
        for given in (inputs, judge.inputs):
            given.clear()
    repeats = timing.repeats_for(watch.read()[0] / 1e3, setting.seconds, setting.repeats)
    return _Admitted(contender, repeats, known)


def _summary(times: timing.Times) -> dict[str, Any]:
    """The columns of times."""
    columns: dict[str, Any] = {"repeats": len(times.forward)}
    both = [sum(pair) for pair in zip(*times)]
    for name, values in (("forward", times.forward), ("backward", times.backward), ("both", both)):
        columns[f"{name}_ms"], columns[f"{name}_iqr"] = timing.middle(values)
    return columns


def _timed(found: _Admitted, case: Case, setting: Setting, columns: dict[str, Any]) -> Row:
    """A row with the columns about bandwidth, of the best time that there is."""
    best = columns["both_ms"] if columns.get("graph_ms") is None else columns["graph_ms"]
    ratio = best / (1e3 * case.bytes_moved / setting.bandwidth)
    about = {"floor_bytes": case.bytes_moved, "bandwidth_gbs": setting.bandwidth / 1e9}
    about |= {"floor_ratio": ratio, "bandwidth_share": 1 / ratio}
    return setting.row(case, found.contender, status="ok", **found.known, **columns, **about)


def _on_gpu(found: _Admitted, inputs: Inputs, setting: Setting) -> Row:
    contender, repeats, case, columns = found.contender, found.repeats, inputs.case, dict[str, Any]()
    try:
        rotating = [inputs]
        if repeats > 2:
            number = timing.num_rotating(setting.device, 2 * sum(level.nbytes for level in inputs.levels))
            rotating += [make_inputs(case, setting.device, k) for k in range(1, number)]
            for given in rotating:
                contender.loss(given)  # which makes what is made on first use
        times, columns["wall_ms"] = timing.gpu_times(contender.loss, rotating, repeats, waits=contender.waits)
        columns |= _summary(times)
        columns["peak_mb"], columns["beyond_gradient_mb"] = timing.gpu_memory(contender.loss, inputs)
        if contender.waits:
            columns["graph_note"] = "waits for the host"
        elif repeats > 1:
            columns["launches"] = timing.launches(contender.loss, inputs)
            try:
                graph = timing.graph_times(contender.loss, rotating, max(5, repeats // 2))
                columns["graph_ms"], columns["graph_iqr"] = timing.middle(graph)
            except Exception as error:
                columns["graph_note"] = _reason(error)
    except Exception as error:
        return setting.row(case, contender, status="failed", **{**found.known, **columns, "note": _reason(error)})
    finally:
        inputs.clear()
        torch.cuda.empty_cache()
    return _timed(found, case, setting, columns)
