"""What a GPU runs in the torch code so as not to make the host wait, run on the CPU beside what the CPU runs."""

from __future__ import annotations

import pytest
import torch
from dialect import assert_same_bits
from virtual_gpu.harness import as_on_a_gpu

from alrp_triton import alrp_loss
from alrp_triton.engine.inputs import Levels
from alrp_triton.engine.knots import make_knots
from alrp_triton.engine.labels import positions
from alrp_triton.engine.passes import eager, find, tables

CLASSES = 4


def make_levels(seed: int = 0) -> tuple[Levels, int]:
    """A level by rows, an empty one, one without positives, one by logits whose first is positive; some ignored."""
    generator = torch.Generator().manual_seed(seed)
    logits = [
        torch.randn(shape, generator=generator) for shape in ((2, 30, CLASSES), (0, CLASSES), (7, CLASSES), (50,))
    ]
    by_row = torch.randint(-1, CLASSES + 1, (2, 30), generator=generator)
    by_logit = torch.randint(-1, 2, (50,), generator=generator)
    by_row[0, 0], by_logit[0] = 0, 1
    labels = [by_row, torch.empty(0, dtype=torch.int64), torch.full((7,), CLASSES), by_logit]
    num_pos = int(((by_row >= 0) & (by_row < CLASSES)).sum() + (by_logit == 1).sum())
    return Levels(logits, labels), num_pos


@pytest.mark.parametrize("piece", [1, 37, 1 << 20])
def test_finds_the_same_positives(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(find, "_PIECE_ON_DEVICE", piece)
    levels, num_pos = make_levels()
    expected, invalid = find._collect(levels, -1, positions)
    assert (len(expected), invalid) == (num_pos, False)
    for asked in (num_pos, num_pos - 3, num_pos + 3, 0):
        index, count, wrong = find._collect_without_sync(levels, asked, -1)
        assert int(count) == num_pos
        assert not bool(wrong)
        shared = min(asked, num_pos)
        assert len(index) == asked
        assert_same_bits("index", index[:shared], expected[:shared])


@pytest.mark.parametrize("place", [0, 2, 3])
def test_sees_labels_out_of_range(place: int) -> None:
    levels, num_pos = make_levels()
    levels.labels[place].view(-1)[-1] = 9
    assert find._collect(levels, -1, positions)[1]
    assert bool(find._collect_without_sync(levels, num_pos, -1)[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("first_is_positive", [True, False])
def test_writes_the_same_positives(first_is_positive: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in ((3, 5), (4,), (2, 2, 3))]
    flat = torch.randperm(15 + 4 + 12, generator=generator)[:11]
    flat = torch.cat([flat[flat > 0], flat.new_zeros(int(first_is_positive))])
    values = torch.randn(len(flat), generator=generator, dtype=torch.float64)
    expected = torch.cat([t.flatten() for t in tensors])
    expected[flat] = values.to(dtype)
    for tensor, local, inside in find.local_indices(tensors, flat):
        eager._overwrite_without_sync(tensor, local, inside, values)
    assert_same_bits("values", torch.cat([t.flatten() for t in tensors]), expected)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("delta", [1.0, 0.0])
def test_the_whole_loss_on_the_path_of_a_gpu(delta: float, grouped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Binary search, no peeking, masks and slots throughout: the same bits."""
    levels, num_pos = make_levels()
    levels.logits[0][0, 1], levels.logits[3][5], levels.logits[2][0, 0] = torch.inf, -torch.inf, 0.25
    errors = torch.linspace(0.1, 0.9, num_pos)
    groups = [torch.arange(x.shape[0])[(..., *[None] * (x.dim() - 1))].expand(x.shape) % 3 for x in levels.logits]

    def run() -> list[torch.Tensor]:
        leaves = [x.clone().requires_grad_() for x in levels.logits]
        out = alrp_loss(leaves, levels.labels, errors, delta=delta, groups=groups if grouped else None, backend="torch")
        return [out.cls.detach(), out.loc, out.rank, *torch.autograd.grad(out.cls, leaves)]

    expected = run()
    monkeypatch.setattr(find, "_collect", lambda *given: pytest.fail("waits for the device"))
    with as_on_a_gpu():
        for one, other in zip(run(), expected):
            assert_same_bits("result", one, other)
        # A wrong number of positives cannot raise here; it makes everything NaN, or raises when asked to.
        errors = errors[:-1]
        assert all(tensor[~(tensor == 0)].isnan().all() for tensor in run())
        monkeypatch.setenv("ALRP_TRITON_DEBUG", "1")
        with pytest.raises(ValueError, match="loc_errors"):
            run()


def test_bucket_search_agrees_with_comparing() -> None:
    scores = torch.tensor([-torch.inf, -3.4e38, -1.0, 0.0, 0.5, 1.5, 3.4e38, torch.inf])
    thresholds = make_knots(torch.tensor([0.5, torch.inf, -torch.inf, 0.5, 3.4028234663852886e38]), 1.0).table
    thresholds = thresholds.thresholds[: len(thresholds.floors) - 1]
    expected = (scores[:, None] >= thresholds[None, :]).sum(1)
    assert_same_bits("grid", tables.BucketSearch(thresholds)(scores).long(), expected)
    assert_same_bits("bisection", tables.buckets_of(scores, thresholds), expected)


def test_narrow_labels_of_many_classes() -> None:
    """200 does not fit into int8: there the class labels cannot name background, but all their values are classes."""
    logits = torch.randn(20, 200, requires_grad=True)
    labels = torch.arange(20, dtype=torch.int8)
    expected = alrp_loss(logits, labels.long(), torch.rand(20)).rank
    assert_same_bits("rank", alrp_loss(logits, labels, torch.rand(20)).rank, expected)
