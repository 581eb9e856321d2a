"""The contract's table of edge cases, row by row, on every backend."""

import pytest
import torch
from dialect import INF, KERNELS, NAN, Case, all_cases, random_case
from dialect.checks import (
    assert_close,
    assert_rounded,
    assert_same_bits,
    assert_same_results,
    backends,
    evaluate,
    judge,
)

from alrp_triton import alrp_loss

pytestmark = pytest.mark.parametrize("backend", backends())

EMPTY = torch.empty(0)


def assert_zero_and_attached(logits, labels, backend, **arguments):
    x = [level.clone().requires_grad_() for level in logits]
    errors = torch.empty(0, requires_grad=True)
    cls, loc, rank = alrp_loss(x, labels, errors, backend=backend, **arguments)
    assert cls.item() == 0
    assert loc.item() == 0
    assert cls.shape == loc.shape == ()
    assert rank.shape == (0,)
    for component in (cls, loc):
        gradients = torch.autograd.grad(component, x, retain_graph=True)
        for gradient, level in zip(gradients, x):
            assert gradient.shape == level.shape
            assert not gradient.any()
    (cls + loc).backward()
    assert all(level.grad is not None for level in x)
    # The errors of no boxes may come without a graph at all.
    loc = alrp_loss(x, labels, EMPTY, backend=backend, **arguments).loc
    loc.backward()


@pytest.mark.thinned(2 if KERNELS else 1)
@pytest.mark.parametrize("delta", [1.0, 0.0])
@pytest.mark.parametrize("loc_ranking", ["sorted", "smooth"])
def test_no_positives(loc_ranking, delta, backend):
    logits = torch.tensor([[1.0, -INF, INF], [-3.0, 0.0, 5.0]])
    arguments = {"delta": delta, "loc_ranking": loc_ranking}
    assert_zero_and_attached([logits], [torch.zeros(2, 3, dtype=torch.int64)], backend, **arguments)
    assert_zero_and_attached([logits], [torch.tensor([3, 3])], backend, **arguments)
    assert_zero_and_attached([logits, logits + 1], [torch.tensor([3, -1]), torch.tensor([3, 3])], backend, **arguments)


@pytest.mark.parametrize("delta", [1.0, 0.0])
def test_no_negatives(delta, backend):
    case = random_case(30, 30, ignored=0)
    ignored = case._replace(
        logits=torch.cat([case.logits, torch.tensor([100.0, NAN])]),
        labels=torch.cat([case.labels, torch.tensor([-1, -1])]),
    )
    for one in (case, ignored):
        result = evaluate(*one[1:], backend, delta=delta)
        assert result.cls == 0
        assert not result.grad_logits.any()
        assert_close("loc", result.loc, judge(one, delta=delta).loc, 1e-6)
        assert result.loc > 0.1


@pytest.mark.parametrize("shape", [(0,), (0, 80), (0, 4, 80), (3, 0)])
def test_empty_input(shape, backend):
    logits = torch.empty(shape)
    assert_zero_and_attached([logits], [torch.empty(shape, dtype=torch.int64)], backend)
    assert_zero_and_attached([logits], [torch.zeros(shape[:-1], dtype=torch.int64)], backend)
    assert_zero_and_attached([logits, logits], [torch.empty(shape, dtype=torch.uint8)] * 2, backend)


def test_an_empty_level_among_others_changes_nothing(backend):
    case = random_case(60, 6)
    x, hole = case.logits.clone().requires_grad_(), torch.empty(0, 3, requires_grad=True)
    no_labels = torch.empty(0, 3, dtype=torch.int64)
    cls, loc, rank = alrp_loss([hole, x, hole], [no_labels, case.labels, no_labels], case.loc_errors, backend=backend)
    grad, grad_hole = torch.autograd.grad(cls, (x, hole))
    expected = evaluate(*case[1:], backend)
    assert torch.equal(cls.detach(), expected.cls)
    assert torch.equal(loc, expected.loc)
    assert torch.equal(rank, expected.rank)
    assert torch.equal(grad, expected.grad_logits)
    assert grad_hole.shape == hole.shape


@pytest.mark.parametrize("value", [0.0, NAN, INF])
def test_everything_ignored(value, backend):
    logits = torch.full((4, 5), value)
    assert_zero_and_attached([logits], [torch.full((4, 5), -1)], backend)
    assert_zero_and_attached([logits], [torch.full((4,), -1)], backend)
    assert_zero_and_attached([logits], [torch.full((4,), 255, dtype=torch.uint8)], backend, ignore_index=255)


@pytest.mark.thinned(2 if KERNELS else 1)
@pytest.mark.parametrize("delta", [1.0, 0.0])
@pytest.mark.parametrize("loc_ranking", ["sorted", "smooth"])
@pytest.mark.parametrize("where", ["a negative", "a positive", "an error"])
@pytest.mark.parametrize("regime", ["middle", "late"])
def test_nan_that_takes_part_is_never_hidden(regime, where, loc_ranking, delta, backend):
    case = random_case(200, 10, regime)
    logits, errors = case.logits.clone(), case.loc_errors.clone()
    if where == "an error":
        errors[3] = NAN
    else:
        logits[(case.labels == (where == "a positive")).nonzero()[-1]] = NAN
    result = evaluate(logits, case.labels, errors, backend, delta=delta, loc_ranking=loc_ranking)
    assert result.cls.isnan()
    assert result.loc.isnan()
    assert result.rank.isnan().all()
    assert result.grad_logits[case.labels != -1].isnan().all()
    assert result.grad_loc_errors.isnan().all()


@pytest.mark.parametrize("where", ["no positives", "no negatives", "a lone positive"])
def test_nan_is_not_hidden_where_a_part_is_missing(where, backend):
    logits = torch.tensor([NAN, 1.0, 2.0])
    labels = {"no positives": [0, 0, -1], "no negatives": [1, 1, -1], "a lone positive": [1, -1, -1]}[where]
    result = evaluate(logits, torch.tensor(labels), torch.full((labels.count(1),), 0.5), backend)
    assert result.cls.isnan()
    assert result.loc.isnan()
    assert result.grad_logits[torch.tensor(labels) != -1].isnan().all()


@pytest.mark.parametrize("delta", [1.0, 0.0])
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
    assert_same_bits("cls", evaluate(scores, labels, errors, backend, **arguments).cls, torch.tensor(0.0))
    scores[2500] = NAN
    assert evaluate(scores, labels, errors, backend, **arguments).cls.isnan()


@pytest.mark.parametrize("delta", [1.0, 0.0])
@pytest.mark.parametrize("value", [NAN, INF, -INF, 1e30])
def test_ignored_logits_have_no_effect(value, delta, backend):
    case = random_case(300, 12, ignored=0.5)
    expected = evaluate(*case[1:], backend, delta=delta)
    changed = case.logits.masked_fill(case.labels == -1, value)
    assert_same_results(evaluate(changed, *case[2:], backend, delta=delta), expected)
    assert not expected.grad_logits[case.labels == -1].any()


def test_infinite_logits_by_hand(backend):
    # H is 0.5 between equal infinities, else 0 or 1.
    logits = torch.tensor([INF, 0.0, -INF, INF, -INF, 0.5])
    labels = torch.tensor([1, 1, 1, 0, 0, 0])
    errors = torch.tensor([0.2, 0.4, 0.6])
    result = evaluate(logits, labels, errors, backend)
    # False positives: 0.5; 1 + 0.75; 2 + 0.5. Positives above: 0; 1; 2.
    rank = torch.tensor([1.5, 3.75, 5.5])
    assert_close("rank", result.rank, rank, 1e-7)
    assert_close("cls", result.cls, (torch.tensor([0.5, 1.75, 2.5]) / rank).mean(), 1e-7)
    assert_close("loc", result.loc, (torch.tensor([0.2, 0.6, 1.2]) / rank).mean(), 1e-7)
    update = torch.tensor([0.5, 1.75 + 0.2, 2.5 + 0.6]) / rank / 3
    w_inf, w_0, w_minus = (update / torch.tensor([0.5, 1.75, 2.5])).tolist()
    negatives = [0.5 * w_inf + w_0 + w_minus, 0.5 * w_minus, 0.75 * w_0 + w_minus]
    assert_close("grad_logits", result.grad_logits, torch.cat([-update, torch.tensor(negatives)]), 2e-7)


@pytest.mark.thinned(2 if KERNELS else 1)
@pytest.mark.parametrize("delta", [1.0, 0.1, 0.0])
@pytest.mark.parametrize("case", [c for c in all_cases() if "infin" in c.name], ids=lambda case: case.name)
def test_infinite_logits_give_no_nan(case, delta, backend):
    for values in evaluate(*case[1:], backend, delta=delta):
        assert values.isfinite().all()


def test_half_precision_underflows_to_nearest(backend):
    # One positive and 2000 equal negatives: each gradient is 1/2001, about 2^-11.
    labels = torch.zeros(2001, dtype=torch.int64)
    labels[0] = 1
    case = Case("", torch.zeros(2001, dtype=torch.float16), labels, torch.tensor([0.25]))
    expected = judge(case).grad_logits
    for exponent in range(-18, 0, 6 if KERNELS else 1):
        result = evaluate(*case[1:], backend, upstream=2.0**exponent)
        assert_rounded(f"2^{exponent}", result.grad_logits, expected * 2.0**exponent, 1e-7)
        assert result.cls.dtype == torch.float32
    # Below half of the smallest float16, 2^-24, nothing is left.
    assert not evaluate(*case[1:], backend, upstream=2.0**-15).grad_logits[1:].any()
    assert evaluate(*case[1:], backend, upstream=2.0**-13).grad_logits[1:].all()


def test_double_backward_raises(backend):
    """A gradient penalty must not train in silence on a derivative that is not there."""
    case = random_case(50, 5)
    x = case.logits.clone().requires_grad_()
    cls = alrp_loss(x, *case[2:], backend=backend).cls
    (gradient,) = torch.autograd.grad(cls, x, create_graph=True)
    with pytest.raises(RuntimeError):
        (gradient.square().sum() + x.sum()).backward()
