"""How groups are given: ids, shapes, strides, levels; and how the torch backend walks them."""

import pytest
import torch
from dialect import (
    ALRP,
    AP,
    DEPTH,
    FAMILY,
    INF,
    KERNELS,
    NDCG,
    RANK_SORT,
    WEIGHTED,
    Case,
    Results,
    assert_agree,
    assert_close,
    assert_same_bits,
    assert_split_alike,
    backends,
    evaluate,
    grouped_case,
    judge,
    of_case,
    problem_of_images,
    random_labels,
    separately,
)
from virtual_gpu.harness import as_on_a_gpu

from alrp_triton import ALRPLoss, alrp_loss
from alrp_triton.engine.passes import eager, find

MEMBERS = (ALRP, AP, NDCG, RANK_SORT, DEPTH, WEIGHTED)
by_backend = pytest.mark.parametrize("backend", backends())
by_member = pytest.mark.parametrize("member", MEMBERS, ids=repr)
# One that sorts positives, one with numbers of its own; where kernels run these do for all.
by_some = pytest.mark.parametrize("member", [RANK_SORT, DEPTH] if KERNELS else MEMBERS, ids=repr)
by_delta = pytest.mark.parametrize("delta", [0.5] if KERNELS else [0.5, 0.0])

ID_DTYPES = [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64]
HUGE = 2**40


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
    for ids in ascending[-1:] if KERNELS else ascending:
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


@pytest.mark.thinned(2 if KERNELS else 1)
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
    if not KERNELS:
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


# What is walked in pieces, and what a GPU runs.


@pytest.mark.thinned(2)
@pytest.mark.skipif(KERNELS, reason="of the torch backend")
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
            for module in (eager, find):
                patched.setattr(module, "_PIECE", piece)
            found = evaluate(member, x, y, values, "torch", groups=groups, delta=delta)
        assert_same(found, expected, "torch")


@pytest.mark.skipif(KERNELS, reason="of the torch backend")
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
    assert logits.numel() > 2 * eager._PIECE


@pytest.mark.skipif(KERNELS, reason="of the torch backend")
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
    monkeypatch.setattr(find, "_collect", lambda levels, ignore: pytest.fail("waits for the device"))
    with as_on_a_gpu():
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


@pytest.mark.skipif(KERNELS, reason="needs no kernel")
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
