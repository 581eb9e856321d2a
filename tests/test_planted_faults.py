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


PASSES = "tests/kernels/test_passes.py"
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
    "a crowd that is not there": Fault(
        "kernels/count.py",
        "both - (count << _UNIT_BITS), mask=count > 0",
        "both - (count << _UNIT_BITS)",
        "count_kernel: out of bounds",
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
        'tl.atomic_add(totals + bucket, count, mask=count > 0, sem="relaxed")',
        "tl.store(totals + bucket, tl.load(totals + bucket) + count, mask=count > 0)",
        "count_kernel: race in global memory",
    ),
    "memory that is not set": Fault(
        "kernels/find.py",
        "found = torch.zeros(2, dtype=torch.int64, device=device)",
        "found = torch.empty(2, dtype=torch.int64, device=device)",
        "AssertionError",
    ),
    "fixed point": Fault(
        "kernels/count.py", "_ONE_MORE = tl.constexpr(1 << 50)", "_ONE_MORE = tl.constexpr(1 << 49)", "Error"
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
        "kernels/search.py",
        "reached = score >= tl.load(table.thresholds + bucket + (half - 1))",
        "reached = score > tl.load(table.thresholds + bucket + (half - 1))",
        "AssertionError",
        "tests/test_golden.py tests/test_family.py",
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
    (folder / "alrp_triton" / "kernels").symlink_to(folder / "kernels")
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
