"""A forward and backward waits for nothing: no value is read, no size depends on one, on the paths that a GPU takes."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from dialect import (
    BORROWED,
    KERNELS,
    MODULES,
    Detector,
    assert_same_bits,
    by_criterion,
    engine_backends,
    make_batch,
    step,
)
from torch import Tensor
from virtual_gpu.harness import as_on_a_gpu

from alrp_triton import APLoss
from alrp_triton.engine import passes
from alrp_triton.engine.inputs import Levels
from alrp_triton.engine.passes import eager, find
from alrp_triton.engine.placed import MOST_COMPARED
from benchmarks.launches import Operators

pytestmark = pytest.mark.skipif(BORROWED, reason="the copies of a borrowed GPU wait")
# A value that the host reads, and a result whose size depends on values.
WAITING = {
    "_local_scalar_dense",
    "_unique2",
    "allclose",
    "bincount",
    "equal",
    "is_nonzero",
    "item",
    "masked_select",
    "nonzero",
    "nonzero_numpy",
    "unique_consecutive",
    "unique_dim",
}
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}
# Copies to the host and from its memory, for which no operator is called on the CPU, or none that tells them apart.
COPIES = [(Tensor, name) for name in ("__array__", "cpu", "numpy", "tolist")]
COPIES += [(torch, name) for name in ("as_tensor", "from_numpy", "tensor")]


class Waiting(Operators):
    """Those for which the host would wait."""

    def counted(self, name: str, schema: Any, args: Any, kwargs: Any) -> bool:
        by_mask = name in INDEXED and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        # Where all get the same number nobody has to know how many they are.
        by_mask = by_mask and not (len(args) > 2 and args[2].numel() == 1)
        repeats = name == "repeat_interleave" and kwargs.get("output_size") is None
        return name in WAITING or by_mask or repeats


@contextlib.contextmanager
def waiting() -> Iterator[Counter[str]]:
    """What would wait meanwhile, by name."""
    mode = Waiting()

    def noted(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            mode.counts[name] += 1
            return original(*given, **named)

        return call

    with contextlib.ExitStack() as stack:
        for owner, name in COPIES:
            stack.enter_context(patch.object(owner, name, noted(name, getattr(owner, name))))
        stack.enter_context(mode)
        yield mode.counts


BACKENDS = [backend for backend in engine_backends() if backend != "numba"]


@pytest.mark.thinned(4 if KERNELS else 1)
@pytest.mark.parametrize("images", [0, 3])
@pytest.mark.parametrize("num_pos", [5, 1, 0])
@by_criterion
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_waits_for_nothing(backend: str, member: str, num_pos: int, images: int) -> None:
    model, batch = Detector(member, backend=backend), make_batch(num_pos=num_pos, images=images)
    # Where no kernels run, as on a GPU without Triton.
    with as_on_a_gpu(), contextlib.nullcontext() if KERNELS else patch.object(passes, "_TRITON_INSTALLED", False):
        step(model, batch)  # what is done once
        with waiting() as found:
            step(model, batch)
    assert not found


@by_criterion
def test_the_first_step_waits_for_nothing(member: str) -> None:
    """Though modules look at their first arguments on a CPU."""
    backend = BACKENDS[0]
    with as_on_a_gpu(), contextlib.nullcontext() if KERNELS else patch.object(passes, "_TRITON_INSTALLED", False):
        step(Detector(member, backend=backend), make_batch())  # what a process does once
        model = Detector(member, backend=backend)
        with waiting() as found:
            step(model, make_batch())
    assert not found


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_labels_that_are_no_integers_wait_for_nothing(dtype: torch.dtype) -> None:
    labels = (torch.arange(40) % 4 == 1).to(dtype)
    with as_on_a_gpu(), waiting() as found:
        loss = APLoss(backend=BACKENDS[0])(torch.randn(40), labels, num_positives=10)
    assert not found
    assert loss > 0


@pytest.mark.thinned(2)
@pytest.mark.parametrize("images", [0, 3])
@pytest.mark.parametrize("num_pos", [5, 1, 0])
@pytest.mark.parametrize("member", MODULES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_monitored_step_waits_for_nothing(backend: str, member: str, num_pos: int, images: int) -> None:
    model, batch = Detector(member, backend=backend, monitor=True), make_batch(num_pos=num_pos, images=images)
    with as_on_a_gpu(), contextlib.nullcontext() if KERNELS else patch.object(passes, "_TRITON_INSTALLED", False):
        step(model, batch)
        with waiting() as found:
            step(model, batch)
            ap = APLoss(backend=backend, monitor=True)
            ap(torch.randn(40), torch.arange(40) % 4, num_positives=10)
    assert not found
    assert ap.stats["num_positives"] == 10
    assert model.criterion.module.stats["num_positives"] == num_pos


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend != "pairwise"])
def test_more_positives_than_are_compared(backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2 * MOST_COMPARED + 20, generator=generator).requires_grad_()
    labels = torch.arange(len(logits)) % 2
    with as_on_a_gpu(), waiting() as found:
        criterion = APLoss(backend=backend, monitor=True)
        criterion(logits, labels, num_positives=MOST_COMPARED + 10).backward()
    assert not found


X, MASK = torch.arange(4.0), torch.tensor([True, False, True, False])
WAITS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "item": lambda x, m: x[0].item(),
    "truth": lambda x, m: bool(x[0] > 0),
    "float": lambda x, m: float(x.sum()),
    "int": lambda x, m: int(m.sum()),
    "index": lambda x, m: range(9)[m.sum()],
    "tolist": lambda x, m: x.tolist(),
    "nonzero": lambda x, m: m.nonzero(),
    "where": lambda x, m: torch.where(m),
    "masked_select": lambda x, m: x.masked_select(m),
    "boolean indexing": lambda x, m: x[m],
    "boolean assignment": lambda x, m: x.clone().__setitem__(m, x[:2]),
    "unique": lambda x, m: x.unique(),
    "equal": lambda x, m: torch.equal(x, x + 1),
    "cpu": lambda x, m: x.cpu(),
    "numpy": lambda x, m: x.numpy(),
    "tensor": lambda x, m: torch.tensor([1.0]),
    "repeat_interleave": lambda x, m: x.repeat_interleave(m.long()),
}


@pytest.mark.parametrize("name", WAITS)
def test_what_waits_is_seen(name: str) -> None:
    with waiting() as found:
        WAITS[name](X, MASK)
    assert found


def test_what_does_not_wait_is_not_seen() -> None:
    with waiting() as found:
        x = torch.where(MASK, X, 0.0)[torch.arange(2)]
        x[MASK[:2]] = 3.0
        x.masked_fill(MASK[:2], 1.0).sum().expand(3).clone()
    assert not found


# What finds and writes positives without waiting, beside what the CPU runs.

COLUMNS = 4


def make_levels(seed: int = 0) -> tuple[Levels, int]:
    """A level by rows, an empty one, one without positives, one by logits whose first is positive; some ignored."""
    generator = torch.Generator().manual_seed(seed)
    logits = [
        torch.randn(shape, generator=generator) for shape in ((2, 30, COLUMNS), (0, COLUMNS), (7, COLUMNS), (50,))
    ]
    by_row = torch.randint(-1, COLUMNS + 1, (2, 30), generator=generator)
    by_logit = torch.randint(-1, 2, (50,), generator=generator)
    by_row[0, 0], by_logit[0] = 0, 1
    labels = [by_row, torch.empty(0, dtype=torch.int64), torch.full((7,), COLUMNS), by_logit]
    num_pos = int(((by_row >= 0) & (by_row < COLUMNS)).sum() + (by_logit == 1).sum())
    return Levels(logits, labels), num_pos


@pytest.mark.parametrize("piece", [1, 37, 1 << 20])
def test_finds_the_same_positives(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(find, "_PIECE_ON_DEVICE", piece)
    levels, num_pos = make_levels()
    expected, invalid = find._collect(levels)
    assert (len(expected), invalid) == (num_pos, False)
    for asked in (num_pos, num_pos - 3, num_pos + 3, 0):
        index, count, wrong = find._collect_without_sync(levels, asked)
        assert int(count) == num_pos
        assert not bool(wrong)
        shared = min(asked, num_pos)
        assert len(index) == asked
        assert_same_bits("index", index[:shared], expected[:shared])


@pytest.mark.parametrize("place", [0, 2, 3])
def test_sees_labels_out_of_range(place: int) -> None:
    levels, num_pos = make_levels()
    levels.labels[place].view(-1)[-1] = 9
    assert find._collect(levels)[1]
    assert bool(find._collect_without_sync(levels, num_pos)[2])


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
