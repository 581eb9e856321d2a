"""What the kernels execute, against the record of what they may; see benchmarks/gate.py."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from cases import KERNELS

pytest.importorskip("triton")
if KERNELS:
    pytest.skip("has virtual GPUs of its own", allow_module_level=True)

import triton
from alrp_triton.kernels import buckets, configurations
from virtual_gpu import NoCompiler, virtual_gpu

from benchmarks import gate
from benchmarks.counted import CASES, Case
from benchmarks.executed import BETWEEN, Costs, Run
from benchmarks.machine import Machine, executed, instructions_of

VERSION, RECORD = gate.recorded()
of_this_compiler = pytest.mark.skipif(
    triton.__version__ != VERSION, reason=f"the record is of Triton {VERSION}, this is {triton.__version__}"
)
PLAIN = Case().name
MIDDLE = Run("sm_90", PLAIN, "middle")


@pytest.fixture(scope="module", autouse=True)
def _engine() -> None:
    try:
        with virtual_gpu():
            pass
    except NoCompiler as missing:
        pytest.skip(str(missing))


def marked(run: Run) -> object:
    """One target's passes always run; the rest nightly. A process assembles the kernels of a case once."""
    marks = [pytest.mark.xdist_group(f"{run.target}, {run.case}")]
    if run[:2] != MIDDLE[:2]:
        marks.append(pytest.mark.nightly)
    return pytest.param(run, id=", ".join(run), marks=marks)


def test_every_run_is_recorded() -> None:
    assert list(RECORD) == gate.RUNS
    for run, kernels in RECORD.items():
        assert len(kernels) == 3
        for costs in kernels.values():
            assert costs.instructions > 0
            assert costs.registers > 0
            # ptxas may keep one number of a thread in memory to have more threads.
            assert costs.spill_bytes <= (8 if CASES.get(run.case, Case()).grouped else 0)
            assert (costs.longest is not None) == (run.case == BETWEEN)


@of_this_compiler
@pytest.mark.parametrize("run", [marked(run) for run in gate.RUNS])
def test_nothing_executes_more_than_recorded(run: Run) -> None:
    found = gate.worse(run, RECORD[run], run.costs())
    assert not found, "if this has to be: python -m benchmarks.gate --record, and say why"


@of_this_compiler
def test_a_worsened_kernel_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Offsets in fixed point computed by way of float64, as one might who fears for digits."""
    source = Path(buckets.__file__).read_text(encoding="utf-8")
    slower = source.replace("(offset * scale)", "(offset.to(tl.float64) * scale)")
    assert slower != source
    path = tmp_path / "slower.py"
    path.write_text(slower.replace("from .", "from alrp_triton.kernels."), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("slower", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(buckets, "bucket_kernel", module.bucket_kernel)
    monkeypatch.setattr(gate, "RUNS", [MIDDLE])
    with pytest.raises(SystemExit) as ended:
        gate.main([])
    assert ended.value.code == 1
    shown = capsys.readouterr().out
    assert "middle: bucket_kernel" in shown
    assert "instructions" in shown


@of_this_compiler
def test_a_worsened_setting_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(configurations.PINNED, "gradient", {"default": {"block": 4096, "num_warps": 4}})
    found = gate.worse(MIDDLE, RECORD[MIDDLE], MIDDLE.costs())
    assert {entry.kernel for entry in found} == {"gradient_kernel"}
    assert "registers" in {entry.cost for entry in found}


@of_this_compiler
def test_recording_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gate, "RUNS", [Run("sm_80", BETWEEN, "P = 300")])
    path = tmp_path / "new" / "executed.json"
    gate.main(["--record", "--file", str(path)])
    gate.main(["--file", str(path)])
    assert "1 runs, nothing worse" in capsys.readouterr().out
    gate.main(["--file", str(path), "--target", "sm_90"])
    assert "0 runs" in capsys.readouterr().out
    content = json.loads(path.read_text(encoding="utf-8"))
    content["counted"][0]["longest"] -= 1
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(SystemExit):
        gate.main(["--file", str(path)])
    assert "longest" in capsys.readouterr().out
    path.write_text(json.dumps(content | {"triton": "0.0"}), encoding="utf-8")
    with pytest.raises(SystemExit, match=r"record is of Triton 0\.0"):
        gate.main(["--file", str(path)])
    path.write_text(json.dumps(content | {"counted": []}), encoding="utf-8")
    with pytest.raises(SystemExit, match="not recorded: sm_80, between the passes, P = 300"):
        gate.main(["--file", str(path)])


def test_kernels_that_come_and_go_are_worse() -> None:
    costs = Costs(1, 1, 1, 1, 1, 1, 1, 1, registers=1, spill_bytes=0, shared_bytes=0)
    found = gate.worse(MIDDLE, {"a": costs, "b": costs}, {"b": costs._replace(loaded=0.5), "c": costs})
    assert [(entry.kernel, entry.cost) for entry in found] == [("a", "launches"), ("c", "launches")]


def test_disassembly_is_read() -> None:
    text = """
kernel:
\t//## File ".nv_debug_ptx_txt", line 30
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;
\t//## File ".nv_debug_ptx_txt", line 41
        /*0020*/              @UP1 UIADD3 UR4, UR4, 0x1, URZ ;
        /*0030*/                   NOP ;
"""
    assert instructions_of(text) == ((30, "LDC"), (30, "LDG.E.128"), (41, "UIADD3"))


def test_copies_of_a_loop_share_its_runs() -> None:
    """A load, an addition and the way back, 8 times, of which ptxas has made two turns of four."""
    program = SimpleNamespace(
        lines=[1, 2, 3, 4, 5],
        classes=["mov", "ld.global", "int32", "branch", "branch"],
        code=np.array([(0,), (0,), (0,), (1,), (0,)], [("target", "i4")]),
    )
    counts = np.array([(3,), (24,), (24,), (24,), (3,)], [("runs", "u8")])
    code = ((1, "MOV"), *([(2, "LDG.E"), (3, "IADD3")] * 4), (4, "BRA"), (5, "EXIT"), (0, "LDC"))
    result = SimpleNamespace(program=program, counts=counts)
    assert executed(result, Machine(code, 1, 0)) == {
        "MOV": 3,
        "LDG.E": 24,
        "IADD3": 24,
        # One for four turns.
        "BRA": 6,
        "EXIT": 3,
        # Of no line: as often as the kernel begins.
        "LDC": 3,
    }
