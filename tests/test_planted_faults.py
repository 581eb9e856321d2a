"""Faults planted in the kernels, in a copy of the package, are found by the tests that ``make test`` runs compiled."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from dialect import KERNELS

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [pytest.mark.nightly, pytest.mark.skipif(KERNELS, reason="starts such processes itself")]


class Fault(NamedTuple):
    """What to put in the place of what, and the test that is to find it, by what it says."""

    file: str
    right: str
    wrong: str
    says: str
    test: str = "tests/test_edge_cases.py"


PASSES, GRID, TABLES = (f"tests/kernels/test_{name}.py" for name in ("passes", "grid", "tables"))
FAULTS = {
    "mask of pass 1": Fault(
        "kernels/count.py",
        "there = within(begin, lane, level.num_logits, BLOCK)",
        "there = within(begin, lane, level.num_logits + 1, BLOCK)",
        "count_kernel: out of bounds",
    ),
    "mask of pass 2": Fault(
        "kernels/write.py",
        "there = within(begin, lane, level.num_logits, BLOCK)",
        "there = within(begin, lane, level.num_logits + 1, BLOCK)",
        "write_kernel: out of bounds",
    ),
    "mask of what is found": Fault(
        "kernels/find.py", "(slot < num_slots)", "(slot <= num_slots)", "find_kernel: out of bounds", PASSES
    ),
    "mask of labels that neighbours share": Fault(
        "kernels/lanes.py",
        "within(begin, part, level.num_logits // WIDTH, BLOCK // WIDTH)",
        "within(begin, part, level.num_logits // WIDTH + 1, BLOCK // WIDTH)",
        "count_kernel: out of bounds",
        PASSES,
    ),
    "columns that are not there": Fault(
        "kernels/count.py",
        "tl.sum(units, axis=0), mask=inside",
        "tl.sum(units, axis=0)",
        "fold_kernel: out of bounds",
        TABLES,
    ),
    "a barrier left out": Fault(
        # The compiler writes them, and so it would be the one to leave one out.
        "tests/virtual_gpu/driver.py",
        "parse(binary.decode())",
        'parse(binary.decode().replace("bar.sync", "// bar.sync", 1))',
        "race in shared memory",
    ),
    "a race between programs": Fault(
        "kernels/count.py",
        'tl.atomic_add(table + bucket, count, mask=count > 0, sem="relaxed")',
        "tl.store(table + bucket, tl.load(table + bucket) + count, mask=count > 0)",
        "count_kernel: race in global memory",
    ),
    "memory that is not set": Fault(
        "kernels/find.py",
        "found = torch.zeros(2, dtype=torch.int64, device=device)",
        "found = torch.empty(2, dtype=torch.int64, device=device)",
        "AssertionError",
    ),
    "rounds that are not set": Fault(
        "kernels/place.py", "tl.store(table.cells, tl.full([], 0, dtype))", "pass", "test_rounds_do_not_depend", GRID
    ),
    "fixed point": Fault(
        "kernels/count.py",
        "_ONE_OF_TILE = tl.constexpr(50), tl.constexpr(1 << 50)",
        "_ONE_OF_TILE = tl.constexpr(50), tl.constexpr(1 << 49)",
        "AssertionError",
    ),
    "offsets of 32 bits": Fault(
        "kernels/lanes.py",
        "distance = at[0].to(tl.int64) * steps[0]",
        "distance = at[0] * steps[0]",
        "test_offsets_beyond_32_bits",
        PASSES,
    ),
    "a device guard left out": Fault(
        "kernels/launch.py",
        "    with on_device_of(logits):",
        "    if True:",
        "launched outside of a device guard",
    ),
    "a look at a value": Fault(
        "alrp_triton/engine/passes/gpu.py",
        "if debug_checks() or not is_asynchronous(numbers.device):",
        "if numbers.tolist():",
        "Counter({'tolist'",
        "tests/test_waiting.py",
    ),
    "ends of ramps": Fault(
        "kernels/search.py", "in_upper = score >= t3", "in_upper = score > t3", "AssertionError: score", GRID
    ),
    "ends of ramps of groups far apart": Fault(
        "kernels/search.py",
        "reached = score >= tl.load(table.thresholds + (step - 1) + bucket)",
        "reached = score > tl.load(table.thresholds + (step - 1) + bucket)",
        "AssertionError: group",
        GRID,
    ),
    "a crowded cell of a group": Fault(
        "kernels/search.py", "(score >= other) & of_group", "(score >= other)", "AssertionError: group", GRID
    ),
    "a group beyond those with cells": Fault(
        "kernels/search.py",
        "tl.where((floor == floor) & there, bucket, 0)",
        "tl.where(floor == floor, bucket, 0)",
        "AssertionError: group",
        GRID,
    ),
    "thresholds of the next group beside a cell": Fault(
        "kernels/grid.py", "(other == cell) & (not one_cell)", "other == other", "AssertionError: group", GRID
    ),
    "ends of ramps in half precision": Fault(
        "kernels/grid.py",
        "value >= tl.load(thresholds + bucket + (step - 1))",
        "value > tl.load(thresholds + bucket + (step - 1))",
        "test_every_value_in_half_precision",
        GRID,
    ),
    "ends of ramps in shared memory": Fault(
        "kernels/search.py",
        "score >= threshold_at(bucket + step)",
        "score > threshold_at(bucket + step)",
        "AssertionError: counts",
        TABLES,
    ),
    "what a sum carries": Fault(
        "kernels/shared.py", "@carries add.u32 high, high, 1;", "", "test_scattered_scores", TABLES
    ),
    "words that are not cleared": Fault(
        "kernels/count.py", "        clear_words(BLOCK)\n", "", "AssertionError: counts", TABLES
    ),
    "words stored while others add": Fault(
        "kernels/count.py",
        "        tl.debug_barrier()\n        store_words(",
        "        store_words(",
        "race in shared memory",
        TABLES,
    ),
    "a launch whose tables are left out": Fault(
        "kernels/count.py",
        "        if tables.SHARED.value:\n            fold(",
        "        if parts is None:\n            fold(",
        "AssertionError: counts",
        TABLES,
    ),
    "a loop that never runs": Fault(
        "kernels/rank.py", "elif values is not None:", "else:", "CompilationError", "tests/kernels/test_placed.py"
    ),
}


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package and its tests, importable from the folder that they are in."""
    folder = tmp_path_factory.mktemp("copy")
    for name in ("alrp_triton", "kernels", "tests", "benchmarks", "pyproject.toml"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder)
    return folder


def run(copy: Path, tests: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--quick", *tests.split()]
    environment = {**os.environ, "VIRTUAL_GPU": "90", "PYTHONPATH": str(copy)}
    return subprocess.run(command, cwd=copy, env=environment, capture_output=True, encoding="utf-8")


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name: str, copy: Path) -> None:
    fault = FAULTS[name]
    path = copy / fault.file
    source = path.read_text(encoding="utf-8")
    assert fault.right in source
    path.write_text(source.replace(fault.right, fault.wrong), encoding="utf-8")
    try:
        found = run(copy, fault.test)
    finally:
        path.write_text(source, encoding="utf-8")
    assert found.returncode == 1, found.stdout[-3000:] + found.stderr[-3000:]
    assert fault.says in found.stdout, found.stdout[-3000:]


def test_without_a_fault_nothing_is_found(copy: Path) -> None:
    found = run(copy, " ".join(sorted({fault.test for fault in FAULTS.values()})))
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]
