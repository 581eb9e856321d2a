"""These tests run kernels on the CPU, in a process of their own: compiled where VIRTUAL_GPU names a target, in Triton's
interpreter where TRITON_INTERPRET is 1."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from dialect import INTERPRETED, KERNELS


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    # Elsewhere the same kernels go through the compiler (test_compiled.py).
    return None if KERNELS or collection_path.name == "conftest.py" else True


@pytest.fixture(autouse=INTERPRETED)
def _as_on_a_gpu() -> Iterator[None]:
    """As where they are compiled: nobody looks at values, and what is not written shows."""
    from virtual_gpu.harness import as_on_a_gpu, filled_memory

    with as_on_a_gpu(), filled_memory():
        yield


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of logits and of positives, so that a few are several blocks."""
    import drawn

    drawn.small_blocks(monkeypatch)
