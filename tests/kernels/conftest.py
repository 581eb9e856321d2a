"""These tests run kernels on the CPU, in a process of their own: compiled where VIRTUAL_GPU names a target, in Triton's
interpreter where TRITON_INTERPRET is 1."""

from __future__ import annotations

from pathlib import Path

import pytest
from cases import KERNELS


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    # Elsewhere the same kernels go through the compiler (test_compiled.py).
    return None if KERNELS or collection_path.name == "conftest.py" else True


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels over the positives take few at a time, so that a few are several blocks."""
    from alrp_triton.kernels import errors, knots

    for settings in (knots.SETTINGS, errors.MANY_SUMS):
        monkeypatch.setitem(settings, "block", 16)
        monkeypatch.setitem(settings, "block_p", 8)
