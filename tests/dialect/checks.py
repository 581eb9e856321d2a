"""What runs here, and how tests compare what comes out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from alrp_triton.engine.passes import numba_installed

from .cases import KERNELS


def backends() -> list[str]:
    """What runs on this CPU in this process: kernels need one of their own, interpreted or on the virtual GPU."""
    if KERNELS:
        return ["triton", "pairwise"]
    return ["torch", *(["numba"] if numba_installed() else []), "reference"]


def engine_backends() -> list[str]:
    """Those that run the engine: all but the reference."""
    return [backend for backend in backends() if backend != "reference"]


by_backend = pytest.mark.parametrize("backend", backends())
by_engine_backend = pytest.mark.parametrize("backend", engine_backends())

EXACT = ("torch", "triton", "numba")
"""The linear backends sum over logits in integers: any order, any split into levels gives the same bits."""


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Within, PyTorch has so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def assert_close(name: str, actual: Tensor, expected: Tensor, rel_norm: float, worst: float | None = None) -> None:
    """Compare in float64 by relative norm, and show the worst element.

    Args:
        name: what is compared.
        actual: any shape.
        expected: the same shape; NaN where and only where ``actual`` is NaN, and equal infinities.
        rel_norm: bound of |actual - expected| / |expected| (2-norms); where ``expected`` is all 0, ``actual`` must be.
        worst: bound of the largest difference in units of the largest ``|expected|``; by default ``rel_norm``.
    """
    assert actual.shape == expected.shape, f"{name}: shape {list(actual.shape)}, expected {list(expected.shape)}"
    actual, expected = actual.detach().double(), expected.detach().double()
    if expected.numel() == 0:
        return
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    error = torch.where(same, 0.0, (actual - expected).abs())
    # What is NaN or infinite in one only is infinitely wrong.
    error = error.nan_to_num(nan=torch.inf, posinf=torch.inf)
    size = torch.where(expected.isfinite(), expected, 0.0).abs()
    norm, relative = size.norm(), error.norm()
    at = int(error.argmax())
    place = [int(k) for k in torch.unravel_index(torch.tensor(at), error.shape)] if error.dim() else []
    where = f"worst at {place}: got {actual.flatten()[at]}, expected {expected.flatten()[at]}"
    within = relative <= rel_norm * norm and error.max() <= (rel_norm if worst is None else worst) * size.max()
    assert within, f"{name}: relative norm of the error {relative / norm:.3g}, allowed {rel_norm:.3g}; {where}"


def assert_rounded(name: str, actual: Tensor, expected: Tensor, margin: float) -> None:
    """``actual`` is ``expected`` (float64), known to ``margin`` of its norm, rounded to ``actual``'s dtype."""
    slack = margin * expected.norm()
    low, high = (expected - slack).to(actual.dtype), (expected + slack).to(actual.dtype)
    outside = (actual < low) | (actual > high) | actual.isnan()
    at = int(outside.int().argmax()) if outside.numel() else 0
    assert not outside.any(), f"{name}: at {at} got {actual[at]}, expected {expected[at]} rounded to {actual.dtype}"


def assert_same_bits(name: str, actual: Tensor, expected: Tensor) -> None:
    """Equal bit for bit, in dtype and shape too, with NaN equal to NaN and 0 to -0."""
    assert actual.dtype == expected.dtype, f"{name}: {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"{name}: {list(actual.shape)}, expected {list(expected.shape)}"
    differ = ~((actual == expected) | (actual.isnan() & expected.isnan()))
    at = differ.nonzero()[:1].tolist()
    assert not at, f"{name}: first difference at {at[0]}: {actual[tuple(at[0])]} and {expected[tuple(at[0])]}"


def assert_same_sums(backend: str, name: str, actual: Tensor, expected: Tensor) -> None:
    """The same bits after a change of the order of additions, from backends whose sums are exact; else nearly."""
    if backend in EXACT:
        assert_same_bits(name, actual, expected)
    else:
        assert_close(name, actual, expected, 1e-6)


def assert_split_alike(backend: str, name: str, actual: Tensor, expected: Tensor) -> None:
    """The same logits split in another way give the same bits; but the pairwise form sums strips of them in float32."""
    if backend == "pairwise":
        assert_close(name, actual, expected, 1e-6)
    else:
        assert_same_bits(name, actual, expected)
