"""One case, all its contenders: who may be timed, and what that gives."""

from __future__ import annotations

import datetime
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from . import timing
from .accuracy import Judge, why_refused, why_wrong
from .peers import Contender
from .rows import Row, describe
from .workloads import Case, Inputs, make_inputs

# A part of the positives tells little where it is smaller than this.
_SMALLEST_PART = 1 / 50


class Setting(NamedTuple):
    """What all cases of a run share."""

    device: torch.device
    machine: dict[str, Any]
    """The columns that say where and when."""
    bandwidth: float
    """Of a copy, bytes a second."""
    seconds: float
    repeats: int
    seed: int = 0
    reference_pairs: float | None = None


class _Admitted(NamedTuple):
    """A contender that may be timed."""

    contender: Contender
    inputs: Inputs
    scale: float
    """What its forward time is multiplied by: 1, unless only a part of the positives is timed."""
    seconds: float
    """Of one run."""
    known: dict[str, Any]
    """The columns that are known already."""


def measure(case: Case, contenders: Sequence[Contender], setting: Setting, once: bool = False) -> Iterator[Row]:
    """Rows of one case, in the order in which they come to be known; a contender that fails gets a row that says why.

    Args:
        once: one timed run of each, with no further inputs, graphs or counts.
    """
    try:
        inputs = make_inputs(case, setting.device, setting.seed)
        judge = Judge(case, setting.device, setting.reference_pairs)
    except (ValueError, RuntimeError) as error:  # numbers that do not fit together, or do not fit
        for contender in contenders:
            yield _row(case, contender, setting, status="skipped", note=_reason(error))
        return
    if any(contender.compiled for contender in contenders):
        # Another shape is compiled anew, and only so many are kept before PyTorch no longer compiles.
        torch.compiler.reset()
    admitted = []
    for contender in contenders:
        found = _admit(contender, case, inputs, judge, setting)
        if isinstance(found, Row):
            yield found
        elif setting.device.type == "cuda":
            yield _on_gpu(found, case, setting, once)
        else:
            admitted.append(found)
    yield from _on_cpu(admitted, case, setting, once)


def _row(case: Case, contender: Contender, setting: Setting, **columns: Any) -> Row:
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    which = {"contender": contender.name, "exact": contender.exact}
    return Row(**{"date": date, **setting.machine, **describe(case), **which, **columns})


def _reason(error: BaseException) -> str:
    """The first line of what an error says."""
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0][:200]}"


def _admit(contender: Contender, case: Case, inputs: Inputs, judge: Judge, setting: Setting) -> _Admitted | Row:
    """A warm contender whose gradient is right, or the row that says why it is not timed."""
    limit = contender.largest_work[setting.device.type == "cuda"]
    part = min(1.0, limit / max(1, contender.work(case)))
    if part < 1 and (not contender.by_positive or part < _SMALLEST_PART):
        note = f"work {contender.work(case):.1e}, at most {limit:.1e} is timed"
        return _row(case, contender, setting, status="skipped", note=note)
    known: dict[str, Any] = {}
    try:
        if (error := judge.error(contender)) is not None:
            about = {"error_logits": judge.case.logits, "error_positives": judge.case.positives}
            known |= {"error": error, **about}
        if (why := why_refused(contender, error)) is not None:
            return _row(case, contender, setting, status="refused", note=why, **known)
        scale = 1.0
        if part < 1:
            num = max(1, int(part * case.positives))
            inputs, scale = inputs.with_positives(num), case.positives / num
            known["note"] = f"forward timed with {num} of {case.positives} positives and scaled"
        seconds = 0.0
        for _ in range(2):  # the first run loads and compiles
            inputs.clear()
            _synchronise(setting.device)
            begin = time.perf_counter()
            value = contender.loss(inputs)
            value.backward()
            _synchronise(setting.device)
            seconds = time.perf_counter() - begin
        if (why := why_wrong(contender, inputs, value)) is not None:
            return _row(case, contender, setting, status="refused", **{**known, "note": why})
    except Exception as error:
        return _row(case, contender, setting, status="failed", **{**known, "note": _reason(error)})
    finally:
        for given in (inputs, judge.inputs):
            given.clear()
    return _Admitted(contender, inputs, scale, seconds, known)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _times(found: _Admitted, times: timing.Times) -> dict[str, Any]:
    """Medians and spreads, of a part scaled to the whole."""
    (forward, forward_iqr), (backward, backward_iqr), (both, both_iqr) = times.middle()
    if found.scale != 1:
        forward, forward_iqr = found.scale * forward, found.scale * forward_iqr
        both, both_iqr = forward + backward, forward_iqr + backward_iqr
    return {
        "forward_ms": forward,
        "forward_iqr": forward_iqr,
        "backward_ms": backward,
        "backward_iqr": backward_iqr,
        "both_ms": both,
        "both_iqr": both_iqr,
        "repeats": len(times.both),
    }


def _with_floor(row: dict[str, Any], case: Case, setting: Setting) -> dict[str, Any]:
    """The columns about bandwidth, from the best time that there is."""
    best = row["both_ms"] if row.get("graph_ms") is None else row["graph_ms"]
    ratio = best / (1e3 * case.bytes_moved / setting.bandwidth)
    about = {"floor_bytes": case.bytes_moved, "bandwidth_gbs": setting.bandwidth / 1e9}
    return {**row, **about, "floor_ratio": ratio, "bandwidth_share": 1 / ratio}


def _on_cpu(admitted: Sequence[_Admitted], case: Case, setting: Setting, once: bool) -> Iterator[Row]:
    turns = {
        found.contender.name: (
            found.contender.loss,
            found.inputs,
            1 if once else timing.repeats_for(found.seconds, setting.seconds, setting.repeats),
        )
        for found in admitted
    }
    times = timing.cpu_turns(turns)
    for found in admitted:
        columns = found.known | _times(found, times[found.contender.name])
        yield _row(case, found.contender, setting, status="ok", **_with_floor(columns, case, setting))


def _on_gpu(found: _Admitted, case: Case, setting: Setting, once: bool) -> Row:
    contender, loss, columns = found.contender, found.contender.loss, dict(found.known)
    try:
        repeats = 1 if once else timing.repeats_for(found.seconds, setting.seconds, setting.repeats)
        rotating = [found.inputs]
        if repeats > 2 and found.scale == 1:
            num = timing.num_rotating(setting.device, 2 * sum(level.nbytes for level in found.inputs.levels))
            rotating += [make_inputs(case, setting.device, setting.seed + k) for k in range(1, num)]
            for given in rotating:  # what is made when first asked for
                loss(given)
        times, columns["wall_ms"] = timing.gpu_times(loss, rotating, repeats, waits=contender.waits)
        columns |= _times(found, times)
        if found.scale != 1:
            columns["wall_ms"] = None  # of a part of the positives
        columns["peak_mb"], columns["beyond_gradient_mb"] = timing.gpu_memory(loss, found.inputs)
        if not once:
            columns |= _graph(contender, rotating, repeats)
            if not contender.waits:
                columns["launches"] = timing.launches(loss, found.inputs)
    except Exception as error:
        return _row(case, contender, setting, status="failed", **{**columns, "note": _reason(error)})
    finally:
        found.inputs.clear()
        torch.cuda.empty_cache()
    return _row(case, contender, setting, status="ok", **_with_floor(columns, case, setting))


def _graph(contender: Contender, rotating: Sequence[Inputs], repeats: int) -> dict[str, Any]:
    if contender.waits:
        return {"graph_note": "waits for the host"}
    try:
        median, spread = timing.middle(timing.graph_times(contender.loss, rotating, max(5, repeats // 2)))
    except Exception as error:
        for given in rotating:
            given.clear()
        return {"graph_note": _reason(error)}
    return {"graph_ms": median, "graph_iqr": spread}
