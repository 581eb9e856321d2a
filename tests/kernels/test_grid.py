"""The bucket of every score, by a grid over the thresholds, against a binary search."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from alrp_triton.kernels.grid import lay
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

FLOATS = {torch.float32: 32, torch.float64: 64}


@triton.jit
def buckets_kernel(scores, table, buckets, floors, number, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    score = load(scores + at, at < number, floors.dtype.element_ty)
    bucket, floor = find_bucket(score, 0, table, scores.dtype.element_ty, 0)
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
