"""The virtual GPU, on which benchmarks count; it lies among the tests of a checkout and is not installed."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from virtual_gpu import Device as Device  # type: ignore[import-not-found]
    from virtual_gpu import Result as Result
else:
    # Of the checkout, which is found when it is needed.
    Device = Result = Any

TESTS = Path(__file__).parent.parent / "tests"
TARGETS = {"sm_80": 80, "sm_90": 90, "sm_100": 100}
"""What it is compiled for here."""


def find() -> None:
    """Make ``virtual_gpu`` a module that can be imported.

    Raises:
        SystemExit: outside of a checkout.
    """
    if not (TESTS / "virtual_gpu").is_dir():
        raise SystemExit(
            f"this needs a checkout of the repository: the virtual GPU is in its folder tests, not in {TESTS}"
        )
    if str(TESTS) not in sys.path:
        sys.path.append(str(TESTS))


@contextlib.contextmanager
def counting_gpu(target: int) -> Iterator[Device]:
    """Within, the package's kernels run for a target, one CTA after the other, and every launch leaves a ``Result``."""
    find()
    from virtual_gpu import Device
    from virtual_gpu.harness import package_on  # type: ignore[import-not-found]

    device = Device(target, check=False, count=True, noise=False, shuffle=False, window=1, quantum=0)
    with package_on(device):
        yield device
