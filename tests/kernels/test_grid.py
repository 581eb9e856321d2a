"""The bucket of every score, by a grid over the thresholds, against a binary search."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from alrp_triton.kernels.grid import lay, shape_of_cells
from alrp_triton.kernels.lanes import load
from alrp_triton.kernels.launch import on_device_of
from alrp_triton.kernels.layout import Table
from alrp_triton.kernels.search import find_bucket
from dialect import INF
from drawn import DELTA, place
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from virtual_gpu.harness import filled_memory

from alrp_triton.engine.knots import make_table

FLOATS = {torch.float32: 32, torch.float64: 64}


@triton.jit
def buckets_kernel(scores, table, buckets, floors, number, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    score = load(scores + at, at < number, floors.dtype.element_ty)
    bucket, floor = find_bucket(score, 0, table, scores.dtype.element_ty)
    tl.store(buckets + at, bucket, mask=at < number)
    tl.store(floors + at, floor, mask=at < number)


def table_of(thresholds: Tensor) -> Table:
    """With its grid, of an even number of thresholds."""
    padded = torch.cat([thresholds.sort().values, thresholds.new_full((len(thresholds) + 1,), torch.nan)])
    return lay(Table(padded, None), thresholds.dtype)


def check(thresholds: Tensor, scores: Tensor) -> Table:
    """Buckets and floors of scores, of the thresholds and of their neighbours."""
    near = [torch.nextafter(thresholds, torch.full_like(thresholds, end)) for end in (-INF, INF)]
    extremes = torch.tensor([-INF, INF, torch.nan, 0.0, -0.0], dtype=thresholds.dtype)
    scores = torch.cat([scores, thresholds, *near, extremes])
    table = table_of(thresholds)
    buckets, floors = torch.empty(len(scores), dtype=torch.int32), torch.empty_like(scores)
    with on_device_of(scores):
        buckets_kernel[(triton.cdiv(len(scores), 256),)](scores, table, buckets, floors, len(scores), BLOCK=256)
    known = thresholds[~thresholds.isnan()].sort().values
    expected = torch.searchsorted(known, scores, right=True).masked_fill(scores.isnan(), 0)
    wrong = (buckets != expected).nonzero()
    assert not len(wrong), f"score {scores[wrong[0]]}: bucket {buckets[wrong[0]]}, expected {expected[wrong[0]]}"
    assert torch.equal(floors, torch.cat([known.new_full((1,), -INF), known])[expected])
    return table


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("number", [0, 2, 6, 254])
def test_every_value_in_half_precision(number: int, dtype: torch.dtype) -> None:
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    thresholds = normal(number).to(torch.float16).float()
    thresholds[:2] = torch.tensor([-INF, torch.nan])[:number]
    table = lay(table_of(thresholds)._replace(cells=None), dtype)
    buckets, floors = torch.empty(len(values), dtype=torch.int32), torch.empty(len(values))
    with on_device_of(values):
        buckets_kernel[(256,)](values, table, buckets, floors, len(values), BLOCK=256)
    known = thresholds[~thresholds.isnan()].sort().values
    expected = torch.searchsorted(known, values.float(), right=True).masked_fill(values.isnan(), 0)
    assert torch.equal(buckets, expected.int())
    assert torch.equal(floors, torch.cat([known.new_full((1,), -INF), known])[expected])


INT64 = torch.iinfo(torch.int64)


@triton.jit
def grouped_buckets_kernel(scores, groups, table, buckets, floors, number, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    score = load(scores + at, at < number, floors.dtype.element_ty)
    group = tl.load(groups + at, mask=at < number, other=0)
    bucket, floor = find_bucket(score, group, table, scores.dtype.element_ty)
    tl.store(buckets + at, bucket, mask=at < number)
    tl.store(floors + at, floor, mask=at < number)


def grouped_table_of(thresholds: Tensor, groups: Tensor) -> Table:
    """With its grid, of an even number of thresholds in any order."""
    by_value = thresholds.argsort(stable=True)  # NaN are last
    order = by_value[groups[by_value].argsort(stable=True)]
    table = make_table(thresholds[order], groups[order])
    return lay(Table(table.thresholds, None, table.groups), thresholds.dtype)


def check_groups(thresholds: Tensor, groups: Tensor, scores: Tensor, of_scores: Tensor) -> Table:
    """Buckets and floors of scores in each of these groups, and in their neighbours."""
    near = [torch.nextafter(thresholds, torch.full_like(thresholds, end)) for end in (-INF, INF)]
    extremes = torch.tensor([-INF, INF, torch.nan, 0.0, -0.0], dtype=thresholds.dtype)
    scores = torch.cat([scores, thresholds, *near, extremes])
    ids = torch.cat([groups, of_scores, torch.tensor([0, INT64.min, INT64.max])]).unique()
    ids = torch.cat([ids, ids + 1, ids - 1]).unique()  # beyond the last one is the first one
    of_scores = ids.repeat_interleave(len(scores))
    scores = scores.repeat(len(ids))
    table = grouped_table_of(thresholds, groups)
    assert table.groups is not None
    buckets, floors = torch.empty(len(scores), dtype=torch.int32), torch.empty_like(scores)
    with on_device_of(scores):
        grid = (triton.cdiv(len(scores), 1024),)
        grouped_buckets_kernel[grid](scores, of_scores, table, buckets, floors, len(scores), BLOCK=1024)
    ordered, of_ordered = table.thresholds[: len(thresholds)], table.groups[: len(thresholds)]
    for group in ids:
        own, mine = ordered[of_ordered == group], of_scores == group
        first = int((of_ordered < group).sum())
        reached = torch.searchsorted(own[~own.isnan()], scores[mine], right=True).masked_fill(scores[mine].isnan(), 0)
        expected = torch.where(reached > 0, first + reached, 0)
        wrong = (buckets[mine] != expected).nonzero()
        assert not len(wrong), f"group {group}, score {scores[mine][wrong[0]]}: expected {expected[wrong[0]]}"
        known = expected > 0
        assert torch.equal(floors[mine][known], ordered[expected[known] - 1])
    return table


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("ids", "one_cell"),
    [
        ([7], False),
        ([-3, -1, 0, 4], False),
        ([INT64.min, INT64.min + 2], False),
        ([INT64.max - 5, INT64.max - 1], False),
        ([INT64.min, INT64.max], True),
        ([139, 285, 581_929], True),
    ],
)
def test_buckets_of_groups(ids: list[int], one_cell: bool, dtype: torch.dtype) -> None:
    thresholds = normal(254, dtype)
    thresholds[::50] = torch.tensor([INF, torch.nan, -INF, 0.0, -0.0, torch.nan])[: len(thresholds[::50])].to(dtype)
    groups = torch.tensor(ids)[torch.arange(254) % len(ids)]
    table = check_groups(thresholds, groups, normal(99, dtype), groups[:99])
    assert (cells_of_a_group(table) == 0) == one_cell


def test_as_many_groups_as_cells() -> None:
    thresholds, num_cells = normal(4), shape_of_cells(2, torch.float32, True)[0] - 1
    for last, cells in ((num_cells - 1, 1), (num_cells, 0)):
        groups = torch.tensor([0, 5, 5, last])
        table = check_groups(thresholds, groups, normal(9), groups)
        assert cells_of_a_group(table) == cells


def test_no_thresholds_of_groups() -> None:
    check_groups(normal(0), torch.zeros(0, dtype=torch.int64), normal(9), torch.arange(9))


@pytest.mark.parametrize("kind", ["equal", "an outlier", "all NaN", "in one group"])
def test_groups_that_a_grid_takes_badly(kind: str) -> None:
    x = normal(128)
    groups = torch.arange(128) % 50 * 80
    if kind == "equal":
        x = x * 0 + 0.25
    elif kind == "an outlier":
        x[7] = 1e30
    elif kind == "all NaN":
        x = x * torch.nan
    else:
        groups[:] = 4000
        groups[0] = 0
    check_groups(x, groups, normal(5), groups[:5])


def cells_of_a_group(table: Table) -> int:
    """0 if there is one cell for all."""
    bits = torch.int64 if table.cells.dtype == torch.float64 else torch.int32
    return int(table.cells.view(bits)[0, 4])


def rounds_of(table: Table) -> int:
    """Comparisons of each score, beyond those with the six thresholds of its cell."""
    bits = torch.int64 if table.cells.dtype == torch.float64 else torch.int32
    return int(table.cells.view(bits)[0, 0])


def normal(number: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(number, generator=torch.Generator().manual_seed(number), dtype=dtype)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("number", [0, 2, 6, 254, 2000])
def test_scattered_thresholds(number: int, dtype: torch.dtype) -> None:
    table = check(normal(number, dtype), 3 * normal(999, dtype))
    assert rounds_of(table) <= 3


@pytest.mark.thinned(4)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "kind",
    ["equal", "0 and -0", "huge", "tiny", "neighbours", "an outlier", "infinite", "NaN", "all NaN", "whole range"],
)
def test_thresholds_that_a_grid_takes_badly(kind: str, dtype: torch.dtype) -> None:
    x, info = normal(64, dtype), torch.finfo(dtype)
    thresholds = {
        "equal": x * 0 - 3.7,
        "0 and -0": x * 0,
        "huge": info.max * (1 - x.abs() / 1e4).clamp(min=0.5),
        "tiny": x * info.tiny * info.eps * 50,
        "neighbours": 1e4 + info.eps * 1e4 * x.mul(8).round(),
        "an outlier": torch.cat([x, x[:1] * 0 + 1e30, x[:1] * 0]),
        "infinite": torch.cat([x, torch.tensor([-INF, INF], dtype=dtype)]),
        "NaN": torch.cat([x, torch.tensor([torch.nan, 1.0], dtype=dtype)]),
        "all NaN": x * torch.nan,
        "whole range": torch.cat([x, torch.tensor([-info.max, info.max], dtype=dtype)]),
    }[kind]
    check(thresholds, normal(300, dtype) * thresholds[0])
    check(-thresholds, thresholds[0] + normal(300, dtype))


def test_rounds_are_as_many_as_the_fullest_cell_needs() -> None:
    for in_one_cell, rounds in ((1, 0), (6, 0), (7, 1), (8, 2), (9, 2), (10, 3), (13, 3), (14, 4), (37, 5)):
        further = torch.linspace(1, 2, 100 - in_one_cell)
        assert rounds_of(check(torch.cat([torch.zeros(in_one_cell), further]), further)) == rounds, in_one_cell


def test_rounds_do_not_depend_on_what_memory_has_held() -> None:
    """Nine ends of ramps are in one cell, which six comparisons and two rounds tell apart."""
    with filled_memory(1):
        assert rounds_of(Table(*place(torch.zeros(9), DELTA).table)) == 2


@settings(max_examples=30)
@given(st.sampled_from([1, 3, 10**6]), st.data())
def test_any_groups(step: int, data: st.DataObject) -> None:
    ids = st.lists(st.integers(0, 7), min_size=20, max_size=20)
    floats = st.lists(st.floats(width=32, allow_nan=True), min_size=20, max_size=20)
    thresholds, scores = (torch.tensor(data.draw(floats)) for _ in range(2))
    groups = torch.tensor(data.draw(ids)) * step
    check_groups(thresholds, groups, scores, groups)


@settings(max_examples=30)
@given(st.sampled_from(list(FLOATS)), st.data())
@example(torch.float32, None)
def test_any_thresholds(dtype: torch.dtype, data: st.DataObject | None) -> None:
    if data is None:
        given_thresholds, scores = [3.4028235e38, -3.4028235e38], [0.0]
    else:
        floats = st.floats(width=FLOATS[dtype], allow_nan=True)
        given_thresholds = data.draw(st.lists(floats, min_size=20, max_size=20))
        scores = data.draw(st.lists(floats, max_size=20))
    check(torch.tensor(given_thresholds, dtype=dtype), torch.tensor(scores, dtype=dtype))
