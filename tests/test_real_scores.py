"""Scores of a detector of photographs, and what benchmarks make of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from dialect import KERNELS

if KERNELS:
    pytest.skip("without kernels", allow_module_level=True)

from benchmarks import workloads
from benchmarks.executed import make_problem
from benchmarks.workloads import REAL, REGIMES, Case, make_inputs, recorded_scores


@pytest.mark.parametrize("regime", REAL)
@pytest.mark.parametrize("layout", ["flat", "levels"])
def test_benchmarks_take_real_scores(regime: str, layout: str) -> None:
    negatives, positives = recorded_scores(regime)
    case = Case("retinanet", regime, image=64, batch=2, num_positives=30, layout=layout, dtype="float16")
    inputs = make_inputs(case)
    scores, labels = inputs.flat().detach().float(), inputs.logit_labels.bool()
    assert len(scores[labels]) == 30
    assert ((scores[labels][:, None] - positives).abs().amin(1) <= 0.01).all()
    assert set(scores[~labels].tolist()) <= set(negatives.half().tolist())
    logits, _, errors = make_problem(regime, 512, 40)
    assert (logits.shape, len(errors)) == ((512, 80), 40)
    assert set(logits[40:].flatten().tolist()) <= set(negatives.tolist())


def test_what_is_recorded() -> None:
    size = workloads.RECORDED.stat().st_size
    assert size <= 2_000_000
    of: dict[str, Any] = {REAL[regime]: recorded_scores(regime) for regime in REAL}
    assert set(of) == set(REGIMES)
    # Rounding to half precision has made some equal; few are, of what is given. Early all lie close together.
    assert [len(n.unique()) > share * len(n) for (n, _), share in zip(of.values(), (0.4, 0.9, 0.9))] == [True] * 3
    # Positives rise above the background as training goes on.
    apart = [float((p[:, None] > n[::997]).float().mean()) for n, p in of.values()]
    assert apart[0] < apart[1] < apart[2]
    assert apart[2] > 0.95


def test_without_a_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(workloads, "RECORDED", tmp_path / "nothing.npz")
    recorded_scores.cache_clear()
    with pytest.raises(ValueError, match="without a checkout"):
        recorded_scores("real early")
