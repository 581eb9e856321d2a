"""The pairwise form takes positives in blocks, and those that lie close together a faster way."""

from __future__ import annotations

import pytest
import torch
from alrp_triton.kernels.pairwise import make_blocks
from dialect import INF, NAN
from drawn import DELTA, PAIRWISE, check_pairwise, levels_of, same_numbers
from torch import Tensor

from alrp_triton.engine.inputs import Levels
from alrp_triton.engine.knots import Table
from alrp_triton.engine.passes.protocol import Own

pytestmark = pytest.mark.usefixtures("small_blocks")
SIZE = 32


def among(positives: Tensor, scores: Tensor) -> Levels:
    return levels_of(
        (torch.cat([positives, scores]), (torch.arange(len(positives) + len(scores)) < len(positives)).long())
    )


def finite_bases(positives: Tensor, delta: float = DELTA) -> list[bool]:
    return make_blocks(positives.sort().values, 0.5 / delta, SIZE).bases.isfinite().tolist()


@pytest.mark.parametrize(
    "delta", [DELTA, pytest.param(3.0, marks=pytest.mark.nightly), pytest.param(1e-20, marks=pytest.mark.nightly)]
)
@pytest.mark.parametrize("spread", [0.2, 1.0, 300.0])
def test_both_kinds_of_blocks(spread: float, delta: float) -> None:
    """Positives within few ramps make all blocks close, others none; no order of the positives is assumed."""
    for num_pos in (0, 1, SIZE - 1, SIZE, SIZE + 1, 2 * SIZE + 1):
        generator = torch.Generator().manual_seed(num_pos)
        positives = torch.randn(num_pos, generator=generator).clamp(-2, 2) * spread * delta
        close = finite_bases(positives, delta)
        assert all(close) or spread > 0.2 or num_pos == 0
        assert not any(close[:-1]) or spread < 300
        # What float32 leaves of differences of numbers near 1, whatever the width of the ramp.
        scores = torch.cat([torch.randn(300, generator=generator) * spread * delta, positives[:40] + delta / 3])
        check_pairwise(among(positives, scores), delta, 3e-7)


def test_close_and_wide_blocks_beside_each_other() -> None:
    """Two crowds far from zero, where score and positive each have few digits left, and a few stragglers between."""
    crowd = torch.rand(SIZE, generator=torch.Generator().manual_seed(5)) * DELTA
    positives = torch.cat([crowd - 3000, torch.tensor([-9.0, 40.0, 0.0]), crowd[:-3] + 7, crowd + 3000])
    assert finite_bases(positives) == [True, False, True]
    check_pairwise(among(positives, torch.cat([positives + 0.3, positives - 0.2, crowd[1:]])), tolerance=1e-7)


def test_infinities_and_nan() -> None:
    """Among scores they meet close blocks; a block that holds one among its positives is not close."""
    positives, scores = (
        torch.tensor([*[-1.0] * SIZE, -INF, INF, INF, 0.5]),
        torch.tensor([-INF, INF, -1, 0.75, 3e38, -3e38]),
    )
    assert finite_bases(positives) == [False, False]
    assert make_blocks(torch.zeros(3), 0.5, SIZE).bases.tolist() == [0.0]
    assert make_blocks(torch.tensor([0.0, NAN]), 0.5, SIZE).bases.isnan().all()
    assert make_blocks(torch.empty(0), 0.0, SIZE).bases.isnan().tolist() == [True]
    for some in (positives, positives[:SIZE]):
        check_pairwise(among(some, scores))


def test_what_each_block_adds_is_not_lost_beside_a_large_sum() -> None:
    """By itself it is less than half of the sum's last digit."""
    num_pos = 16 * SIZE
    positives, weights = torch.zeros(num_pos), torch.full((num_pos + 1,), 2.0**-25 / SIZE, dtype=torch.float64)
    weights[-1] = 1
    table, own = Table(positives, positives[:0]), torch.zeros(1, num_pos, dtype=torch.float64)
    levels, given = among(positives, torch.full((3,), 9.0)), (Own(torch.arange(num_pos), own), [torch.ones(())])
    (found,) = PAIRWISE.write(levels, table, weights, *given, DELTA)
    same_numbers("gradient", found[num_pos:], torch.full((3,), 1 + 2.0**-21), 2e-7)
