"""The command ``alrp-triton``: its arguments, ``info``, and how results are shown."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from alrp_triton.kernels import settings as launch_settings
from dialect.interpreters import start_python

import alrp_triton
from alrp_triton import cli, info, verify
from alrp_triton.cli import verifying
from alrp_triton.engine.passes import numba_installed

AUTO = "numba" if numba_installed() else "torch"


pytestmark = pytest.mark.usefixtures("command_environment")


def run_process(*arguments: str, code: str) -> CompletedProcess[str]:
    """``alrp-triton`` in a process of its own, which runs ``code`` first."""
    code = f"import sys\n{code}\nfrom alrp_triton.cli import main\nsys.exit(main())"
    return start_python(code, *arguments)


def words(text: str) -> list[str]:
    """The words, apart from the lines that rich draws, in an order that does not depend on where lines are broken."""
    return sorted(word for word in text.split() if set(word) - {"─"})


def without_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*filter(lambda name: name.startswith("rich."), sys.modules), "rich"]:
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["verify", "--device", "cuda:99"], "'cuda:99' is not on this machine, which has cpu"),
        (["verify", "--device", "meta"], "'meta' is not on this machine"),
        (["verify", "--device", "nowhere"], "'nowhere' is no device"),
        (["verify", "--backend", "auto"], "invalid choice: 'auto'"),
        (["verify", "--nothing"], "--nothing"),
        ([], "COMMAND"),
    ],
)
def test_wrong_arguments(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["verify", "--help"], ["info", "--help"], ["--version"]):
        with pytest.raises(SystemExit) as stopped:
            cli.main(arguments)
        assert stopped.value.code == 0
    output = capsys.readouterr().out
    assert output.endswith(f"alrp-triton {alrp_triton.__version__}\n")
    for word in ("doctor", "verify", "info", "--interpret", "--quick", "--json"):
        assert word in output


def test_info_shows_what_there_is(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli.main(["info"]) == 0
    output = capsys.readouterr().out
    for version in (alrp_triton.__version__, torch.__version__, ".".join(map(str, sys.version_info[:3]))):
        assert version in output
    for backend in ("torch", "numba", "triton", "pairwise", "reference"):
        assert backend in output
    for name in (*launch_settings.PINNED, *info.ENVIRONMENT):
        assert name in output
    for expected in ("taken by auto", str(launch_settings.cache_file()), "not there", "not set"):
        assert expected in output


def test_info_as_json_is_what_is_collected(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == info.collect()
    assert found["versions"]["torch"] == torch.__version__
    assert found["devices"][0]["device"] == "cpu"
    assert found["autotuning"]["found"] == {}
    assert found["environment"]["TRITON_INTERPRET"] is None
    backends = {backend["backend"]: backend for backend in found["backends"] if backend["device"] == "cpu"}
    assert set(backends) == {"torch", "numba", "triton", "pairwise", "reference"}
    assert backends["torch"] == {
        "backend": "torch", "device": "cpu", "available": True, "reason": None, "auto": not numba_installed(),
    }  # fmt: skip
    assert [name for name, backend in backends.items() if backend["auto"]] == [AUTO]
    assert not backends["triton"]["available"]
    assert "Triton" in backends["triton"]["reason"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows the settings of the devices instead")
def test_info_without_a_gpu_shows_the_default_settings() -> None:
    expected = {kernel: table["default"] for kernel, table in launch_settings.PINNED.items()}
    assert info.collect()["settings"] == {"default": expected}


def test_info_with_gpus(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def properties(device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(name=f"GPU number {device.index}", major=9, minor=0, total_memory=80 * 2**30)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setitem(launch_settings.PINNED, "count", {"default": {"block": 1}, "sm_9": {"block": 2}})
    monkeypatch.setattr("alrp_triton.engine.passes.triton_installed", lambda: True)
    found = info.collect()
    assert found["devices"][2] == {
        "device": "cuda:1", "name": "GPU number 1", "architecture": "sm_90", "memory": 80 * 2**30,
    }  # fmt: skip
    assert list(found["settings"]) == ["sm_90"]
    assert found["settings"]["sm_90"]["count"] == {"block": 2}
    taken = {(backend["device"], backend["backend"]) for backend in found["backends"] if backend["auto"]}
    assert taken == {("cpu", AUTO), ("cuda:0", "triton"), ("cuda:1", "triton")}
    assert cli.main(["info"]) == 0
    output = capsys.readouterr().out
    assert "GPU number 1" in output
    assert "80.0 GiB" in output


def test_info_shows_found_settings(capsys: pytest.CaptureFixture[str]) -> None:
    file = launch_settings.cache_file()
    file.parent.mkdir(parents=True)
    settings = launch_settings.CANDIDATES["count"][1]
    file.write_text(json.dumps({"count|Some GPU|torch.float32|2^20": settings, "other|x": {}}))
    assert info.collect()["autotuning"]["found"] == {"count|Some GPU|torch.float32|2^20": settings}
    assert cli.main(["info"]) == 0
    output = capsys.readouterr().out
    assert "(1 settings)" in output
    assert "count, Some GPU, torch.float32, 2^20" in output


def test_info_starts_nothing_and_needs_no_extra() -> None:
    code = """
import atexit
sys.modules["rich"] = None
def look():
    import torch
    assert not torch.cuda.is_initialized() or torch.cuda.is_available()
    print("triton" in sys.modules, file=sys.stderr)
atexit.register(look)
"""
    done = run_process("info", code=code)
    assert done.returncode == 0
    assert done.stderr.split() == ["False"]
    assert "taken by auto" in done.stdout


def test_without_triton() -> None:
    code = "sys.modules['triton'] = None"
    done = run_process("info", "--json", code=code)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["versions"]["triton"] is None
    reasons = {backend["backend"]: backend["reason"] for backend in found["backends"] if backend["backend"] != "numba"}
    assert reasons == {
        "torch": None, "triton": "Triton is not installed", "pairwise": "Triton is not installed", "reference": None,
    }  # fmt: skip


def test_verify_without_triton(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(verifying, "triton_installed", lambda: False)
    monkeypatch.setattr("alrp_triton.engine.passes.triton_installed", lambda: False)
    monkeypatch.setattr(verify, "plan", _without_cases(verify.plan))
    assert cli.main(["verify", "--device", "cpu"]) == 0
    output = capsys.readouterr().out
    assert "not checked: triton on cpu: Triton is not installed" in output
    assert "--interpret" not in output


def _without_cases(plan: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **arguments: ([], plan(*args, **arguments)[1])


def test_the_same_words_without_rich(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    monkeypatch.setenv("ALRP_TRITON_CACHE", "cache")  # short enough for a cell of a table
    row = verify.Row("middle", "torch", "cpu", *[2e-8] * 6, True, 1.5)
    rows = [row, row._replace(case="ties", worst=1e-4), row._replace(backend="triton", failure="no kernel [image]")]
    checks = [SimpleNamespace(run=lambda row=row: row) for row in rows]
    monkeypatch.setattr(verify, "plan", lambda *args, **arguments: (checks, []))

    def output() -> str:
        assert cli.main(["info"]) == 0
        assert cli.main(["verify"]) == 1
        return capsys.readouterr().out

    by_rich = output()
    without_rich(monkeypatch)
    plain = output()
    assert "─" in by_rich
    assert "─" not in plain
    assert words(by_rich) == words(plain)
    assert "  middle  2.0e-08         2.0e-08        2.0e-08     2.0e-08       yes        1.50  ok\n" in plain
    assert "no kernel [image]" in plain


def test_progress_goes_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = iter([verify.Row("a", "torch", "cpu"), verify.Row("b", "torch", "cpu")])
    assert [row.case for row in verifying._with_progress(rows, 2)] == ["a", "b"]
    assert capsys.readouterr().out == ""


def test_bench_needs_its_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code = "import sys; from alrp_triton import cli; assert cli.main(['info', '--json']) == 0;"
    code += "print(any('benchmarks' in name for name in sys.modules), file=sys.stderr)"
    assert start_python(code).stderr.split() == ["False"]
    monkeypatch.setitem(sys.modules, "rich", None)
    assert cli.main(["bench", "--preset", "smoke"]) == 1
    assert "rich not found: pip install 'alrp-triton[bench]'" in capsys.readouterr().err
