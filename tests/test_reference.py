"""The judge itself: against plain Python, against the general form of Algorithm 1, and against the published code."""

import math

import pytest
import torch
from dialect import FLOAT_MAX, GOLDEN, INF, Case, all_cases, assert_close, load_golden, problems, random_case
from hypothesis import given, settings
from hypothesis import strategies as st

from alrp_triton import reference

TINY = [case for case in all_cases() if len(case.logits) <= 150]


def plain_alrp(case: Case, delta: float, eps: float, smooth: bool):
    """The loss number by number, in Python floats: (cls, loc, rank, d cls / d logits, d loc / d errors).

    Positives that rank alike in the sorted form go by their place: the later one first.
    """
    scores, labels = [float(s) for s in case.logits], case.labels.tolist()
    errors = dict(zip([i for i, label in enumerate(labels) if label == 1], [float(e) for e in case.loc_errors]))
    negatives = [j for j, label in enumerate(labels) if label == 0]

    def h(j, i):
        x = 0.0 if scores[j] == scores[i] else scores[j] - scores[i]
        if delta == 0:
            return 1.0 if x >= 0 else 0.0
        if x <= -delta:
            return 0.0
        return 1.0 if x >= delta else x / (2 * delta) + 0.5

    cls, loc, ranks = 0.0, 0.0, []
    score_gradient, error_gradient = [0.0] * len(scores), dict.fromkeys(errors, 0.0)
    for i in errors:
        false = math.fsum(h(j, i) for j in negatives)
        above = {k: h(k, i) for k in errors if k != i}
        rank = 1 + math.fsum(above.values()) + false
        ranks.append(rank)
        cls += false / rank / len(errors)
        sorted_above = {k: 1.0 for k in errors if (scores[k], k) >= (scores[i], i)}
        counted = {**above, i: 1.0} if smooth else sorted_above
        for k, share in counted.items():
            loc += share * errors[k] / rank / len(errors)
            error_gradient[k] += share / rank / len(errors)
        if false > eps:
            # Equation 10 less equation 13, spread over the false positives.
            excess = (false + math.fsum(share * errors[k] for k, share in above.items())) / rank
            score_gradient[i] -= excess / len(errors)
            for j in negatives:
                score_gradient[j] += excess * h(j, i) / false / len(errors)
    return cls, loc, ranks, score_gradient, list(error_gradient.values())


def assert_plain(case, delta, eps, smooth):
    result = reference.alrp(
        case.logits, case.labels, case.loc_errors, delta=delta, eps=eps, loc_ranking="smooth" if smooth else "sorted"
    )
    for name, actual, expected in zip(result._fields, result, plain_alrp(case, delta, eps, smooth)):
        assert_close(name, actual, torch.tensor(expected, dtype=torch.float64), 1e-13)


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("delta", [1.0, 0.1, 0.0])
@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
def test_agrees_with_plain_python(case, delta, smooth):
    assert_plain(case, delta, 1e-5, smooth)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(problems(), st.sampled_from([2.0, 1.0, 0.5, 1e-3, 0.0]), st.sampled_from([0.0, 1e-5, 0.6]), st.booleans())
def test_agrees_with_plain_python_on_drawn_cases(case, delta, eps, smooth):
    assert_plain(case, delta, eps, smooth)


def test_blocks_of_positives_do_not_show(monkeypatch):
    case = random_case(300, 40)
    whole = reference.alrp(*case[1:])
    monkeypatch.setattr(reference, "_PAIRS_PER_BLOCK", 7 * 300)
    for name, one, other in zip(whole._fields, reference.alrp(*case[1:]), whole):
        assert_close(name, one, other, 1e-14)


def test_ramp_by_hand():
    x = torch.tensor([-INF, -2.0, -1.0, -0.5, 0.0, 0.25, 1.0, 3.0, INF], dtype=torch.float64)
    assert reference.ramp(x, 1.0).tolist() == [0, 0, 0, 0.25, 0.5, 0.625, 1, 1, 1]
    assert reference.ramp(x, 0.25).tolist() == [0, 0, 0, 0, 0.5, 1, 1, 1, 1]
    assert reference.ramp(x, 0.0).tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 1]
    assert reference.ramp(torch.tensor([math.nan]), 0.0).isnan().all()
    assert reference.ramp(torch.tensor([math.nan]), 1.0).isnan().all()


@pytest.mark.parametrize("delta", [5e-324, 1e-320, 1e300, 8e307])
def test_ramp_of_extreme_widths(delta):
    x = torch.tensor([-INF, 0.0, INF], dtype=torch.float64)
    assert reference.ramp(x, delta).tolist() == [0, 0.5, 1]


def test_difference_by_hand():
    s = torch.tensor([-INF, 0.0, FLOAT_MAX, INF], dtype=torch.float64)
    expected = [
        [0, INF, INF, INF],
        [-INF, 0, FLOAT_MAX, INF],
        [-INF, -FLOAT_MAX, 0, INF],
        [-INF, -INF, -INF, 0],
    ]
    assert reference.difference(s, s).tolist() == expected


def pairs(case, delta):
    """H(x_ij) over negatives, ``[P, N]``, and over positives k != i, ``[P, P]``."""
    logits = case.logits.double()
    pos, neg = logits[case.labels == 1], logits[case.labels == 0]
    over_pos = reference.ramp(reference.difference(pos, pos), delta).fill_diagonal_(0)
    return reference.ramp(reference.difference(neg, pos), delta), over_pos


def on_all_logits(case, grad_pos, grad_neg):
    gradient = torch.zeros(len(case.logits), dtype=torch.float64)
    gradient[case.labels == 1], gradient[case.labels == 0] = grad_pos, grad_neg
    return gradient


def interpolated(precision, pos_logits):
    """From the lowest positive upwards, no precision lower than one already seen (of equal scores, in stable order)."""
    order = pos_logits.argsort(stable=True)
    result = torch.empty_like(precision)
    result[order] = precision[order].cummax(0).values
    return result


def ap_by_algorithm_1(case, delta, interpolate, eps=1e-5):
    """AP Loss: what is wrong at positive i is 1 - precision, and nothing should be."""
    h_neg, h_pos = pairs(case, delta)
    false, rank_pos = h_neg.sum(1), 1 + h_pos.sum(1)
    precision = rank_pos / (rank_pos + false)
    if interpolate:
        precision = interpolated(precision, case.logits[case.labels == 1])
    p_j_given_i = torch.where(false[:, None] > eps, h_neg / false[:, None], 0.0)
    primary = (1 - precision)[:, None] * p_j_given_i
    gradients = reference.algorithm_1(primary, torch.zeros_like(primary), case.num_positives)
    return (1 - precision).mean(), on_all_logits(case, *gradients)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden_alrp(path):
    case, golden = load_golden(path)
    result = reference.alrp(*case[1:])
    for name, actual in zip(result._fields, result):
        assert_close(name, actual, golden[f"alrp_{name}"], 1e-6)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden_ap_is_a_case_of_algorithm_1(path):
    case, golden = load_golden(path)
    value, gradient = ap_by_algorithm_1(case, 1.0, interpolate=True)
    assert_close("ap", value, golden["ap"], 1e-6)
    assert_close("ap_grad_logits", gradient, golden["ap_grad_logits"], 1e-6)


def test_interpolation_matters_in_golden_vectors():
    """Else the test above would not tell the two forms of AP apart."""
    case, golden = load_golden(next(path for path in GOLDEN if path.stem == "inverted"))
    value, _ = ap_by_algorithm_1(case, 1.0, interpolate=False)
    assert abs(value - golden["ap"]) > 1e-3 * value


@pytest.mark.parametrize("delta", [1.0, 0.1, 0.0])
@pytest.mark.parametrize("case", [case for case in TINY if case.num_positives], ids=lambda case: case.name)
def test_ap_is_alrp_without_localisation_errors(case, delta):
    """With E = 0, LRP error is 1 - precision and its target is 0: plain AP."""
    value, gradient = ap_by_algorithm_1(case, delta, interpolate=False)
    result = reference.alrp(case.logits, case.labels, torch.zeros(case.num_positives), delta=delta)
    assert_close("value", result.cls, value, 1e-12)
    assert_close("gradient", result.grad_logits, gradient, 1e-12)
    assert result.loc == 0


@pytest.mark.parametrize("delta", [1.0, 0.1, 0.0])
@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
def test_alrp_is_a_case_of_algorithm_1(case, delta):
    """All P x N primary terms and targets of equations 12 and 13 at once."""
    h_neg, h_pos = pairs(case, delta)
    errors = case.loc_errors.double()
    false = h_neg.sum(1)
    rank = 1 + h_pos.sum(1) + false
    lrp, target = (false + errors + h_pos @ errors) / rank, errors / rank
    p_j_given_i = torch.where(false[:, None] > 1e-5, h_neg / false[:, None], 0.0)
    primary = lrp[:, None] * p_j_given_i
    gradients = reference.algorithm_1(primary, target[:, None] * p_j_given_i, max(case.num_positives, 1))
    result = reference.alrp(*case[1:], delta=delta, loc_ranking="smooth")
    assert_close("gradient", result.grad_logits, on_all_logits(case, *gradients), 1e-12)
    # Theorem 1: the primary terms add up to the loss, but for positives without false positives.
    gated = torch.where(false > 1e-5, 0.0, lrp)
    if case.num_positives:
        total = (primary.sum() + gated.sum()) / case.num_positives
        assert_close("loss", result.cls + result.loc, total, 1e-12)


def test_algorithm_1_by_hand():
    primary = torch.tensor([[0.5, 0.25], [1.0, 0.0]])
    target = torch.tensor([[0.25, 0.25], [0.0, 0.5]])
    positives, negatives = reference.algorithm_1(primary, target, 2.0)
    # Updates -0.25, 0 and -1, 0.5.
    assert positives.tolist() == [-0.125, -0.25]
    assert negatives.tolist() == [0.625, -0.25]


def test_wrong_number_of_errors():
    with pytest.raises(ValueError, match=r"^loc_errors: expected"):
        reference.alrp(torch.zeros(3), torch.tensor([1, 0, 1]), torch.zeros(1))
