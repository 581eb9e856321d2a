"""What .github promises: that its workflows run targets of the Makefile, with the versions that pyproject.toml says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / ".github").rglob("*.yml"))
yaml = pytest.importorskip("yaml")
if not FILES:
    pytest.skip("a source distribution has no .github", allow_module_level=True)


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def runs() -> Iterator[tuple[str, str]]:
    """Each command of a workflow, with the values of each row of its matrix, and the name of the file."""
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        for job in read(path)["jobs"].values():
            for row in job.get("strategy", {}).get("matrix", {}).get("include", [{}]):
                for step in job["steps"]:
                    command = step.get("run", "")
                    for key, value in row.items():
                        command = command.replace(f"${{{{ matrix.{key} }}}}", value)
                    yield path.name, command


def test_commands_are_targets_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets, variables = (set(re.findall(name, makefile, re.MULTILINE)) for name in (r"^([a-z-]+):", r"^([A-Z_]+) \?="))
    found = set()
    for name, command in runs():
        if command:
            tool, *words = re.sub(r"\$\{\{.*?\}\}", "", command).split()
            assert tool == "make", f"{name}: {command}"
            assert {word for word in words if "=" not in word} <= targets, f"{name}: {command}"
            assert {word.partition("=")[0] for word in words if "=" in word} <= variables, f"{name}: {command}"
            found |= {*words}
    assert {"test", "release", "nightly", "verify"} <= found


def test_the_matrix_has_the_oldest_supported_versions() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    oldest = (ROOT / "requirements" / "oldest.txt").read_text(encoding="utf-8")
    (python,) = re.findall(r'^requires-python = ">=(.*)"', project, re.MULTILINE)
    rows = read(ROOT / ".github" / "workflows" / "ci.yml")["jobs"]["make"]["strategy"]["matrix"]["include"]
    tested = [row for row in rows if {"test", "test-package"} & {*row["targets"].split()}]
    pythons = {row["constraints"]: row["python"] for row in tested}
    assert pythons["requirements/oldest.txt"] == python
    assert "" in pythons
    policy = (ROOT / "docs" / "policy.md").read_text(encoding="utf-8")
    assert f"| Python | {python} and later | {', '.join(sorted(pythons.values()))} |" in policy
    for name in ("torch", "torchvision"):
        version = re.findall(rf'"{name}>=([\d.]+)"', project)[0]
        assert re.search(rf"^{name}=={re.escape(version)}\.", oldest, re.MULTILINE)
        assert name != "torch" or f"| PyTorch | {version} and later" in policy


def test_workflows_may_only_read_and_end() -> None:
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        workflow = read(path)
        assert workflow["permissions"] == {"contents": "read"}
        assert "concurrency" in workflow
        for name, job in workflow["jobs"].items():
            assert job["timeout-minutes"] > 0
            assert job.get("permissions", {}) == ({"id-token": "write"} if name == "publish" else {})
            for step in job["steps"]:
                assert "uses" not in step or re.search(r"@(v\d+|release/v\d+)$", step["uses"])


def test_the_other_files_parse() -> None:
    assert all(read(path) for path in (*FILES, ROOT / ".pre-commit-config.yaml"))
