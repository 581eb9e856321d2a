"""What tools/hub.py assembles for Hugging Face's ``kernels``."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from dialect.interpreters import start_python, without

from alrp_triton.engine.passes import triton_installed
from tools.hub import BACKENDS, assemble

BESIDE = (Path(__file__).parent / "hub_beside.py").read_text(encoding="utf-8")
# PyTorch warns that there is no NumPy, and Triton's interpreter of what NumPy divides.
QUIET = "import warnings\nwarnings.simplefilter('ignore')\n"
LIBRARY = bool([*importlib.metadata.distributions(name="kernels")])


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    assemble(tmp_path / "hub")
    return tmp_path / "hub"


def test_imports_are_relative_or_of_what_the_library_allows(hub: Path) -> None:
    allowed, found = {*sys.stdlib_module_names, "torch", "triton"}, 0
    for path in (hub / "build" / "torch-cuda").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            assert {name.partition(".")[0] for name in names} <= allowed, path
            found += len(names)
    assert found > 100


def test_names_are_unique_and_follow_from_the_files(hub: Path, tmp_path: Path) -> None:
    assemble(tmp_path / "again")
    metadata = [
        [json.loads((folder / "build" / f"torch-{backend}" / "metadata.json").read_text()) for backend in BACKENDS]
        for folder in (hub, tmp_path / "again")
    ]
    assert metadata[0] == metadata[1]
    names = {each["id"] for each in metadata[0]}
    assert len(names) == len(BACKENDS)
    assert all(name.isidentifier() for name in names)


def printed_beside(hub: Path, *arguments: str, code: str = "", **settings: Any) -> str:
    done = start_python(BESIDE + code, str(hub), *arguments, cwd=hub, **settings)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_stands_beside_the_installed_package_without_numpy(hub: Path) -> None:
    """And without the passes by Numba, which need it, also where Numba is installed."""
    given = QUIET + without("kernels", "numpy") + "import torch"
    assert printed_beside(hub, given=given).startswith("_alrp_triton_cpu_")


@pytest.mark.nightly
@pytest.mark.skipif(not triton_installed(), reason="needs Triton")
def test_the_kernels_stand_beside_those_of_the_installed_package(hub: Path) -> None:
    """In Triton's interpreter."""
    printed = printed_beside(hub, "triton", given=QUIET + without("kernels") + "import torch", TRITON_INTERPRET="1")
    assert printed.startswith("_alrp_triton_cpu_")


@pytest.mark.skipif(not LIBRARY, reason="needs Hugging Face's kernels")
def test_the_library_loads_it(hub: Path) -> None:
    code = """
from kernels._rust import Build, Digest, DigestAlgorithm, Metadata
hub = Path(sys.argv[1])
assert len(Build.open(hub).general.backends) == len(list(hub.glob("build/*/metadata.json")))
for metadata in hub.glob("build/*/metadata.json"):
    Metadata.read_from_file(metadata).digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, metadata.parent))
"""
    assert printed_beside(hub, code=code).startswith("_alrp_triton_")
