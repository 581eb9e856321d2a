"""These tests run kernels on the CPU, in a process of their own: ``TRITON_INTERPRET=1 pytest tests/kernels``."""

from __future__ import annotations

from pathlib import Path

from cases import INTERPRETED


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    # Elsewhere the same kernels go through the compiler (test_compiled.py).
    return None if INTERPRETED or collection_path.name == "conftest.py" else True
