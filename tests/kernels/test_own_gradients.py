"""Pass 2 writes the positives' own gradients, and multiplies all by a factor: to the bit, whatever it is handed."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
import triton
import triton.language as tl
from alrp_triton.kernels import levels
from alrp_triton.kernels.gradient import write_linear_gradient
from alrp_triton.kernels.search import number_below
from alrp_triton.kernels.walk import make_walk, on_device_of
from grouped_levels import INF, NAN, small_blocks
from torch import Tensor

BLOCK = 64
FACTORS = [None, torch.tensor(-2.7), torch.tensor([3e-3], dtype=torch.float64)]


@pytest.fixture(autouse=True, params=["together", "apart"])
def launches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks(monkeypatch, BLOCK)
    if request.param == "apart":
        monkeypatch.setattr(levels, "MOST_LEVELS", 1)


@triton.jit
def below_kernel(values, ascending, length, highest, out):  # type: ignore[no-untyped-def]
    i = tl.program_id(0)
    tl.store(out + i, number_below(tl.load(values + i), ascending, length, highest))


@pytest.mark.parametrize("length", [*range(10), 31, 32, 33])
def test_number_below(length: int) -> None:
    ascending = torch.arange(length + 3) * 2**33
    values = torch.cat([ascending - 1, ascending, ascending + 1])
    out = torch.full_like(values, -1)
    highest = 2 ** (length.bit_length() - 1) if length else 0
    with on_device_of(values):
        below_kernel[(len(values),)](values, ascending, length, highest, out)
    assert torch.equal(out, torch.searchsorted(ascending[:length], values))


def write(
    logits: list[Tensor],
    labels: list[Tensor],
    pos_index: Tensor,
    pos_gradient: Tensor,
    factor: Tensor | None = None,
    poison: float = 0.0,
) -> list[Tensor]:
    """Gradients by tables of constants, which leave nothing to rounding: -2 below 0, 3 from 0 on."""
    compute = torch.float64 if logits[0].dtype == torch.float64 else torch.float32
    thresholds = torch.tensor([0.0, 0.0], dtype=compute)
    floors = torch.tensor([-1.0, 0.0, 0.0], dtype=compute)
    coefficients = torch.tensor([[-2.0, 9.0, 3.0], [0.0, 0.0, 0.0]], dtype=compute) + poison
    walks = [make_walk(x, y, torch.full_like(x, 55.0)) for x, y in zip(logits, labels)]
    write_linear_gradient(
        walks,
        thresholds,
        floors,
        coefficients,
        1.0,
        -1,
        pos_index=pos_index,
        pos_gradient=pos_gradient + poison,
        factor=factor,
        pos_factor=factor,
    )
    return [walk.gradient for walk in walks]


def expected(
    logits: list[Tensor], labels: list[Tensor], pos_index: Tensor, pos_gradient: Tensor, factor: Tensor | None
) -> Tensor:
    x, y = (torch.cat([one.reshape(-1) for one in many]) for many in (logits, labels))
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    scale = torch.ones((), dtype=torch.float64) if factor is None else factor.reshape(()).double()
    value = torch.where(x >= 0, 3.0, -2.0).to(compute) * scale.to(compute)
    value[pos_index] = (pos_gradient * scale).to(compute)
    return torch.where(y == -1, 0.0, value).to(x.dtype)


def at(indices: list[int], sizes: list[int], dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor]]:
    """Levels of these sizes with positives at these flat indices, and ignored ones at some others."""
    generator = torch.Generator().manual_seed(sum(sizes))
    x, y = torch.randn(sum(sizes), generator=generator).to(dtype), torch.zeros(sum(sizes), dtype=torch.int64)
    y[5::7] = -1
    y[indices] = 1
    return list(x.split(sizes)), list(y.split(sizes))


def check(indices: list[int], sizes: list[int], factor: Tensor | None, dtype: torch.dtype = torch.float32) -> None:
    logits, labels = at(indices, sizes, dtype)
    index = torch.tensor(sorted(indices), dtype=torch.int64)
    own = torch.randn(len(index), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = torch.cat(write(logits, labels, index, own, factor))
    assert torch.equal(found, expected(logits, labels, index, own, factor))


SIZES = [64, 65, 0, 63, 130, 1, 64]
LAST = sum(SIZES) - 1
EDGES = [0, *(i + d for i in accumulate(size for size in SIZES if size) for d in (-1, 0) if i + d <= LAST)]


@pytest.mark.parametrize("factor", FACTORS, ids=["none", "float32", "float64"])
@pytest.mark.parametrize(
    "indices",
    [[], [0], [LAST], [LAST - 1, LAST], EDGES, [63, 64], [191, 192, 193], list(range(64, 129)), list(range(LAST + 1))],
    ids=lambda indices: f"{len(indices)} from {min(indices, default=None)}",
)
def test_places(indices: list[int], factor: Tensor | None) -> None:
    check(indices, SIZES, factor)


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 7, 8, 9])
def test_any_number_of_positives_in_one_tile(number: int) -> None:
    """Of which the last is in the last lane of the last tile, and some lie before it."""
    check([3, 9, *range(2 * BLOCK - number, 2 * BLOCK)], [BLOCK, BLOCK], None)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("factor", FACTORS, ids=["none", "float32", "float64"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype, factor: Tensor | None) -> None:
    check(EDGES, SIZES, factor, dtype)


def test_class_labels_in_a_transposed_level() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(5, n, generator=generator).t() for n in (30, 13)]
    labels = [torch.randint(-1, 6, (n,), generator=generator) for n in (30, 13)]
    spread = [torch.where(y[:, None] < 0, -1, (torch.arange(5) == y[:, None]).long()) for y in labels]
    index = (torch.cat(spread).reshape(-1) == 1).nonzero().squeeze(1)
    own = torch.randn(len(index), generator=generator, dtype=torch.float64)
    found = torch.cat(write(logits, labels, index, own, FACTORS[1])).reshape(-1)
    assert torch.equal(found, expected(logits, spread, index, own, FACTORS[1]))


def test_the_factor_comes_before_the_rounding() -> None:
    """What would be 0 in half precision, were it rounded before it is multiplied."""
    logits, labels = at([3], [64], torch.float16)
    index, own = torch.tensor([3]), torch.tensor([1e-9], dtype=torch.float64)
    (found,) = write(logits, labels, index, own, torch.tensor(65536.0))
    assert found[3] == torch.tensor(65536e-9).half() > 0
    assert found[4].isinf()


def test_positives_may_have_a_factor_of_their_own() -> None:
    """A loss of several values multiplies theirs itself."""
    logits, labels = at([3, 70], [64, 64])
    walks = [make_walk(x, y, torch.full_like(x, 55.0)) for x, y in zip(logits, labels)]
    for factor, pos_factor in ((2.0, None), (None, 4.0), (2.0, 4.0)):
        write_linear_gradient(
            walks,
            torch.tensor([9.0, 9.0]),
            torch.tensor([-1.0, 9.0, 9.0]),
            torch.tensor([[-3.0, 0.0, 0.0], [0.0, 0.0, 0.0]]),
            1.0,
            -1,
            pos_index=torch.tensor([3, 70]),
            pos_gradient=torch.tensor([0.5, 0.25], dtype=torch.float64),
            factor=None if factor is None else torch.tensor(factor),
            pos_factor=None if pos_factor is None else torch.tensor(pos_factor),
        )
        found, kinds = torch.cat([walk.gradient for walk in walks]), torch.cat(labels)
        assert (found[kinds == 0] == -3 * (factor or 1)).all()
        assert found[[3, 70]].tolist() == [0.5 * (pos_factor or 1), 0.25 * (pos_factor or 1)]


@pytest.mark.parametrize("factor", [INF, -INF, NAN])
def test_what_is_ignored_gets_0_whatever_the_factor(factor: float) -> None:
    logits, labels = at([3, 70], [64, 64])
    labels[0][10:20] = -1
    logits[0][10:20] = torch.tensor([NAN, INF, -INF, 0.0, 1.0]).repeat(2)
    found = torch.cat(write(logits, labels, torch.tensor([3, 70]), torch.ones(2).double(), torch.tensor(factor)))
    ignored = torch.cat(labels) == -1
    assert (found[ignored] == 0).all()
    assert not found[~ignored].isfinite().any()


@pytest.mark.parametrize("expected_positives", [0, 1, 2, 3, 6])
@pytest.mark.parametrize("poison", [0.0, NAN])
def test_a_wrong_number_of_positives(expected_positives: int, poison: float) -> None:
    """Nothing beyond the tables is read, where the right numbers lie, and all is NaN where the tables are."""
    indices = [3, 63, 64, 100]
    logits, labels = at(indices, [64, 64])
    # Between what is handed over lies what would be found beyond it.
    index = torch.tensor([-1, 3, 63, 64, 100, 101, 101, 101])[1:]
    own = torch.tensor([777.0] * 8, dtype=torch.float64)[1:]
    own[:expected_positives] = 5.0
    found = torch.cat(write(logits, labels, index[:expected_positives], own[:expected_positives], None, poison))
    ignored = torch.cat(labels) == -1
    assert (found[ignored] == 0).all()
    assert not (found == 777).any()
    assert not (found == 55).any()
    assert found[~ignored].isnan().all() == (poison != 0)
    if not poison:
        assert (found[indices[:expected_positives]] == 5).all()


def test_unsorted_zeros_in_the_place_of_missing_positives() -> None:
    """As they come where fewer are found than expected."""
    logits, labels = at([70], [64, 64])
    index, own = torch.tensor([0, 0, 70]), torch.full((3,), NAN, dtype=torch.float64)
    found = torch.cat(write(logits, labels, index, own, None, NAN))
    assert found[torch.cat(labels) != -1].isnan().all()
    assert (found[torch.cat(labels) == -1] == 0).all()
