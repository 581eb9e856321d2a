"""The judge of AP, NDCG and Rank & Sort: against numbers by hand, plain Python, and the published code."""

import math
from typing import NamedTuple

import pytest
import torch
from dialect import GOLDEN, NAN, all_cases, assert_close, load_golden, problems, random_case
from hypothesis import given, settings
from hypothesis import strategies as st

from alrp_triton import reference

TINY = [case for case in all_cases() if len(case.logits) <= 150]
DELTAS = [1.0, 0.5, 0.0]
by_name = pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
by_delta = pytest.mark.parametrize("delta", DELTAS)


def ious(case):
    """Some of them equal."""
    return (4 * case.loc_errors.double()).round() / 4


def ramp(x, delta):
    if delta == 0:
        return 1.0 if x >= 0 else 0.0
    return min(max(x / (2 * delta) + 0.5, 0.0), 1.0)


class Plain(NamedTuple):
    """Pairs of a case, number by number: indices of both kinds, and H(x_ij) by ``[i, j]``."""

    pos: list
    neg: list
    h: dict
    scores: list

    def false(self, i):
        return math.fsum(self.h[i, j] for j in self.neg)

    def true(self, i):
        return 1 + math.fsum(self.h[i, k] for k in self.pos if k != i)

    def spread(self, i, amount, over, gradient, q=None):
        """Algorithm 1: ``amount`` taken from i and given to the others in the proportions of H or ``q``."""
        q = q or self.h
        gradient[i] -= amount
        for j in over:
            gradient[j] += amount * (q[i, j] / math.fsum(q[i, k] for k in over))


def plain(case, delta, f=ramp) -> Plain:
    s, labels = [float(x) for x in case.logits], case.labels.tolist()
    pos, neg = ([i for i, label in enumerate(labels) if label == wanted] for wanted in (1, 0))
    h = {(i, j): f(0.0 if s[j] == s[i] else s[j] - s[i], delta) for i in pos for j in pos + neg}
    return Plain(pos, neg, h, s)


def plain_ap(case, delta, interpolated):
    """1 - precision at each positive, spread over its false positives."""
    p = plain(case, delta)
    precision = {i: p.true(i) / (p.true(i) + p.false(i)) for i in p.pos}
    if interpolated:
        up_to = {i: [k for k in p.pos if (p.scores[k], k) <= (p.scores[i], i)] for i in p.pos}
        precision = {i: max(precision[k] for k in up_to[i]) for i in p.pos}
    gradient = [0.0] * len(p.scores)
    for i in p.pos:
        if p.false(i) > 0:
            p.spread(i, (1 - precision[i]) / len(p.pos), p.neg, gradient)
    value = math.fsum(1 - x for x in precision.values()) / max(len(p.pos), 1)
    return value, [p.true(i) + p.false(i) for i in p.pos], gradient


def plain_ndcg(case, delta):
    """How far each gain is from the best mean gain; the update, from what it would be without negatives."""
    p = plain(case, delta)
    best = math.fsum(1 / math.log2(1 + k) for k in range(1, len(p.pos) + 1))
    value, gradient = 0.0, [0.0] * len(p.scores)
    for i in p.pos:
        gain = 1 / math.log2(1 + p.true(i) + p.false(i))
        value += (best / len(p.pos) - gain) / best
        if p.false(i) > 0:
            p.spread(i, (1 / math.log2(1 + p.true(i)) - gain) / best, p.neg, gradient)
    return value, [p.true(i) + p.false(i) for i in p.pos], gradient


def plain_rank_sort(case, delta, eps):
    """Share of negatives above each positive, and by how much worse the positives above it are than they should be."""
    p = plain(case, delta)
    t = dict(zip(p.pos, ious(case).tolist()))
    ranking, sorting = 0.0, 0.0
    by_ranking, by_sorting = [0.0] * len(p.scores), [0.0] * len(p.scores)

    def mean_error(i, members):
        return math.fsum(p.h[i, k] * (1 - t[k]) for k in members) / math.fsum(p.h[i, k] for k in members)

    for i in p.pos:
        error = p.false(i) / (math.fsum(p.h[i, k] for k in p.pos) + p.false(i)) / len(p.pos)
        ranking += error
        if p.false(i) > eps:
            p.spread(i, error, p.neg, by_ranking)
        error = (mean_error(i, p.pos) - mean_error(i, [k for k in p.pos if t[k] >= t[i]])) / len(p.pos)
        sorting += error
        missorted = [k for k in p.pos if t[k] < t[i]]
        if math.fsum(p.h[i, k] for k in missorted) > eps:
            p.spread(i, error, missorted, by_sorting)
    return ranking, sorting, by_ranking, by_sorting


def assert_all(result, expected, tolerance=1e-12):
    for name, actual, number in zip(result._fields, result, expected):
        number = torch.as_tensor(number, dtype=torch.float64)
        # Gradients to their own size; values to that of 1, since NDCG subtracts from it.
        assert_close(name, actual if number.dim() else actual + 1, number if number.dim() else number + 1, tolerance)


def assert_plain_family(case, delta):
    inputs = case.logits, case.labels
    for interpolated in (True, False):
        result = reference.ap(*inputs, delta=delta, interpolated=interpolated)
        assert_all(result, plain_ap(case, delta, interpolated))
    assert_all(reference.ndcg(*inputs, delta=delta), plain_ndcg(case, delta))
    for eps in (1e-10, 0.6):
        result = reference.rank_sort(*inputs, ious(case), delta=delta, eps=eps)
        assert_all(result, plain_rank_sort(case, delta, eps))


@pytest.mark.thinned(2)
@by_delta
@by_name
def test_agrees_with_plain_python(case, delta):
    assert_plain_family(case, delta)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(problems(), st.sampled_from([2.0, 1.0, 0.5, 0.0]))
def test_agrees_with_plain_python_on_drawn_cases(case, delta):
    assert_plain_family(case, delta)


HAND = torch.tensor([3.0, 4.0, 1.0, NAN, 3.5, 0.0]), torch.tensor([1, 0, 1, -1, 0, 1])


def test_ap_by_hand():
    """Precisions 1/3, 2/4, 3/5 with the step function; the running maximum from below is 3/5 throughout."""
    errors = [2 / 3, 1 / 2, 2 / 5]
    half = sum(errors) / 6
    expected = [-errors[0] / 3, half, -errors[1] / 3, 0, half, -errors[2] / 3]
    assert_all(reference.ap(*HAND, delta=0, interpolated=False), (sum(errors) / 3, [3.0, 4.0, 5.0], expected), 1e-15)
    expected = [-0.4 / 3, 0.2, -0.4 / 3, 0, 0.2, -0.4 / 3]
    assert_all(reference.ap(*HAND, delta=0), (0.4, [3.0, 4.0, 5.0], expected), 1e-15)


def test_ndcg_by_hand():
    best = 1 + 1 / math.log2(3) + 1 / 2
    missing = [1 - 1 / 2, 1 / math.log2(3) - 1 / math.log2(5), 1 / 2 - 1 / math.log2(6)]
    half = sum(missing) / 2 / best
    expected = [-missing[0] / best, half, -missing[1] / best, 0, half, -missing[2] / best]
    assert_all(reference.ndcg(*HAND, delta=0), (sum(missing) / best, [3.0, 4.0, 5.0], expected), 1e-15)


def test_rank_sort_by_hand():
    """The first positive, of the lowest IoU, is above the others: errors 0, 0.3 - 0.1 and 0.3 - 0.2 of sorting."""
    result = reference.rank_sort(*HAND, torch.tensor([0.5, 0.9, 0.7], dtype=torch.float64), delta=0)
    errors = [2 / 3, 2 / 4, 2 / 5]
    half = sum(errors) / 6
    by_ranking = [-errors[0] / 3, half, -errors[1] / 3, 0, half, -errors[2] / 3]
    by_sorting = [0.1, 0, -0.2 / 3, 0, 0, -0.1 / 3]
    assert_all(result, (sum(errors) / 3, 0.1, by_ranking, by_sorting), 1e-15)


def test_rank_sort_counts_a_positive_above_itself():
    """By H(0): half against half a false positive; or one against one with the step function."""
    for delta in (0.5, 0.0):
        result = reference.rank_sort(torch.zeros(2), torch.tensor([0, 1]), torch.ones(1), delta=delta)
        assert_all(result, (0.5, 0.0, [0.5, -0.5], [0.0, 0.0]), 1e-15)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden(path):
    case, golden = load_golden(path)
    result = reference.ap(case.logits, case.labels)
    assert_close("ap", result.value, golden["ap"], 1e-6)
    assert_close("ap_grad_logits", result.grad_logits, golden["ap_grad_logits"], 1e-6)
    result = reference.rank_sort(case.logits, case.labels, golden["rs_ious"])
    assert_close("rs_rank", result.ranking, golden["rs_rank"], 1e-6)
    assert_close("rs_sort", result.sorting, golden["rs_sort"], 1e-6)
    assert_close("rs_grad_logits", result.grad_ranking + result.grad_sorting, golden["rs_grad_logits"], 1e-6)


def test_blocks_of_positives_do_not_show(monkeypatch):
    case = random_case(300, 40)

    def results():
        inputs = case.logits, case.labels
        return reference.ap(*inputs), reference.ndcg(*inputs), reference.rank_sort(*inputs, case.loc_errors)

    whole = results()
    monkeypatch.setattr(reference, "_PAIRS_PER_BLOCK", 7 * 300)
    for one, other in zip(results(), whole):
        assert_all(one, other, 1e-14)


def test_ndcg_of_scikit_learn():
    """Without ties, with the step function."""
    metrics = pytest.importorskip("sklearn.metrics")
    for seed in range(5):
        case = random_case(200, 20, seed=seed, ignored=0)
        score = metrics.ndcg_score(case.labels[None].numpy(), case.logits[None].numpy())
        assert reference.ndcg(case.logits, case.labels, delta=0).value.item() == pytest.approx(1 - score, abs=1e-12)
