"""``alrp-triton verify`` of the kernels, where they run."""

from __future__ import annotations

import pytest
import torch
from dialect import KERNELS

from alrp_triton.verify import Check, plan

pytestmark = pytest.mark.skipif(not KERNELS, reason="no kernels run in this process")
CHECKS, UNAVAILABLE = plan(["triton", "pairwise"], [torch.device("cpu")], quick=True)


def test_both_backends_are_there() -> None:
    assert not UNAVAILABLE
    assert {check.backend for check in CHECKS} == {"triton", "pairwise"}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: f"{check.case.name}-{check.backend}")
def test_nothing_is_missed(check: Check) -> None:
    row = check.run()
    # What this machine lacks is no miss of the kernels.
    if check.case.missing:
        pytest.skip(check.case.missing)
    assert not row.misses
