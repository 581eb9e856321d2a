"""The sorting error without pairs: sums over what lies above a score and above a value."""

from __future__ import annotations

from contextlib import AbstractContextManager
from unittest.mock import patch

import pytest
import torch
from dialect import KERNELS, assert_same_bits
from hypothesis import given, settings
from hypothesis import strategies as st

if KERNELS:
    pytest.skip("without kernels", allow_module_level=True)

from alrp_triton.engine import sorting
from alrp_triton.engine.sorting import dominance_sums, sort_by_value, sorting_sums

INF = float("inf")
SCORES = st.one_of(
    st.sampled_from([0.0, -0.0, 0.25, 1.0, -1.0, INF, -INF, 3e38, -3e38, 1e-40]), st.floats(-5, 5, width=32)
)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_sums_of_columns_before_a_place_by_rank(data: st.DataObject) -> None:
    m = data.draw(st.integers(1, 12))
    ranks = torch.tensor(data.draw(st.lists(st.integers(0, m - 1), min_size=m, max_size=m)))
    n = data.draw(st.integers(1, 4))
    at = torch.tensor(data.draw(st.lists(st.lists(st.integers(0, m), min_size=n, max_size=n), min_size=3, max_size=3)))
    least = torch.tensor(data.draw(st.lists(st.integers(0, int(ranks.max()) + 1), min_size=n, max_size=n)))
    rows = torch.tensor(data.draw(st.lists(st.integers(-9, 9), min_size=2 * m, max_size=2 * m))).double().view(2, m)
    higher, lower = dominance_sums(rows, ranks, at, least, None, torch.zeros_like(least))
    for found, chosen in ((higher, ranks[:, None] >= least), (lower, ranks[:, None] < least)):
        for q in range(3):
            before = torch.arange(m)[:, None] < at[q]
            first = torch.arange(m)[:, None] < at[0]
            expected = rows @ (before & chosen).double() - rows @ (first & chosen).double()
            assert torch.equal(found[:, q] - found[:, 0], expected)


def by_pairs(
    logits: torch.Tensor, values: torch.Tensor, groups: torch.Tensor | None, delta: float, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, pair by pair, with a share of 1 for each positive."""
    x = logits.double()
    difference = torch.where(x == x[:, None], 0.0, x - x[:, None])  # [i, k]
    heights = (difference / (2 * delta) + 0.5).clamp(0, 1) if delta else (difference >= 0).double()
    if groups is not None:
        heights = torch.where(groups == groups[:, None], heights, 0.0)
    proper, below_1 = values >= values[:, None], 1 - values.double()
    target = torch.where(proper, heights, 0.0)
    errors = (heights @ below_1) / heights.sum(1) - (target @ below_1) / target.sum(1)
    others = torch.where(proper, 0.0, heights)
    weights = torch.where(others.sum(1) > eps, errors / others.sum(1), 0.0)
    received = (others * weights[:, None]).sum(0)
    return errors, received - torch.where(others.sum(1) > eps, errors, 0.0)


def path_of(few: int, on_device: bool) -> AbstractContextManager[object]:
    """Pairs up to so many; groups together, as where the host does not know them."""
    names = {"_FEW": few, "_FEW_OF_GROUPS_ON_DEVICE": few}
    return patch.multiple(sorting, **names, is_asynchronous=lambda device: on_device)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(SCORES, st.integers(0, 6), st.integers(-1, 1)), max_size=14), st.sampled_from([0.0, 0.5, 1.0])
)
def test_errors_and_gradients_are_those_of_all_pairs(drawn: list[tuple[float, int, int]], delta: float) -> None:
    """Few positives are compared in pairs, and here by dominance, too."""
    logits = torch.tensor([score for score, *_ in drawn], dtype=torch.float32)
    values = torch.tensor([value / 6 for _, value, _ in drawn], dtype=torch.float32)
    groups = torch.tensor([group for *_, group in drawn], dtype=torch.int64)
    share = torch.ones(len(drawn), dtype=torch.float64)
    for of in (None, groups):
        for few, on_device in ((0, False), (512, False), (0, True)):
            with path_of(few, on_device):
                found = sort_by_value(logits, values, of, share, delta, 1e-10)
            for one, other in zip(found, by_pairs(logits, values, of, delta, 1e-10)):
                torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("different", [1, 2, 8, 5000])
def test_many_positives(different: int) -> None:
    generator = torch.Generator().manual_seed(different)
    logits = 2 * torch.randn(5000, generator=generator)
    values = (different * torch.rand(5000, generator=generator)).floor() / different
    share = torch.ones(5000, dtype=torch.float64)
    found = sort_by_value(logits, values, None, share, 0.5, 1e-10)
    for one, other in zip(found, by_pairs(logits, values, None, 0.5, 1e-10)):
        assert (one - other).abs().max() <= 1e-7 * other.abs().max()
    if different == 1:
        assert not found[0].abs().max() > 1e-12
        assert not found[1].any()  # exactly: nothing is above what it should not be above


def test_large_and_small_groups() -> None:
    """Large ones have sums of their own, small ones a few pairs together; none feels the others."""
    generator = torch.Generator().manual_seed(3)
    groups = torch.cat([torch.full((n,), k) for k, n in enumerate([700, 3, 1, 40, 900, 500, 13, 2000])])
    groups = groups[torch.randperm(len(groups), generator=generator)]
    logits, values = 2 * torch.randn(len(groups), generator=generator), torch.rand(len(groups), generator=generator)
    share = torch.ones(len(groups), dtype=torch.float64)
    expected = by_pairs(logits, values, groups, 0.5, 1e-10)
    for on_device in (False, True):
        with path_of(0 if on_device else 512, on_device):
            found = sort_by_value(logits, values, groups, share, 0.5, 1e-10)
            far = sort_by_value(logits.masked_fill(groups == 0, 1e30), values, groups, share, 0.5, 1e-10)
        for one, other, wanted in zip(found, far, expected):
            assert (one - wanted).abs().max() <= 1e-7 * wanted.abs().max()
            assert_same_bits("groups beside a far one", other[groups != 0], one[groups != 0])
        if not on_device:
            own = groups == 7
            alone = sort_by_value(logits[own], values[own], None, share[own], 0.5, 1e-10)
            for one, other in zip(found, alone):
                assert_same_bits("group", one[own], other)


def test_groups_on_a_device_need_no_pairs() -> None:
    """All pairs of 70,000 positives would take 39 GB and a minute."""
    generator = torch.Generator().manual_seed(4)
    logits, values = torch.randn(2, 70_000, generator=generator).unbind()
    groups, share = torch.arange(70_000) % 9, torch.ones(70_000, dtype=torch.float64)
    expected = sort_by_value(logits, values, groups, share, 0.5, 1e-10)
    with patch.object(sorting, "is_asynchronous", lambda device: True), patch.object(sorting, "_Pairs", None):
        found = sort_by_value(logits, values, groups, share, 0.5, 1e-10)
    for one, other in zip(found, expected):
        assert (one - other).abs().max() <= 1e-7 * other.abs().max()


def test_the_same_bits_for_any_flat_order_and_number_of_threads() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, values = ((8 * torch.randn(3000, generator=generator)).round() / 8 for _ in range(2))
    groups = torch.arange(3000) % 3
    order = torch.randperm(3000, generator=generator)
    share = torch.full((3000,), 1 / 3000, dtype=torch.float64)
    threads = torch.get_num_threads()
    for of in (None, groups):
        first = sort_by_value(logits, values, of, share, 0.5, 1e-10)
        torch.set_num_threads(1 if threads > 1 else 2)
        try:
            second = sort_by_value(logits[order], values[order], None if of is None else of[order], share, 0.5, 1e-10)
        finally:
            torch.set_num_threads(threads)
        for one, other in zip(first, second):
            assert_same_bits("sorted", one[order], other)


def test_memory_is_linear() -> None:
    """All pairs of 100,000 positives would take 80 GB."""
    logits, values = torch.randn(2, 100_000, generator=torch.Generator().manual_seed(0)).unbind()
    ramps, above, target_ramps, target_above, missorted = sorting_sums(logits, values, None, 1.0)
    torch.testing.assert_close(target_ramps + missorted, ramps, rtol=1e-9, atol=1e-6)
    assert (above.isfinite() & target_above.isfinite()).all()
