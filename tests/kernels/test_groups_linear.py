"""The linear form with one ranking for each group: buckets and gradients, against comparisons of all with all."""

from __future__ import annotations

import pytest
import torch
from alrp_triton.kernels.buckets import count_into_buckets
from alrp_triton.kernels.gradient import write_linear_gradient
from alrp_triton.kernels.walk import make_walk
from grouped_levels import (
    IDS,
    INF,
    LAYOUTS,
    NAN,
    Flat,
    Level,
    by_group,
    check_close,
    flatten,
    gradient_of,
    make_level,
    small_blocks,
)
from torch import Tensor

SCALE = 2.0**30


def knots(flat: Flat, delta: float) -> tuple[Tensor, Tensor]:
    """Thresholds and their groups: where the ramps of the positives begin and end; NaN for the end of +inf's."""
    scores, groups = flat.positives
    end = (scores + delta).masked_fill(scores == INF, NAN) if delta else scores
    return by_group(torch.cat([scores - delta, end]), torch.cat([groups, groups]))


def floors_of(thresholds: Tensor) -> Tensor:
    low = torch.tensor([-INF], dtype=thresholds.dtype)
    largest = torch.finfo(thresholds.dtype).max
    return torch.cat([low, thresholds.nan_to_num(nan=INF, posinf=INF, neginf=-INF)]).clamp(-largest, largest)


def bucket_of(flat: Flat, thresholds: Tensor, groups: Tensor) -> Tensor:
    own = flat.groups[:, None] == groups
    reached = own & (flat.scores[:, None] >= thresholds)
    before = (flat.groups[:, None] > groups) | reached
    return torch.where(reached.any(1), before.sum(1), 0)


def offset_of(flat: Flat, bucket: Tensor, floors: Tensor, delta: float) -> Tensor:
    if not delta:
        return torch.zeros_like(flat.scores)
    largest = torch.finfo(floors.dtype).max
    return ((flat.scores.to(floors.dtype).clamp(-largest, largest) - floors[bucket]) * (0.5 / delta)).clamp(max=1)


def check(levels: list[Level], thresholds: Tensor, groups: Tensor, delta: float) -> Tensor:
    """Both passes against the definition; returns the counts."""
    flat, inverse_width = flatten(levels), 0.5 / delta if delta else 0.0
    floors = floors_of(thresholds)
    found = count_into_buckets([level.walk() for level in levels], thresholds, floors, inverse_width, SCALE, -1, groups)
    bucket = bucket_of(flat, thresholds, groups)
    offset = offset_of(flat, bucket, floors, delta)
    counted = flat.negative & (bucket > 0) & ~flat.scores.isnan()
    expected = torch.zeros(2, len(floors) + 1, dtype=torch.int64)
    expected[0].index_add_(0, bucket[counted], torch.ones_like(bucket[counted]))
    expected[1].index_add_(0, bucket[counted], (offset[counted] * SCALE).long())
    expected[0, -1] = (flat.negative & flat.scores.isnan()).sum()
    assert torch.equal(found, expected)

    coefficients = torch.randn(2, len(floors), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    coefficients[1, 0] = 0  # bucket 0 has no slope
    coefficients = coefficients.to(floors.dtype)
    walks = [level.walk(writes=True) for level in levels]
    own = flat.own_gradients()
    write_linear_gradient(walks, thresholds, floors, coefficients, inverse_width, -1, groups, **own)
    level, slope = coefficients
    value = torch.where(flat.negative, level[bucket] + slope[bucket] * offset, 0.0)
    value[own["pos_index"]] = own["pos_gradient"].to(value.dtype)
    dtype = levels[0].logits.dtype
    # What becomes of a NaN score is for the tables to say, which are then NaN throughout.
    known = ~(flat.negative & flat.scores.isnan())
    check_close(gradient_of(walks)[known], value.to(dtype)[known], 2e-2 if dtype == torch.bfloat16 else 1e-6)
    return expected[0]


@pytest.mark.parametrize("block", [64, 256])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks(monkeypatch, block)
    level = make_level(layout)
    assert check([level], *knots(flatten([level]), 0.375), 0.375).sum() > 0


@pytest.mark.thinned(3)
@pytest.mark.parametrize("id_dtype", IDS)
@pytest.mark.parametrize("delta", [0.0, 0.5])
def test_levels_are_ranked_together(id_dtype: torch.dtype, delta: float, monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks(monkeypatch)
    levels = [make_level(layout, id_dtype=id_dtype, seed=i) for i, layout in enumerate(LAYOUTS[:4])]
    levels.insert(2, Level(torch.empty(0, 3), torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=id_dtype)))
    flat = flatten(levels)
    assert len(flat.positives[1].unique()) == len(IDS[id_dtype])
    assert check(levels, *knots(flat, delta), delta).sum() > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(dtype: torch.dtype) -> None:
    level = make_level("class labels", dtype)
    thresholds, groups = knots(flatten([level]), 0.375)
    check([level], thresholds if dtype == torch.float64 else thresholds.float(), groups, 0.375)


@pytest.mark.parametrize("size", [1, 63, 64, 65, 128, 129])
def test_sizes_around_a_block(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks(monkeypatch)
    generator = torch.Generator().manual_seed(size)
    scores = torch.randn(size, generator=generator)
    labels = torch.zeros(size, dtype=torch.int64)
    groups = torch.randint(-3, 3, (size,), generator=generator)
    thresholds, threshold_groups = by_group(
        torch.randn(30, generator=generator), torch.randint(-3, 3, (30,), generator=generator)
    )
    check([Level(scores, labels, groups)], thresholds, threshold_groups, 1.0)


def test_nan_in_thresholds_and_scores() -> None:
    """No score reaches a NaN, not even +inf, and a NaN score counts as such whatever its group."""
    values = torch.tensor([0.0, 1.0, NAN, NAN, -1.0, INF, -INF, NAN])
    groups = torch.tensor([-4, -4, -4, 0, 2, 2, 9, 9])
    scores = torch.tensor([-INF, -1.5, 0.0, 0.5, 2.0, INF, NAN]).repeat(6, 1)
    level = Level(scores, torch.zeros(6, 7, dtype=torch.int64), torch.tensor([-4, 0, 2, 9, -5, 10]))
    counts = check([level], values, groups, 0.5)
    #                                    group -4     0  2     9
    assert counts.tolist() == [0, 2, 2, 0, 0, 3, 1, 6, 0, 6]
    level.labels[:] = -1
    assert check([level], values, groups, 0.5).sum() == 0


def test_groups_without_positives_have_bucket_0() -> None:
    scores = torch.full((4, 3), INF)
    labels, ids = torch.zeros(4, 3, dtype=torch.int64), torch.tensor([-7, 1, 3, 2**40])
    thresholds, groups = torch.tensor([-1.0, 1.0]), torch.tensor([1, 1])
    counts = check([Level(scores, labels, ids)], thresholds, groups, 1.0)
    assert counts.tolist() == [0, 0, 3, 0]


def test_no_positives() -> None:
    level = make_level("class labels")
    empty = torch.empty(0)
    counts = check([level], empty, torch.empty(0, dtype=torch.int64), 1.0)
    assert counts.tolist() == [0, 0]


def test_one_group_is_as_no_groups() -> None:
    level = make_level("channels first")
    flat = flatten([level])
    thresholds = knots(flat, 0.5)[0].sort().values
    floors = floors_of(thresholds)
    one = Level(level.logits, level.labels, torch.tensor(-3).expand(level.labels.shape))
    groups = torch.full((len(thresholds),), -3)
    expected = count_into_buckets([make_walk(*level[:2])], thresholds, floors, 1.0, SCALE, -1)
    assert torch.equal(count_into_buckets([one.walk()], thresholds, floors, 1.0, SCALE, -1, groups), expected)
    coefficients = torch.randn(2, len(floors), generator=torch.Generator().manual_seed(0))
    walks = [one.walk(writes=True), make_walk(*level[:2], torch.full_like(level.logits, NAN))]
    write_linear_gradient(walks[:1], thresholds, floors, coefficients, 1.0, -1, groups, **flat.own_gradients())
    write_linear_gradient(walks[1:], thresholds, floors, coefficients, 1.0, -1, **flat.own_gradients())
    assert torch.equal(walks[0].gradient, walks[1].gradient)


def test_groups_part_axes_that_labels_do_not() -> None:
    x, y = torch.empty(2, 3, 4, 5), torch.zeros(2, 3, 4)
    per_row = torch.zeros(2, 3, 4)
    assert make_walk(x, y, groups=per_row).sizes == (5, 24)
    assert make_walk(x, x, groups=per_row).sizes == (5, 24)
    assert make_walk(x, x, groups=x).sizes == (120,)
    assert make_walk(x, y, groups=x).sizes == (5, 24)
    images = torch.zeros(2, 1, 1).expand(2, 3, 4)
    assert make_walk(x, y, groups=images).sizes == (5, 12, 2)
    assert make_walk(x, x, groups=images).sizes == (60, 2)
    walk = make_walk(x, x, groups=images)
    assert [walk.arguments("z")[f"z_step{i}"] for i in range(4)] == [0, 1, 1, 1]
    assert make_walk(x, y).groups is None
    assert make_walk(x, x, groups=torch.tensor(3).expand(2, 3, 4)).sizes == (120,)
