"""What the kernels execute, compared with the record of it; and the arithmetic of the model, worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from dialect import KERNELS

pytest.importorskip("triton")
if KERNELS:
    pytest.skip("has virtual GPUs of its own", allow_module_level=True)

import triton
from alrp_triton.kernels import settings as launch_settings
from virtual_gpu import NoCompiler, virtual_gpu

from benchmarks import counting, gate, model
from benchmarks.executed import BETWEEN, PASSES, RUNS, Case, Costs, Run

VERSION, RECORD = gate.recorded()
MIDDLE = Run("sm_90", Case().name, "middle")
COSTS = Costs(64, 2, 2, 6, 4, atomics=0.5, hottest=0.01, barriers=1, registers=32, spill_bytes=0, shared_bytes=0)


@pytest.fixture(scope="module")
def compiler() -> None:
    """The one that the record is of."""
    if triton.__version__ != VERSION:
        pytest.skip(f"the record is of Triton {VERSION}, this is {triton.__version__}")
    try:
        with virtual_gpu():
            pass
    except NoCompiler as missing:
        pytest.skip(str(missing))


def marked(run: Run) -> object:
    """One target's passes always run, the rest nightly. A process assembles the kernels of a case once."""
    nightly = [pytest.mark.nightly] if run[:2] != MIDDLE[:2] else []
    return pytest.param(run, id=", ".join(run), marks=[pytest.mark.xdist_group(f"{run.target}, {run.case}"), *nightly])


@pytest.mark.parametrize("run", [marked(run) for run in RUNS])
def test_nothing_executes_more_than_recorded(compiler: None, run: Run) -> None:
    assert not gate.worse(run, RECORD[run], run.costs()), "python -m benchmarks.gate --record, and say why"


@pytest.mark.nightly
def test_the_gate_fails_when_a_kernel_executes_more(
    compiler: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gate, "RUNS", [Run("sm_80", BETWEEN, "P = 300")])
    path = tmp_path / "new" / "executed.json"
    gate.main(["--record", "--file", str(path)])
    gate.main(["--file", str(path)])
    assert "1 runs, nothing worse" in capsys.readouterr().out
    content = json.loads(path.read_text(encoding="utf-8"))
    content["counted"][0]["instructions"] -= 1
    for changed, said in (
        (content, "instructions"),
        ({**content, "triton": "0"}, ""),
        ({**content, "counted": []}, ""),
    ):
        path.write_text(json.dumps(changed), encoding="utf-8")
        with pytest.raises(SystemExit):
            gate.main(["--file", str(path)])
        assert said in capsys.readouterr().out
    for kernel, settings in launch_settings.PINNED.items():
        slower = {**settings["default"], "block": 4 * settings["default"]["block"]}
        monkeypatch.setitem(launch_settings.PINNED, kernel, {"default": slower})
    assert gate.worse(MIDDLE, RECORD[MIDDLE], MIDDLE.costs())
    found = gate.worse(MIDDLE, {"a": COSTS, "b": COSTS}, {"b": COSTS._replace(loaded=0.5), "c": COSTS})
    assert [(entry.where[-1], entry.cost) for entry in found] == [("a", "launches"), ("c", "launches")]


def test_machine_code_counts_as_often_as_its_ptx_ran() -> None:
    """A load, an addition and the way back, 8 times, of which ptxas has made two turns of four."""
    text = "\n".join(
        f'//## File ".nv_debug_ptx_txt", line {line}\n/*0010*/ @!P0 {opcode} R4 ;\n/*0020*/ NOP ;'
        for line, opcode in [(1, "MOV"), *[(2, "LDG.E"), (3, "IADD3")] * 4, (4, "BRA"), (5, "EXIT")]
    )
    program = SimpleNamespace(
        lines=[1, 2, 3, 4, 5],
        classes=["mov", "ld.global", "int32", "branch", "branch"],
        code=np.array([(0,), (0,), (0,), (1,), (0,)], [("target", "i4")]),
    )
    result = SimpleNamespace(program=program, counts=np.array([(3,), (24,), (24,), (24,), (3,)], [("runs", "u8")]))
    machine = counting.Machine(((0, "LDC"), *counting.instructions_of(text)), 1, 0)
    # One branch for four turns; what belongs to no line runs as often as the kernel begins.
    expected = {"MOV": 3, "LDG.E": 24, "IADD3": 24, "BRA": 6, "EXIT": 3, "LDC": 3}
    assert counting.executed(result, machine) == expected


def test_the_model_by_hand() -> None:
    # 1e9 clocks a second of 10 processors.
    gpu = model.GPU("sm_90", 10, 1.0, 2, 4, 0.5, 8, 0.25, 3, 100)
    # Bytes: 1e7 at 5e11 a second; instructions: 2e6 of warps at 2e10; sectors: 4e6 at 4e10; atomics: 5e5 at 8e9; on
    # the hottest word 1e4 at 2.5e8.
    bounds = model.bounds_of(COSTS, gpu, 1_000_000)
    assert bounds == pytest.approx(model.Bounds(0.02, 0.1, 0.1, 0.0625, 0.04))
    assert bounds._replace(sectors=0.2).limit == "sectors"
    assert model.floor(gpu, 1_000_000, "float32") == pytest.approx(0.024)
    finding, first, second = (names[0] for names in PASSES.values())
    nothing = dict.fromkeys(("instructions", "atomics", "hottest", "loaded", "stored"), 0)
    passes = {finding: COSTS._replace(**nothing), first: COSTS}
    passes[second] = COSTS._replace(atomics=0, hottest=0, instructions=128)
    between = COSTS._replace(instructions=640e6, longest=1e6)
    counted = {MIDDLE: passes, Run("sm_90", BETWEEN, "P = 300"): {"a": between, "b": between._replace(longest=10e6)}}
    forward, backward = model.Problem(1_000_000, 300, "float32").times(counted, gpu, "middle").values()
    # Nine launches, two kernels of 3 and 30 ms, finding the positives, pass 1; two launches, pass 2.
    pass_1 = 0.02 + 0.1 + 0.1 + 0.0625 + 0.04
    assert forward == pytest.approx(model.Time(0.9 + 33 + 0.02 + 0.1, 0.9 + 33 + 0.02 + pass_1))
    assert backward == pytest.approx(model.Time(0.2 + 0.2, 0.2 + 0.02 + 0.2 + 0.1))
