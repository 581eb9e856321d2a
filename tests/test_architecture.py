"""The rules of the house, by reading the imports: what may know of what."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from alrp_triton.engine.passes import BACKENDS

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "alrp_triton"
# From the top down; whatever is in none of them stands above all. Within the engine there is no circle.
LAYERS = ("integrations", "losses", "boxes", "engine", "kernels")
KERNELS = LAYERS.index("kernels")


class Import(NamedTuple):
    """Of a module of ours, or of somebody else's top-level package."""

    module: str
    name: str
    at_once: bool
    """Whether it is done when the module itself is imported, and not only read by type checkers."""


def sources() -> dict[str, Path]:
    """All modules of the package by their names in it, the kernels among them."""
    found = {}
    for top, prefix in ((PACKAGE, ""), (ROOT / "kernels", "kernels.")):
        for path in top.rglob("*.py"):
            parts = path.relative_to(top).with_suffix("").parts
            found[(prefix + ".".join(parts)).removesuffix("__init__").strip(".")] = path
    return found


SOURCES = sources()


def imports_of(name: str) -> Iterator[Import]:
    package = name if SOURCES[name].stem == "__init__" else name.rpartition(".")[0]

    def visit(node: ast.AST, at_once: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (Import("", alias.name.partition(".")[0], at_once) for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and not child.level:
                yield Import("", (child.module or "").partition(".")[0], at_once)
            elif isinstance(child, ast.ImportFrom):
                base = package.split(".")[: len(package.split(".")) - child.level + 1] if package else []
                module = ".".join([*base, *(child.module or "").split(".")]).strip(".")
                for alias in child.names:
                    inner = f"{module}.{alias.name}".strip(".")
                    yield Import(inner if inner in SOURCES else module, alias.name, at_once)
            inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            typed = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            yield from visit(child, at_once and not inside and not typed)

    yield from visit(ast.parse(SOURCES[name].read_text(encoding="utf-8")), True)


OURS = {name: [found for found in imports_of(name) if found.module or not found.name] for name in SOURCES}


def layer(name: str) -> int:
    fitting = [i for i, prefix in enumerate(LAYERS) if name == prefix or name.startswith(f"{prefix}.")]
    return max(fitting, default=-1)


def test_imports_are_read() -> None:
    assert len(SOURCES) > 70
    assert {found.module for found in OURS["losses.ap"]} >= {"reference", "engine", "losses.framework"}
    assert any(found.module == "engine.passes.gpu" and not found.at_once for found in OURS["engine.operators"])


def test_imports_point_downwards() -> None:
    for name, found in OURS.items():
        for one in found:
            upwards = layer(one.module) < layer(name) and layer(name) >= 0
            # What stands in no layer, and imports none, serves all.
            common = layer(one.module) < 0 and all(layer(further.module) < 0 for further in OURS.get(one.module, ()))
            # Adapters stand on what users import.
            if upwards and not common and layer(name) > 0:
                pytest.fail(f"{name} imports {one.module}")


def test_one_module_imports_the_kernels() -> None:
    users = {(name, found.module) for name in OURS for found in OURS[name] if layer(found.module) == KERNELS}
    outside = {(name, module) for name, module in users if layer(name) != KERNELS}
    # What a launch is set to can be shown without Triton.
    assert {name for name, _ in outside} == {"engine.passes.gpu", "info"}
    assert {module for name, module in outside if name == "info"} == {"kernels.settings"}


def test_kernels_and_reference_know_nothing_above_them() -> None:
    allowed = {"torch", "triton", "__future__", *sys.stdlib_module_names}
    for name in (*(name for name in SOURCES if layer(name) == KERNELS), "reference"):
        for found in imports_of(name):
            if found.module:
                assert name != "reference"
                assert layer(found.module) == KERNELS
            else:
                assert found.name in allowed, f"{name} imports {found.name}"


def test_no_circle() -> None:
    """Of all imports, those within functions among them."""
    seen: dict[str, bool] = {}

    def visit(name: str, path: tuple[str, ...]) -> None:
        if seen.get(name) is False:
            pytest.fail(" -> ".join([*path[path.index(name) :], name]))
        if name not in seen:
            seen[name] = False
            for found in OURS[name]:
                if found.module != name and found.module in SOURCES:
                    visit(found.module, (*path, name))
            seen[name] = True

    for name in SOURCES:
        visit(name, ())


def test_nothing_of_ours_is_imported_by_a_string() -> None:
    """Adapters find modules of their frameworks so."""
    for name, path in SOURCES.items():
        if layer(name) == 0:
            continue
        text = path.read_text(encoding="utf-8")
        assert "import_module(" not in text, name
        assert "__import__(" not in text, name


def test_the_name_of_a_backend_is_compared_in_one_file() -> None:
    for name, path in SOURCES.items():
        if name == "engine.passes":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare):
                constants = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant)]
                assert not set(constants) & set(BACKENDS), f"{name}, line {node.lineno}"


def test_kernels_take_at_most_a_dozen_parameters() -> None:
    counted = {}
    for name in SOURCES:
        if layer(name) == KERNELS:
            for node in ast.walk(ast.parse(SOURCES[name].read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                    counted[node.name] = len(node.args.args)
    assert len(counted) > 8
    assert max(counted.values()) <= 12, counted
