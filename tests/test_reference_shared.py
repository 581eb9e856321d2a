"""What all losses of the judge share: groups, NaN, and what happens without positives or negatives."""

import pytest
import torch
from dialect import FLOAT_MAX, INF, NAN, all_cases, assert_close, problems, random_case
from hypothesis import given, settings
from hypothesis import strategies as st

from alrp_triton import reference

EMPTY = [case for case in all_cases() if len(case.logits) <= 500 and not case.num_positives]
WITHOUT_NEGATIVES = [case for case in all_cases() if case.num_positives and not (case.labels == 0).any()]


def formula(ranking, numbers):
    """Fails or is NaN where there is no positive: it is not to be asked then."""
    assert len(numbers) == len(ranking.rank) > 0
    errors = ranking.num_false_positives + ranking.sums_above(numbers) + ranking.sums_sorted(numbers**2)
    return errors * ranking.running_max(numbers) / ranking.rank / ranking.num_positives.mean()


def general(logits, labels, numbers, **arguments):
    result = reference.ranking_loss(logits, labels, formula, extras={"numbers": numbers}, **arguments)
    return {**result._asdict(), "grad_extras": result.grad_extras["numbers"]}


LOSSES = {
    "alrp": lambda logits, labels, v, **a: reference.alrp(logits, labels, v, **a)._asdict(),
    "ap": lambda logits, labels, v, **a: reference.ap(logits, labels, **a)._asdict(),
    "ndcg": lambda logits, labels, v, **a: reference.ndcg(logits, labels, **a)._asdict(),
    "rank_sort": lambda logits, labels, v, **a: reference.rank_sort(logits, labels, v, **a)._asdict(),
    "general": general,
}
VALUES = ("cls", "loc", "value", "ranking", "sorting")
BY_POSITIVE = ("rank", "grad_loc_errors", "grad_extras")
NAN_PLACES = [
    *((name, place) for name in LOSSES for place in ("a positive", "a negative", "a group without positives")),
    *((name, "a number") for name in ("alrp", "rank_sort", "general")),
]
by_loss = pytest.mark.parametrize("name", LOSSES)


def separate_calls(loss, case, groups, **arguments):
    """The mean over the groups with a positive, each called on its own logits alone."""
    present = groups[case.labels == 1].unique().tolist()
    whole = {}
    for group in present:
        inside = groups == group
        of_positives = inside[case.labels == 1]
        parts = loss(case.logits[inside], case.labels[inside], case.loc_errors[of_positives], **arguments)
        for name, part in parts.items():
            size = () if name in VALUES else of_positives.shape if name in BY_POSITIVE else inside.shape
            total = whole.setdefault(name, torch.zeros(size, dtype=torch.float64))
            place = ... if name in VALUES else of_positives if name in BY_POSITIVE else inside
            total[place] += part if name == "rank" else part / len(present)
    return whole


def assert_results(actual, expected, tolerance=1e-14):
    assert list(actual) == list(expected)
    for name, number in expected.items():
        assert_close(name, actual[name], number, tolerance)


def drawn_groups(case, ids, seed=0):
    choice = torch.randint(len(ids), case.labels.shape, generator=torch.Generator().manual_seed(seed))
    return torch.tensor(ids)[choice]


@pytest.mark.parametrize("ids", [[0, 1], [7], [-(2**40), -1, 3, 2**40], list(range(60))], ids=["2", "1", "any", "60"])
@pytest.mark.parametrize("delta", [1.0, 0.0])
@by_loss
def test_groups_are_the_mean_of_separate_calls(name, delta, ids):
    case = random_case(300, 30, "middle", seed=5)
    groups = drawn_groups(case, ids)
    if len(ids) == 60:  # some have no positive, and so receive nothing
        alone = ~torch.isin(groups, groups[case.labels == 1])
        assert (alone & (case.labels == 0)).any()
        for gradient, x in LOSSES[name](*case[1:], delta=delta, groups=groups).items():
            assert gradient in VALUES + BY_POSITIVE or not x[alone].any()
    expected = separate_calls(LOSSES[name], case, groups, delta=delta)
    assert_results(LOSSES[name](*case[1:], delta=delta, groups=groups), expected)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(problems(), st.lists(st.integers(-2, 2), min_size=1, max_size=5), st.sampled_from([1.0, 0.0]))
def test_groups_of_drawn_cases(case, ids, delta):
    groups = drawn_groups(case, ids)
    for loss in LOSSES.values():
        if case.num_positives:
            expected = separate_calls(loss, case, groups, delta=delta)
            assert_results(loss(*case[1:], delta=delta, groups=groups), expected)


def test_groups_by_hand():
    """Average precisions: 1 - 1/2 with one group id, 1 - 1/3 with the other, whose gradients are halved."""
    logits, labels = torch.tensor([0.0, 1.0, 0.0, 1.0, 2.0, 9.0]), torch.tensor([1, 0, 1, 0, 0, 0])
    result = reference.ap(logits, labels, delta=0, groups=torch.tensor([5, 5, -5, -5, -5, 0]))
    expected = torch.tensor([-1 / 4, 1 / 4, -1 / 3, 1 / 6, 1 / 6, 0], dtype=torch.float64)
    assert result.value.item() == pytest.approx((1 / 2 + 2 / 3) / 2, abs=1e-15)
    assert result.rank.tolist() == [2, 3]
    assert_close("grad_logits", result.grad_logits, expected, 1e-15)


@by_loss
def test_one_group_is_no_group(name):
    case = random_case(200, 20)
    expected = LOSSES[name](*case[1:])
    assert_results(LOSSES[name](*case[1:], groups=torch.full((200,), -9)), expected, 0)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("delta", [1.0, 0.0])
@pytest.mark.parametrize(("name", "place"), NAN_PLACES)
def test_nan_is_everywhere(name, delta, place, grouped):
    case = random_case(200, 20, seed=1, ignored=0.2)
    labels, logits, numbers = case.labels, case.logits.clone(), case.loc_errors.clone()
    groups = drawn_groups(case, [3, 4]) if grouped else None
    if place == "a number":
        numbers[7] = NAN
    else:
        at = (labels == (1 if place == "a positive" else 0)).nonzero()[5]
        logits[at] = NAN
        if place == "a group without positives" and grouped:
            groups[at] = 99
    ignored = labels == -1
    for key, x in LOSSES[name](logits, labels, numbers, delta=delta, groups=groups).items():
        if key in VALUES + BY_POSITIVE:
            assert x.isnan().all(), key
        else:
            assert x[~ignored].isnan().all(), key
            assert (x[ignored] == 0).all(), key


def test_nan_that_a_formula_overlooks():
    case = random_case(50, 5)
    extras = {"numbers": torch.tensor([0, 1, NAN, 2, 3])}
    result = reference.ranking_loss(*case[1:3], lambda ranking, numbers: 1 / ranking.rank, extras=extras)
    assert result.value.isnan()
    assert result.rank.isnan().all()
    assert result.grad_extras["numbers"].isnan().all()
    assert result.grad_logits.isnan().equal(case.labels != -1)


@by_loss
def test_nan_that_is_ignored_has_no_effect(name):
    case = random_case(200, 20, ignored=0.2)
    poisoned = case.logits.masked_fill(case.labels == -1, NAN)
    assert_results(LOSSES[name](poisoned, *case[2:]), LOSSES[name](*case[1:]), 0)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("case", EMPTY, ids=lambda case: case.name)
@by_loss
def test_without_positives(name, case, grouped):
    groups = drawn_groups(case, [3, 4]) if grouped else None
    for key, x in LOSSES[name](*case[1:], groups=groups).items():
        size = () if key in VALUES else (0,) if key in BY_POSITIVE else case.logits.shape
        assert x.shape == size
        assert x.dtype == torch.float64
        assert (x == 0).all(), key


@by_loss
def test_nan_without_positives(name):
    logits, labels = torch.tensor([1.0, NAN, 0.0]), torch.tensor([0, 0, -1])
    for key, x in LOSSES[name](logits, labels, torch.empty(0)).items():
        if key in VALUES:
            assert x.isnan(), key
        elif key not in BY_POSITIVE:
            assert x.isnan().tolist() == [True, True, False], key


@pytest.mark.parametrize("case", WITHOUT_NEGATIVES, ids=lambda case: case.name)
@pytest.mark.parametrize("delta", [1.0, 0.0])
def test_without_negatives(case, delta):
    for name in ("alrp", "ap", "ndcg", "rank_sort"):
        result = LOSSES[name](*case[1:], delta=delta)
        for key in ("cls", "ranking") + (("value",) if delta == 0 or name == "ap" else ()):
            # NDCG subtracts from 1, and counts a positive for half above its equals unless delta is 0.
            assert abs(result.get(key, 0)) <= 1e-15, key
        for key in ("grad_logits", "grad_ranking"):
            assert not result.get(key, torch.zeros(1)).any(), key


def test_infinities_by_hand():
    """Two positives at either end, a negative at each end and one between; equal infinities count 1/2."""
    logits, labels = torch.tensor([INF, -INF, INF, FLOAT_MAX, -INF]), torch.tensor([1, 1, 0, 0, 0])
    result = reference.ap(logits, labels, interpolated=False)
    assert result.rank.tolist() == [1.5, 4.5]
    errors = [0.5 / 1.5, 2.5 / 4.5]
    of_low = errors[1] / 2 / 2.5
    expected = [-errors[0] / 2, -errors[1] / 2, errors[0] / 2 + of_low, of_low, of_low / 2]
    assert_close("grad_logits", result.grad_logits, torch.tensor(expected, dtype=torch.float64), 1e-15)


@pytest.mark.parametrize("name", ["alrp", "rank_sort", "general"])
def test_wrong_number_of_numbers(name):
    argument = {"alrp": "loc_errors", "rank_sort": "ious", "general": "numbers"}[name]
    with pytest.raises(ValueError, match=f"^{argument}: expected one for each of the 2 positives, got 1$"):
        LOSSES[name](torch.zeros(3), torch.tensor([1, 0, 1]), torch.zeros(1))
