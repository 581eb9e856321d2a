"""The judge itself: against loops over Python's numbers, numbers by hand, and scikit-learn.

The reference is a backend, too: groups, NaN, infinities and the published code meet it where they meet all backends.
"""

import math

import pytest
import torch
from dialect import (
    ALRP,
    APE,
    FLOAT_MAX,
    INF,
    NAN,
    NDCG,
    PLAIN,
    RANK_SORT,
    Plain,
    all_cases,
    assert_agree,
    assert_close,
    by_member,
    judge,
    listed_case,
    problems,
    random_case,
    repeatable,
)
from hypothesis import assume, given
from hypothesis import strategies as st

from alrp_triton import reference

TINY = [case for case in all_cases() if len(case.logits) <= 150 and case.num_positives]
# Those whose eps may be told.
GATED = (ALRP, RANK_SORT, APE)


def doubles(numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def plain_parts(pairs, smooth):
    """The components of aLRP, with the derivative of the second. Positives that rank alike in the sorted form go by
    their place: the later one first."""
    cls, loc, by_values = 0.0, 0.0, dict.fromkeys(pairs.positives, 0.0)
    for i in pairs.positives:
        share = 1 / pairs.rank[i] / len(pairs.positives)
        cls += pairs.false[i] * share
        above = pairs.others(i) if smooth else pairs.descending(i)
        for k, h in {i: 1.0, **{k: pairs.h(i, k) if smooth else 1.0 for k in above}}.items():
            loc += h * pairs.values[k] * share
            by_values[k] += h * share
    numbers = {"cls": cls, "loc": loc, "rank": [*pairs.rank.values()], "loc by values": [*by_values.values()]}
    return {name: doubles(number) for name, number in numbers.items()}


def assert_plain(member, case, delta, eps=None):
    arguments = {"delta": delta} if eps is None else {"delta": delta, "eps": eps}
    pairs = Plain(case, delta, member.values(case).tolist())
    if member is ALRP:
        for loc_ranking in ("sorted", "smooth"):
            found = judge(ALRP, case, loc_ranking=loc_ranking, **arguments)
            assert_agree(found, plain_parts(pairs, loc_ranking == "smooth"), 1e-12)
    else:
        found = judge(member, case, **arguments)
    for part in PLAIN[member]:
        part = part if eps is None else part._replace(eps=eps)
        value = sum(found[name] for name in part.components)
        # NDCG subtracts from 1.
        assert_close("value", 1 + value, doubles(1 + part.value(pairs)), 1e-12)
        assert_close(part.gradient, found[part.gradient], doubles(part.update(pairs)), 1e-12)


@pytest.mark.thinned(2)
@by_member
@pytest.mark.parametrize("delta", [1.0, 0.1, 0.0])
@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
def test_agrees_with_plain_python(case, delta, member):
    assert_plain(member, case, delta)
    if member in GATED:
        assert_plain(member, case, delta, 0.6)


@by_member
@repeatable(max_examples=60)
@given(problems(), st.sampled_from([2.0, 1.0, 0.5, 1e-3, 0.0]), st.sampled_from([0.0, 1e-5, 0.6]))
def test_agrees_with_plain_python_on_drawn_cases(member, case, delta, eps):
    assume(case.num_positives)
    assert_plain(member, case, delta, eps if member in GATED else None)


@by_member
def test_blocks_of_positives_do_not_show(member, monkeypatch):
    case = random_case(300, 40)
    whole = judge(member, case)
    monkeypatch.setattr(reference, "_PAIRS_PER_BLOCK", 7 * 300)
    for name, tensor in judge(member, case).items():
        assert_close(name, tensor, whole[name], 1e-14)


# By hand.


def test_ramp_by_hand():
    x = doubles([-INF, -2.0, -1.0, -0.5, 0.0, 0.25, 1.0, 3.0, INF])
    assert reference.ramp(x, 1.0).tolist() == [0, 0, 0, 0.25, 0.5, 0.625, 1, 1, 1]
    assert reference.ramp(x, 0.25).tolist() == [0, 0, 0, 0, 0.5, 1, 1, 1, 1]
    assert reference.ramp(x, 0.0).tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 1]
    for delta in (5e-324, 1e-320, 1e300, 8e307):
        assert reference.ramp(x[[0, 4, 8]], delta).tolist() == [0, 0.5, 1]
    for delta in (0.0, 1.0):
        assert reference.ramp(torch.tensor([NAN]), delta).isnan().all()


def test_difference_by_hand():
    s = doubles([-INF, 0.0, FLOAT_MAX, INF])
    rows = [[0, INF, INF, INF], [-INF, 0, FLOAT_MAX, INF], [-INF, -FLOAT_MAX, 0, INF], [-INF, -INF, -INF, 0]]
    assert reference.difference(s, s).tolist() == rows


def test_algorithm_1_by_hand():
    primary = torch.tensor([[0.5, 0.25], [1.0, 0.0]])
    target = torch.tensor([[0.25, 0.25], [0.0, 0.5]])
    positives, negatives = reference.algorithm_1(primary, target, 2.0)
    # Updates -0.25, 0 and -1, 0.5.
    assert positives.tolist() == [-0.125, -0.25]
    assert negatives.tolist() == [0.625, -0.25]


# Three positives at ranks 3, 4 and 5 with the step function, below two negatives.
HAND = torch.tensor([3.0, 4.0, 1.0, NAN, 3.5, 0.0]), torch.tensor([1, 0, 1, -1, 0, 1])
BEST = 1 + 1 / math.log2(3) + 1 / 2
MISSING = [1 - 1 / 2, 1 / math.log2(3) - 1 / math.log2(5), 1 / 2 - 1 / math.log2(6)]


@pytest.mark.parametrize(
    ("loss", "value", "errors"),
    [
        (lambda: reference.ap(*HAND, delta=0, interpolated=False), (2 / 3 + 1 / 2 + 2 / 5) / 3, [2 / 9, 1 / 6, 2 / 15]),
        # Precisions 1/3, 2/4, 3/5: the running maximum from below is 3/5 throughout.
        (lambda: reference.ap(*HAND, delta=0), 0.4, [0.4 / 3] * 3),
        (lambda: reference.ndcg(*HAND, delta=0), sum(MISSING) / BEST, [missing / BEST for missing in MISSING]),
    ],
    ids=["plain_ap", "ap", "ndcg"],
)
def test_scores_by_hand(loss, value, errors):
    found, half = loss(), sum(errors) / 2
    assert found.rank.tolist() == [3, 4, 5]
    assert_close("value", found.value, doubles(value), 1e-15)
    assert_close("gradient", found.grad_logits, doubles([-errors[0], half, -errors[1], 0, half, -errors[2]]), 1e-15)


def test_groups_by_hand():
    """Average precisions: 1 - 1/2 with one group id, 1 - 1/3 with the other, whose gradients are halved."""
    logits, labels = torch.tensor([0.0, 1.0, 0.0, 1.0, 2.0, 9.0]), torch.tensor([1, 0, 1, 0, 0, 0])
    result = reference.ap(logits, labels, delta=0, groups=torch.tensor([5, 5, -5, -5, -5, 0]))
    assert result.value.item() == pytest.approx((1 / 2 + 2 / 3) / 2, abs=1e-15)
    assert result.rank.tolist() == [2, 3]
    assert_close("gradient", result.grad_logits, doubles([-1 / 4, 1 / 4, -1 / 3, 1 / 6, 1 / 6, 0]), 1e-15)


def test_infinities_by_hand():
    """Two positives at either end, a negative at each end and one between; equal infinities count 1/2."""
    logits, labels = torch.tensor([INF, -INF, INF, FLOAT_MAX, -INF]), torch.tensor([1, 1, 0, 0, 0])
    result = reference.ap(logits, labels, interpolated=False)
    assert result.rank.tolist() == [1.5, 4.5]
    errors = [0.5 / 1.5, 2.5 / 4.5]
    of_low = errors[1] / 2 / 2.5
    expected = doubles([-errors[0] / 2, -errors[1] / 2, errors[0] / 2 + of_low, of_low, of_low / 2])
    assert_close("gradient", result.grad_logits, expected, 1e-15)


def test_ndcg_of_scikit_learn():
    """Without ties, with the step function."""
    metrics = pytest.importorskip("sklearn.metrics")
    for seed in range(5):
        case = random_case(200, 20, seed=seed, ignored=0)
        score = metrics.ndcg_score(case.labels[None].numpy(), case.logits[None].numpy())
        assert judge(NDCG, case, delta=0)["loss"].item() == pytest.approx(1 - score, abs=1e-12)


# The general form.


def lrp_error(ranking, loc_errors):
    return (ranking.num_false_positives + loc_errors + ranking.sums_above(loc_errors)) / ranking.rank


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
    """lrp_error with half of its target, pair by pair: (value, gradient, derivative of the errors, rank)."""
    pairs = Plain(case, 0.0, case.loc_errors.tolist())

    def call(f, j, i):
        below, above = pairs.scores[i], pairs.scores[j]
        return min(max(float(f(doubles([[0.0 if above == below else above - below]]), 1.5)), 0.0), 1.0)

    value, gradient, by_error, ranks = 0.0, [0.0] * len(pairs.scores), dict.fromkeys(pairs.positives, 0.0), []
    for i, own in pairs.values.items():
        above = {k: call(h, k, i) for k in pairs.others(i)}
        false = math.fsum(call(h, j, i) for j in pairs.negatives)
        ranks.append(1 + math.fsum(above.values()) + false)
        error = (false + own + math.fsum(share * pairs.values[k] for k, share in above.items())) / ranks[-1]
        value += error / normaliser
        for k, share in {**above, i: 1.0}.items():
            by_error[k] += share / ranks[-1] / normaliser
        masses = {j: call(q, j, i) for j in pairs.negatives}
        if math.fsum(masses.values()) > eps:
            update = (error - 0.5 * own / ranks[-1]) / normaliser
            gradient[i] -= update
            for j in pairs.negatives:
                gradient[j] += update * (masses[j] / math.fsum(masses.values()))
    return value, gradient, list(by_error.values()), ranks


@pytest.mark.parametrize("eps", [0.0, 2.0])
@pytest.mark.parametrize("distribution", [None, squared_ramp, step, too_much])
@pytest.mark.parametrize("smoothing", [None, sigmoid, too_much, step])
def test_pair_functions_against_plain_python(smoothing, distribution, eps):
    mixed = listed_case("mixed", [0.0, 1.0, INF, -INF, 0.5, 0.5], [0.5, INF, 1.0, -2.0, 0.75, -INF, 0.0])
    for case in (mixed, random_case(60, 12), random_case(40, 10, "inverted"), random_case(30, 10, "late")):
        h = smoothing or reference.ramp
        result = reference.ranking_loss(
            *(case.logits, case.labels, lrp_error),
            target=lambda ranking, loc_errors: 0.5 * loc_errors / ranking.rank,
            normaliser=lambda ranking: torch.full_like(ranking.rank, 7),
            extras={"loc_errors": case.loc_errors},
            **{"delta": 1.5, "eps": eps, "smoothing": smoothing, "distribution": distribution},
        )
        found = (result.value, result.grad_logits, result.grad_extras["loc_errors"], result.rank)
        for one, other in zip(found, plain_general(case, h, distribution or h, eps, 7.0)):
            assert_close(case.name, one, doubles(other), 1e-12)


def test_what_a_formula_sees():
    """Of two equal scores the later is above, in the sorted sums; and an infinity is like any other score."""
    case = listed_case("", [1.0, 3.0, 1.0, INF, INF], [2.0, 3.0])
    ranking = reference.ReferenceRanking(case.logits[:5].double(), case.logits[5:].double(), 0.0, reference.ramp)
    values = doubles([1.0, 10.0, 100.0, 1000.0, 5.0])
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

    given = case.logits, case.labels
    result = reference.ranking_loss(*given, lambda r: r.num_false_positives / r.rank, target=target, delta=0)
    assert result.grad_logits.tolist() == [0, -1 / 6, 1 / 6]
    result = reference.ranking_loss(*given, target, delta=0)
    assert result.value.isnan()
    assert result.grad_logits.isnan().all()


def test_nan_that_a_formula_overlooks():
    case = random_case(50, 5)
    extras = {"numbers": torch.tensor([0, 1, NAN, 2, 3])}
    result = reference.ranking_loss(*case[1:3], lambda ranking, numbers: 1 / ranking.rank, extras=extras)
    assert result.value.isnan()
    assert result.rank.isnan().all()
    assert result.grad_extras["numbers"].isnan().all()
    assert result.grad_logits.isnan().equal(case.labels != -1)


def test_wrong_number_of_numbers():
    given = torch.zeros(3), torch.tensor([1, 0, 1])
    calls = {
        "loc_errors": lambda numbers: reference.alrp(*given, numbers),
        "ious": lambda numbers: reference.rank_sort(*given, numbers),
        "numbers": lambda numbers: reference.ranking_loss(*given, lrp_error, extras={"numbers": numbers}),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=f"^{name}: expected one for each of the 2 positives, got 1$"):
            call(torch.zeros(1))
