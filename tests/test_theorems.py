"""What the paper proves of every loss of its kind, and what follows from the definitions of aLRP, on drawn scores with
ties, ramp ends and infinities."""

import pytest
import torch
from dialect import (
    ALRP,
    AP,
    DEPTH,
    EXACT,
    FAMILY,
    KERNELS,
    PLAIN,
    RANK_SORT,
    Case,
    Plain,
    assert_agree,
    assert_close,
    assert_same_bits,
    assert_same_results,
    assert_same_sums,
    by_backend,
    evaluate,
    of_case,
    problems,
    repeatable,
)
from hypothesis import assume, given
from hypothesis import strategies as st

DELTAS = st.sampled_from([1.0, 0.5, 0.1, 0.0, 37.5, 1e-6])
LOC_RANKINGS = st.sampled_from(["sorted", "smooth"])
# Scores whose shifts by whole numbers are exact in float32.
DYADIC = st.integers(-64, 64).map(lambda k: k / 16)

pytestmark = [by_backend, pytest.mark.thinned(2)]
by_member = pytest.mark.parametrize("member", [AP, RANK_SORT, DEPTH] if KERNELS else FAMILY, ids=repr)
properties = repeatable(max_examples=6 if KERNELS else 60)


def sums_up(case, member, delta, backend):
    """The results, and for each part of the loss its plain form, with the pairs it is made of."""
    option = {"loc_ranking": "smooth"} if member is ALRP else {}
    found = of_case(member, case, backend, delta=delta, **option)
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
    cls, loc, rank, by_logits, by_values = of_case(ALRP, case, backend, delta=delta, loc_ranking=loc_ranking).values()
    assert (by_logits[case.labels == 1] <= 0).all()
    assert (by_logits[case.labels == 0] >= 0).all()
    assert (by_logits[case.labels == -1] == 0).all()
    assert (by_values >= 0).all()
    assert 0 <= cls < 1
    assert (rank >= 1).all()
    assert (rank <= (case.labels >= 0).sum()).all()
    if loc_ranking == "smooth" and case.num_positives:
        # A mean of weighted means of errors and false positives, each counted as 1.
        assert cls + loc <= max(1.0, float(case.loc_errors.max())) * (1 + 1e-6)
        # Each positive shares out its LRP error above the target, which is such a mean again.
        assert by_logits[case.labels == 0].sum() <= max(1.0, float(case.loc_errors.max())) * (1 + 1e-6)


@properties
@given(
    case=problems(DYADIC),
    shift=st.integers(-1000, 1000),
    delta=st.sampled_from([1.0, 0.5, 2.0**-4, 0.0, 40.0]),
    loc_ranking=LOC_RANKINGS,
)
def test_only_differences_of_scores_count(case, shift, delta, loc_ranking, backend):
    arguments = {"delta": delta, "loc_ranking": loc_ranking}
    expected = of_case(ALRP, case, backend, **arguments)
    shifted = of_case(ALRP, case._replace(logits=case.logits + shift), backend, **arguments)
    for name, tensor in shifted.items():
        assert_close(name, tensor, expected[name], 1e-6)
    if delta != 40.0:
        # With these every knot and every offset is exact.
        assert_same_results(shifted, expected)


@properties
@given(case=problems(DYADIC), exponent=st.integers(-20, 20), delta=st.sampled_from([1.0, 0.5, 0.0]))
def test_scores_and_delta_may_be_scaled_together(case, exponent, delta, backend):
    scaled = case._replace(logits=case.logits * 2.0**exponent)
    found = of_case(ALRP, scaled, backend, delta=delta * 2.0**exponent)
    assert_same_results(found, of_case(ALRP, case, backend, delta=delta))


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
    permuted = Case("permuted", case.logits[order], case.labels[order], case.loc_errors[pos_order])
    found, expected = (of_case(ALRP, one, backend, delta=delta, loc_ranking=loc_ranking) for one in (permuted, case))
    # P-sized sums in another order: float64 rounding, which float32 hardly ever shows.
    for name, tensor in expected.items():
        place = order if name.endswith("by logits") else pos_order if tensor.dim() else ...
        assert_close(name, found[name], tensor[place], 1.5e-7 if backend in EXACT else 1e-6)


@properties
@given(case=problems(), delta=DELTAS, value=st.floats(width=32), loc_ranking=LOC_RANKINGS)
def test_ignored_logits_might_as_well_not_be_there(case, delta, value, loc_ranking, backend):
    arguments = {"delta": delta, "loc_ranking": loc_ranking}
    ignored = case.labels == -1
    found = of_case(ALRP, case._replace(logits=case.logits.masked_fill(ignored, value)), backend, **arguments)
    assert not found["cls by logits"][ignored].any()
    without = case._replace(logits=case.logits[~ignored], labels=case.labels[~ignored])
    for name, tensor in of_case(ALRP, without, backend, **arguments).items():
        assert_same_sums(backend, name, found[name][~ignored] if name.endswith("by logits") else found[name], tensor)


@properties
@given(case=problems(max_size=12), delta=DELTAS, row=st.integers(0, 11))
def test_raising_a_positive_never_raises_its_own_rank(case, delta, row, backend):
    assume(case.num_positives > 0)
    row = row % case.num_positives
    raised = case.logits.clone()
    raised[(case.labels == 1).nonzero()[row]] += 0.25
    cases = case, case._replace(logits=raised)
    before, after = (of_case(ALRP, one, backend, delta=delta)["rank"][row] for one in cases)
    assert after <= before * (1 + 2e-7)


@pytest.mark.parametrize("delta", [1.0, 0.0])
def test_weak_duplicates_share_one_gradient(delta, backend):
    """Equal negatives get equal bits, and equal positives too, where their errors are equal."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20, generator=generator).repeat(5)
    labels = torch.tensor([1, 0, 0, 0, 1] * 4).repeat(5)
    found = evaluate(ALRP, logits, labels, torch.full((40,), 0.3), backend, delta=delta)
    gradient = found["cls by logits"].view(5, 20)
    assert_same_bits("gradients", gradient, gradient[:1].expand(5, 20))
