"""How groups are given: ids, shapes, strides, levels; and how the torch backend walks them."""

import pytest
import torch
from dialect import (
    FAMILY,
    INF,
    KERNELS,
    RANK_SORT,
    Case,
    assert_agree,
    assert_close,
    assert_same_results,
    by_backend,
    by_some_grouped,
    evaluate,
    grouped_case,
    of_case,
    problem_of_images,
    separately,
)
from virtual_gpu.harness import as_on_a_gpu

from alrp_triton.engine.passes import find

by_delta = pytest.mark.parametrize("delta", [0.5] if KERNELS else [0.5, 0.0])

ID_DTYPES = [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64]
HUGE = 2**40


@by_backend
@by_some_grouped
def test_only_which_ids_are_equal_matters(member, backend):
    """Order apart, which decides in which order groups are added up."""
    case, groups = grouped_case(150, 15)
    expected = of_case(member, case, backend, groups=groups)
    ascending = [(-5, -4, -3, -2), (0, 1000, HUGE, HUGE + 1), (-(2**63), -HUGE, -1, 2**63 - 1)]
    for ids in ascending[-1:] if KERNELS else ascending:
        assert_same_results(of_case(member, case, backend, groups=torch.tensor(ids)[groups]), expected)
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
    assert_same_results(of_case(RANK_SORT, case, backend, groups=ids[groups].to(dtype)), expected)


@pytest.mark.thinned(2 if KERNELS else 1)
@by_backend
@by_delta
@by_some_grouped
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
        assert_same_results(found, expected, split_by=backend)

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
@by_some_grouped
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
@by_some_grouped
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
    if member.takes != "ious":  # whose values have been rounded already
        assert_agree(flattened, order)


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
        assert_same_results(evaluate(member, x, y, values, "torch", **arguments), expected)
        if not member.takes:
            return
        # What is wrong makes everything NaN; but 0 stays where ignored.
        found = evaluate(member, x, y, values[:-1], "torch", **arguments)
        assert all(found[component].isnan() for component in member.components)
        assert all(tensor[tensor != 0].isnan().all() for tensor in found.values())
        monkeypatch.setenv("ALRP_TRITON_DEBUG", "1")
        with pytest.raises(ValueError, match=f"^{member.takes}: expected"):
            evaluate(member, x, y, values[:-1], "torch", **arguments)
