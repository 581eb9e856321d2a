"""Finding the positives by kernels, against what the torch code collects."""

from __future__ import annotations

import pytest
import torch
from alrp_triton.kernels import configurations, positives
from torch import Tensor

from alrp_triton.engine.inputs import Levels
from alrp_triton.engine.positives import _collect

CLASSES = 5


@pytest.fixture(autouse=True, params=[64, 1024])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that cut levels anywhere, and tiles larger than any."""
    monkeypatch.setitem(configurations.PINNED, "collect", {"default": {"block": request.param, "num_warps": 4}})


def make_levels(seed: int = 0, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    """Channel-first, sliced, empty, without positives, by logit in a transposed tensor, and of five axes."""
    generator = torch.Generator().manual_seed(seed)

    def logits(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    def labels(low: int, high: int, shape: torch.Size, kind: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(low, high, shape, generator=generator).to(kind)

    first = logits(2, 3 * CLASSES, 4, 5).view(2, 3, CLASSES, 4, 5).permute(0, 3, 4, 1, 2)
    sliced = logits(2, 9, CLASSES + 2)[:, ::2, 1:-1]
    by_logit = logits(13, 17).t()
    odd = logits(2, 3, 2, 3, 2, CLASSES).permute(4, 2, 0, 3, 1, 5)
    return [
        (first, labels(-1, CLASSES + 1, first.shape[:-1])),
        (sliced, labels(-1, CLASSES + 1, sliced.shape[:-1], torch.int16)),
        (logits(0, CLASSES), torch.empty(0, dtype=torch.int64)),
        (logits(7, CLASSES), torch.full((7,), CLASSES, dtype=torch.uint8)),
        (by_logit, labels(-1, 2, by_logit.shape, torch.int8)),
        (odd, labels(0, CLASSES + 1, odd.shape[:-1], torch.uint8)),
    ]


def expected_of(levels: list[tuple[Tensor, Tensor]], ignore_index: int) -> tuple[Tensor, Tensor]:
    index, invalid = _collect(Levels(*map(list, zip(*levels))), ignore_index)
    assert not invalid
    return index, torch.cat([logits.reshape(-1) for logits, _ in levels])[index]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("most_counted", [0, 1 << 13])
def test_all_layouts(dtype: torch.dtype, most_counted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(positives, "_MOST_COUNTED", most_counted)
    levels = make_levels(dtype=dtype)
    index, logits = expected_of(levels, -1)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    pos_index, pos_logits, found = positives.collect(levels, len(index), -1, compute)
    assert torch.equal(pos_index, index)
    assert torch.equal(pos_logits, logits.to(compute))
    assert found.tolist() == [len(index), 0]


@pytest.mark.parametrize("ignore_index", [-100, 1, CLASSES, 255])
def test_any_label_may_be_the_ignored_one(ignore_index: int) -> None:
    logits = torch.randn(40, CLASSES)
    labels = torch.arange(40) % (CLASSES + 1)
    labels[5] = ignore_index
    index, _ = expected_of([(logits, labels)], ignore_index)
    pos_index, _, found = positives.collect([(logits, labels)], len(index), ignore_index, torch.float32)
    assert torch.equal(pos_index, index)
    assert found.tolist() == [len(index), 0]


@pytest.mark.parametrize("most_counted", [0, 1 << 13])
@pytest.mark.parametrize("more", [-3, -1, 1, 4, 400])
def test_a_wrong_number_gives_nan_and_places_that_exist(
    more: int, most_counted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(positives, "_MOST_COUNTED", most_counted)
    levels = make_levels(1)
    index, _ = expected_of(levels, -1)
    pos_index, pos_logits, found = positives.collect(levels, len(index) + more, -1, torch.float32)
    assert pos_logits.isnan().all()
    assert found.tolist() == [len(index), 0]
    assert set(pos_index.tolist()) <= {0, *index.tolist()}
    assert (pos_index.diff() >= 0).all()


@pytest.mark.parametrize("label", [-2, CLASSES + 1, 1000])
@pytest.mark.parametrize("per_class", [True, False])
def test_labels_out_of_range(label: int, per_class: bool) -> None:
    logits = torch.randn(300, CLASSES)
    labels = torch.zeros(300, dtype=torch.int64) if per_class else torch.zeros(300, CLASSES, dtype=torch.int64)
    labels.view(-1)[-1] = label
    num_positives = 299 if per_class else 0
    _, pos_logits, found = positives.collect([(logits, labels)], num_positives, -1, torch.float32)
    assert found[0] == num_positives
    assert found[1] > 0
    assert pos_logits.isnan().all()


@pytest.mark.parametrize("label", [2, CLASSES])
def test_a_single_row_with_a_scalar_label(label: int) -> None:
    logits = torch.randn(CLASSES)
    index, _ = expected_of([(logits, torch.tensor(label))], -1)
    pos_index, pos_logits, _ = positives.collect([(logits, torch.tensor(label))], len(index), -1, torch.float32)
    assert torch.equal(pos_index, index)
    assert torch.equal(pos_logits, logits[index])


def test_no_positives_and_no_logits() -> None:
    nothing = (torch.empty(0, CLASSES), torch.empty(0, dtype=torch.int64))
    background = (torch.randn(9, CLASSES), torch.full((9,), CLASSES))
    for levels in ([nothing], [background], [nothing, background]):
        pos_index, pos_logits, found = positives.collect(levels, 0, -1, torch.float32)
        assert pos_index.shape == pos_logits.shape == (0,)
        assert found.tolist() == [0, 0]
    # None there though one is expected.
    assert positives.collect([nothing], 1, -1, torch.float32)[1].isnan().all()
