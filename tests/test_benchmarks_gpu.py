"""What the benchmark suite does on a GPU: with clocks and counters made up, and on a real one where there is one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from alrp_triton.benchmarks import rows, suite, timing
from alrp_triton.benchmarks.measure import _Admitted, _on_gpu
from alrp_triton.benchmarks.peers import Contender
from alrp_triton.benchmarks.workloads import Inputs, make_inputs
from benchmarking import SMALL, right, setting


def on_gpu(monkeypatch: pytest.MonkeyPatch, contender: Contender, once: bool = False) -> rows.Row:
    """The row of a GPU whose clocks and counters are made up."""
    monkeypatch.setattr(timing, "num_rotating", lambda device, size: 3)
    monkeypatch.setattr(timing, "gpu_memory", lambda loss, inputs: (5.0, 1.0))
    monkeypatch.setattr(timing, "launches", lambda loss, inputs: 7)

    def gpu_times(loss, inputs: list[Inputs], repeats: int, *, waits: bool) -> tuple[timing.Times, float]:
        assert len(inputs) == (1 if once or repeats == 2 else 3)
        assert len({given.levels[0].data_ptr() for given in inputs}) == len(inputs)
        return timing.Times([1.0] * repeats, [2.0] * repeats, [3.0] * repeats), 4.0

    monkeypatch.setattr(timing, "gpu_times", gpu_times)
    admitted = _Admitted(contender, make_inputs(SMALL), 1.0, 1e-3, {"error": 1e-8})
    return _on_gpu(admitted, SMALL, setting()._replace(repeats=4, seconds=1.0), once)


def test_row_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "graph_times", lambda loss, inputs, repeats: [0.5] * repeats)
    row = on_gpu(monkeypatch, Contender("ours", right, True))
    assert (row.status, row.forward_ms, row.backward_ms, row.both_ms, row.wall_ms) == ("ok", 1, 2, 3, 4)
    assert (row.graph_ms, row.best_ms, row.launches, row.peak_mb, row.beyond_gradient_mb) == (0.5, 0.5, 7, 5, 1)
    assert row.bandwidth_share == pytest.approx(row.floor_bytes / 0.5e-3 / 1e10)
    row = on_gpu(monkeypatch, Contender("loop", right, True, waits=True))
    assert (row.graph_ms, row.graph_note, row.launches, row.best_ms) == (None, "waits for the host", None, 3)
    row = on_gpu(monkeypatch, Contender("ours", right, True), once=True)
    assert (row.repeats, row.graph_ms, row.launches, row.both_ms, row.peak_mb) == (1, None, None, 3, 5)


def test_what_cannot_be_captured_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def graph_times(*arguments, **named) -> None:
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(timing, "graph_times", graph_times)
    row = on_gpu(monkeypatch, Contender("ours", right, True))
    assert (row.status, row.graph_ms, row.best_ms) == ("ok", None, 3)
    assert row.graph_note == "RuntimeError: operation not permitted"
    monkeypatch.setattr(timing, "gpu_times", graph_times)
    monkeypatch.setattr(timing, "num_rotating", lambda device, size: 1)
    admitted = _Admitted(Contender("ours", right, True), make_inputs(SMALL), 1.0, 1e-3, {"error": 1e-8})
    row = _on_gpu(admitted, SMALL, setting(), once=False)
    assert (row.status, row.note, row.error, row.both_ms) == (
        "failed",
        "RuntimeError: operation not permitted",
        1e-8,
        None,
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    assert suite.main(["--preset", "smoke", "--device", "cuda", "--no-verify", "--output", str(path)]) == 0
    mine = [row for row in rows.read([path]) if row.contender == "ours, triton"]
    assert len(mine) == 2
    for each in mine:
        assert each.status == "ok"
        assert each.graph_ms is not None, each.graph_note
        assert 0 < each.launches < 100
        assert each.peak_mb > each.beyond_gradient_mb > 0
        assert each.wall_ms > 0
