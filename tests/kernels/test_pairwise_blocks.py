"""The pairwise form takes positives in blocks, and those that lie close together a faster way."""

from __future__ import annotations

import pytest
import torch
from alrp_triton.kernels import configurations
from alrp_triton.kernels.pairs import make_blocks
from alrp_triton.kernels.pairwise_count import count_pairs
from alrp_triton.kernels.pairwise_gradient import write_pairwise_gradient
from alrp_triton.kernels.walk import make_walk
from torch import Tensor

INF, NAN = float("inf"), float("nan")
SCALE = 2.0**30


@pytest.fixture(autouse=True)
def settings_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for kernel, table in configurations.PINNED.items():
        monkeypatch.setitem(configurations.PINNED, kernel, {"default": table["default"]})


def passes(positives: Tensor, scores: Tensor, delta: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both passes over negatives alone, and what every pair in float64 makes of them; all weights are 1."""
    inverse_width = 0.5 / delta
    labels = torch.zeros(scores.shape, dtype=torch.int8)
    totals = count_pairs([make_walk(scores, labels)], positives, inverse_width, SCALE, -1)
    gradient = torch.full_like(scores, NAN)
    weights = torch.cat([torch.ones(len(positives)), torch.zeros(3)])
    write_pairwise_gradient([make_walk(scores, labels, gradient)], positives, weights, inverse_width, -1)
    h = ((scores.double() - positives.double()[:, None]) * inverse_width + 0.5).clamp(0, 1)
    # The pairwise form leaves two equal infinities to its caller.
    h = h.nan_to_num(0.0)
    return totals[0, : len(positives)] / SCALE, h.sum(1), gradient.double(), h.sum(0)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("num_positives", [1, 127, 128, 129, 300])
@pytest.mark.parametrize("delta", [3.0, 0.37, 1e-3, 1e-20])
def test_both_kinds_of_blocks(num_positives: int, delta: float) -> None:
    """A wide ramp makes all blocks close, a narrow one none; no order of the positives is assumed."""
    generator = torch.Generator().manual_seed(num_positives)
    positives = torch.randn(num_positives, generator=generator) / 2
    scores = torch.cat([torch.randn(1500, generator=generator), positives[:40] + delta / 3])
    closeness = make_blocks(positives.sort().values, 0.5 / delta, 128).bases.isfinite()
    assert bool(closeness.all()) or delta < 3
    assert not bool(closeness[0]) or delta > 1e-3 or num_positives == 1
    counted, expected, gradient, expected_gradient = passes(positives, scores, delta)
    # What float32 leaves of differences of numbers near 1, whatever the width of the ramp.
    assert (counted - expected).abs().max() <= 3e-7 * len(scores)
    assert (gradient - expected_gradient).abs().max() <= 3e-7 * num_positives


def test_close_and_wide_blocks_beside_each_other() -> None:
    """Two crowds far from zero, where score and positive each have few digits left, and a few stragglers between."""
    generator = torch.Generator().manual_seed(5)
    crowd = torch.rand(128, generator=generator)
    positives = torch.cat([crowd - 3000, torch.tensor([-9.0, 40.0, 0.0]), crowd[:125] + 7, crowd + 3000])
    scores = torch.cat([positives + 0.3, positives - 0.9, torch.randn(100, generator=generator)])
    assert make_blocks(positives.sort().values, 0.5, 128).bases.isfinite().tolist() == [True, False, True]
    counted, expected, gradient, expected_gradient = passes(positives, scores, 1.0)
    assert (counted - expected).abs().max() <= 1e-7 * expected.max()
    assert (gradient - expected_gradient).abs().max() <= 1e-7 * expected_gradient.max()


def test_infinities_and_nan() -> None:
    """Among scores they meet close blocks; a block that holds one among its positives is not close."""
    positives = torch.cat([torch.full((128,), -1.0), torch.tensor([-INF, INF, INF, 0.5])])
    scores = torch.tensor([-INF, INF, -1.0, 0.75, 3.4e38, -3.4e38])
    blocks = make_blocks(positives.sort().values, 0.5, 128)
    assert blocks.bases.isfinite().tolist() == [False, False]
    assert make_blocks(torch.zeros(3), 0.5, 128).bases.tolist() == [0.0]
    assert make_blocks(torch.tensor([0.0, NAN]), 0.5, 128).bases.isnan().all()
    for some in (positives, positives[:128]):
        counted, expected, gradient, expected_gradient = passes(some, scores, 1.0)
        assert torch.allclose(counted, expected.to(counted.dtype))
        assert torch.allclose(gradient, expected_gradient)


@pytest.mark.parametrize("inverse_width", [0.0, 0.5])
def test_no_positives(inverse_width: float) -> None:
    blocks = make_blocks(torch.empty(0), inverse_width, 128)
    assert blocks.positives.isnan().all()
    assert blocks.bases.isnan().tolist() == [True]
