"""Several rankings in one call: the mean over the groups of what separate calls give, for every loss of the family."""

import pytest
import torch
from dialect import (
    ALRP,
    APE,
    EXACT,
    GROUPED,
    INF,
    KERNELS,
    NAN,
    NDCG,
    RANK_SORT,
    WEIGHTED,
    Case,
    all_cases,
    assert_agree,
    assert_all_nan,
    assert_close,
    assert_right,
    assert_same_bits,
    assert_same_results,
    by_backend,
    by_engine_backend,
    by_grouped,
    by_some_grouped,
    draw_groups,
    engine_backends,
    evaluate,
    grouped_case,
    judge,
    of_case,
    problems,
    random_case,
    repeatable,
    separately,
)
from hypothesis import given
from hypothesis import strategies as st

by_delta = pytest.mark.parametrize("delta", [0.5] if KERNELS else [0.5, 0.0])

HUGE = 2**40


@pytest.mark.thinned(3)
@by_backend
@by_some_grouped
@repeatable(max_examples=2 if KERNELS else 40)
@given(
    case=problems(),
    delta=st.sampled_from([1.0, 0.5, 0.1, 0.0, 37.5]),
    ids=st.lists(st.sampled_from([-HUGE, -3, 0, 1, 2, HUGE]), min_size=24, max_size=24),
)
def test_drawn_groups_are_separate_calls(case, delta, ids, member, backend):
    groups = torch.tensor(ids)[: len(case.logits)]
    found = of_case(member, case, backend, groups=groups, delta=delta)
    expected = separately(member, case, groups, backend, delta=delta)
    if expected:
        assert_agree(found, expected)
    else:
        assert not any(tensor.any() for tensor in found.values())


def combinations():
    """Every case with every loss on every backend; where kernels run each with some."""
    cases = all_cases()
    deltas = [1.0, 0.1, 0.0]
    turns = [
        (case, member, backend, deltas) for case in cases for member in GROUPED[:5] for backend in engine_backends()
    ]
    if KERNELS:
        small = [case for case in cases if 10 < len(case.logits) <= 400]
        turns = [
            (case, GROUPED[i % 5], "pairwise" if i % 3 == 0 else "triton", [deltas[i // 5 % 3]])
            for i, case in enumerate(small)
        ]
    return [pytest.param(*turn, id=f"{turn[0].name}-{turn[1]}-{turn[2]}") for turn in turns]


@pytest.mark.thinned(8 if KERNELS else 14)
@pytest.mark.parametrize(("case", "member", "backend", "deltas"), combinations())
def test_every_case_in_three_groups(case, member, backend, deltas):
    """Against the reference, which has groups of its own; scores tie across groups, and some are infinite."""
    for delta in deltas:
        assert_right(member, case, backend, delta=delta, groups=draw_groups(case))


@by_backend
@by_delta
@pytest.mark.parametrize("loc_ranking", ["sorted", "smooth"])
def test_alrp_by_either_ranking_of_positives(loc_ranking, delta, backend):
    case, groups = grouped_case()
    arguments = {"delta": delta, "loc_ranking": loc_ranking}
    found = assert_right(ALRP, case, backend, groups=groups, **arguments)
    assert_agree(found, separately(ALRP, case, groups, backend, **arguments))


@by_engine_backend
@by_delta
@by_some_grouped
def test_a_group_is_not_touched_by_the_others(member, delta, backend):
    """In integer-exact backends bit for bit; with four groups a mean is exact, too."""
    case, groups = grouped_case()
    found = of_case(member, case, backend, groups=groups, delta=delta)
    alone = separately(member, case, groups, backend, constant=True, delta=delta)
    for name, expected in alone.items():
        if backend in EXACT and expected.dim():
            assert_same_bits(name, found[name], expected)
    assert_agree(found, alone)


@by_backend
@by_delta
@by_some_grouped
def test_one_group_is_no_groups(member, delta, backend):
    """But for the last bit: scans of groups add in another order."""
    for dtype, tolerance in [(torch.float32, 2e-7), (torch.float64, 1e-14)][: 1 if KERNELS else 2]:
        case = random_case(150, 20, dtype=dtype)
        expected = of_case(member, case, backend, delta=delta)
        for groups in (torch.zeros(150, dtype=torch.int8), torch.tensor(-HUGE).expand(150)):
            found = of_case(member, case, backend, delta=delta, groups=groups)
            for name, tensor in found.items():
                assert_close(name, tensor, expected[name], tolerance if backend in EXACT else 1e-6)


@by_backend
@by_some_grouped
def test_each_positive_may_have_a_group_of_its_own(member, backend):
    case = random_case(120, 17, ignored=0)
    groups = torch.arange(120) % 17
    groups[case.labels == 1] = torch.randperm(17, generator=torch.Generator().manual_seed(0))
    found = assert_right(member, case, backend, groups=groups)
    if not KERNELS:
        assert_agree(found, separately(member, case, groups, backend))
    if member is RANK_SORT:
        assert found["sorting"] == 0
        assert not found["sorting by logits"].any()


@by_backend
@by_delta
@by_some_grouped
def test_groups_without_positives_or_without_negatives(member, delta, backend):
    case, groups = grouped_case(160, 16)
    # Group 1 has no positives, group 2 no negatives; 3 is ignored altogether.
    case.labels[(groups == 1) & (case.labels == 1)] = 0
    case.labels[(groups == 2) & (case.labels == 0)] = -1
    case.labels[groups == 3] = -1
    case = case._replace(loc_errors=case.loc_errors[: int((case.labels == 1).sum())])
    found = assert_right(member, case, backend, groups=groups, delta=delta)
    assert_agree(found, separately(member, case, groups, backend, delta=delta))
    for name, tensor in found.items():
        if name.endswith("by logits"):
            assert not tensor[(groups == 1) | (groups == 3)].any()
            # The order of positives is all that there is to gain without negatives.
            assert not tensor[groups == 2].any() or name == "sorting by logits"


@by_backend
@by_grouped
def test_no_positives_in_any_group(member, backend):
    logits, groups = torch.tensor([[1.0, -INF, INF], [-3.0, 0.0, 5.0]]), torch.tensor([4, -4])
    for labels in (torch.tensor([3, 3]), torch.tensor([-1, -1]), torch.zeros(2, 3, dtype=torch.int64)):
        found = evaluate(member, logits, labels, torch.empty(0), backend, groups=groups)
        assert not any(tensor.any() for tensor in found.values())
    empty = torch.empty(0, 3)
    found = evaluate(member, empty, torch.empty(0, dtype=torch.int64), torch.empty(0), backend, groups=groups[:0])
    assert not any(tensor.any() for tensor in found.values())


@by_backend
@by_some_grouped
@pytest.mark.parametrize("where", ["a positive", "a negative", "a group without positives", "a value"])
def test_nan_in_any_group_poisons_all(where, member, backend):
    case, groups = grouped_case(90, 9, ids=(0, 1, 2))
    case.labels[(groups == 2) & (case.labels == 1)] = 0
    case = case._replace(loc_errors=case.loc_errors[: int((case.labels == 1).sum())])
    values = member.values(case).clone()
    if where == "a value":
        if not member.takes:
            return
        values[-1] = NAN
    else:
        label, group = {"a positive": (1, 0), "a negative": (0, 1), "a group without positives": (0, 2)}[where]
        case.logits[((case.labels == label) & (groups == group)).nonzero()[0]] = NAN
    for delta in [0.5] if KERNELS else [0.5, 0.0]:
        found = evaluate(member, case.logits, case.labels, values, backend, groups=groups, delta=delta)
        assert_all_nan(found, case.labels)


@by_backend
@by_some_grouped
def test_ignored_logits_have_no_effect_and_no_group(member, backend):
    case, groups = grouped_case(120, 12)
    case = case._replace(labels=case.labels.masked_fill(torch.arange(120) % 5 == 0, -1))
    case = case._replace(loc_errors=case.loc_errors[: int((case.labels == 1).sum())])
    expected = of_case(member, case, backend, groups=groups)
    ignored = case.labels == -1
    changed = case._replace(logits=case.logits.masked_fill(ignored, NAN))
    for other in (groups, groups.masked_fill(ignored, 99)):
        assert_same_results(of_case(member, changed, backend, groups=other), expected)


@by_backend
@by_delta
@by_some_grouped
def test_scores_tie_across_groups(member, delta, backend):
    """Three groups with the same scores, some infinite: each gets a third of what one would, to the bit."""
    scores = torch.tensor([0.5, 0.0, -0.5, INF, -INF, 0.5, 0.0, -0.25, INF, -INF, 0.5])
    labels = torch.tensor([1, 1, 1, 1, 1, 0, 0, 0, 0, 0, -1])
    values = torch.tensor([0.25, 0.75, 0.5, 1.0, 0.0])
    one = Case("one", scores, labels, values)
    three = Case("three", scores.repeat(3), labels.repeat(3), values.repeat(3))
    groups = torch.tensor([7, -HUGE, 8]).repeat_interleave(11)
    found = of_case(member, three, backend, groups=groups, delta=delta)
    expected = of_case(member, one, backend, delta=delta)
    for name, wanted in expected.items():
        if wanted.dim() == 0:
            assert_agree({name: found[name]}, {name: wanted})
            continue
        parts = found[name].view(3, -1)
        if backend != "pairwise":  # which sums strips of logits in float32, whatever their groups
            assert_same_bits(name, parts, parts[:1].expand_as(parts))
        assert_close(name, parts[0], wanted if name == "rank" else wanted / 3, 1e-6)


@pytest.mark.thinned(2)
@by_backend
@by_some_grouped
def test_few_false_positives_beside_a_crowd(member, backend):
    """One group's negatives hardly reach its ramps, the other's fill them; neither loses digits to the other."""
    crowd = 1000 if KERNELS else 1_000_000
    generator = torch.Generator().manual_seed(0)
    few = torch.tensor([2.0, 2.5, 3.0, 1.0001, 1.0 - 1e-3, -5.0])
    logits = torch.cat([few, torch.randn(crowd, generator=generator) / 4 + 2])
    labels = torch.zeros(len(logits), dtype=torch.int64)
    labels[[0, 1, 2, 10, 20, 30]] = 1
    groups = (torch.arange(len(logits)) >= 6).long()
    case = Case("", logits, labels, torch.tensor([0.25, 0.75, 0.5, 0.25, 0.5, 1.0]))
    few_alone = Case("", logits[:6], labels[:6], case.loc_errors[:3])
    alone, exact = of_case(member, few_alone, backend, delta=1.0), judge(member, few_alone, delta=1.0)
    name = f"{member.components[0]} by logits"
    # Of too few false positives the weighted loss sends nothing, nor does a positive whose IoU is 0 in APE Loss.
    assert exact[name].any() != (member in (WEIGHTED, APE))
    for ids in [(0, 1), (1, 0)]:
        found = of_case(member, case, backend, groups=torch.tensor(ids)[groups], delta=1.0)
        assert_close(name, found[name][:6], alone[name] / 2, 1e-6)
        assert_close(name, found[name][:6], exact[name] / 2, 1e-6)


@by_backend
@by_some_grouped
@pytest.mark.parametrize("scale", [1.0] if KERNELS else [1.0, 1e9, 2.0**-80])
def test_groups_far_from_each_other(scale, member, backend):
    """The axis of scores is shared; gaps between groups, or of one group within another's, must not show."""
    case, groups = grouped_case(120, 12)
    case = case._replace(logits=(case.logits + groups * torch.tensor([0.0, 1e4, -1e6, 3e7])[groups]) * scale)
    found = assert_right(member, case, backend, groups=groups, delta=0.5 * scale)
    assert_agree(found, separately(member, case, groups, backend, delta=0.5 * scale))


@by_backend
def test_upstream_gradient_goes_into_the_mean(backend):
    case, groups = grouped_case(120, 12)
    case = case._replace(logits=case.logits.half())
    expected = judge(NDCG, case, groups=groups)["loss by logits"]
    found = of_case(NDCG, case, backend, groups=groups, upstream=2.0**-12)
    assert_agree({"loss by logits": found["loss by logits"]}, {"loss by logits": expected * 2.0**-12})
