"""Faults planted in the kernels, in a copy of the package, are found by the tests that ``make test`` runs compiled."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from cases import KERNELS

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [pytest.mark.nightly, pytest.mark.skipif(KERNELS, reason="starts such processes itself")]


class Fault(NamedTuple):
    """What to put in the place of what, and the test that is to find it, by what it says."""

    file: str
    right: str
    wrong: str
    test: str
    says: str


EDGES, STEPS = "tests/test_edge_cases.py", "tests/kernels/test_steps.py"
FAULTS = {
    "mask of pass 1": Fault(
        "kernels/buckets.py",
        "there = begin + lane < num_logits",
        "there = begin + lane <= num_logits",
        EDGES,
        "bucket_kernel: out of bounds",
    ),
    "mask of pass 2": Fault(
        "kernels/gradient.py",
        "there = begin + lane < num_logits",
        "there = begin + lane <= num_logits",
        EDGES,
        "gradient_kernel: out of bounds",
    ),
    "mask of what is found": Fault(
        "kernels/positives.py", "(slot < num_slots)", "(slot <= num_slots)", "tests/kernels", "out of bounds"
    ),
    "a crowd that is not there": Fault(
        "kernels/buckets.py", "units_of_crowd, mask=count > 0", "units_of_crowd", EDGES, "bucket_kernel: out of bounds"
    ),
    "a barrier left out": Fault(
        # The compiler writes them, and so it would be the one to leave one out.
        "tests/virtual_gpu/driver.py",
        "parse(binary.decode())",
        'parse(binary.decode().replace("bar.sync", "// bar.sync", 1))',
        EDGES,
        "race in shared memory",
    ),
    "a race between programs": Fault(
        "kernels/buckets.py",
        'tl.atomic_add(totals + crowd, count, mask=count > 0, sem="relaxed")',
        "tl.store(totals + crowd, tl.load(totals + crowd) + count, mask=count > 0)",
        EDGES,
        "bucket_kernel: race in global memory",
    ),
    "memory that is not set": Fault(
        "alrp_triton/engine/fused.py",
        "torch.zeros(sum(sizes), dtype=torch.int64, device=device)",
        "torch.empty(sum(sizes), dtype=torch.int64, device=device)",
        EDGES,
        "AssertionError",
    ),
    "fixed point": Fault(
        "kernels/buckets.py", "_ONE_MORE = tl.constexpr(1 << 50)", "_ONE_MORE = tl.constexpr(1 << 49)", EDGES, "Error"
    ),
    "offsets of 32 bits": Fault(
        "kernels/walk.py",
        "at = i0.to(tl.int64) * step0",
        "at = i0 * step0",
        "tests/kernels/test_walk.py",
        "out of bounds",
    ),
    "a device guard left out": Fault(
        "kernels/knots.py",
        "    with on_device_of(tensor):",
        "    if True:",
        EDGES,
        "launched outside of a device guard",
    ),
    "a look at a value": Fault(
        "alrp_triton/engine/fused.py",
        "if debug_checks() or not is_asynchronous(device):",
        "if found.tolist():",
        "tests/test_waiting.py",
        "Counter({'tolist'",
    ),
    "ends of ramps": Fault(
        "kernels/search.py",
        "reached = score >= tl.load(thresholds + bucket + (half - 1))",
        "reached = score > tl.load(thresholds + bucket + (half - 1))",
        "tests/test_golden.py tests/test_alrp.py",
        "relative norm of the error",
    ),
    "a loop that never runs": Fault("kernels/ranks.py", "elif values is not None:", "else:", STEPS, "CompilationError"),
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
