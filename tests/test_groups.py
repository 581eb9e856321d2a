"""Several rankings in one call: the mean over the groups of what separate calls give, for every loss of the family."""

import importlib

import pytest
import torch
from cases import INF, INTERPRETED, NAN, Case, all_cases, problems, random_case, random_labels
from checks import EXACT, assert_close, assert_same_bits, assert_split_alike, backends, engine_backends
from family import ALRP, AP, DEPTH, FAMILY, NDCG, RANK_SORT, WEIGHTED, Results, assert_agree, evaluate, judge, of_case
from hypothesis import given, settings
from hypothesis import strategies as st

from alrp_triton import ALRPLoss, alrp_loss
from alrp_triton.engine import positives
from alrp_triton.engine.backends import search, tables

# By name, since ``backends.torch`` is PyTorch itself, which that package imports.
torch_backend = importlib.import_module("alrp_triton.engine.backends.torch")

MEMBERS = (ALRP, AP, NDCG, RANK_SORT, DEPTH, WEIGHTED)
by_backend = pytest.mark.parametrize("backend", backends())
by_member = pytest.mark.parametrize("member", MEMBERS, ids=repr)
# One that sorts positives, one with numbers of its own; in the interpreter these do for all.
by_some = pytest.mark.parametrize("member", [RANK_SORT, DEPTH] if INTERPRETED else MEMBERS, ids=repr)
by_delta = pytest.mark.parametrize("delta", [0.5] if INTERPRETED else [0.5, 0.0])

ID_DTYPES = [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64]
HUGE = 2**40


def draw_groups(case: Case, ids: list[int], seed: int = 0) -> torch.Tensor:
    """A group for each logit."""
    return torch.tensor(ids)[torch.randint(len(ids), case.labels.shape, generator=torch.Generator().manual_seed(seed))]


def grouped_case(size: int = 240, num_pos: int = 24, seed: int = 0, ids: tuple[int, ...] = (0, 1, 2, 3)):
    """A case whose scores and values lie elsewhere in each group, and the groups; each has positives."""
    case = random_case(size, num_pos, seed=seed)
    groups = draw_groups(case, list(ids), seed)
    groups[(case.labels == 1).nonzero().squeeze(1)[: len(ids)]] = torch.tensor(ids)
    shift = sum((groups == identity) * 0.75 * k for k, identity in enumerate(ids))
    return case._replace(logits=case.logits + shift), groups


def separately(member, case: Case, groups, backend: str, constant: bool = False, **arguments) -> Results:
    """The mean over the groups with a positive, each called by itself; rank is not averaged.

    Args:
        constant: whether each of these calls gets groups, too, all the same.
    """
    values, is_pos = member.values(case), case.labels == 1
    present = groups[is_pos].unique().tolist()
    whole: Results = {}
    for group in present:
        inside = groups == group
        own = {"groups": groups[inside]} if constant else {}
        parts = evaluate(
            member, case.logits[inside], case.labels[inside], values[inside[is_pos]], backend, **own, **arguments
        )
        for name, part in parts.items():
            part = part if name == "rank" else part / len(present)
            if part.dim() == 0:
                whole[name] = whole.get(name, 0) + part
                continue
            place = inside[is_pos] if name in member.by_positive else inside
            whole.setdefault(name, torch.zeros(place.shape, dtype=part.dtype))[place] = part
    return whole


@by_backend
@by_some
@settings(max_examples=2 if INTERPRETED else 40, deadline=None, derandomize=True)
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
    """Every case with every loss on every backend; in the interpreter each with some."""
    cases = all_cases()
    deltas = [1.0, 0.1, 0.0]
    turns = [
        (case, member, backend, deltas) for case in cases for member in MEMBERS[:5] for backend in engine_backends()
    ]
    if INTERPRETED:
        small = [case for case in cases if 10 < len(case.logits) <= 400]
        turns = [
            (case, MEMBERS[i % 5], "pairwise" if i % 3 == 0 else "triton", [deltas[i // 5 % 3]])
            for i, case in enumerate(small)
        ]
    return [pytest.param(*turn, id=f"{turn[0].name}-{turn[1]}-{turn[2]}") for turn in turns]


@pytest.mark.parametrize(("case", "member", "backend", "deltas"), combinations())
def test_every_case_in_three_groups(case, member, backend, deltas):
    """Against the reference, which has groups of its own; scores tie across groups, and some are infinite."""
    groups = draw_groups(case, [HUGE, -2, 5])
    tolerance = 1e-9 if case.logits.dtype == torch.float64 else 1e-6
    for delta in deltas:
        expected = judge(member, case, delta=delta, groups=groups)
        assert_agree(of_case(member, case, backend, delta=delta, groups=groups), expected, tolerance, f"delta {delta}")


@by_backend
@by_delta
@pytest.mark.parametrize("loc_ranking", ["sorted", "smooth"])
def test_alrp_by_either_ranking_of_positives(loc_ranking, delta, backend):
    case, groups = grouped_case()
    arguments = {"delta": delta, "loc_ranking": loc_ranking}
    found = of_case(ALRP, case, backend, groups=groups, **arguments)
    assert_agree(found, separately(ALRP, case, groups, backend, **arguments))
    assert_agree(found, judge(ALRP, case, groups=groups, **arguments))


@pytest.mark.parametrize("backend", engine_backends())
@by_delta
@by_some
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
@by_some
def test_one_group_is_no_groups(member, delta, backend):
    """But for the last bit: scans of groups add in another order."""
    for dtype, tolerance in [(torch.float32, 2e-7), (torch.float64, 1e-14)][: 1 if INTERPRETED else 2]:
        case = random_case(150, 20, dtype=dtype)
        expected = of_case(member, case, backend, delta=delta)
        for groups in (torch.zeros(150, dtype=torch.int8), torch.tensor(-HUGE).expand(150)):
            found = of_case(member, case, backend, delta=delta, groups=groups)
            for name, tensor in found.items():
                assert_close(name, tensor, expected[name], tolerance if backend in EXACT else 1e-6)


@by_backend
@by_some
def test_each_positive_may_have_a_group_of_its_own(member, backend):
    case = random_case(120, 17, ignored=0)
    groups = torch.arange(120) % 17
    groups[case.labels == 1] = torch.randperm(17, generator=torch.Generator().manual_seed(0))
    found = of_case(member, case, backend, groups=groups)
    assert_agree(found, judge(member, case, groups=groups))
    if not INTERPRETED:
        assert_agree(found, separately(member, case, groups, backend))
    if member is RANK_SORT:
        assert found["sorting"] == 0
        assert not found["sorting by logits"].any()


@by_backend
@by_delta
@by_some
def test_groups_without_positives_or_without_negatives(member, delta, backend):
    case, groups = grouped_case(160, 16)
    # Group 1 has no positives, group 2 no negatives; 3 is ignored altogether.
    case.labels[(groups == 1) & (case.labels == 1)] = 0
    case.labels[(groups == 2) & (case.labels == 0)] = -1
    case.labels[groups == 3] = -1
    case = case._replace(loc_errors=case.loc_errors[: int((case.labels == 1).sum())])
    found = of_case(member, case, backend, groups=groups, delta=delta)
    assert_agree(found, separately(member, case, groups, backend, delta=delta))
    assert_agree(found, judge(member, case, groups=groups, delta=delta))
    for name, tensor in found.items():
        if name.endswith("by logits"):
            assert not tensor[(groups == 1) | (groups == 3)].any()
            # The order of positives is all that there is to gain without negatives.
            assert not tensor[groups == 2].any() or name == "sorting by logits"


@by_backend
@by_member
def test_no_positives_in_any_group(member, backend):
    logits, groups = torch.tensor([[1.0, -INF, INF], [-3.0, 0.0, 5.0]]), torch.tensor([4, -4])
    for labels in (torch.tensor([3, 3]), torch.tensor([-1, -1]), torch.zeros(2, 3, dtype=torch.int64)):
        found = evaluate(member, logits, labels, torch.empty(0), backend, groups=groups)
        assert not any(tensor.any() for tensor in found.values())
    empty = torch.empty(0, 3)
    found = evaluate(member, empty, torch.empty(0, dtype=torch.int64), torch.empty(0), backend, groups=groups[:0])
    assert not any(tensor.any() for tensor in found.values())


@by_backend
@by_some
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
    for delta in [0.5] if INTERPRETED else [0.5, 0.0]:
        found = evaluate(member, case.logits, case.labels, values, backend, groups=groups, delta=delta)
        for name, tensor in found.items():
            if name.endswith("by logits"):
                assert tensor[case.labels != -1].isnan().all(), name
                assert not tensor[case.labels == -1].any()
            else:
                assert tensor.isnan().all(), name


@by_backend
@by_some
def test_ignored_logits_have_no_effect_and_no_group(member, backend):
    case, groups = grouped_case(120, 12)
    case = case._replace(labels=case.labels.masked_fill(torch.arange(120) % 5 == 0, -1))
    case = case._replace(loc_errors=case.loc_errors[: int((case.labels == 1).sum())])
    expected = of_case(member, case, backend, groups=groups)
    ignored = case.labels == -1
    changed = case._replace(logits=case.logits.masked_fill(ignored, NAN))
    for other in (groups, groups.masked_fill(ignored, 99)):
        for name, tensor in of_case(member, changed, backend, groups=other).items():
            assert_same_bits(name, tensor, expected[name])


@by_backend
@by_delta
@by_some
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


# Ids, and how they are given.


def assert_same(found: Results, expected: Results, backend: str, bits: bool = True) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        if bits:
            assert_same_bits(name, tensor, expected[name])
        else:
            assert_split_alike(backend, name, tensor, expected[name])


@by_backend
@by_some
def test_only_which_ids_are_equal_matters(member, backend):
    """Order apart, which decides in which order groups are added up."""
    case, groups = grouped_case(150, 15)
    expected = of_case(member, case, backend, groups=groups)
    ascending = [(-5, -4, -3, -2), (0, 1000, HUGE, HUGE + 1), (-(2**63), -HUGE, -1, 2**63 - 1)]
    for ids in ascending[-1:] if INTERPRETED else ascending:
        assert_same(of_case(member, case, backend, groups=torch.tensor(ids)[groups]), expected, backend)
    # Twice the same in the low 32 bits.
    permuted = of_case(member, case, backend, groups=torch.tensor([3 + 2**32, -1, 3, 0])[groups])
    for name, tensor in permuted.items():
        assert_close(name, tensor, expected[name], 1e-6)


@by_backend
@pytest.mark.parametrize("dtype", ID_DTYPES)
def test_every_integer_dtype(dtype, backend):
    limits = torch.iinfo(dtype)
    ids = torch.tensor([limits.min, limits.min + 1, limits.max - 1, limits.max])
    case, groups = grouped_case(150, 15)
    expected = of_case(RANK_SORT, case, backend, groups=groups)
    assert_same(of_case(RANK_SORT, case, backend, groups=ids[groups].to(dtype)), expected, backend)


def problem_of_images(num_images=3, num_anchors=14, num_classes=5):
    """Logits ``[B, A, C]``, class labels ``[B, A]``, the same by logits, values."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(num_images, num_anchors, num_classes, generator=generator)
    classes = torch.randint(-1, num_classes + 3, (num_images, num_anchors), generator=generator).clamp(max=num_classes)
    labels = torch.zeros(logits.shape, dtype=torch.int64)
    is_pos = (classes >= 0) & (classes < num_classes)
    labels[is_pos] = torch.nn.functional.one_hot(classes[is_pos], num_classes)
    labels[classes == -1] = -1
    return logits, classes, labels, (4 * torch.rand(int(is_pos.sum()), generator=generator)).round() / 4


@by_backend
@by_delta
@by_some
def test_one_ranking_for_each_image(member, delta, backend):
    """By rows, expanded; by logits; with classes or labels; in other dtypes, strides, orders of levels."""
    logits, classes, labels, values = problem_of_images()
    images = torch.arange(3)[:, None].expand(3, 14)
    case = Case("flat", logits.flatten(), labels.flatten(), values)
    flat = images[..., None].expand(3, 14, 5).reshape(-1)
    expected = evaluate(member, *case[1:], backend, groups=flat, delta=delta)
    assert_agree(expected, member.judge(*case[1:], groups=flat, delta=delta))

    def check(x, y, groups):
        found = evaluate(member, x, y, values, backend, groups=groups, delta=delta)
        flattened = {name: t.reshape(-1) if name.endswith("by logits") else t for name, t in found.items()}
        assert_same(flattened, expected, backend, bits=False)

    check(logits, classes, images)
    check(logits, classes, images[..., None].expand(3, 14, 5))
    check(logits, labels, images)
    check(logits.permute(2, 1, 0).contiguous().permute(2, 1, 0), classes, images.contiguous().to(torch.int8))
    if not INTERPRETED:
        check(logits, labels, images.clone()[..., None].expand(3, 14, 5))
        check(logits, labels.transpose(0, 2).contiguous().transpose(0, 2), images)
        check(logits, classes, torch.stack([images, images - 7], dim=-1)[..., 0])
        check(logits, labels, torch.stack([flat, -flat], dim=-1)[:, 0].view(3, 14, 5))
    # One level by classes, one empty, one by logits and without its images as an axis.
    check(
        [logits[:1], logits[:0], logits[1:].reshape(2 * 14, 5)],
        [classes[:1], classes[:0], labels[1:].reshape(2 * 14, 5)],
        (images[:1], images[:0].to(torch.uint8), images[1:].reshape(-1).to(torch.int16)),
    )


@by_backend
@by_some
def test_levels_may_share_groups(member, backend):
    """An image has anchors on every level."""
    logits, classes, labels, _ = problem_of_images()
    images = torch.arange(3)[:, None].expand(3, 14)
    parts = [slice(0, 4), slice(4, 4), slice(4, 14)]
    levels = [[tensor[:, part] for part in parts] for tensor in (logits, classes, images)]
    flat = [torch.cat([tensor[:, part].flatten() for part in parts]) for tensor in (logits, labels)]
    flat_groups = torch.cat([images[:, part, None].expand(3, -1, 5).flatten() for part in parts])
    values = torch.linspace(0, 1, int((flat[1] == 1).sum()))
    found = evaluate(member, *levels[:2], values, backend, groups=levels[2])
    assert_agree(found, member.judge(*flat, values, groups=flat_groups))


@by_backend
@by_some
def test_one_ranking_for_each_class(member, backend):
    """Class labels, a group for each logit with stride 0 along anchors: mean over classes, as in mean AP."""
    logits, classes, labels, values = problem_of_images()
    per_class = torch.arange(5).expand(logits.shape)
    flat = per_class.reshape(-1)
    found = evaluate(member, logits, classes, values, backend, groups=per_class)
    flattened = {name: t.reshape(-1) if name.endswith("by logits") else t for name, t in found.items()}
    assert_agree(flattened, member.judge(logits.flatten(), labels.flatten(), values, groups=flat))
    case = Case("flat", logits.flatten(), labels.flatten(), values)
    order = separately(member, case, flat, backend)
    if member is not RANK_SORT:  # whose values have been rounded already
        assert_agree(flattened, order)


@by_backend
def test_a_lone_group_for_a_single_row(backend):
    logits, labels = torch.tensor([0.5, -0.25, 0.0, 1.0]), torch.tensor(2)
    values = torch.tensor([0.5])
    expected = evaluate(ALRP, logits, labels, values, backend)
    found = evaluate(ALRP, logits, labels, values, backend, groups=torch.tensor(-3))
    for name, tensor in found.items():
        assert_close(name, tensor, expected[name], 1e-6)


# Numbers.


@by_backend
@by_some
def test_few_false_positives_beside_a_crowd(member, backend):
    """One group's negatives hardly reach its ramps, the other's fill them; neither loses digits to the other."""
    crowd = 1000 if INTERPRETED else 1_000_000
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
    # Of too few false positives the weighted loss sends nothing.
    assert exact[name].any() != (member is WEIGHTED)
    for ids in [(0, 1), (1, 0)]:
        found = of_case(member, case, backend, groups=torch.tensor(ids)[groups], delta=1.0)
        assert_close(name, found[name][:6], alone[name] / 2, 1e-6)
        assert_close(name, found[name][:6], exact[name] / 2, 1e-6)


@by_backend
@by_some
@pytest.mark.parametrize("scale", [1.0] if INTERPRETED else [1.0, 1e9, 2.0**-80])
def test_groups_far_from_each_other(scale, member, backend):
    """The axis of scores is shared; gaps between groups, or of one group within another's, must not show."""
    case, groups = grouped_case(120, 12)
    case = case._replace(logits=(case.logits + groups * torch.tensor([0.0, 1e4, -1e6, 3e7])[groups]) * scale)
    found = of_case(member, case, backend, groups=groups, delta=0.5 * scale)
    assert_agree(found, separately(member, case, groups, backend, delta=0.5 * scale))
    assert_agree(found, judge(member, case, groups=groups, delta=0.5 * scale))


@by_backend
@by_some
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_of_scores(dtype, member, backend):
    case, groups = grouped_case(120, 12)
    case = case._replace(logits=case.logits.to(dtype))
    found = of_case(member, case, backend, groups=groups)
    assert_agree(found, judge(member, case, groups=groups), 1e-9 if dtype == torch.float64 else 1e-6)
    assert found[f"{member.components[0]} by logits"].dtype == dtype


@by_backend
def test_upstream_gradient_goes_into_the_mean(backend):
    case, groups = grouped_case(120, 12)
    case = case._replace(logits=case.logits.half())
    expected = judge(NDCG, case, groups=groups)["loss by logits"]
    found = of_case(NDCG, case, backend, groups=groups, upstream=2.0**-12)
    assert_agree({"loss by logits": found["loss by logits"]}, {"loss by logits": expected * 2.0**-12})


# What is walked in pieces, and what a GPU runs.


@pytest.mark.skipif(INTERPRETED, reason="of the torch backend")
@by_delta
@by_member
@pytest.mark.parametrize("piece", [1, 7, 50])
def test_any_pieces_give_the_same_bits(piece, member, delta, monkeypatch):
    """Pieces of one group, of several, of none with positives, of infinities and NaN-free constants."""
    logits, classes, labels, values = problem_of_images(4)
    logits[0, :3], logits[1, 2], logits[3] = 0.25, INF, -INF
    images = torch.tensor([5, 5, -1, 7])[:, None].expand(4, 14)
    per_logit = torch.arange(logits.numel()).view(logits.shape) // 33
    problems = [
        (logits, classes, images),
        (logits, labels, per_logit),
        ([logits[:2].transpose(0, 1), logits[2:]], [classes[:2].T, labels[2:]], [images[:2].T, per_logit[2:]]),
    ]
    for x, y, groups in problems:
        expected = evaluate(member, x, y, values, "torch", groups=groups, delta=delta)
        with monkeypatch.context() as patched:
            for module in (torch_backend, positives):
                patched.setattr(module, "_PIECE", piece)
            found = evaluate(member, x, y, values, "torch", groups=groups, delta=delta)
        assert_same(found, expected, "torch")


@pytest.mark.skipif(INTERPRETED, reason="of the torch backend")
@by_delta
@by_member
def test_large_enough_for_several_pieces(member, delta):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 30_000, 4, generator=generator)
    labels = random_labels(logits.numel(), 50, 0.1, generator).view(logits.shape)
    case = Case("", logits.flatten(), labels.flatten(), torch.rand(50, generator=generator))
    images = torch.arange(3)[:, None].expand(3, 30_000)
    found = evaluate(member, logits, labels, member.values(case), "torch", groups=images, delta=delta)
    flattened = {name: t.reshape(-1) if name.endswith("by logits") else t for name, t in found.items()}
    flat = images[..., None].expand(logits.shape).reshape(-1)
    assert_agree(flattened, judge(member, case, groups=flat, delta=delta))
    assert logits.numel() > 2 * torch_backend._PIECE


@pytest.mark.skipif(INTERPRETED, reason="of the torch backend")
@by_delta
@pytest.mark.parametrize("member", FAMILY, ids=repr)
@pytest.mark.parametrize("grouped", [False, True])
def test_on_the_path_of_a_gpu(grouped, member, delta, monkeypatch):
    """Nothing is looked at: binary searches, slots and masks; the same bits."""
    logits, classes, labels, values = problem_of_images(4)
    logits[1, 2], logits[3, :5] = INF, -INF
    x, y = [logits[:2], logits[2:3, 0], logits[3:]], [classes[:2], classes[2:3, 0], labels[3:]]
    given = [torch.tensor([5, -9])[:, None].expand(2, 14), torch.tensor([5]), torch.arange(70).view(1, 14, 5) % 3]
    values = values[: int(sum((t == 1).sum() for t in y[2:]) + sum(((t >= 0) & (t < 5)).sum() for t in y[:2]))]
    arguments = {"groups": given if grouped else None, "delta": delta}
    expected = evaluate(member, x, y, values, "torch", **arguments)
    monkeypatch.setattr(positives, "_collect", lambda levels, ignore: pytest.fail("waits for the device"))
    for module in (positives, torch_backend, search, tables):
        monkeypatch.setattr(module, "waits_for_nothing", lambda device: True)
    assert_same(evaluate(member, x, y, values, "torch", **arguments), expected, "torch")
    if not member.takes:
        return
    # What is wrong makes everything NaN; but 0 stays where ignored.
    found = evaluate(member, x, y, values[:-1], "torch", **arguments)
    assert all(found[component].isnan() for component in member.components)
    assert all(tensor[tensor != 0].isnan().all() for tensor in found.values())
    monkeypatch.setenv("ALRP_TRITON_DEBUG", "1")
    with pytest.raises(ValueError, match=f"^{member.takes}: expected"):
        evaluate(member, x, y, values[:-1], "torch", **arguments)


# Arguments.

LOGITS, LABELS = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 3])
GROUPS = torch.tensor([0, 1])
WRONG = [
    (TypeError, "groups", GROUPS.float()),
    (TypeError, "groups", GROUPS == 1),
    (TypeError, "groups", 0),
    (TypeError, "groups", "images"),
    (TypeError, r"groups\[0\]", [[0, 1]]),
    (TypeError, r"groups\[0\]", [0, 1]),
    (ValueError, "groups", torch.tensor(0)),
    (ValueError, "groups", torch.tensor([0, 1, 2])),
    (ValueError, "groups", GROUPS[:, None]),
    (ValueError, "groups", torch.zeros(3, 2, dtype=torch.int64)),
    (ValueError, "groups", torch.zeros(2, 3, 1, dtype=torch.int64)),
    (ValueError, "groups", GROUPS.to("meta")),
    (ValueError, "groups", [GROUPS, GROUPS]),
    (ValueError, "groups", []),
    (ValueError, "groups", ()),
]


@by_backend
@by_member
def test_wrong_groups_are_named(member, backend):
    values = torch.tensor([0.5])
    member.loss(LOGITS, LABELS, values, groups=GROUPS, backend=backend)
    for error, name, groups in WRONG:
        with pytest.raises(error, match=f"^{name}: expected"):
            member.loss(LOGITS, LABELS, values, groups=groups, backend=backend)
    for groups in ([GROUPS], [GROUPS, GROUPS[:1]], GROUPS, [GROUPS, None]):
        with pytest.raises((TypeError, ValueError), match=r"^groups.*: expected"):
            member.loss([LOGITS, LOGITS], [LABELS, LABELS], torch.rand(2), groups=groups, backend=backend)


@pytest.mark.skipif(INTERPRETED, reason="needs no kernel")
def test_module_of_alrp_takes_groups():
    logits, classes, _, values = problem_of_images()
    boxes = torch.tensor([0.0, 0.0, 1.0, 1.0]).repeat(len(values), 1)
    module = ALRPLoss(delta=0.5, box_error=lambda pred, target: values, self_balance=3.0, eps=0.25)
    images = torch.arange(3)[:, None].expand(3, 14)
    found = module(logits, classes, boxes, boxes, images)
    expected = alrp_loss(logits, classes, values, delta=0.5, eps=0.25, groups=images)
    assert_same_bits("cls", found.cls, expected.cls)
    assert_same_bits("loc", found.loc, 3.0 * expected.loc)
    assert_same_bits("rank", found.rank, expected.rank)
    assert found.cls != module(logits, classes, boxes, boxes).cls
