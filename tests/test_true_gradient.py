"""``gradient="true"``: the derivative of a smooth loss with respect to the scores."""

import pytest
import torch
from dialect import (
    INF,
    KERNELS,
    NAN,
    all_cases,
    assert_close,
    by_engine_backend,
    draw_groups,
    random_case,
)
from dialect.processes import BACKENDS

from alrp_triton.framework import RankingLoss, ranking_loss


def smooth_ap(ranking):
    return ranking.num_false_positives / ranking.rank


def recall_at_10(ranking):
    return torch.sigmoid((ranking.rank - 10) / 4)


def smooth_dcg(ranking):
    return 1 - 1 / torch.log2(1 + ranking.rank)


def weighted(ranking, weights):
    return weights * torch.log1p(ranking.num_false_positives) + weights.square() * ranking.rank_positive.sqrt()


def count(ranking):
    return ranking.num_positives + 1.0


FORMULAS = {"ap": smooth_ap, "recall": recall_at_10, "dcg": smooth_dcg, "weighted": weighted}
by_formula = pytest.mark.parametrize("name", FORMULAS)
# No scores of theirs are a ramp's end apart, where the derivative has two values.
SMOOTH = ["early", "middle", "late"]
TORCH = [backend for backend in BACKENDS if backend != "pairwise"]


def run(name, case, **settings):
    x, values = case.logits.clone().requires_grad_(), case.loc_errors.clone().requires_grad_()
    extras = {"weights": values} if name == "weighted" else {}
    settings = {"delta": 0.7, "num_positives": len(values), **settings}
    loss = ranking_loss(x, case.labels, FORMULAS[name], extras=extras, gradient="true", **settings)
    found = torch.autograd.grad(loss, [x, *extras.values()])
    return {"loss": loss.detach(), **dict(zip(("by logits", "by values"), found))}


@by_engine_backend
@by_formula
@pytest.mark.parametrize("grouped", [False, True])
def test_is_that_of_the_reference(grouped, name, backend):
    if backend == "pairwise":
        pytest.skip("has no tables")
    for regime in SMOOTH[: 1 if KERNELS else 3]:
        case = random_case(150 if KERNELS else 500, 25, regime, ignored=0.1)
        settings = {"groups": draw_groups(case)} if grouped else {}
        settings["normaliser"] = count if grouped else None
        found, expected = run(name, case, backend=backend, **settings), run(name, case, backend="reference", **settings)
        for key, tensor in expected.items():
            assert_close(key, found[key], tensor, 1e-6)


@pytest.mark.skipif(KERNELS, reason="of the torch backend")
@by_formula
def test_is_that_of_differences(name):
    """The slope of the loss itself, in float64."""
    case = random_case(40, 6, dtype=torch.float64)

    def loss(x):
        return run_value(name, case._replace(logits=x))

    torch.autograd.gradcheck(loss, (case.logits.clone().requires_grad_(),), eps=1e-6, atol=1e-5, rtol=1e-4)


def run_value(name, case):
    extras = {"weights": case.loc_errors} if name == "weighted" else {}
    settings = {"num_positives": len(case.loc_errors), "delta": 0.7, "backend": "torch", "gradient": "true"}
    return ranking_loss(case.logits, case.labels, FORMULAS[name], extras=extras, **settings)


@pytest.mark.skipif(KERNELS, reason="of the torch backend")
def test_value_is_that_of_the_error_driven_loss():
    for case in all_cases():
        if case.num_positives:
            settings = {"num_positives": case.num_positives, "delta": 0.5}
            values = [
                ranking_loss(case.logits, case.labels, smooth_ap, gradient=gradient, backend="torch", **settings)
                for gradient in ("true", "error-driven")
            ]
            torch.testing.assert_close(*values, rtol=0, atol=0, equal_nan=True)


@by_engine_backend
def test_ends_of_a_ramp(backend):
    """The beginning belongs to the ramp, its end does not; scores are binary fractions, so both are hit."""
    if backend == "pairwise":
        pytest.skip("has no tables")
    logits, labels = torch.tensor([0.0, -0.5, 0.5, -0.25, -0.75, 0.75]), torch.tensor([1, 0, 0, 0, 0, 0])
    x = logits.requires_grad_()
    loss = ranking_loss(
        x, labels, lambda r: r.num_false_positives, num_positives=1, delta=0.5, gradient="true", backend=backend
    )
    assert torch.autograd.grad(loss, x)[0].tolist() == [-2.0, 1.0, 0.0, 1.0, 0.0, 0.0]


@by_engine_backend
@by_formula
def test_edges(name, backend):
    """No positives, no negatives, nothing at all, infinities and NaN."""
    if backend == "pairwise":
        pytest.skip("has no tables")
    case = random_case(60, 6)
    none = case._replace(labels=case.labels.masked_fill(case.labels == 1, 0), loc_errors=case.loc_errors[:0])
    empty = none._replace(logits=none.logits[:0], labels=none.labels[:0])
    for one in (none, empty):
        assert not any(tensor.any() for tensor in run(name, one, backend=backend).values())
    alone = case._replace(labels=case.labels.masked_fill(case.labels == 0, -1))
    infinite = case._replace(logits=case.logits.clone())
    infinite.logits[:20] = torch.tensor([INF, -INF]).repeat(10)
    for one in (alone, infinite):
        found, expected = run(name, one, backend=backend), run(name, one, backend="reference")
        for key, tensor in expected.items():
            assert found[key].isfinite().all()
            assert_close(key, found[key], tensor, 1e-6)
    case.logits[case.labels == 0] = NAN
    found = run(name, case, backend=backend)
    assert found["loss"].isnan()
    assert found["by logits"][case.labels >= 0].isnan().all()


@pytest.mark.skipif(KERNELS, reason="needs no kernel")
def test_half_precision_and_levels():
    case = random_case(400, 30)
    whole = run("ap", case._replace(logits=case.logits.half().float()), backend="torch")["by logits"]
    halves = case.logits.half()
    levels = [halves[:100].view(10, 10).t().contiguous().t().requires_grad_(), halves[100:].clone().requires_grad_()]
    labels = [case.labels[:100].view(10, 10), case.labels[100:]]
    loss = ranking_loss(levels, labels, smooth_ap, num_positives=30, delta=0.7, gradient="true", backend="torch")
    found = torch.autograd.grad(loss, levels)
    assert torch.equal(torch.cat([each.flatten() for each in found]), whole.half())


@pytest.mark.skipif(KERNELS, reason="needs no kernel")
def test_module_in_one_graph():
    case = random_case(90, 9)
    criterion = RankingLoss(recall_at_10, gradient="true", delta=0.7, backend="torch")
    assert "gradient='true'" in repr(criterion)
    found = []
    for call in (criterion, torch.compile(criterion, fullgraph=True, backend="aot_eager")):
        x = case.logits.clone().requires_grad_()
        found.append(torch.autograd.grad(call(x, case.labels, 9), x)[0])
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"gradient": "exact"}, "gradient: expected 'error-driven' or 'true', got 'exact'"),
        ({"delta": 0}, "delta: expected a number > 0 with gradient='true'"),
        ({"target": smooth_ap}, "target: expected none with gradient='true'"),
        ({"eps": 0.1}, "eps: expected none with gradient='true'"),
        ({"smoothing": lambda x, delta: x}, "smoothing: expected none with gradient='true'"),
        ({"error": lambda r: r.sums_sorted(r.rank)}, "gradient: 'true' is not there for a formula with sums_sorted"),
    ],
)
def test_mistakes(settings, said):
    case = random_case(60, 6)
    settings = {"error": smooth_ap, "num_positives": 6, "gradient": "true", "backend": "torch", **settings}
    with pytest.raises((TypeError, ValueError), match=said):
        ranking_loss(case.logits, case.labels, **settings)
