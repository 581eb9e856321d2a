"""aLRP Loss against its float64 reference over every hard case, and the same bits whatever runs how."""

import pytest
import torch
from cases import INF, INTERPRETED, all_cases, random_case
from checks import assert_close, assert_rounded, assert_same_bits, assert_same_results, backends, engine_backends, evaluate, judge

from alrp_triton import alrp_loss
from alrp_triton.engine.backends import torch as torch_backend
from alrp_triton.engine.positives import _PIECE as POSITIVES_PIECE

CASES = all_cases()
DELTAS = [1.0, 0.1, 0.0] if INTERPRETED else [1.0, 0.5, 0.1, 0.0, 37.5, 1e-6]
# What pass 1 sums in fixed point has 36 binary places, whatever the dtype.
TOLERANCE = {torch.float64: 1e-9}


@pytest.mark.parametrize("backend", engine_backends())
@pytest.mark.parametrize("delta", DELTAS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_agrees_with_reference(case, delta, backend):
    for loc_ranking in ("sorted", "smooth"):
        arguments = {"delta": delta, "loc_ranking": loc_ranking}
        result = evaluate(case.logits, case.labels, case.loc_errors, backend, **arguments)
        expected = judge(case, **arguments)
        tolerance = TOLERANCE.get(case.logits.dtype, 1e-6)
        for name in ("cls", "loc", "rank"):
            assert_close(f"{name}, {loc_ranking}", getattr(result, name), getattr(expected, name), tolerance)
        if case.logits.dtype in (torch.float16, torch.bfloat16):
            assert_rounded("grad_logits", result.grad_logits, expected.grad_logits, tolerance)
        else:
            assert_close("grad_logits", result.grad_logits, expected.grad_logits, tolerance)
        if case.loc_errors.dtype == torch.bfloat16:
            assert_rounded("grad_loc_errors", result.grad_loc_errors, expected.grad_loc_errors, tolerance)
        else:
            assert_close("grad_loc_errors", result.grad_loc_errors, expected.grad_loc_errors, tolerance)
