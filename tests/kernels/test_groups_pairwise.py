"""The pairwise form with groups, and with a function in the place of the ramp, against every pair in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from alrp_triton.kernels.pairwise_count import count_pairs
from alrp_triton.kernels.pairwise_gradient import write_pairwise_gradient
from alrp_triton.kernels.walk import make_walk
from grouped_levels import IDS, INF, LAYOUTS, NAN, Level, check_close, flatten, gradient_of, make_level, small_blocks
from torch import Tensor

SCALE = 2.0**30
Function = Callable[[Tensor, float], Tensor]


@triton.jit
def sigmoid(x, delta):
    return 1 / (1 + tl.exp(-x / delta))


@triton.jit
def squared_ramp(x, delta):
    h = tl.minimum(tl.maximum(x / (2 * delta) + 0.5, 0.0), 1.0)
    return h * h


@triton.jit
def too_steep(x, delta):
    return x / delta


@triton.jit
def constant(x, delta):
    return 0.25


@triton.jit
def whole_one(x, delta):
    return 1


@triton.jit
def truth(x, delta):
    return x > 0


@triton.jit
def integer(x, delta):
    return (x > 0).to(tl.int8) * 3


@triton.jit
def wider(x, delta):
    return x.to(tl.float64) / delta


@triton.jit
def broken_at_infinity(x, delta):
    return x - x + 0.5


@triton.jit
def root(x, delta):
    return tl.sqrt(x)


IN_TORCH: dict[object, Function] = {
    sigmoid: lambda x, delta: torch.sigmoid(x / delta),
    squared_ramp: lambda x, delta: (x / (2 * delta) + 0.5).clamp(0, 1) ** 2,
    too_steep: lambda x, delta: x / delta,
    constant: lambda x, delta: torch.full_like(x, 0.25),
    whole_one: lambda x, delta: torch.ones_like(x),
    truth: lambda x, delta: (x > 0).to(x.dtype),
    integer: lambda x, delta: (x > 0).to(x.dtype) * 3,
    wider: lambda x, delta: x / delta,
}


@pytest.fixture(autouse=True)
def blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks(monkeypatch)


def ramp(x: Tensor, delta: float) -> Tensor:
    return (x / (2 * delta) + 0.5) if delta else (x >= 0).to(x.dtype)


def check(
    levels: list[Level], delta: float, *, grouped: bool, function: object = None, tolerance: float = 2e-7
) -> Tensor:
    """Both passes against all pairs; returns what the first one counts."""
    flat = flatten(levels)
    dtype = torch.float64 if flat.scores.dtype == torch.float64 else torch.float32
    (positives, pos_groups), inverse_width = flat.positives, 0.5 / delta if delta else 0.0
    positives, num_pos = positives.to(dtype), len(positives)
    extra = {"pos_groups": pos_groups if grouped else None, "function": function, "delta": delta}
    walks = [level.walk() if grouped else make_walk(*level[:2]) for level in levels]
    totals = count_pairs(walks, positives, inverse_width, SCALE, -1, **extra)

    scores = flat.scores.double()
    x = scores - positives.double()[:, None]
    x = x.masked_fill(scores == positives[:, None], 0.0)
    h = IN_TORCH.get(function, ramp)(x, delta).clamp(0, 1).masked_fill(x.isnan(), 0.0)
    if grouped:
        h = h * (flat.groups == pos_groups[:, None])
    h = h * flat.negative
    assert totals.shape == (1, num_pos + 3)
    check_close(totals[0, :num_pos] / SCALE, h.sum(1), tolerance * max(1, len(scores)))
    assert totals[0, num_pos:].tolist() == [0, 0, int((flat.negative & scores.isnan()).sum())]

    weights = torch.rand(num_pos + 3, generator=torch.Generator().manual_seed(2), dtype=dtype)
    walks = [
        level.walk(writes=True) if grouped else make_walk(*level[:2], torch.full_like(level.logits, NAN))
        for level in levels
    ]
    write_pairwise_gradient(walks, positives, weights, inverse_width, -1, **extra)
    expected = (weights[:num_pos].double() @ h + weights[-1]) * flat.negative
    if flat.scores.dtype == torch.bfloat16:
        tolerance = 0.02 * float(expected.abs().max())
    check_close(gradient_of(walks), expected.to(flat.scores.dtype), tolerance * max(1, num_pos))
    return totals[0, :num_pos]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    assert check([make_level(layout)], 0.375, grouped=True).sum() > 0


@pytest.mark.thinned(2)
@pytest.mark.parametrize("id_dtype", IDS)
@pytest.mark.parametrize("delta", [0.0, 0.5])
def test_levels_are_ranked_together(id_dtype: torch.dtype, delta: float) -> None:
    levels = [make_level(layout, id_dtype=id_dtype, seed=i) for i, layout in enumerate(LAYOUTS[:4])]
    levels.insert(2, Level(torch.empty(0, 3), torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=id_dtype)))
    check(levels, delta, grouped=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("function", [None, squared_ramp])
def test_dtypes(dtype: torch.dtype, function: object) -> None:
    check([make_level("class labels", dtype)], 0.375, grouped=True, function=function)


def around(num_pos: int, num_neg: int) -> Level:
    """Positives, then negatives, in a few groups, equal scores among them."""
    generator = torch.Generator().manual_seed(num_pos)
    scores = torch.randint(-6, 7, (num_pos + num_neg,), generator=generator) / 4
    labels = torch.tensor([1] * num_pos + [0] * num_neg)
    return Level(scores, labels, torch.randint(-2, 2, labels.shape, generator=generator))


@pytest.mark.thinned(2)
@pytest.mark.parametrize(("num_pos", "num_neg"), [(0, 5), (1, 1), (31, 33), (32, 32), (33, 95), (129, 63), (257, 1)])
@pytest.mark.parametrize("function", [None, sigmoid])
def test_sizes_around_a_block(num_pos: int, num_neg: int, function: object) -> None:
    check([around(num_pos, num_neg)], 0.5, grouped=True, function=function)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("function", IN_TORCH, ids=lambda function: function.__name__)
def test_functions(function: object, grouped: bool) -> None:
    check([make_level("per image", size=21)], 0.7, grouped=grouped, function=function)


@pytest.mark.parametrize("delta", [0.0, 1.0])
def test_equal_infinities_differ_by_0(delta: float) -> None:
    """Of two equal ones each counts H(0), in one group; the others all or nothing."""
    scores = torch.tensor([INF, -INF, 1.0, INF, -INF, 1.0])
    labels, groups = torch.tensor([1, 1, 1, 0, 0, 0]), torch.full((6,), 5)
    at_0 = 0.5 if delta else 1.0
    counts = check([Level(scores, labels, groups)], delta, grouped=True)
    assert (counts / SCALE).tolist() == [at_0, 2 + at_0, 1 + at_0]
    groups[3:5] = -5
    counts = check([Level(scores, labels, groups)], delta, grouped=True)
    assert (counts / SCALE).tolist() == [0, 1, at_0]


def test_nan_counts_as_such_whatever_its_group() -> None:
    level = make_level("both per logit")
    level.logits[0, :4] = NAN
    level.labels[0, :4] = torch.tensor([0, 0, -1, 0])
    flat = flatten([level])
    (positives, pos_groups) = flat.positives
    for groups, function in [(pos_groups, None), (pos_groups, sigmoid), (torch.full_like(pos_groups, 2), None)]:
        found = count_pairs([level.walk()], positives, 1.0, SCALE, -1, groups, function, 0.5)
        assert found[0, -1] == 3
        assert (found[0] >= 0).all()


def test_nan_that_a_function_makes_is_counted_and_kept() -> None:
    """It must not vanish into the fixed point, nor into a clamp."""
    scores = torch.tensor([0.5, 1.0, 2.0, INF])
    labels = torch.tensor([1, 0, 0, 0])
    positives, weights = scores[:1], torch.tensor([2.0, 0.0, 0.0, 0.0])
    gradient = torch.full((4,), 7.0)
    for last, count in ((4, 1), (3, 0)):
        walk = make_walk(scores[:last], labels[:last], gradient[:last])
        found = count_pairs([walk], positives, 1.0, SCALE, -1, None, broken_at_infinity, 0.5)
        assert found.tolist() == [[0 if count else SCALE, 0, 0, count]]
        write_pairwise_gradient([walk], positives, weights, 1.0, -1, None, broken_at_infinity, 0.5)
        assert gradient[:3].tolist() == [0.0, 1.0, 1.0]
    assert gradient[3].isnan()


def test_no_function_is_asked_about_positives_that_are_not_there() -> None:
    scores, labels = torch.tensor([-9.0, -8.75, -9.0]), torch.tensor([1, 0, 0])
    walk = make_walk(scores, labels, torch.full((3,), NAN))
    found = count_pairs([walk], scores[:1], 1.0, SCALE, -1, None, root, 0.5)
    assert found.tolist() == [[SCALE / 2, 0, 0, 0]]
    write_pairwise_gradient([walk], scores[:1], torch.tensor([2.0, 0.0, 0.0, 0.0]), 1.0, -1, None, root, 0.5)
    assert walk.gradient.tolist() == [0.0, 1.0, 0.0]


def test_one_group_is_as_no_groups() -> None:
    level = make_level("channels first")
    scores = level.logits.clamp(-3, 3)
    one = Level(scores, level.labels, torch.tensor(-3).expand(level.labels.shape))
    positives, groups = flatten([one]).positives
    expected = count_pairs([make_walk(*one[:2])], positives, 1.0, SCALE, -1)
    assert torch.equal(count_pairs([one.walk()], positives, 1.0, SCALE, -1, groups), expected)
