"""The emulator's own tests, against PyTorch and NumPy; they need Triton as a compiler, and a C compiler."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import pytest

from . import Device, NoCompiler, virtual_gpu
from .engine import load_engine

# In the interpreter nothing is compiled.
if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1":
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session", autouse=True)
def _engine() -> None:
    try:
        load_engine()
    except NoCompiler as missing:
        pytest.skip(str(missing))


@pytest.fixture
def gpu(request: pytest.FixtureRequest) -> Iterator[Device]:
    """A virtual GPU, of sm_90 or the parameter's; what runs there has to be sound."""
    with virtual_gpu(Device(getattr(request, "param", 90), count=True)) as device:
        yield device
    # Warps that hold the same part of a tensor write the same.
    problems = {what for what in device.problems if "the same value stored twice in shared" not in what}
    assert not problems, device.examples
