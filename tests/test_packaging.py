"""What gets built and what it installs, checked on real artefacts in separate processes."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from dialect.interpreters import run_python, without
from packaging.requirements import Requirement

import alrp_triton

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = (
    *("numba", "llvmlite", "torchvision", "rich", "matplotlib"),
    *("pycocotools", "torchmetrics", "sklearn", "pytest", "hypothesis"),
)
NOT_SOURCE = ("build", "dist", "demo-output", "__pycache__")
# The fixtures are then made once, also where several processes share the tests.
pytestmark = pytest.mark.xdist_group("packaging")


def run_tool(*arguments: str | Path, cwd: Path) -> None:
    command = [sys.executable, "-m", *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def not_source(folder: str, names: list[str]) -> set[str]:
    """What is no source: hidden or generated folders, and virtual environments of any name."""
    return {
        name
        for name in names
        if name.startswith(".")
        or name in NOT_SOURCE
        or name.endswith((".egg-info", ".pyc", ".pt"))
        or (Path(folder) / name / "pyvenv.cfg").exists()
    }


@pytest.fixture(scope="session")
def artefacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A copy of the ``source``, its ``sdist``, the ``wheel`` by way of that, the ``direct`` wheel; built offline."""
    root = tmp_path_factory.mktemp("build")
    source = root / "source"
    # In a copy, so that nothing left over from another build gets in, and nothing is left behind.
    shutil.copytree(ROOT, source, ignore=not_source)
    run_tool("build", "--no-isolation", "--outdir", root / "out", source, cwd=root)
    run_tool("build", "--no-isolation", "--wheel", "--outdir", root / "direct", source, cwd=root)
    (sdist,) = (root / "out").glob("*.tar.gz")
    (wheel,) = (root / "out").glob("*.whl")
    (direct,) = (root / "direct").glob("*.whl")
    return {"source": source, "sdist": sdist, "wheel": wheel, "direct": direct}


@pytest.fixture(scope="session")
def installed(artefacts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the wheel is installed into."""
    root = tmp_path_factory.mktemp("installed")
    site = root / "site"
    run_tool("pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site, artefacts["wheel"], cwd=root)
    return site


def package_files(source: Path) -> set[str]:
    """The files that belong into a wheel, by the names that they have when installed."""
    files = set()
    # Of benchmarks the modules alone.
    parts = (
        ("alrp_triton", "", "**/*"),
        ("kernels", "/kernels", "**/*"),
        ("benchmarks", "/benchmarks", "*.py"),
        ("benchmarks/training", "/benchmarks/training", "*.py"),
    )
    for folder, subpackage, pattern in parts:
        package = f"alrp_triton{subpackage}"
        for path in (source / folder).glob(pattern):
            if path.is_file():
                files.add(f"{package}/{path.relative_to(source / folder).as_posix()}")
    return files


def test_wheel_holds_the_package_and_nothing_else(artefacts: dict[str, Path]) -> None:
    with zipfile.ZipFile(artefacts["wheel"]) as archive:
        names = set(archive.namelist())
    info = {name for name in names if name.split("/")[0].endswith(".dist-info")}
    assert names - info == package_files(artefacts["source"])
    assert {f"alrp_triton/{name}" for name in ("kernels/__init__.py", "benchmarks/run.py", "py.typed")} <= names
    assert {name.split("/")[0] for name in names - info} == {"alrp_triton"}  # no top-level "kernels", "benchmarks"
    assert any(name.endswith("/licenses/LICENSE") for name in info)
    assert artefacts["wheel"].stat().st_size < 1_000_000


def test_wheel_is_the_same_by_way_of_the_sdist(artefacts: dict[str, Path]) -> None:
    contents = []
    for build in ("wheel", "direct"):
        with zipfile.ZipFile(artefacts[build]) as archive:
            contents.append({name: archive.read(name) for name in archive.namelist()})
    assert contents[0] == contents[1]


def test_sdist_holds_what_development_needs(artefacts: dict[str, Path]) -> None:
    with tarfile.open(artefacts["sdist"]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    expected = {"Makefile", "mkdocs.yml", "LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "pyproject.toml"}
    source = artefacts["source"]
    for folder in ("kernels", "tests", "benchmarks", "examples", "docs", "requirements", "tools"):
        expected |= {path.relative_to(source).as_posix() for path in (source / folder).rglob("*") if path.is_file()}
    assert expected <= names
    assert not [name for name in names if name.endswith(".pyc")]


def test_metadata(installed: Path) -> None:
    (distribution,) = importlib.metadata.distributions(path=[str(installed)])
    metadata = distribution.metadata
    assert metadata["Name"] == "alrp-triton"
    assert metadata["Version"] == alrp_triton.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    extras = {"torchvision", "mmdet", "transformers", "metrics", "cli", "numba", "bench", "demo", "test", "frameworks"}
    extras |= {"docs", "compare", "calibration", "monai", "ultralytics", "rfdetr"}
    assert set(metadata.get_all("Provides-Extra") or []) == extras
    requirements = [Requirement(line) for line in distribution.requires or []]
    # An extra is a marker that holds for that extra alone; triton's marker holds on Linux.
    linux = {"sys_platform": "linux", "extra": ""}
    core = [r for r in requirements if r.marker is None or r.marker.evaluate(linux)]
    assert sorted(r.name for r in core) == ["numpy", "torch", "triton"]
    mac = {"sys_platform": "darwin", "extra": ""}
    assert sorted(r.name for r in requirements if r.marker is None or r.marker.evaluate(mac)) == ["numpy", "torch"]
    (script,) = distribution.entry_points
    assert (script.group, script.name, script.value) == ("console_scripts", "alrp-triton", "alrp_triton.cli:main")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton, as the kernels do")
def test_every_module_imports_with_the_core_dependencies(
    artefacts: dict[str, Path], installed: Path, tmp_path: Path
) -> None:
    """Adapters, the numba backend and what trains detectors apart, which need what they are for: nothing needs an extra
    before it is used."""
    code = """
import importlib, json, pkgutil
import alrp_triton
import alrp_triton.benchmarks
import alrp_triton.kernels
modules = [alrp_triton]
for module in pkgutil.walk_packages(alrp_triton.__path__, "alrp_triton."):
    adapters = ("integrations.", "engine.passes.numba", "metrics.matching", "metrics.torchmetrics")
    apart = module.name.startswith(tuple(f"alrp_triton.{name}" for name in (*adapters, "benchmarks.training.")))
    if not apart and not module.name.endswith(".__main__"):
        modules.append(importlib.import_module(module.name))
print(json.dumps([module.__file__ for module in modules]))
"""
    files = json.loads(run_python(without(*EXTRAS) + code, cwd=tmp_path, path=[installed]))
    adapters = re.compile(
        r"alrp_triton/integrations/(?!__init__)|alrp_triton/metrics/(matching|torchmetrics)\.py"
        r"|alrp_triton/engine/passes/numba|alrp_triton/benchmarks/training/(?!__init__)|.*/__main__\.py"
    )
    expected = {
        name for name in package_files(artefacts["source"]) if name.endswith(".py") and not adapters.match(name)
    }
    assert set(files) == {str(installed / name) for name in expected}


@pytest.mark.parametrize("cwd", ["elsewhere", "checkout"])
def test_editable_install_imports_the_checkout(tmp_path: Path, cwd: str) -> None:
    # All by that name, since the checkout's own egg-info comes first where the checkout is on the path.
    found = importlib.metadata.distributions(name="alrp-triton")
    urls = [json.loads(distribution.read_text("direct_url.json") or "{}") for distribution in found]
    if not any(url.get("url") == ROOT.as_uri() and url.get("dir_info", {}).get("editable") for url in urls):
        pytest.skip("no editable install of this checkout in this environment")
    code = "import alrp_triton.kernels as kernels; print(kernels.__name__, kernels.__file__)"
    output = run_python(code, cwd=tmp_path if cwd == "elsewhere" else ROOT)
    assert output.split() == ["alrp_triton.kernels", str(ROOT / "kernels" / "__init__.py")]


def test_a_checkout_is_whole_without_an_installation() -> None:
    code = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
import alrp_triton.benchmarks as benchmarks, alrp_triton.kernels as kernels
print(kernels.__file__, benchmarks.__file__)
"""
    output = run_python(code, cwd=ROOT)
    assert output.split() == [str(ROOT / name / "__init__.py") for name in ("kernels", "benchmarks")]


def test_kernels_folder_is_no_package_of_its_own() -> None:
    code = "try:\n    import kernels\nexcept ImportError as error:\n    print(error)"
    output = run_python(code, cwd=ROOT)
    assert "alrp_triton.kernels" in output
    assert "'kernels'" in output


def test_tests_of_a_group_share_a_worker(request: pytest.FixtureRequest) -> None:
    """pytest-xdist sees groups by an attribute that is not public in pytest; see requirements/constraints.txt."""
    if not request.config.getoption("loadgroup", False):
        pytest.skip("tests are not shared out by groups")
    assert request.node.nodeid.endswith("@packaging")


def git(*arguments: str) -> str:
    # "safe.directory" lets git read a checkout that belongs to another user, as in containers.
    command = ["git", "-c", "safe.directory=*", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_changelog_and_citation_tell_of_this_version() -> None:
    for name, line in (("CHANGELOG.md", r"^## \[(\S+)\]"), ("CITATION.cff", r"^version: (\S+)$")):
        versions = re.findall(line, (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE)
        assert versions[:1] == [alrp_triton.__version__], name


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="asks git for tags")
def test_a_tag_names_this_version_and_the_changelog_its_day() -> None:
    tags = git("tag", "--points-at", "HEAD", "--list", "v*").split()
    if not tags:
        pytest.skip("this commit is no release")
    version = alrp_triton.__version__
    assert tags == [f"v{version}"]
    day = rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$"
    assert re.search(day, (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="asks git which files are tracked")
def test_no_file_names_a_developer_s_folders() -> None:
    tracked = git("ls-files", "-z").split("\0")
    # An absolute path, not a part of a longer one or of an address.
    path = re.compile(r"(?<![\w.~-])/(?:home|root|work|Users)/|\b[A-Z]:\\Users\\")
    found = []
    for name in filter(None, tracked):
        try:
            text = (ROOT / name).read_text(encoding="utf-8")
        except (UnicodeDecodeError, FileNotFoundError):  # not a text file, or deleted and not yet committed
            continue
        found += [f"{name}:{number}: {line}" for number, line in enumerate(text.splitlines(), 1) if path.search(line)]
    assert not found
