"""Small forward + backward benchmarks for watching changes: ``pytest benchmarks/bench_alrp.py``.

The loop runs with a tenth of the positives; its time is proportional to their number.
"""

from __future__ import annotations

from typing import Any

import pytest

from .cpu import run_focal, run_loop, run_ours
from .workloads import NUM_CLASSES, REGIMES, make_workload

NUM_LOGITS, NUM_POSITIVES = 6_138 * NUM_CLASSES, 500


@pytest.mark.parametrize("contender", ["ours", "ours_class_labels", "focal", "loop_tenth_of_positives"])
@pytest.mark.parametrize("regime", REGIMES)
def test_forward_backward(benchmark: Any, regime: str, contender: str) -> None:
    """Time one contender; groups by regime, so that what is to be compared stands together."""
    benchmark.group = regime
    is_loop = contender.startswith("loop")
    workload = make_workload(regime, NUM_LOGITS, NUM_POSITIVES // 10 if is_loop else NUM_POSITIVES)
    labels = workload.class_labels if contender == "ours_class_labels" else workload.logit_labels()
    if contender == "focal":
        labels = labels.to(workload.logits.dtype)
    run = run_loop if is_loop else run_focal if contender == "focal" else run_ours

    def setup() -> None:
        workload.logits.grad = None

    benchmark.pedantic(run, args=(workload, labels), setup=setup, rounds=3 if is_loop else 10, warmup_rounds=1)
    assert workload.logits.grad is not None
    assert workload.logits.grad.isfinite().all()
