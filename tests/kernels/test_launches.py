"""How often an iteration makes a GPU start something, which is what small inputs wait for."""

from __future__ import annotations

import pytest
from cases import INTERPRETED

from benchmarks.launches import CRITERIA, LOSSES, launches_of

pytestmark = pytest.mark.skipif(INTERPRETED, reason="launches are counted where kernels are compiled")


@pytest.mark.parametrize("num_levels", [1, 5])
@pytest.mark.parametrize(("name", "most"), [("alrp", 8), ("ap", 8), ("ndcg", 7), ("rank_sort", 8)])
def test_launches_of_an_iteration(name: str, most: int, num_levels: int) -> None:
    forward, backward = launches_of(LOSSES[name], 300, num_levels)
    assert sum(forward.values()) + sum(backward.values()) <= most


def test_launches_of_a_formula_of_ones_own() -> None:
    """As counted when this was written; with another PyTorch there may be some more."""
    forward, backward = launches_of(LOSSES["own"], 300)
    assert sum(forward.values()) + sum(backward.values()) <= 48


@pytest.mark.parametrize(
    ("name", "num_levels", "most"),
    [
        ("ALRPLoss", 1, 153),
        ("ALRPLoss", 5, 153),
        ("RankSortLoss", 1, 181),
        ("RankSortLoss", 5, 221),
        ("APLoss", 5, 8),
        ("NDCGLoss", 5, 7),
    ],
)
def test_launches_of_a_criterion(name: str, num_levels: int, most: int) -> None:
    """Errors of boxes and self-balancing are PyTorch's operations: with another PyTorch there may be some more."""
    forward, backward = launches_of(CRITERIA[name], 300, num_levels)
    assert sum(forward.values()) + sum(backward.values()) <= most
