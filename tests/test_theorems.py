"""What the paper proves of every loss of its kind, and what follows from the definitions of aLRP, on drawn scores with
ties, ramp ends and infinities."""

from itertools import pairwise

import pytest
import torch
from dialect import ALRP, AP, DEPTH, FAMILY, KERNELS, PLAIN, RANK_SORT, Plain, assert_agree, of_case, problems
from dialect.checks import (
    EXACT,
    assert_close,
    assert_same_bits,
    assert_same_results,
    assert_same_sums,
    backends,
    evaluate,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from alrp_triton import alrp_loss

EXAMPLES = 6 if KERNELS else 60
DELTAS = st.sampled_from([1.0, 0.5, 0.1, 0.0, 37.5, 1e-6])
LOC_RANKINGS = st.sampled_from(["sorted", "smooth"])
# Scores whose shifts by whole numbers are exact in float32.
DYADIC = st.integers(-64, 64).map(lambda k: k / 16)

pytestmark = pytest.mark.parametrize("backend", backends())
by_member = pytest.mark.parametrize("member", [AP, RANK_SORT, DEPTH] if KERNELS else FAMILY, ids=repr)
properties = settings(max_examples=EXAMPLES, deadline=None, derandomize=True)


def sums_up(case, member, delta, backend):
    """The results, and for each part of the loss its plain form, with the pairs it is made of."""
    settings = {"loc_ranking": "smooth"} if member is ALRP else {}
    found = of_case(member, case, backend, delta=delta, **settings)
    pairs = Plain(case, delta, member.values(case).tolist())
    return [(part, pairs, sum(found[name].double() for name in part.components), found) for part in PLAIN[member]]


@pytest.mark.thinned(2 if KERNELS else 4)
@by_member
@properties
@given(case=problems(), delta=DELTAS)
def test_theorem_1_the_loss_is_the_sum_of_its_primary_terms(case, delta, member, backend):
    """Errors spread over false positives, by pairs; with those that have none to be spread over."""
    assume(case.num_positives > 0)
    for part, pairs, value, found in sums_up(case, member, delta, backend):
        expected = torch.tensor(part.value(pairs), dtype=torch.float64)
        assert_agree({"sum": value}, {"sum": expected}, 1e-6, part.components)
        # Algorithm 1, of which theorem 2 is a consequence.
        expected = torch.tensor(part.update(pairs), dtype=torch.float64)
        assert_close(part.gradient, found[part.gradient], expected, 1e-6)


@pytest.mark.thinned(2 if KERNELS else 4)
@by_member
@properties
@given(case=problems(), delta=DELTAS)
def test_theorem_2_gradients_balance(case, delta, member, backend):
    """Those of positives and of negatives; where positives are sorted, those of positives among themselves."""
    for part, _, _, found in sums_up(case, member, delta, backend):
        gradient = found[part.gradient].double()
        pos, neg = gradient[case.labels == 1], gradient[case.labels == 0]
        assert (pos.sum() + neg.sum()).abs() <= 1e-6 * pos.abs().sum()
        assert not gradient[case.labels == -1].any()
        if part.among_positives:
            assert not neg.any()
        else:
            assert (pos <= 0).all()
            assert (neg >= 0).all()


@properties
@given(case=problems(), delta=DELTAS, loc_ranking=LOC_RANKINGS)
def test_signs_and_bounds(case, delta, loc_ranking, backend):
    result = evaluate(*case[1:], backend, delta=delta, loc_ranking=loc_ranking)
    assert (result.grad_logits[case.labels == 1] <= 0).all()
    assert (result.grad_logits[case.labels == 0] >= 0).all()
    assert (result.grad_logits[case.labels == -1] == 0).all()
    assert (result.grad_loc_errors >= 0).all()
    assert 0 <= result.cls < 1
    assert (result.rank >= 1).all()
    assert (result.rank <= (case.labels >= 0).sum()).all()
    if loc_ranking == "smooth" and case.num_positives:
        # A mean of weighted means of errors and false positives, each counted as 1.
        assert result.cls + result.loc <= max(1.0, float(case.loc_errors.max())) * (1 + 1e-6)
        # Each positive shares out its LRP error above the target, which is such a mean again.
        assert result.grad_logits[case.labels == 0].sum() <= max(1.0, float(case.loc_errors.max())) * (1 + 1e-6)


@properties
@given(
    case=problems(DYADIC),
    shift=st.integers(-1000, 1000),
    delta=st.sampled_from([1.0, 0.5, 2.0**-4, 0.0, 40.0]),
    loc_ranking=LOC_RANKINGS,
)
def test_only_differences_of_scores_count(case, shift, delta, loc_ranking, backend):
    arguments = {"delta": delta, "loc_ranking": loc_ranking}
    expected = evaluate(*case[1:], backend, **arguments)
    shifted = evaluate(case.logits + shift, *case[2:], backend, **arguments)
    for name, actual, wanted in zip(expected._fields, shifted, expected):
        assert_close(name, actual, wanted, 1e-6)
    if delta != 40.0:
        # With these every knot and every offset is exact.
        assert_same_results(shifted, expected)


@properties
@given(case=problems(DYADIC), exponent=st.integers(-20, 20), delta=st.sampled_from([1.0, 0.5, 0.0]))
def test_scores_and_delta_may_be_scaled_together(case, exponent, delta, backend):
    scale = 2.0**exponent
    expected = evaluate(*case[1:], backend, delta=delta)
    assert_same_results(evaluate(case.logits * scale, *case[2:], backend, delta=delta * scale), expected)


@properties
@given(case=problems(), delta=DELTAS, data=st.data())
def test_permuting_the_negatives_permutes_the_gradient(case, delta, data, backend):
    others = (case.labels != 1).nonzero().squeeze(1)
    order = torch.arange(len(case.logits))
    order[others] = others[data.draw(st.permutations(range(len(others))))]
    expected = evaluate(*case[1:], backend, delta=delta)
    result = evaluate(case.logits[order], case.labels[order], case.loc_errors, backend, delta=delta)
    wanted = expected._replace(grad_logits=expected.grad_logits[order])
    for name, one, other in zip(wanted._fields, result, wanted):
        assert_same_sums(backend, name, one, other)


@properties
@given(case=problems(), delta=DELTAS, loc_ranking=LOC_RANKINGS, data=st.data())
def test_permuting_everything_permutes_the_gradients(case, delta, loc_ranking, data, backend):
    # Of equal positives the order counts in the sorted form.
    positives = case.logits[case.labels == 1]
    assume(loc_ranking == "smooth" or len(positives.unique()) == len(positives))
    order = torch.tensor(data.draw(st.permutations(range(len(case.logits)))), dtype=torch.int64)
    number = torch.full_like(case.labels, -1)
    number[case.labels == 1] = torch.arange(case.num_positives)
    pos_order = number[order][case.labels[order] == 1]
    arguments = {"delta": delta, "loc_ranking": loc_ranking}
    expected = evaluate(*case[1:], backend, **arguments)
    result = evaluate(case.logits[order], case.labels[order], case.loc_errors[pos_order], backend, **arguments)
    wanted = expected._replace(
        rank=expected.rank[pos_order],
        grad_logits=expected.grad_logits[order],
        grad_loc_errors=expected.grad_loc_errors[pos_order],
    )
    # P-sized sums in another order: float64 rounding, which float32 hardly ever shows.
    for name, one, other in zip(wanted._fields, result, wanted):
        assert_close(name, one, other, 1.5e-7 if backend in EXACT else 1e-6)


@properties
@given(case=problems(), delta=DELTAS, value=st.floats(width=32), loc_ranking=LOC_RANKINGS)
def test_ignored_logits_might_as_well_not_be_there(case, delta, value, loc_ranking, backend):
    arguments = {"delta": delta, "loc_ranking": loc_ranking}
    ignored = case.labels == -1
    result = evaluate(case.logits.masked_fill(ignored, value), *case[2:], backend, **arguments)
    assert not result.grad_logits[ignored].any()
    without = evaluate(case.logits[~ignored], case.labels[~ignored], case.loc_errors, backend, **arguments)
    kept = result._replace(grad_logits=result.grad_logits[~ignored])
    for name, one, other in zip(kept._fields, kept, without):
        assert_same_sums(backend, name, one, other)


@properties
@given(case=problems(), delta=DELTAS, cuts=st.lists(st.integers(0, 24), max_size=4), loc_ranking=LOC_RANKINGS)
def test_levels_are_ranked_together(case, delta, cuts, loc_ranking, backend):
    arguments = {"delta": delta, "loc_ranking": loc_ranking, "backend": backend}
    whole = evaluate(*case[1:], **arguments)
    edges = sorted({0, len(case.logits), *(cut for cut in cuts if cut <= len(case.logits))})
    parts = [slice(a, b) for a, b in pairwise(edges)] or [slice(0, 0)]
    logits = [case.logits[part].clone().requires_grad_() for part in parts]
    errors = case.loc_errors.clone().requires_grad_()
    cls, loc, rank = alrp_loss(logits, [case.labels[part] for part in parts], errors, **arguments)
    gradient = torch.cat(torch.autograd.grad(cls, logits, retain_graph=True))
    (grad_errors,) = torch.autograd.grad(loc, errors)
    for name, one, other in zip(whole._fields, (cls.detach(), loc.detach(), rank, gradient, grad_errors), whole):
        assert_same_sums(backend, name, one, other)


@properties
@given(case=problems(max_size=12), delta=DELTAS, row=st.integers(0, 11))
def test_raising_a_positive_never_raises_its_own_rank(case, delta, row, backend):
    row = row % max(case.num_positives, 1)
    assume(case.num_positives > 0)
    at = (case.labels == 1).nonzero()[row]
    raised = case.logits.clone()
    raised[at] += 0.25
    before, after = (evaluate(x, *case[2:], backend, delta=delta).rank[row] for x in (case.logits, raised))
    assert after <= before * (1 + 2e-7)


@pytest.mark.parametrize("delta", [1.0, 0.0])
def test_weak_duplicates_share_one_gradient(delta, backend):
    """Equal negatives get equal bits, and equal positives too, where their errors are equal."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20, generator=generator).repeat(5)
    labels = torch.tensor([1, 0, 0, 0, 1] * 4).repeat(5)
    gradient = evaluate(logits, labels, torch.full((40,), 0.3), backend, delta=delta).grad_logits.view(5, 20)
    assert_same_bits("gradients", gradient, gradient[:1].expand(5, 20))
