"""Building the engine, and importing the package."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from . import NoCompiler, caches, engine

TESTS = str(Path(__file__).parents[1])


def python(code: str, **variables: str) -> str:
    environment = {**os.environ, "PYTHONPATH": TESTS, **variables}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return ran.stdout


def test_importing_needs_neither_triton_nor_a_compiler(tmp_path):
    code = "import sys, virtual_gpu; print('triton' in sys.modules)"
    assert python(code, PATH="", CC="", VIRTUAL_GPU_CACHE=str(tmp_path / "cache")) == "False\n"
    assert not (tmp_path / "cache").exists()


def test_a_missing_compiler_has_an_error_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("VIRTUAL_GPU_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(NoCompiler, match="no cc or gcc or clang"):
        engine.load_engine.__wrapped__()
    monkeypatch.setenv("CC", "mycc -m64")
    with pytest.raises(NoCompiler, match="no mycc"):
        engine.load_engine.__wrapped__()


def test_who_asks_for_compiled_kernels_is_told_that_there_is_no_compiler(tmp_path):
    variables = {"VIRTUAL_GPU": "90", "VIRTUAL_GPU_CACHE": str(tmp_path), "CC": "/nowhere/cc"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/test_figure1.py"]
    environment = {**os.environ, **variables}
    ran = subprocess.run(command, cwd=Path(TESTS).parent, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == pytest.ExitCode.USAGE_ERROR
    assert (
        "VIRTUAL_GPU=90: the virtual GPU's engine is built by a C compiler, and there is no /nowhere/cc" in ran.stderr
    )


def test_a_compiler_that_fails_is_quoted(tmp_path, monkeypatch):
    monkeypatch.setenv("VIRTUAL_GPU_CACHE", str(tmp_path))
    monkeypatch.setenv("CC", "sh -c 'echo no such flag >&2; exit 1'")
    with pytest.raises(RuntimeError, match="no such flag"):
        engine.load_engine.__wrapped__()
    assert not list(tmp_path.iterdir())


def test_several_builders_do_not_clash(tmp_path, monkeypatch):
    monkeypatch.setenv("CC", 'sh -c \'sleep 0.1; touch $(echo "$*" | sed "s/.*-o //; s/ -lm//")\' --')
    library = tmp_path / "engine.so"
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: engine._build(library, {"grid.c": ""}), range(4)))
    assert [path.name for path in tmp_path.iterdir()] == ["engine.so"]


def test_the_cache_is_a_folder_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.delenv("VIRTUAL_GPU_CACHE", raising=False)
    monkeypatch.setattr(caches.tempfile, "gettempdir", lambda: str(tmp_path))
    folder = caches.cache_folder()
    assert folder == (tmp_path / f"virtual-gpu-{os.getuid()}").resolve()
    assert folder.stat().st_mode & 0o777 == 0o700
    owner = os.getuid()
    monkeypatch.setattr(caches.os, "getuid", lambda: owner + 1)
    (tmp_path / f"virtual-gpu-{owner + 1}").mkdir()
    with pytest.raises(PermissionError, match="VIRTUAL_GPU_CACHE"):
        caches.cache_folder()
