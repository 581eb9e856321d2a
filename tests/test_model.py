"""The model of times on GPUs: its arithmetic against numbers worked out by hand, and that all it says is called so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cases import KERNELS
from torch import Tensor
from virtual_gpu import NoCompiler

pytest.importorskip("triton")

from benchmarks import measured, model, virtual
from benchmarks.executed import BETWEEN, Costs, Run
from benchmarks.gate import recorded
from benchmarks.gpus import ASSUMED, GPU, GPUS, PUBLISHED, STAND_INS, Number, named
from benchmarks.model import Bounds, Problem, Time
from benchmarks.timing import Times
from benchmarks.virtual import counting_gpu
from benchmarks.workloads import Inputs

# 1e9 clocks a second of 10 processors: 1e10 clocks of processors.
SMALL = GPU("sm_90", *(Number(value, ASSUMED) for value in (10, 1.0, 2, 4, 0.5, 8, 0.25, 3, 100)))
COSTS = Costs(
    instructions=64, loaded=2, stored=2, read=6, written=4, atomics=0.5, hottest=0.01, barriers=1,
    registers=32, spill_bytes=0, shared_bytes=0,
)  # fmt: skip
BEFORE = COSTS._replace(instructions=640e6, longest=1e6)
COUNTED = {
    Run("sm_90", "linear, 1 level, float32", "middle"): {
        "collect_kernel": COSTS._replace(
            **dict.fromkeys(("instructions", "atomics", "hottest", "loaded", "stored"), 0)
        ),
        "bucket_kernel": COSTS,
        "gradient_kernel": COSTS._replace(atomics=0, hottest=0, instructions=128),
    },
    Run("sm_90", BETWEEN, "P = 300"): {"a": BEFORE, "b": BEFORE._replace(longest=10e6)},
}
PROBLEM = Problem(1_000_000, 300, "float32")


def test_bounds() -> None:
    found = model.bounds_of(COSTS, SMALL, 1_000_000)
    assert found == pytest.approx(
        Bounds(
            bytes=0.02,  # 1e7 bytes at 5e11 a second
            instructions=0.1,  # 2e6 of warps at 2e10 a second
            sectors=0.1,  # 4e6 at 4e10 a second
            atomics=0.0625,  # 5e5 at 8e9 a second
            hottest=0.04,  # 1e4 at 2.5e8 a second
        )
    )
    assert found._replace(sectors=0.2).limit == "sectors"


def test_kernels_between_the_passes() -> None:
    # 2e7 instructions of warps at 2e10 a second, 1e6 of the longest CTA at three clocks each.
    assert model.time_between(BEFORE, SMALL) == pytest.approx(3)
    assert model.time_between(BEFORE._replace(longest=1000), SMALL) == pytest.approx(1)


def test_the_floor() -> None:
    assert model.floor(SMALL, 1_000_000, "float32") == pytest.approx(0.024)
    assert model.floor(SMALL, 1_000_000, "bfloat16") == pytest.approx(0.012)


def test_a_step() -> None:
    forward, backward = PROBLEM.times(COUNTED, SMALL, "middle").values()
    # Six launches, two kernels of 3 and 30 ms, finding the positives, pass 1.
    assert forward == pytest.approx(Time(0.6 + 33 + 0.02 + 0.1, 0.6 + 33 + 0.02 + 0.3225))
    assert backward == pytest.approx(Time(0.2 + 0.2, 0.2 + 0.02 + 0.2 + 0.1))
    assert forward.plus(backward) == pytest.approx(Time(34.12, 34.4625))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("num_positives", [300, 1000])
@pytest.mark.parametrize("regime", ["early", "middle", "late"])
def test_no_gpu_is_below_the_floor(regime: str, num_positives: int, dtype: str) -> None:
    _, counted = recorded()
    problem = Problem(31_426_560, num_positives, dtype)
    for gpu in GPUS.values():
        forward, backward = problem.times(counted, gpu, regime).values()
        assert model.floor(gpu, problem.num_logits, dtype) < forward.plus(backward).overlapping
        assert forward.overlapping < forward.in_turn


def test_every_assumption_says_where_it_is_from() -> None:
    for name, gpu in GPUS.items():
        assert {number.source for number in gpu[1:]} <= {PUBLISHED, ASSUMED}
        assert gpu.counts_of == "sm_90" or name in ("A100", "B200")
    assert set(STAND_INS) == {"MI300X"}


def test_gpus_are_found_by_name() -> None:
    assert named("NVIDIA H100 80GB HBM3") == "H100"
    assert named("NVIDIA GeForce RTX 4090") is None


def test_all_that_is_printed_is_called_a_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(model.torch.cuda, "is_available", lambda: False)
    tables = []
    monkeypatch.setattr(model, "print_table", lambda *given: tables.append(given))
    model.main(["--bounds", "--assumptions"])
    assert len(tables) == 3
    assert all("model, nothing measured" in title for title, *_ in tables)
    for title, _, rows, *caption in tables[:2]:
        assert any(row[0].startswith("MI300X") for row in rows), title
        assert "stand in for MI300X" in caption[0]
    assert not capsys.readouterr().out


def test_a_gpu_is_measured_beside_the_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(model.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(model.torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(model, "measured_milliseconds", lambda *given: {"forward": 1.25, "backward": 0.75})
    model.main(["--positives", "300", "--logits", "1600000"])
    shown = capsys.readouterr().out
    assert "Measured beside the model's ms of H100" in shown
    assert shown.count("1.250") == shown.count("0.750") == 3
    monkeypatch.setattr(model.torch.cuda, "get_device_name", lambda: "another")
    model.main([])
    assert "the model has no numbers of another" in capsys.readouterr().out


@pytest.mark.skipif(KERNELS, reason="has a virtual GPU of its own")
def test_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that is made up."""

    def gpu_times(loss, inputs: list[Inputs], repeats: int, *, waits: bool) -> tuple[Times, float]:
        value: Tensor = loss(inputs[1])
        assert value.isfinite()
        assert [given.case.logits for given in inputs] == [8000] * 3
        assert all(given.levels[0].grad is not None for given in inputs)
        return Times([3.0, 1.0, 2.0], [0.5, 0.4, 0.6], []), 9.0

    monkeypatch.setattr(measured, "num_rotating", lambda device, size: 3)
    monkeypatch.setattr(measured, "gpu_times", gpu_times)
    try:
        with counting_gpu(90):
            found = measured.measured_milliseconds("middle", 8000, 30, "float32", "cpu")
    except NoCompiler as missing:
        pytest.skip(str(missing))
    assert found == {"forward": 2.0, "backward": 0.5}


def test_counting_takes_a_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(virtual, "TESTS", tmp_path)
    with pytest.raises(SystemExit, match="needs a checkout"), counting_gpu(90):
        pass


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_measuring_a_gpu() -> None:
    found = measured.measured_milliseconds("middle", 80 * 4096, 300, "float32")
    assert found["forward"] > 0
    assert found["backward"] > 0
