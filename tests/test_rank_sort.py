"""Rank & Sort Loss: positives above negatives, and sorted by their IoUs."""

import pytest
import torch
from dialect import (
    INF,
    KERNELS,
    RANK_SORT,
    assert_agree,
    assert_close,
    assert_same_bits,
    by_backend,
    evaluate,
    of_case,
    random_case,
)

from alrp_triton import rank_sort_loss, reference
from alrp_triton.engine.passes.eager import Eager
from alrp_triton.verify import relative_errors

by_delta = pytest.mark.parametrize("delta", [0.5, 0.0])


def orders(scores):
    """IoUs of each kind for positives with these scores."""
    generator = torch.Generator().manual_seed(3)
    drawn = torch.rand(len(scores), generator=generator)
    return {
        "any": drawn,
        "as scored": torch.linspace(0, 1, len(scores))[scores.argsort().argsort()],
        "the other way": torch.linspace(1, 0, len(scores))[scores.argsort().argsort()],
        "all equal": torch.full_like(drawn, 0.7),
        "all 0": torch.zeros_like(drawn),
        "0 and 1": drawn.round(),
        "nearly equal": 0.5 + drawn * 1e-6,
        "tenths": (10 * drawn).round() / 10,
        "beyond 0 and 1": 4 * drawn - 1,
    }


@by_backend
@pytest.mark.parametrize("delta", [0.5] if KERNELS else [0.5, 0.0, 3.0])
@pytest.mark.parametrize("kind", ["any", "tenths", "all equal"] if KERNELS else orders(torch.zeros(2)))
def test_any_order_of_ious(kind, delta, backend):
    case = random_case(150, 40) if KERNELS else random_case(600, 150)
    ious = orders(case.logits[case.labels == 1])[kind]
    groups = torch.arange(len(case.logits)) % 3
    for arguments in [{"groups": groups}] if KERNELS else [{}, {"groups": groups}]:
        found = evaluate(RANK_SORT, case.logits, case.labels, ious, backend, delta=delta, **arguments)
        expected = RANK_SORT.judge(case.logits, case.labels, ious, delta=delta, **arguments)
        # Of what IoUs of float32 differ by, sums of float64 keep the digits that they have.
        assert_agree(found, expected, said=kind)
        if kind in ("all equal", "all 0"):
            assert found["sorting"].abs() < 1e-7
            assert not found["sorting by logits"].any()
        if kind == "as scored" and delta == 0:
            assert found["sorting"].abs() < 1e-7
        if kind == "the other way":
            assert found["sorting"] > 0.1


@by_backend
def test_by_hand(backend):
    """The lowest IoU on top, the highest second; two false positives above all but the first."""
    logits = torch.tensor([3.0, 2.0, 1.0, 2.5, 2.5, -5.0])
    labels = torch.tensor([1, 1, 1, 0, 0, 0])
    ious = torch.tensor([0.2, 0.8, 0.5])
    found = evaluate(RANK_SORT, logits, labels, ious, backend, delta=0.0)
    # Ranking: 0/1, 2/4, 2/5. Sorting: 0; (0.8 + 0.2)/2 - 0.2; (0.8 + 0.2 + 0.5)/3 - (0.2 + 0.5)/2.
    assert_close("ranking", found["ranking"], torch.tensor((2 / 4 + 2 / 5) / 3), 1e-7)
    by_ranking = torch.tensor([0, -1 / 2, -2 / 5, 0.45, 0.45, 0]) / 3
    assert_close("by ranking", found["ranking by logits"], by_ranking, 1e-7)
    assert_close("sorting", found["sorting"], torch.tensor((0.3 + 0.15) / 3), 2e-7)
    by_sorting = torch.tensor([0.3 + 0.15, -0.3, -0.15, 0, 0, 0]) / 3
    assert_close("by sorting", found["sorting by logits"], by_sorting, 2e-7)


@by_backend
def test_a_positive_is_above_itself_by_half(backend):
    """One false positive against H(0) of its own: 1/2, whichever H(0) is."""
    for delta in (0.5, 0.0):
        found = evaluate(RANK_SORT, torch.zeros(2), torch.tensor([0, 1]), torch.ones(1), backend, delta=delta)
        assert_close("ranking", found["ranking"], torch.tensor(0.5), 1e-7)
        assert_close("by ranking", found["ranking by logits"], torch.tensor([0.5, -0.5]), 1e-7)
        assert found["sorting"] == 0


@by_backend
@by_delta
def test_both_parts_at_once(delta, backend):
    """One backward for any weighted sum gives the sum of one for each."""
    case = random_case(200, 30)
    ious = RANK_SORT.values(case)
    each = evaluate(RANK_SORT, case.logits, case.labels, ious, backend, delta=delta)
    assert each["sorting by logits"].any()
    for weight in [-3.0] if KERNELS else [1.0, 0.5, -3.0]:
        x = case.logits.clone().requires_grad_()
        ranking, sorting = rank_sort_loss(x, case.labels, ious, delta=delta, backend=backend)
        (gradient,) = torch.autograd.grad(ranking + weight * sorting, x)
        expected = each["ranking by logits"].double() + weight * each["sorting by logits"].double()
        assert_close("gradient", gradient, expected, 2e-7)


@pytest.mark.skipif(KERNELS, reason="of the torch backend")
def test_both_parts_at_once_cost_one_pass(monkeypatch):
    case = random_case(200, 30)
    x, passes, write = case.logits.clone().requires_grad_(), [], Eager.write
    monkeypatch.setattr(Eager, "write", lambda *given: passes.append(1) or write(*given))
    sum(rank_sort_loss(x, case.labels, RANK_SORT.values(case), backend="torch")).backward()
    assert len(passes) == 1


@by_backend
def test_ious_are_constants(backend):
    case = random_case(100, 12)
    x = case.logits.clone().requires_grad_()
    ious = RANK_SORT.values(case).requires_grad_()
    ranking, sorting = rank_sort_loss(x, case.labels, ious, backend=backend)
    (ranking + sorting).backward()
    assert ious.grad is None
    expected = of_case(RANK_SORT, case, backend)
    assert_close("gradient", x.grad, expected["ranking by logits"] + expected["sorting by logits"], 2e-7)
    ranking, sorting = rank_sort_loss(case.logits, case.labels, ious, backend=backend)
    assert not ranking.requires_grad
    assert not sorting.requires_grad


@by_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision_the_gradient_of_both_components_is_rounded_once(dtype, backend):
    case = random_case(300, 30, dtype=dtype)
    ious = RANK_SORT.values(case)
    exact = reference.rank_sort(case.logits, case.labels, ious, delta=0.5)
    x = case.logits.clone().requires_grad_()
    sum(rank_sort_loss(x, case.labels, ious, backend=backend)).backward()
    # Beyond what rounding to the nearest explains, which one of two rounded numbers would not be.
    error, worst = relative_errors(x.grad, exact.grad_ranking + exact.grad_sorting)
    assert max(error, worst) < 1e-6


@by_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_ious_of_any_dtype_and_stride(dtype, backend):
    case = random_case(100, 12)
    ious = RANK_SORT.values(case)
    expected = evaluate(RANK_SORT, case.logits, case.labels, ious, backend)
    for given in (ious.to(dtype), torch.stack([ious, -ious], dim=1).to(dtype)[:, 0]):
        found = evaluate(RANK_SORT, case.logits, case.labels, given, backend)
        for name, tensor in found.items():
            assert_same_bits(name, tensor, expected[name])


@by_backend
def test_ious_are_compared_as_precisely_as_scores(backend):
    """Equal in float32 they are equal, whatever float64 says of them; every backend has to see the same order."""
    case = random_case(100, 12)
    ious = RANK_SORT.values(case).double()
    ious[1::2] = ious[::2] * (1 + 1e-12)
    for logits, same in ((case.logits, True), (case.logits.double(), False)):
        found = evaluate(RANK_SORT, logits, case.labels, ious, backend)
        rounded = evaluate(RANK_SORT, logits, case.labels, ious.float(), backend)
        assert torch.equal(found["sorting by logits"], rounded["sorting by logits"]) == same


@by_backend
def test_infinite_scores_by_hand(backend):
    """H is 1/2 between equal infinities, else 0 or 1."""
    logits = torch.tensor([INF, -INF, INF, -INF, INF])
    labels, ious = torch.tensor([1, 1, 1, 1, 0]), torch.tensor([0.5, 0.25, 1.0, 0.75])
    found = evaluate(RANK_SORT, logits, labels, ious, backend)
    # Above those at +inf: one half each of both positives, and of the negative. Above the others: all of them.
    assert_close("ranking", found["ranking"], torch.tensor((2 * 0.5 / 1.5 + 2 * 1 / 4) / 4), 1e-7)
    means = [(0.5 + 0.0) / 2, (0.5 + 0 + 0.375 + 0.125) / 3, (0.5 + 0.0) / 2, (0.5 + 0 + 0.375 + 0.125) / 3]
    targets = [(0.5 + 0.0) / 2, (0.5 + 0 + 0.375 + 0.125) / 3, 0.0, (0 + 0.125) / 1.5]
    errors = torch.tensor([a - b for a, b in zip(means, targets)]) / 4
    assert_close("sorting", found["sorting"], errors.sum(), 1e-6)
    # The third sends to the first, the last to the first and the second: one whole, and one half.
    received = torch.tensor([errors[2] + errors[3] * 2 / 3, errors[3] / 3, 0, 0])
    assert_close("by sorting", found["sorting by logits"][:4], received - errors, 1e-6)
