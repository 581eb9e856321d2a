"""The command ``alrp-triton doctor``: what it says of a sound installation, and of each fault."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dialect.interpreters import start_python, without

import alrp_triton
from alrp_triton import cli, doctor, doctor_devices, info, verify
from alrp_triton.doctor import Fault
from alrp_triton.engine.passes import numba_installed, triton_installed

pytestmark = pytest.mark.usefixtures("command_environment", "sound")
needs_triton = pytest.mark.skipif(not triton_installed(), reason="needs Triton")
needs_numba = pytest.mark.skipif(not numba_installed(), reason="needs Numba")
GPU = "NVIDIA H100, 570.86.15"


def installed(version: str = alrp_triton.__version__, folder: Path | None = None) -> Any:
    """What pip knows of the package; with a folder it is editable."""
    direct = {} if folder is None else {"url": folder.as_uri(), "dir_info": {"editable": True}}
    return SimpleNamespace(version=version, read_text=lambda name: json.dumps(direct))


@pytest.fixture
def sound(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The package is installed once, and all folders can be written, whatever this environment is like."""
    copies = {folder: Path(folder, "alrp_triton").resolve() for folder in sys.path}
    own = Path(alrp_triton.__file__).resolve().parent
    monkeypatch.setattr(sys, "path", [folder for folder, copy in copies.items() if copy == own or not copy.is_dir()])
    monkeypatch.setattr(doctor, "distributions", lambda **_: [installed()])
    monkeypatch.setattr(doctor_devices, "gpus_of_driver", list)
    monkeypatch.setattr(doctor, "SECONDS", 0.5)
    for name in ("NUMBA_DISABLE_JIT", "CC", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine has a GPU, as far as the command looks without using it."""
    found = {"name": "NVIDIA H100", "architecture": "sm_90", "memory": 80 * 2**30}
    collected = info.collect()
    monkeypatch.setattr(info, "collect", lambda: collected)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(info, "devices", lambda: [torch.device("cuda", 0)])
    monkeypatch.setattr(info, "describe", lambda device: found)
    monkeypatch.setattr(doctor_devices, "warm_up", lambda *args, **settings: None)


def faults(look: Callable[[], doctor.Findings]) -> list[Fault]:
    return [finding for finding in look() if isinstance(finding, Fault)]


def only(look: Callable[[], doctor.Findings]) -> str:
    """The one fault that is found, with what to do."""
    (fault,) = faults(look)
    return f"{fault.what} -> {fault.mend}"


def lines(look: Callable[[], doctor.Findings]) -> str:
    return "\n".join(finding for finding in look() if isinstance(finding, str))


@pytest.mark.skipif(torch.cuda.is_available(), reason="compiles and runs there")
def test_a_sound_installation(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    output = capsys.readouterr().out
    assert output.endswith("\nNothing is wrong.\n")
    for title in ("Versions", "Package", "Devices", "Kernels", "Results", "Caches", "Environment"):
        assert f"\n{title}\n" in f"\n{output}"
    expected = (
        alrp_triton.__version__,
        torch.__version__,
        "backend='auto' takes",
        "torch on cpu:",
        "nothing to compile",
    )
    for words in expected if triton_installed() else expected[:-1]:
        assert words in output
    assert "WRONG" not in output


def test_a_fault_makes_the_status_1(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> doctor.Findings:
        yield "before"
        raise LookupError("nobody thought of it\nmore")

    monkeypatch.setattr(doctor, "_LOOKS", {"One": broken, "Two": lambda: iter([Fault("this", "that")])})
    assert cli.main(["doctor"]) == 1
    unforeseen = "this could not be examined: LookupError: nobody thought of it"
    assert capsys.readouterr().out == (
        f"One\n  before\n  WRONG: {unforeseen}\nTwo\n  WRONG: this\n\nWhat to do:\n"
        f"  1. {unforeseen}\n     please report it, with this output\n  2. this\n     that\n"
    )


def test_the_user_is_not_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/people/anne")
    monkeypatch.setenv("USERPROFILE", "/people/anne")
    monkeypatch.setenv("LOGNAME", "anne")
    said = ["/people/anne/.triton", "/data/anne/cache", Fault("/scratch/anne", "joanne/anne.txt")]
    monkeypatch.setattr(doctor, "_LOOKS", {"": lambda: iter(said)})
    ((_, findings),) = doctor.examine()
    assert list(findings) == ["~/.triton", "/data/<user>/cache", Fault("/scratch/<user>", "joanne/anne.txt")]
    monkeypatch.setenv("HOME", "/")
    ((_, findings),) = doctor.examine()
    assert next(findings) == "/people/<user>/.triton"


def test_old_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    required = ["torch>=2.9", 'triton>=3.5; sys_platform == "linux"', 'pytest<9.2,>=8; extra == "test"', "pip<9"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: required)
    old = {"torch": "2.8.1+cu128", "triton": "3.10.0", "numba": None, "pytest": "9"}
    monkeypatch.setattr(info, "versions", lambda: dict(old))
    assert only(doctor._versions) == "torch: expected 2.9 or later, got 2.8.1+cu128 -> pip install 'torch>=2.9'"
    assert doctor._oldest() == {"torch": (2, 9), "triton": (3, 5), "pytest": (8,)}


def test_the_driver_and_frameworks_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_devices, "gpus_of_driver", lambda: [GPU, GPU])
    monkeypatch.setattr(doctor, "_version", lambda name: {"monai": "1.5.0", "transformers": "4.60.0"}.get(name))
    found = lines(doctor._versions)
    assert "nvidia driver 570.86.15\n" in found
    assert "monai 1.5.0, transformers 4.60.0" in found


def test_two_copies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    copy = tmp_path / "alrp_triton"
    copy.mkdir()
    (copy / "__init__.py").touch()
    own = Path(alrp_triton.__file__).parent.parent
    monkeypatch.setattr(sys, "path", [str(own), "", str(tmp_path)])
    monkeypatch.chdir(own)
    said = only(doctor._package)
    assert said.startswith(f"another copy of the package is on the path, and may be taken instead: {copy} -> keep one")
    monkeypatch.setattr(sys, "path", [str(own)])
    assert not faults(doctor._package)
    monkeypatch.setattr(doctor, "distributions", lambda **_: [installed(folder=tmp_path)])
    assert str(copy) in only(doctor._package)


def test_not_installed_or_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "distributions", lambda **_: [])
    assert "not installed, but imported from a folder -> pip install ." in only(doctor._package)
    monkeypatch.setattr(doctor, "distributions", lambda **_: [installed("0.0.9")])
    assert f"pip knows version 0.0.9, and Python imports {alrp_triton.__version__} -> pip" in only(doctor._package)


def test_without_kernels() -> None:
    """As from a checkout that is not installed, where folders have other names than in the package."""
    code = (
        without("triton", "numba")
        + """
import importlib.machinery, sys
inner = importlib.machinery.PathFinder.find_spec
class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        return None if name == "alrp_triton.kernels" else inner(name, path, target)
sys.meta_path = [each for each in sys.meta_path if "PathFinder" not in str(each) and "editable" not in str(each)]
sys.meta_path.append(Finder)
from alrp_triton import cli, doctor
doctor.SECONDS = 0
sys.exit(cli.main(["doctor"]))
"""
    )
    done = start_python(code, path=[Path(alrp_triton.__file__).parent.parent])
    assert done.returncode == 1, done.stderr
    assert "WRONG: alrp_triton.kernels is missing" in done.stdout
    assert "could not be examined" not in done.stdout
    assert "auto' takes torch: numba is not installed; pip install 'alrp-triton[numba]'" in done.stdout


def test_gpus_that_pytorch_does_not_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor_devices, "gpus_of_driver", lambda: [GPU])
    found = f"PyTorch finds no GPU, but the driver has {GPU}: "
    monkeypatch.setattr(torch.version, "cuda", None)
    assert only(doctor_devices.devices).startswith(f"{found}this PyTorch is built without CUDA -> install PyTorch's")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert only(doctor_devices.devices).startswith(f"{found}it may be too old for CUDA 13.0 -> update the driver")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert only(doctor_devices.devices) == f"{found}CUDA_VISIBLE_DEVICES hides it -> unset CUDA_VISIBLE_DEVICES"


def test_the_interpreter_is_for_cpus(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    if not torch.cuda.is_available():
        assert not faults(doctor_devices.devices)
        assert "TRITON_INTERPRET=1: triton and pairwise run in" in lines(doctor_devices.devices)
    request.getfixturevalue("gpu")
    assert only(doctor_devices.devices).endswith("-> unset TRITON_INTERPRET")


def test_what_auto_takes(monkeypatch: pytest.MonkeyPatch, gpu: None) -> None:
    monkeypatch.setattr("alrp_triton.engine.passes.triton_installed", lambda: True)
    said = lines(doctor_devices.devices)
    assert "cuda:0: NVIDIA H100, sm_90, 80.0 GiB\n" in said
    assert "auto' takes triton: it is installed, and the fastest here\n" in said
    for module in ("engine.passes", "doctor_devices"):
        monkeypatch.setattr(f"alrp_triton.{module}.triton_installed", lambda: False)
    assert "auto' takes torch: Triton is not installed\n" in lines(doctor_devices.devices)
    assert only(doctor_devices.devices) == (
        "cuda:0 runs without kernels, because Triton is not installed -> pip install triton"
    )


def test_a_device_without_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("meta"))
    assert "meta: backend='auto' takes torch" in lines(doctor_devices.devices)

    def refuse(*size: int, **settings: Any) -> None:
        raise TypeError("no float64")

    monkeypatch.setattr(torch, "zeros", refuse)
    assert "meta: has no float64" in lines(doctor_devices.devices)


@needs_triton
def test_kernels_that_do_not_run(monkeypatch: pytest.MonkeyPatch, gpu: None) -> None:
    monkeypatch.setattr(doctor_devices, "_launcher", lambda needed: iter(()))
    assert "those of ALRPLoss compile and run on cuda:0, in" in lines(doctor_devices.kernels)

    def broken(*args: Any, **settings: Any) -> None:
        raise RuntimeError("no kernel image is available\nfor execution")

    monkeypatch.setattr(doctor_devices, "warm_up", broken)
    said = only(doctor_devices.kernels)
    assert said.startswith(
        "the kernels do not compile and run on cuda:0: RuntimeError: no kernel image is available ->"
    )
    monkeypatch.delattr("alrp_triton.engine.passes.gpu", raising=False)
    monkeypatch.setitem(sys.modules, "alrp_triton.engine.passes.gpu", None)
    assert only(doctor_devices.kernels).startswith("the kernels cannot be imported: ModuleNotFoundError: ")


@needs_triton
@pytest.mark.skipif(sys.platform == "win32", reason="Triton brings a compiler there")
def test_no_compiler(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(doctor_devices.sysconfig, "get_paths", lambda: {"include": str(Path(__file__).parent)})
    if not torch.cuda.is_available():
        assert not faults(doctor_devices.kernels)
        assert "on a GPU needed by Triton's launcher: a C compiler" in lines(doctor_devices.kernels)
    request.getfixturevalue("gpu")
    said = [f"{fault.what} -> {fault.mend}" for fault in faults(doctor_devices.kernels)]
    assert said[0].startswith("Triton's launcher needs a C compiler, which is not found -> install them: apt-get")
    assert said[1].startswith("Triton's launcher needs Python's headers")


def test_wrong_results_and_time(monkeypatch: pytest.MonkeyPatch) -> None:
    row = verify.Row("middle", "torch", "cpu", *[2e-8] * 6, True, 1.5)
    rows = [row, row._replace(case="ties", worst=1e-4), row._replace(backend="numba")]
    checks = [SimpleNamespace(backend=one.backend, device="cpu", run=lambda one=one: one) for one in rows]
    monkeypatch.setattr(verify, "plan", lambda *args, **settings: (checks, []))
    assert only(doctor._results).startswith(
        "torch on cpu gives wrong results, such as in ties: worst 1.0e-04 (allowed 1e-06) -> take another backend"
    )
    assert "torch on cpu: 1 of 2 checks against float64 passed\nnumba on cpu: 1 of 1" in lines(doctor._results)
    times = iter([0.0, 0.1, 0.2, 9.0])
    monkeypatch.setattr(doctor.time, "perf_counter", lambda: next(times))
    # One of each backend first.
    said = "torch on cpu: 1 of 1 checks against float64 passed; 1 left out after 0 s\nnumba on cpu: 1 of 1"
    assert said in lines(doctor._results)


def test_folders_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gpu: None) -> None:
    folder = tmp_path / "folder"
    assert not faults(lambda: doctor_devices._cache("a", folder, "FOLDER", True))
    assert not list(tmp_path.iterdir())

    def refuse(*args: Any, **settings: Any) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(doctor_devices.tempfile, "TemporaryFile", refuse)
    said = only(lambda: doctor_devices._cache("a", folder, "FOLDER", True))
    assert said == f"a: {folder} cannot be written -> set FOLDER to a folder that you can write"
    assert not faults(lambda: doctor_devices._cache("a", folder, "FOLDER", False))
    assert lines(lambda: doctor_devices._cache("a", folder, "FOLDER", False)).endswith("not there yet, not writable")
    names = " ".join(fault.mend for fault in faults(doctor_devices.caches))
    assert "ALRP_TRITON_CACHE" in names
    assert ("TRITON_CACHE_DIR" in names) == triton_installed()


@needs_numba
def test_numba_that_compiles_again_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    from alrp_triton.engine.passes import numba_loops

    monkeypatch.setattr(numba_loops, "count", SimpleNamespace(stats=SimpleNamespace(cache_path=None)))
    said = only(doctor_devices.caches)
    assert said.startswith("Numba compiles again in each process")
    assert said.endswith("a folder that you can write")
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")
    assert only(doctor_devices.caches).endswith("-> unset NUMBA_DISABLE_JIT")
    monkeypatch.delenv("NUMBA_DISABLE_JIT")
    monkeypatch.delattr("alrp_triton.engine.passes.numba_loops")
    monkeypatch.setitem(sys.modules, "alrp_triton.engine.passes.numba_loops", None)
    assert only(doctor_devices.caches).startswith("Numba cannot be imported: ")


def test_launch_settings(tmp_path: Path) -> None:
    from alrp_triton.kernels import settings

    file = settings.cache_file()
    file.parent.mkdir(parents=True)
    file.write_text("{")
    assert only(doctor_devices.caches).startswith(f"{file} has no settings for this version -> delete it")
    file.write_text(json.dumps({"count|Some GPU|torch.float32|2^20": settings.CANDIDATES["count"][1]}))
    assert "\nlaunch settings (1): " in lines(doctor_devices.caches)
    assert not faults(doctor_devices.caches)


def test_the_driver_s_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!{sys.executable}\nprint({GPU!r})\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    if sys.platform != "win32":
        assert doctor_devices.gpus_of_driver() == [GPU]
    program.write_text(f"#!{sys.executable}\nprint('failed'); raise SystemExit(9)\n")
    assert doctor_devices.gpus_of_driver() == []
    monkeypatch.setenv("PATH", "")
    assert doctor_devices.gpus_of_driver() == []


def test_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert "CUDA_VISIBLE_DEVICES=1" in lines(doctor._environment)
