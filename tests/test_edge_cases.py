"""The contract's table of edge cases, row by row, for the losses of the family on every backend."""

import pytest
import torch
from dialect import (
    ALRP,
    INF,
    KERNELS,
    NAN,
    RANK_SORT,
    Case,
    all_cases,
    assert_all_nan,
    assert_close,
    assert_right,
    assert_rounded,
    assert_same_bits,
    assert_same_results,
    by_backend,
    by_member_sparing,
    evaluate,
    judge,
    of_case,
    random_case,
)

pytestmark = by_backend
by_delta = pytest.mark.parametrize("delta", [1.0, 0.0])

X = torch.tensor([[1.0, -INF, INF], [-3.0, 0.0, 5.0]])
EMPTY = torch.empty(0, dtype=torch.int64)


def empty(*shape):
    """Without a logit: labels for each, by row, and in two levels."""
    x, by_logit = torch.empty(shape), torch.empty(shape, dtype=torch.int64)
    by_row = torch.zeros(shape[:-1], dtype=torch.int64)
    return [([x], [by_logit]), ([x], [by_row]), ([x, x], [by_logit.byte()] * 2)]


def ignored(value):
    """Logits of that value, all of them ignored."""
    x = torch.full((4, 5), value)
    return [([x], [torch.full((4, 5), -1)]), ([x], [torch.full((4,), -1)])]


WITHOUT_POSITIVES = {
    "negatives": [([X], [torch.zeros(2, 3, dtype=torch.int64)]), ([X], [torch.tensor([3, 3])])],
    "levels": [
        ([X, X + 1], [torch.tensor([3, -1]), torch.tensor([3, 3])]),
        ([X[0], X], [torch.zeros(3).int(), X.int() * 0]),
    ],
    "empty": [*empty(0), *empty(0, 80), *empty(0, 4, 80), *empty(3, 0)],
    "ignored": [*ignored(0.0), *ignored(NAN), *ignored(INF)],
}


@pytest.mark.thinned(2)
@by_member_sparing
@by_delta
@pytest.mark.parametrize("problems", WITHOUT_POSITIVES.values(), ids=WITHOUT_POSITIVES)
def test_no_positives(problems, delta, member, backend):
    """0, attached to the graph, with gradients that are there and 0."""
    for logits, labels in problems:
        given = (logits, labels) if len(logits) > 1 else (logits[0], labels[0])
        found = evaluate(member, *given, torch.empty(0), backend, delta=delta)
        assert not any(tensor.any() for tensor in found.values())
        for component, leaf in member.derivatives:
            assert found[component].shape == ()
            expected = 0 if leaf == "values" else sum(x.numel() for x in logits)
            assert found[f"{component} by {leaf}"].numel() == expected
        # The values of no positives may come without a graph at all.
        leaves = [x.clone().requires_grad_() for x in logits]
        loss = member.loss(leaves, labels, torch.empty(0), backend=backend, delta=delta)
        sum(loss[component] for component in member.components).backward()
        assert all(x.grad.shape == x.shape and not x.grad.any() for x in leaves)


def test_everything_ignored_by_another_index(backend):
    found = evaluate(ALRP, X, torch.full((2,), 255, dtype=torch.uint8), torch.empty(0), backend, ignore_index=255)
    assert not any(tensor.any() for tensor in found.values())


@by_member_sparing
@by_delta
def test_no_negatives(delta, member, backend):
    """No false positives, so no gradient but that of values, and of the order of positives among themselves."""
    case = random_case(30, 30, ignored=0)
    more = torch.cat([case.logits, torch.tensor([100.0, NAN])]), torch.cat([case.labels, torch.tensor([-1, -1])])
    for one in (case, Case("and ignored", *more, case.loc_errors)):
        found = assert_right(member, one, backend, delta=delta)
        assert not found[f"{member.components[0]} by logits"].any()
        if member is ALRP:
            assert found["cls"] == 0
            assert found["loc"] > 0.1
        if member is RANK_SORT:
            assert found["ranking"] == 0
            assert found["sorting by logits"].any()


def test_an_empty_level_among_others_changes_nothing(backend):
    case = random_case(60, 6)
    hole, no_labels = torch.empty(0, 3), torch.empty(0, 3, dtype=torch.int64)
    levels = [hole, case.logits, hole], [no_labels, case.labels, no_labels]
    found = evaluate(ALRP, *levels, case.loc_errors, backend)
    assert_same_results(found, of_case(ALRP, case, backend))


@pytest.mark.thinned(2)
@by_member_sparing
@by_delta
@pytest.mark.parametrize("where", ["a negative", "a positive", "a value"])
@pytest.mark.parametrize("regime", ["middle", "late"])
def test_nan_that_takes_part_is_never_hidden(regime, where, delta, member, backend):
    case = random_case(200, 10, regime)
    logits, values = case.logits.clone(), member.values(case).clone()
    if where == "a value":
        values[3] = NAN
    else:
        logits[(case.labels == (where == "a positive")).nonzero()[-1]] = NAN
    for option in ({}, {"loc_ranking": "smooth"}) if member is ALRP else ({},):
        if where != "a value" or member.takes:
            assert_all_nan(evaluate(member, logits, case.labels, values, backend, delta=delta, **option), case.labels)


@by_member_sparing
@pytest.mark.parametrize("labels", [[0, 0, -1], [1, 1, -1], [1, -1, -1]], ids=str)
def test_nan_is_not_hidden_where_a_part_is_missing(labels, member, backend):
    labels = torch.tensor(labels)
    values = torch.full((int((labels == 1).sum()),), 0.5)
    assert_all_nan(evaluate(member, torch.tensor([NAN, 1.0, 2.0]), labels, values, backend), labels)


@by_delta
@pytest.mark.parametrize("groups", [1, 2])
def test_a_stretch_in_which_nothing_counts(groups, delta, backend):
    """Thousands of scores below all ramps, or that reach ramps of another group alone, and a NaN or none among them."""
    scores = torch.full((4096,), -9.0)
    labels = torch.zeros(4096, dtype=torch.int64)
    scores[:64], labels[:64] = torch.linspace(0, 5, 64), 1
    ids = torch.zeros(4096, dtype=torch.int64)
    if groups == 2:
        ids[2048:], labels[2048:2112], scores[2048:2112], scores[3072:] = 1, 1, 20.0, 5.0
    errors = torch.linspace(0.1, 0.9, int(labels.sum()))
    arguments = {"delta": delta, "groups": ids if groups == 2 else None}
    assert_same_bits("cls", evaluate(ALRP, scores, labels, errors, backend, **arguments)["cls"], torch.tensor(0.0))
    scores[2500] = NAN
    assert evaluate(ALRP, scores, labels, errors, backend, **arguments)["cls"].isnan()


@by_member_sparing
@by_delta
@pytest.mark.parametrize("value", [NAN, INF, -INF, 1e30])
def test_ignored_logits_have_no_effect(value, delta, member, backend):
    case = random_case(300, 12, ignored=0.5)
    expected = of_case(member, case, backend, delta=delta)
    changed = case._replace(logits=case.logits.masked_fill(case.labels == -1, value))
    assert_same_results(of_case(member, changed, backend, delta=delta), expected)
    assert not any(tensor[case.labels == -1].any() for name, tensor in expected.items() if name.endswith("by logits"))


def test_infinite_logits_by_hand(backend):
    # H is 0.5 between equal infinities, else 0 or 1.
    logits = torch.tensor([INF, 0.0, -INF, INF, -INF, 0.5])
    labels = torch.tensor([1, 1, 1, 0, 0, 0])
    found = evaluate(ALRP, logits, labels, torch.tensor([0.2, 0.4, 0.6]), backend)
    # False positives: 0.5; 1 + 0.75; 2 + 0.5. Positives above: 0; 1; 2.
    rank = torch.tensor([1.5, 3.75, 5.5])
    assert_close("rank", found["rank"], rank, 1e-7)
    assert_close("cls", found["cls"], (torch.tensor([0.5, 1.75, 2.5]) / rank).mean(), 1e-7)
    assert_close("loc", found["loc"], (torch.tensor([0.2, 0.6, 1.2]) / rank).mean(), 1e-7)
    update = torch.tensor([0.5, 1.75 + 0.2, 2.5 + 0.6]) / rank / 3
    w_inf, w_0, w_minus = (update / torch.tensor([0.5, 1.75, 2.5])).tolist()
    negatives = [0.5 * w_inf + w_0 + w_minus, 0.5 * w_minus, 0.75 * w_0 + w_minus]
    assert_close("by logits", found["cls by logits"], torch.cat([-update, torch.tensor(negatives)]), 2e-7)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("delta", [1.0, 0.1, 0.0])
@pytest.mark.parametrize("case", [c for c in all_cases() if "infin" in c.name], ids=lambda case: case.name)
def test_infinite_logits_give_no_nan(case, delta, backend):
    for tensor in assert_right(ALRP, case, backend, delta=delta).values():
        assert tensor.isfinite().all()


def test_half_precision_underflows_to_nearest(backend):
    # One positive and 2000 equal negatives: each gradient is 1/2001, about 2^-11.
    labels = torch.zeros(2001, dtype=torch.int64)
    labels[0] = 1
    case = Case("", torch.zeros(2001, dtype=torch.float16), labels, torch.tensor([0.25]))
    expected = judge(ALRP, case)["cls by logits"]
    for exponent in range(-18, 0, 6 if KERNELS else 1):
        found = of_case(ALRP, case, backend, upstream=2.0**exponent)
        assert_rounded(f"2^{exponent}", found["cls by logits"], expected * 2.0**exponent, 1e-7)
    # Below half of the smallest float16, 2^-24, nothing is left.
    assert not of_case(ALRP, case, backend, upstream=2.0**-15)["cls by logits"][1:].any()
    assert of_case(ALRP, case, backend, upstream=2.0**-13)["cls by logits"][1:].all()
