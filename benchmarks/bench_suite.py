"""The suite's contenders under pytest-benchmark, for watching changes: ``pytest benchmarks/bench_suite.py``.

The smoke preset's cases, or by the environment variable ``ALRP_TRITON_BENCH_PRESET`` those of another. Contenders of
one case stand together; who is wrong, or has too much to do, is skipped and says why.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch

from .accuracy import Judge, why_refused, why_wrong
from .peers import contenders
from .presets import PRESETS
from .workloads import Case, Inputs, make_inputs

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@cache
def judge(case: Case) -> Judge:
    """One evaluation of the reference for all contenders of a case."""
    return Judge(case, DEVICE)


def pytest_generate_tests(metafunc: Any) -> None:
    """A test for each case and contender. As a hook, since what is installed has to import without pytest."""
    preset = PRESETS[os.environ.get("ALRP_TRITON_BENCH_PRESET", "smoke")]
    known = list(contenders(DEVICE))
    eager = [name for name in known if not contenders(DEVICE)[name].compiled]
    pairs = [(case, name) for case in preset.cases for name in known]
    pairs += [(case, name) for case in preset.sweeps for name in eager]
    metafunc.parametrize(("case", "name"), pairs, ids=[f"{case.name}: {name}" for case, name in pairs])


def test_forward_backward(benchmark: Any, case: Case, name: str) -> None:
    """Time one contender on one case."""
    import pytest

    contender = contenders(DEVICE)[name]
    if contender.work(case) > contender.largest_work[DEVICE.type == "cuda"]:
        pytest.skip("too much work")
    if (why := why_refused(contender, judge(case).error(contender))) is not None:
        pytest.skip(why)
    inputs = make_inputs(case, DEVICE)
    benchmark.group = case.name

    def setup() -> tuple[tuple[Inputs], dict[str, Any]]:
        inputs.clear()
        return (inputs,), {}

    def run(given: Inputs) -> torch.Tensor:
        value = contender.loss(given)
        value.backward()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return value.detach()

    value = benchmark.pedantic(run, setup=setup, rounds=10, warmup_rounds=2)
    assert why_wrong(contender, inputs, value) is None
