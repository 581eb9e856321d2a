"""A forward and backward waits for nothing: no value is read, no size depends on one, on the paths that a GPU takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import KERNELS
from checks import engine_backends
from modes import MEMBERS, Detector, make_batch, step
from torch import Tensor
from virtual_gpu.harness import as_on_a_gpu
from waiting import waiting

from alrp_triton import ap_loss
from alrp_triton.engine.placed import MOST_COMPARED

BACKENDS = [backend for backend in engine_backends() if backend != "numba"]


@pytest.mark.thinned(4 if KERNELS else 1)
@pytest.mark.parametrize("images", [0, 3])
@pytest.mark.parametrize("num_pos", [5, 1, 0])
@pytest.mark.parametrize("member", MEMBERS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_waits_for_nothing(backend: str, member: str, num_pos: int, images: int) -> None:
    model, batch = Detector(member, backend=backend), make_batch(num_pos=num_pos, images=images)
    with as_on_a_gpu():
        step(model, batch)  # what is done once
        with waiting() as found:
            step(model, batch)
    assert not found


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend != "pairwise"])
def test_more_positives_than_are_compared(backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2 * MOST_COMPARED + 20, generator=generator).requires_grad_()
    labels = torch.arange(len(logits)) % 2
    with as_on_a_gpu(), waiting() as found:
        ap_loss(logits, labels, num_positives=MOST_COMPARED + 10, backend=backend).backward()
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
