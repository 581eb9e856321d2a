"""Levels of every layout, and launch settings: what only the Triton backends have to get right."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from alrp_triton.kernels import configurations
from alrp_triton.kernels.walk import make_walk
from cases import COMPILED_FOR, Case, random_case
from checks import assert_close, assert_same_results, evaluate, judge
from virtual_gpu import Device
from virtual_gpu.harness import package_on

from alrp_triton import alrp_loss

pytestmark = pytest.mark.parametrize("backend", ["triton", "pairwise"])


@pytest.mark.thinned(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_levels_of_every_layout(backend: str, dtype: torch.dtype) -> None:
    """A channel-first level, a slice of a wider tensor, an expanded row, an empty level, one with per-logit labels."""
    torch.manual_seed(3)
    anchors, classes = 3, 5
    first = torch.randn(2, anchors * classes, 4, 6).view(2, anchors, classes, 4, 6).permute(0, 3, 4, 1, 2)
    sliced = torch.randn(2, 7, classes + 4)[:, ::2, 4:]
    expanded = torch.randn(1, 1, classes).expand(3, 2, classes)
    transposed = torch.randn(9, 11).t()
    # A conversion keeps strides only of what is dense, so slice and expand again.
    levels = [first.to(dtype), sliced.to(dtype), expanded[:1].to(dtype).expand(3, 2, classes)]
    levels += [torch.empty(0, classes, dtype=dtype), transposed.to(dtype)]
    levels[1] = torch.randn(2, 7, classes + 4).to(dtype)[:, ::2, 4:]
    labels = [
        torch.randint(-1, classes + 1, levels[0].shape[:-1]),
        torch.randint(-1, classes + 1, levels[1].shape[:-1], dtype=torch.int16),
        torch.randint(-1, classes + 1, levels[2].shape[:-1], dtype=torch.int8),
        torch.empty(0, dtype=torch.int64),
        torch.randint(-1, 2, (9, 11), dtype=torch.int32).t(),
    ]
    positive = [(y >= 0) & (y < classes) if y.dim() != x.dim() else y == 1 for x, y in zip(levels, labels)]
    errors = torch.rand(int(sum(mask.sum() for mask in positive)))

    def gradients(backend: str) -> list[torch.Tensor]:
        leaves = [level.detach().requires_grad_() for level in levels]
        out = alrp_loss(leaves, labels, errors, backend=backend)
        return [out.cls.detach(), *torch.autograd.grad(out.cls, leaves)]

    found, expected = gradients(backend), gradients("reference")
    assert_close("cls", found[0], expected[0], 1e-6)
    for i, (level, one, other) in enumerate(zip(levels, found[1:], expected[1:])):
        assert one.dtype == dtype
        assert_close(f"level {i}", one, other, 8e-3 if dtype == torch.bfloat16 else 1e-6)
        if level.numel() and i != 2:
            assert one.abs().sum() > 0


def test_more_axes_than_a_kernel_walks_are_copied(backend: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4, 2, 5, 3, 2).permute(5, 3, 1, 4, 0, 2)
    y = (torch.rand(x.shape) < 0.05).long()
    case = Case("six axes", x.reshape(-1), y.reshape(-1), torch.rand(int(y.sum())))
    leaf = x.detach().requires_grad_()
    alrp_loss(leaf, y, case.loc_errors, backend=backend).cls.backward()
    assert_close("gradient", leaf.grad.reshape(-1), judge(case).grad_logits, 1e-6)


def test_other_settings_give_the_same_sums(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = random_case(1500, 40, "middle")
    expected = evaluate(case.logits, case.labels, case.loc_errors, backend)
    for block in (64, 256):
        for kernel, table in configurations.PINNED.items():
            monkeypatch.setitem(configurations.PINNED, kernel, {"default": table["default"] | {"block": block}})
        found = evaluate(case.logits, case.labels, case.loc_errors, backend)
        if backend == "triton":
            assert_same_results(found, expected)
        else:
            assert_close("gradient", found.grad_logits, expected.grad_logits, 1e-6)


def test_every_element_is_written(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients are allocated full of NaN; none may be left."""
    original = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda like, **how: original(like, **how).fill_(-99))
    case = random_case(1025, 7, "middle", ignored=0.2)
    found = evaluate(case.logits, case.labels, case.loc_errors, backend)
    assert not (found.grad_logits == -99).any()
    assert (found.grad_logits[case.labels == -1] == 0).all()


def test_axes_that_follow_each_other_are_one(backend: str) -> None:
    x = torch.empty(2, 3, 4, 5)
    assert make_walk(x, x.long()).sizes == (120,)
    assert make_walk(x, torch.zeros(2, 3, 4)).sizes == (5, 24)
    assert make_walk(x.permute(0, 2, 3, 1), torch.zeros(2, 4, 5)).sizes == (3, 20, 2)
    assert make_walk(x[:, :1], x[:, :1].long()).sizes == (20, 2)
    assert make_walk(torch.empty(1), torch.zeros(1)).sizes == (1,)


def test_only_what_lies_in_memory_as_it_is_walked_is_flat(backend: str) -> None:
    x = torch.empty(4, 6)
    assert make_walk(x, x.long()).flat
    assert make_walk(x, torch.zeros(4), torch.empty_like(x)).flat
    assert make_walk(x.view(2, 2, 6), torch.zeros(2, 2)).flat
    assert not make_walk(x.t(), x.t().long()).flat
    assert not make_walk(x[:, :5], torch.zeros(4)).flat
    assert not make_walk(x[::2], torch.zeros(2)).flat
    assert not make_walk(x, x.long(), torch.empty(6, 4).t()).flat


def test_offsets_beyond_32_bits(backend: str) -> None:
    """Labels that lie a thousand million elements apart, of which nothing else is ever touched."""
    case = random_case(16, 5, ignored=0.1)
    labels = torch.from_numpy(np.zeros(3 * 2**30 + 4, np.int8)).as_strided((4, 4), (1, 2**30))
    labels.copy_(case.labels.view(4, 4))
    # To note who touched each of so many elements would take too much memory.
    device = Device(COMPILED_FOR, check=False) if COMPILED_FOR else None
    with package_on(device) if device else contextlib.nullcontext():
        found = evaluate(case.logits.view(4, 4), labels, case.loc_errors, backend)
    assert not (device and device.errors)
    expected = evaluate(case.logits.view(4, 4), case.labels.view(4, 4), case.loc_errors, backend)
    assert_same_results(found, expected)
