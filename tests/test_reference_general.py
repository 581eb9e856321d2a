"""The judge's general form: its instances, formulas and pair functions of any kind."""

import math

import pytest
import torch
from dialect import INF, all_cases, assert_close, listed_case, problems, random_case
from hypothesis import given, settings
from hypothesis import strategies as st

from alrp_triton import reference

TINY = [case for case in all_cases() if len(case.logits) <= 150]
by_delta = pytest.mark.parametrize("delta", [1.0, 0.1, 0.0])
by_name = pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)


def lrp_error(ranking, loc_errors):
    return (ranking.num_false_positives + loc_errors + ranking.sums_above(loc_errors)) / ranking.rank


def lrp_target(ranking, loc_errors):
    return loc_errors / ranking.rank


def sorted_loc(ranking, loc_errors):
    return ranking.sums_sorted(loc_errors) / ranking.rank


def imprecision(ranking):
    return ranking.num_false_positives / ranking.rank


def interpolated_imprecision(ranking):
    return 1 - ranking.running_max(ranking.rank_positive / ranking.rank)


def gain_max(ranking):
    return sum(1 / math.log2(1 + k) for k in range(1, int(ranking.num_positives[0]) + 1))


def missing_gain(ranking):
    return gain_max(ranking) / ranking.num_positives - 1 / torch.log2(1 + ranking.rank)


def missing_gain_target(ranking):
    return gain_max(ranking) / ranking.num_positives - 1 / torch.log2(1 + ranking.rank_positive)


def assert_instance(general, value, gradient):
    # NDCG subtracts from 1.
    assert_close("value", 1 + general.value, 1 + value, 1e-12)
    assert_close("grad_logits", general.grad_logits, gradient, 1e-12)


def assert_members_are_instances(case, delta):
    inputs, extras = (case.logits, case.labels), {"loc_errors": case.loc_errors}
    member = reference.alrp(*inputs, case.loc_errors, delta=delta, loc_ranking="smooth")
    general = reference.ranking_loss(*inputs, lrp_error, target=lrp_target, extras=extras, delta=delta, eps=1e-5)
    assert_instance(general, member.cls + member.loc, member.grad_logits)
    assert_close("rank", general.rank, member.rank, 1e-12)
    assert_close("grad_extras", general.grad_extras["loc_errors"], member.grad_loc_errors, 1e-12)

    member = reference.alrp(*inputs, case.loc_errors, delta=delta)
    general = reference.ranking_loss(*inputs, sorted_loc, target=sorted_loc, extras=extras, delta=delta)
    assert_instance(general, member.loc, torch.zeros_like(member.grad_logits))
    assert_close("grad_extras", general.grad_extras["loc_errors"], member.grad_loc_errors, 1e-12)

    for interpolated, formula in ((True, interpolated_imprecision), (False, imprecision)):
        member = reference.ap(*inputs, delta=delta, interpolated=interpolated)
        assert_instance(reference.ranking_loss(*inputs, formula, delta=delta), member.value, member.grad_logits)

    member = reference.ndcg(*inputs, delta=delta)
    formulas = {"error": missing_gain, "target": missing_gain_target, "normaliser": gain_max}
    assert_instance(reference.ranking_loss(*inputs, **formulas, delta=delta), member.value, member.grad_logits)

    def with_itself(ranking):
        return ranking.num_false_positives / (ranking.rank - (0 if delta == 0 else 0.5))

    member = reference.rank_sort(*inputs, case.loc_errors, delta=delta)
    general = reference.ranking_loss(*inputs, with_itself, delta=delta, eps=1e-10)
    assert_instance(general, member.ranking, member.grad_ranking)


@by_delta
@by_name
def test_members_are_instances(case, delta):
    assert_members_are_instances(case, delta)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(problems(), st.sampled_from([2.0, 0.5, 0.0]))
def test_members_are_instances_on_drawn_cases(case, delta):
    assert_members_are_instances(case, delta)


def sigmoid(x, delta):
    return torch.sigmoid(4 * x / delta)


def too_much(x, delta):
    """Beyond [0, 1] on both sides, and so to be clamped."""
    return 2 * x / delta


def squared_ramp(x, delta):
    return reference.ramp(x, delta) ** 2


def step(x, delta):
    return (x >= 0).float()


def plain_general(case, h, q, eps, normaliser):
    """lrp_error with half of lrp_target, pair by pair: (value, gradient, derivative of the errors, rank)."""
    scores, labels = case.logits.tolist(), case.labels.tolist()
    errors = dict(zip([i for i, label in enumerate(labels) if label == 1], case.loc_errors.tolist()))
    negatives = [j for j, label in enumerate(labels) if label == 0]

    def call(f, j, i):
        x = torch.tensor([[0.0 if scores[j] == scores[i] else scores[j] - scores[i]]], dtype=torch.float64)
        return min(max(float(f(x, 1.5)), 0.0), 1.0)

    value, gradient, by_error, ranks = 0.0, [0.0] * len(scores), dict.fromkeys(errors, 0.0), []
    for i in errors:
        above = {k: call(h, k, i) for k in errors if k != i}
        false = math.fsum(call(h, j, i) for j in negatives)
        ranks.append(1 + math.fsum(above.values()) + false)
        error = (false + errors[i] + math.fsum(share * errors[k] for k, share in above.items())) / ranks[-1]
        value += error / normaliser
        for k, share in {**above, i: 1.0}.items():
            by_error[k] += share / ranks[-1] / normaliser
        masses = {j: call(q, j, i) for j in negatives}
        if math.fsum(masses.values()) > eps:
            update = (error - 0.5 * errors[i] / ranks[-1]) / normaliser
            gradient[i] -= update
            for j in negatives:
                gradient[j] += update * (masses[j] / math.fsum(masses.values()))
    return value, gradient, list(by_error.values()), ranks


@pytest.mark.parametrize("eps", [0.0, 2.0])
@pytest.mark.parametrize("distribution", [None, squared_ramp, step, too_much])
@pytest.mark.parametrize("smoothing", [None, sigmoid, too_much, step])
def test_pair_functions_against_plain_python(smoothing, distribution, eps):
    mixed = listed_case("mixed", [0.0, 1.0, INF, -INF, 0.5, 0.5], [0.5, INF, 1.0, -2.0, 0.75, -INF, 0.0])
    for case in (mixed, random_case(60, 12), random_case(40, 10, "inverted"), random_case(30, 10, "late")):
        h = smoothing or reference.ramp
        value, gradient, by_error, rank = plain_general(case, h, distribution or h, eps, 7.0)
        result = reference.ranking_loss(
            case.logits,
            case.labels,
            lrp_error,
            target=lambda ranking, loc_errors: 0.5 * lrp_target(ranking, loc_errors),
            normaliser=lambda ranking: torch.full_like(ranking.rank, 7),
            extras={"loc_errors": case.loc_errors},
            delta=1.5,
            eps=eps,
            smoothing=smoothing,
            distribution=distribution,
        )
        expected = (value, gradient, by_error, rank)
        actual = (result.value, result.grad_logits, result.grad_extras["loc_errors"], result.rank)
        for name, one, other in zip(("value", "grad_logits", "grad_extras", "rank"), actual, expected):
            assert_close(f"{case.name} {name}", one, torch.tensor(other, dtype=torch.float64), 1e-12)


def entangled(ranking, first, second, unused):
    """Not linear in its extras, and every statistic in it."""
    above, before = ranking.sums_above(first * second), ranking.sums_sorted(first**2)
    highest = ranking.running_max(second)
    size = ranking.num_positives + ranking.num_false_positives
    return (above**2 + before * highest + first) / ranking.rank + second / size * ranking.rank_positive


def entangled_target(ranking, first, second, unused):
    return first / ranking.rank / 2


@by_delta
def test_derivative_of_extras_by_finite_differences(delta):
    case, generator = random_case(80, 9, seed=2), torch.Generator().manual_seed(1)
    groups = torch.arange(80) % 2
    extras = {name: torch.rand(9, generator=generator, dtype=torch.float64) for name in ("first", "second", "unused")}

    def value(changed):
        return reference.ranking_loss(
            case.logits, case.labels, entangled, target=entangled_target, extras=changed, delta=delta, groups=groups
        )

    derivative = value(extras).grad_extras
    assert list(derivative) == list(extras)
    assert not derivative["unused"].any()
    with torch.no_grad():
        assert_close("without autograd", value(extras).grad_extras["first"], derivative["first"], 0)
    step = 1e-6
    for name in ("first", "second"):
        expected = torch.zeros(9, dtype=torch.float64)
        for k in range(9):
            change = step * torch.nn.functional.one_hot(torch.tensor(k), 9)
            high, low = (value({**extras, name: extras[name] + sign * change}).value for sign in (1, -1))
            expected[k] = (high - low) / (2 * step)
        assert_close(name, derivative[name], expected, 1e-7)
    assert not any(x.requires_grad for x in extras.values())


@by_delta
@pytest.mark.parametrize("distribution", [None, squared_ramp])
def test_theorems_1_and_2(delta, distribution):
    case = random_case(400, 30, "inverted")
    extras = {name: torch.rand(30, dtype=torch.float64) for name in ("first", "second", "unused")}
    settings = {"extras": extras, "delta": delta, "distribution": distribution}
    inputs, is_pos, is_neg = (case.logits, case.labels, entangled), case.labels == 1, case.labels == 0
    result = reference.ranking_loss(*inputs, **settings)
    # Every positive has false positives, and without a target the updates are the primary terms.
    assert_close("theorem 1", -result.grad_logits[is_pos].sum(), result.value, 1e-12)
    assert_close("theorem 2", result.grad_logits[is_neg].sum(), result.value, 1e-12)
    improved = reference.ranking_loss(*inputs, target=entangled_target, **settings).grad_logits
    target = reference.ranking_loss(case.logits, case.labels, entangled_target, **settings).value
    assert_close("theorem 1, with a target", -improved[is_pos].sum(), result.value - target, 1e-12)
    assert_close("theorem 2, with a target", improved[is_neg].sum(), -improved[is_pos].sum(), 1e-12)
    assert (improved[is_pos] < 0).all()
    assert (improved[is_neg] >= 0).all()


def test_what_a_formula_sees():
    """Of two equal scores the later is above, in the sorted sums; and an infinity is like any other score."""
    case = listed_case("", [1.0, 3.0, 1.0, INF, INF], [2.0, 3.0])
    ranking = reference.ReferenceRanking(
        case.logits[:5].double(), case.logits[5:].double(), 0.0, lambda x, delta: reference.ramp(x, delta)
    )
    values = torch.tensor([1.0, 10.0, 100.0, 1000.0, 5.0], dtype=torch.float64)
    assert ranking.num_positives.tolist() == [5.0] * 5
    assert ranking.num_false_positives.tolist() == [2, 1, 2, 0, 0]
    assert ranking.rank_positive.tolist() == [5, 3, 5, 2, 2]
    assert ranking.rank.tolist() == [7, 4, 7, 2, 2]
    assert ranking.sums_above(values).tolist() == [1115, 1005, 1016, 5, 1000]
    assert ranking.sums_sorted(values).tolist() == [1116, 1015, 1115, 1005, 5]
    assert ranking.running_max(values).tolist() == [1, 100, 100, 1000, 1000]


def test_nothing_is_sent_without_a_distribution():
    """What the formulas give there, here 0/0 in the target, does not matter; elsewhere it would."""
    case = listed_case("", [5.0, 0.0], [1.0])

    def target(ranking):
        return 0 * ranking.num_false_positives / ranking.num_false_positives

    result = reference.ranking_loss(case.logits, case.labels, imprecision, target=target, delta=0)
    assert result.grad_logits.tolist() == [0, -1 / 6, 1 / 6]
    result = reference.ranking_loss(case.logits, case.labels, target, delta=0)
    assert result.value.isnan()
    assert result.grad_logits.isnan().all()
