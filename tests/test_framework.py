"""Losses from formulas: the family's own, numbers of the positives, targets, normalisers, and the module."""

import math
from functools import partial

import pytest
import torch
from dialect import (
    ALRP,
    AP,
    KERNELS,
    NDCG,
    PLAIN_AP,
    RANK_SORT,
    assert_agree,
    assert_close,
    assert_right,
    assert_same_bits,
    by_backend,
    depth_error,
    depth_normaliser,
    depth_target,
    draw_groups,
    formula,
    imprecision,
    judge,
    of_case,
    problems,
    random_case,
    repeatable,
)
from hypothesis import given
from hypothesis import strategies as st

from alrp_triton import framework, reference
from alrp_triton.framework import RankingLoss, ranking_loss
from alrp_triton.losses.alrp import lrp_error as lrp
from alrp_triton.losses.alrp import lrp_target

# The family, as users would write it.


def interpolated(ranking):
    return 1 - ranking.running_max(ranking.rank_positive / ranking.rank)


def best_gain(ranking):
    places = torch.arange(2.0, 2 + float(ranking.num_positives.max()), dtype=torch.float64)
    return (1 / places.log2()).cumsum(0)[ranking.num_positives.long() - 1]


def missing_gain(ranking):
    return best_gain(ranking) / ranking.num_positives - 1 / (1 + ranking.rank).log2()


def missing_gain_target(ranking):
    return best_gain(ranking) / ranking.num_positives - 1 / (1 + ranking.rank_positive).log2()


def share_of_negatives(at_0, ranking):
    return ranking.num_false_positives / (ranking.rank - 1 + at_0)


def written(member, delta):
    """A loss of the family from a formula."""
    name = f"own_{member}"
    if member is ALRP:
        return formula(name, lrp, "loc_errors", target=lrp_target, eps=1e-5)
    if member is NDCG:
        return formula(name, missing_gain, target=missing_gain_target, normaliser=best_gain)
    if member is RANK_SORT:
        return formula(name, partial(share_of_negatives, 0.5 if delta else 1.0), eps=1e-10)
    return formula(name, interpolated if member is AP else imprecision)


@pytest.mark.thinned(1 if KERNELS else 2)
@by_backend
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("delta", [0.5] if KERNELS else [1.0, 0.5, 0.0])
@pytest.mark.parametrize("member", [ALRP, AP, PLAIN_AP, NDCG, RANK_SORT], ids=repr)
def test_the_family_in_formulas(member, delta, grouped, backend):
    for dtype in [torch.float32] if KERNELS else [torch.float32, torch.float64, torch.bfloat16]:
        case = random_case(200 if KERNELS else 600, 30, dtype=dtype)
        arguments = {"delta": delta, **({"groups": draw_groups(case)} if grouped else {})}
        found = of_case(written(member, delta), case, backend, **arguments)
        if member is ALRP:
            of = of_case(member, case, backend, loc_ranking="smooth", **arguments)
            expected = {
                "loss": of["cls"] + of["loc"],
                "loss by logits": of["cls by logits"],
                "loss by values": of["loc by values"],
            }
        elif member is RANK_SORT:
            of = of_case(member, case, backend, **arguments)
            expected = {"loss": of["ranking"], "loss by logits": of["ranking by logits"]}
        else:
            expected = of_case(member, case, backend, **arguments)
        for name, tensor in expected.items():
            finest = {torch.float64: 1e-12, torch.bfloat16: torch.finfo(dtype).eps}.get(tensor.dtype, 1e-6)
            assert_close(name, found[name], tensor, finest)


@by_backend
@repeatable(max_examples=4 if KERNELS else 60)
@given(case=problems(), delta=st.sampled_from([1.0, 0.5, 0.1, 0.0]), member=st.sampled_from([ALRP, AP, NDCG]))
def test_the_family_in_formulas_on_drawn_cases(case, delta, member, backend):
    found = of_case(written(member, delta), case, backend, delta=delta)
    settings = {"loc_ranking": "smooth"} if member is ALRP else {}
    expected = judge(member, case, delta=delta, **settings)
    value = expected["cls"] + expected["loc"] if member is ALRP else expected["loss"]
    assert_agree({"loss": found["loss"]}, {"loss": value})
    gradient = expected[f"{member.components[0]} by logits"]
    assert_close("gradient", found["loss by logits"], gradient, 1e-6)


# Further numbers of the positives.


def tangled(ranking, numbers, others):
    """Uses all that a formula is offered; the largest and the numbers by order are no linear functions."""
    above = ranking.sums_above(numbers * others) / ranking.rank
    before = ranking.sums_sorted(numbers.square()) / ranking.rank_positive
    largest = ranking.running_max(numbers + others) * ranking.num_false_positives.log1p()
    return (above + before).sqrt() + largest * numbers / ranking.num_positives


@by_backend
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("delta", [0.5, 0.0])
def test_gradients_of_extras(delta, grouped, backend):
    """Those of the reference, which are what finite differences of its values are."""
    case = random_case(80, 12, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    numbers, others = torch.rand(2, 12, generator=generator, dtype=torch.float64) + 0.1
    arguments = {"delta": delta, "groups": draw_groups(case) if grouped else None, "normaliser": depth_normaliser}

    def expected(one, other):
        extras = {"numbers": one, "others": other}
        return reference.ranking_loss(case.logits, case.labels, tangled, extras=extras, **arguments)

    leaves = numbers.clone().requires_grad_(), others.clone().requires_grad_()
    x = case.logits.clone().requires_grad_()
    extras = {"numbers": leaves[0], "others": leaves[1]}
    value = ranking_loss(x, case.labels, tangled, extras=extras, backend=backend, **arguments)
    by_logits, *by_extras = torch.autograd.grad(value, (x, *leaves))
    exact = expected(numbers, others)
    assert_close("value", value, exact.value, 1e-9)
    assert_close("by logits", by_logits, exact.grad_logits, 1e-9)
    for name, gradient in zip(extras, by_extras):
        assert_close(name, gradient, exact.grad_extras[name], 1e-9)
    step = 1e-5
    for k in range(12):
        move = torch.zeros(12, dtype=torch.float64).index_fill(0, torch.tensor(k), step)
        for gradient, moves in zip(by_extras, ((move, 0), (0, move))):
            up, down = (expected(numbers + s * moves[0], others + s * moves[1]).value for s in (1, -1))
            assert abs((up - down) / (2 * step) - gradient[k]) < 1e-7


@by_backend
def test_extras_may_come_from_anywhere(backend):
    """From a graph, without a graph, twice the same, strided, expanded."""
    case = random_case(80, 12, dtype=torch.float64)

    def product(ranking, one, other):
        return one.square() * other * ranking.num_false_positives / ranking.rank

    def run(one, other):
        x = case.logits.clone().requires_grad_()
        return ranking_loss(x, case.labels, product, extras={"one": one, "other": other}, backend=backend)

    leaf = torch.linspace(0.1, 1, 12, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(run(leaf, leaf.detach()), leaf)
    (other,) = torch.autograd.grad(run(leaf.detach(), leaf), leaf)
    (both,) = torch.autograd.grad(run(leaf, leaf), leaf)
    assert_close("the same twice", both, expected + other, 1e-12)
    (derived,) = torch.autograd.grad(run(3 * leaf, leaf.detach()), leaf)
    assert_close("derived", derived, 9 * expected, 1e-12)
    row = torch.full((1,), 0.5, dtype=torch.float64, requires_grad=True)
    (expanded,) = torch.autograd.grad(run(row.expand(12), leaf.detach()), row)
    (repeated,) = torch.autograd.grad(run(row.repeat(12), leaf.detach()), row)
    assert_close("expanded", expanded, repeated, 1e-12)
    pairs = torch.stack([leaf, leaf], dim=1)
    (strided,) = torch.autograd.grad(run(pairs[:, 0], pairs[:, 1].detach()), leaf)
    assert_close("strided", strided, expected, 1e-12)


@by_backend
def test_numbers_alone_may_need_a_gradient(backend):
    case = random_case(80, 12)
    leaf = case.loc_errors.clone().requires_grad_()
    value = ranking_loss(case.logits, case.labels, depth_error, extras={"costs": leaf}, backend=backend)
    (gradient,) = torch.autograd.grad(value, leaf)
    exact = reference.ranking_loss(case.logits, case.labels, depth_error, extras={"costs": case.loc_errors})
    assert_close("gradient", gradient, exact.grad_extras["costs"], 1e-6)


@by_backend
def test_extras_that_the_formula_leaves_out(backend, looking):
    """Have a say in P all the same, and a gradient of 0 or none."""
    case = random_case(80, 12)
    leaf = case.loc_errors.clone().requires_grad_()
    x = case.logits.clone().requires_grad_()
    value = ranking_loss(x, case.labels, lambda ranking, **_: imprecision(ranking), extras={"n": leaf}, backend=backend)
    value.backward()
    assert_same_bits("value", value.detach(), of_case(formula("", imprecision), case, backend)["loss"])
    assert leaf.grad is None or not leaf.grad.any()
    with pytest.raises(ValueError, match=r"^n: expected one for each positive label, 12, got 11; .*at_positives"):
        ranking_loss(*case[1:3], lambda ranking, n: ranking.rank, extras={"n": leaf[:11]}, backend=backend)


# Target, normaliser, eps.


@by_backend
@pytest.mark.parametrize("grouped", [False, True])
def test_normalisers(grouped, backend):
    case = random_case(100, 20, dtype=torch.float64)
    arguments = {"groups": draw_groups(case)} if grouped else {}
    of_one = of_case(formula("", imprecision), case, backend, **arguments)
    p = 20
    if not grouped:
        for given, factor in [
            (lambda ranking: 7, p / 7),
            (lambda ranking: 0.5, 2 * p),
            (lambda ranking: torch.tensor(4.0), p / 4),
            (lambda ranking: torch.tensor(4), p / 4),
            (lambda ranking: ranking.num_positives, 1),
            (lambda ranking: ranking.num_positives.sqrt(), math.sqrt(p)),
        ]:
            found = of_case(formula("", imprecision, normaliser=given), case, backend)
            for name, tensor in found.items():
                assert_close(name, tensor, factor * of_one[name], 1e-12)
    for given in (lambda ranking: 7, lambda ranking: ranking.num_positives**2, lambda ranking: ranking.rank):
        own = formula("", depth_error, "costs", target=depth_target, normaliser=given)
        assert_right(own, case, backend, **arguments)


@by_backend
def test_targets(backend):
    """A target of its own error leaves a value and no gradient; twice the error turns the gradient around."""
    case = random_case(100, 20)
    plain = of_case(formula("", imprecision), case, backend)
    content = of_case(formula("", imprecision, target=imprecision), case, backend)
    assert content["loss"] == plain["loss"]
    assert not content["loss by logits"].any()
    missed = of_case(formula("", imprecision, target=lambda ranking: 2 * imprecision(ranking)), case, backend)
    assert missed["loss"] == plain["loss"]
    assert_same_bits("gradient", missed["loss by logits"], -plain["loss by logits"])
    # An extra in the target moves the gradient of scores, and gets none itself.
    own = formula("", lambda ranking, t: imprecision(ranking) + 0 * t, "t", target=lambda ranking, t: t)
    assert not assert_right(own, case, backend)["loss by values"].any()


# The module.


def beyond(x, delta):
    return 3 * x


def test_module_shows_its_formulas():
    module = RankingLoss(imprecision, lrp_target, best_gain, smoothing=torch.sigmoid, distribution=beyond, eps=1)
    text = repr(module)
    for part in ("RankingLoss(error=imprecision", "target=lrp_target", "normaliser=best_gain", "delta=1.0", "eps=1"):
        assert part in text
    assert "smoothing=sigmoid" in text
    assert "distribution=beyond" in text
    assert "target" not in repr(RankingLoss(imprecision))
    assert "error=functools.partial" in repr(RankingLoss(partial(share_of_negatives, 0.5)))


@by_backend
def test_module_takes_extras_by_their_names(backend):
    case = random_case(60, 8)
    settings = {"target": depth_target, "normaliser": depth_normaliser, "delta": 0.25, "eps": 0.1, "backend": backend}
    module = RankingLoss(depth_error, **settings)
    groups = draw_groups(case)
    for arguments in ({}, {"groups": groups}, {"num_positives": 8}):
        x, costs = case.logits.clone().requires_grad_(), case.loc_errors.clone().requires_grad_()
        found = module(x, case.labels, costs=costs, **arguments)
        expected = ranking_loss(x, case.labels, depth_error, extras={"costs": costs}, **settings, **arguments)
        assert_same_bits("value", found.detach(), expected.detach())
        for one, other in zip(*(torch.autograd.grad(value, (x, costs)) for value in (found, expected))):
            assert_same_bits("gradient", one, other)


def test_what_the_module_offers():
    assert set(framework.__all__) >= {"PairFunction", "RankingLoss", "Statistics", "ranking_loss"}
