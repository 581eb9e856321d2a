"""The sorting error's kernels, against loops over all pairs in float64."""

from __future__ import annotations

import pytest
import torch
from alrp_triton.kernels.sorting import sorting_errors, sorting_received
from grouped_levels import INF, NAN, check_close
from torch import Tensor


@pytest.fixture(autouse=True)
def empty_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not written shows."""
    original = torch.empty

    def empty(*size: int, **how: object) -> Tensor:
        made = original(*size, **how)
        return made.fill_(NAN) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", empty)


def h_of(scores: Tensor, k: int, i: int, delta: float) -> float:
    above, below = float(scores[k]), float(scores[i])
    x = 0.0 if above == below else above - below
    return min(max(x / (2 * delta) + 0.5, 0.0), 1.0) if delta else float(x >= 0)


def loops(scores: Tensor, ious: Tensor, weights: Tensor, groups: Tensor | None, delta: float) -> tuple[Tensor, Tensor]:
    num_pos = len(scores)
    errors = torch.zeros(5, num_pos, dtype=torch.float64)
    received = torch.zeros(num_pos, dtype=torch.float64)
    for i in range(num_pos):
        for k in range(num_pos):
            if groups is not None and groups[k] != groups[i]:
                continue
            h, error = h_of(scores, k, i, delta), 1 - float(ious[k])
            errors[0, i] += h
            errors[1, i] += h * error
            if ious[k] >= ious[i]:
                errors[2, i] += h
                errors[3, i] += h * error
            else:
                errors[4, i] += h
                received[k] += float(weights[i]) * h
    return errors, received


def check(scores: Tensor, ious: Tensor, delta: float, groups: Tensor | None = None) -> Tensor:
    weights = torch.rand(len(scores), dtype=torch.float64, generator=torch.Generator().manual_seed(1)) - 0.3
    inverse_width = 0.5 / delta if delta else 0.0
    expected = loops(scores, ious, weights, groups, delta)
    errors = sorting_errors(scores, ious, inverse_width, groups)
    received = sorting_received(scores, ious, weights, inverse_width, groups)
    assert errors.dtype == received.dtype == torch.float64
    tolerance = (1e-6 if scores.dtype == torch.float32 else 1e-13) * max(1, len(scores))
    check_close(errors, expected[0], tolerance)
    check_close(received, expected[1], tolerance)
    # What is missorted is given out to the last bit that matters: nothing is lost between the two kernels.
    check_close(received.sum(), (weights * errors[4]).sum(), 1e-12 * max(1, len(scores)))
    assert torch.equal(sorting_errors(scores, ious, inverse_width, groups), errors)
    return errors


def drawn(num_pos: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Scores and IoUs of which many are equal."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-12, 13, (num_pos,), generator=generator).to(dtype) / 8
    return scores, torch.randint(0, 9, (num_pos,), generator=generator).to(dtype) / 8


@pytest.mark.parametrize("num_pos", [0, 1, 2, 7, 8, 9, 63, 64, 65, 97])
def test_sizes(num_pos: int) -> None:
    check(*drawn(num_pos), 0.5)


@pytest.mark.parametrize("delta", [0.0, 0.25, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_widths_and_dtypes(delta: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(5)
    scores, ious = torch.randn(40, generator=generator).to(dtype), torch.rand(40, generator=generator).to(dtype)
    errors = check(scores, ious, delta)
    assert (errors[4] > 0).any()


@pytest.mark.parametrize("delta", [0.0, 0.5])
@pytest.mark.parametrize("num_pos", [1, 33, 70])
def test_groups(num_pos: int, delta: float) -> None:
    ids = torch.tensor([-(2**63), -1, 0, 2**40, 2**63 - 1])
    groups = ids[torch.randint(5, (num_pos,), generator=torch.Generator().manual_seed(2))]
    check(*drawn(num_pos), delta, groups)


@pytest.mark.parametrize("delta", [0.0, 0.5])
def test_itself_and_equals(delta: float) -> None:
    """Alone, a positive counts H(0) of itself; equal ones count H(0) of each other, none of it missorted."""
    at_0 = 0.5 if delta else 1.0
    score, iou = torch.tensor([[0.3], [0.1]])
    error = at_0 * (1 - float(iou))
    assert sorting_errors(score, iou, 0.5 if delta else 0.0)[:, 0].tolist() == [at_0, error, at_0, error, 0.0]
    errors = check(torch.full((9,), -2.0), torch.full((9,), 0.5), delta)
    assert errors[0].tolist() == [9 * at_0] * 9
    assert errors[4].tolist() == [0.0] * 9


@pytest.mark.parametrize("delta", [0.0, 0.5])
def test_infinite_scores(delta: float) -> None:
    scores = torch.tensor([INF, -INF, 0.0, INF, -INF, 3.0e38, -3.0e38])
    errors = check(scores, torch.tensor([0.2, 0.9, 0.5, 0.7, 0.1, 0.6, 0.6]), delta)
    assert errors.isfinite().all()


def test_sorted_by_iou_nothing_is_missorted() -> None:
    scores = torch.linspace(-5, 5, 30)
    errors = check(scores, torch.linspace(0, 1, 30), 0.1)
    assert (errors[4] == 0).all()
    assert torch.equal(errors[:2], errors[2:4])
    assert (check(-scores, torch.linspace(0, 1, 30), 0.1)[4, 1:] > 0).all()
