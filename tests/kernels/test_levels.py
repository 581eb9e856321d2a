"""Several levels in one launch: the bits of one launch for each, and which levels go together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import accumulate

import pytest
import torch
import triton
import triton.language as tl
from alrp_triton.kernels import levels
from alrp_triton.kernels.buckets import count_into_buckets
from alrp_triton.kernels.gradient import write_linear_gradient
from alrp_triton.kernels.positives import collect
from alrp_triton.kernels.walk import on_device_of
from cases import INTERPRETED
from grouped_levels import Level, by_group, flatten, gradient_of, small_blocks
from torch import Tensor

from benchmarks.launches import LOSSES, counting, launches_of

CLASSES = 4
counts_launches = pytest.mark.skipif(INTERPRETED, reason="launches are counted where kernels are compiled")


@pytest.fixture(autouse=True)
def blocks_of_64(monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks(monkeypatch)


def scores(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(-8, 9, shape, generator=generator) / 4


def labels(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(-1, CLASSES + 1, shape, generator=generator)


def flags(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.tensor([-1, 0, 0, 1])[torch.randint(4, shape, generator=generator)]


def groups(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(-2, 2, shape, generator=generator)


def channels_first(g: torch.Generator, n: int) -> tuple[Tensor, ...]:
    # An axis of one place would make another structure.
    height = n and n // 4 + 2
    x = scores(g, 2, 2 * CLASSES, height, 2).view(2, 2, CLASSES, height, 2).permute(0, 3, 4, 1, 2)
    return x, labels(g, 2, height, 2, 2)


LAYOUTS: dict[str, Callable[[torch.Generator, int], tuple[Tensor, ...]]] = {
    "rows": lambda g, n: (scores(g, n, CLASSES), labels(g, n).to(torch.int16)),
    "vector": lambda g, n: (scores(g, n), flags(g, n)),
    "channels first": channels_first,
    "slices": lambda g, n: (scores(g, n, CLASSES + 4)[:, 4:], labels(g, n)),
    "transposed": lambda g, n: (scores(g, 3, n).t(), flags(g, n, 3).to(torch.int8)),
    "groups of rows": lambda g, n: (scores(g, n, CLASSES), labels(g, n), groups(g, n)),
    "groups of logits": lambda g, n: (scores(g, n, CLASSES), labels(g, n), groups(g, n, CLASSES)),
}
# Several tiles of 64, one, just none, and just one more; no level is empty but those that are.
SIZES = [17, 16, 15, 33, 0, 32, 2, 3, 31, 0, 18, 4]


def make_levels(layout: str, number: int, dtype: torch.dtype = torch.float32) -> list[Level]:
    generator = torch.Generator().manual_seed(number)
    made = [LAYOUTS[layout](generator, n) for n in SIZES[:number]]
    return [Level(x.to(dtype) if x.is_contiguous() else x, *rest, *[None] * (3 - 1 - len(rest))) for x, *rest in made]


def results(made: list[Level]) -> tuple[list[Tensor], Counter[str]]:
    """What the three kernels find in levels, and how often each was launched."""
    grouped = made[0].groups is not None
    walks = [level.walk(writes=True) for level in made]
    x = torch.cat([level.logits.reshape(-1) for level in made]).float()
    thresholds, threshold_groups = x[:10].sort().values, None
    if grouped:
        thresholds, threshold_groups = by_group(thresholds, flatten(made).groups[:10])
    floors = torch.cat([thresholds[:1] - 1, thresholds])
    coefficients = torch.randn(2, 11, generator=torch.Generator().manual_seed(0))
    own = flatten(made).own_gradients()
    with counting() as launched:
        found = collect([level[:2] for level in made], 23, -1, torch.float32)
        totals = count_into_buckets(walks, thresholds, floors, 0.5, 2.0**20, -1, threshold_groups)
        write_linear_gradient(walks, thresholds, floors, coefficients, 0.5, -1, threshold_groups, **own)
    assert totals.sum() > 0
    assert (gradient_of(walks) != 0).any()
    # With another number of positives than there are, which are kept depends on their order.
    return [found[2], totals, gradient_of(walks)], launched


@counts_launches
@pytest.mark.thinned(4)
@pytest.mark.parametrize(
    ("layout", "number"), [*((layout, number) for layout in LAYOUTS for number in (3, 12)), ("rows", 1), ("rows", 10)]
)
def test_bits_of_a_launch_for_each_level(layout: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_levels(layout, number)
    filled = sum(level.logits.numel() > 0 for level in made)
    together, launched = results(made)
    monkeypatch.setattr(levels, "MOST_LEVELS", 1)
    apart, launched_apart = results(made)
    for one, other in zip(together, apart):
        assert torch.equal(one, other)
    for kernel in ("collect", "bucket", "gradient"):
        assert launched_apart[f"{kernel}_kernel"] == filled
        assert launched_apart[f"{kernel}_levels_kernel"] == 0
        in_launches = launched[f"{kernel}_levels_kernel"], launched[f"{kernel}_kernel"]
        # Of ten levels that are not empty, eight and two.
        assert in_launches == {1: (0, 1), 3: (1, 0), 8: (1, 0), 10: (2, 0)}[filled]


@pytest.mark.parametrize("layout", list(LAYOUTS)[:5])
def test_positives_come_in_order(layout: str) -> None:
    made = make_levels(layout, 12)
    flat = flatten(made)
    expected = (flat.kinds == 1).nonzero().squeeze(1)
    pos_index, pos_logits, found = collect([level[:2] for level in made], len(expected), -1, torch.float32)
    assert found.tolist() == [len(expected), 0]
    assert torch.equal(pos_index, expected)
    assert torch.equal(pos_logits, flat.scores[expected])


@counts_launches
def test_levels_of_other_structures_have_launches_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    layouts = ("rows", "channels first", "vector", "rows", "slices", "channels first", "transposed", "rows")
    made = [make_levels(layout, 1 + i % 4)[-1] for i, layout in enumerate(layouts)]
    together, launched = results(made)
    assert (launched["gradient_levels_kernel"], launched["gradient_kernel"]) == (2, 3)
    monkeypatch.setattr(levels, "MOST_LEVELS", 1)
    for one, other in zip(together, results(made)[0]):
        assert torch.equal(one, other)


@counts_launches
@pytest.mark.parametrize("name", ["alrp", "rank_sort"])
def test_levels_cost_an_iteration_no_launch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def count(num_levels: int) -> list[int]:
        return [sum(part.values()) for part in launches_of(LOSSES[name], 40, num_levels)]

    forward, backward = count(1)
    assert count(5) == [forward, backward]
    monkeypatch.setattr(levels, "MOST_LEVELS", 1)
    # Finding positives and counting; writing.
    assert count(5) == [forward + 2 * 4, backward + 4]


@counts_launches
@pytest.mark.parametrize("name", ["alrp", "rank_sort", "own"])
def test_pass_2_is_one_launch(name: str) -> None:
    """It multiplies by the upstream gradient and writes the positives' own itself."""
    _, backward = launches_of(LOSSES[name], 20)
    assert backward["gradient_kernel"] == 1
    assert backward["positives_kernel"] == 0
    assert backward["combine_kernel"] == 0


def level(num_logits: int = 64, dtype: torch.dtype = torch.float32, offset: int = 0, **other: int) -> levels.Level:
    arguments = {"num_logits": num_logits, "size0": 5, "x_step0": 1, "x_step1": 7, "AXES": 2} | other
    return levels.make_level({"logits": torch.empty(64, dtype=dtype)[offset:], "groups": None}, arguments)


@pytest.mark.parametrize(
    "other",
    [
        {"dtype": torch.bfloat16},
        {"offset": 1},
        {"x_step0": 2},
        {"x_step1": 1},
        {"AXES": 3},
        {"size0": 2**30},
    ],
    ids=str,
)
def test_what_levels_have_to_share(other: dict[str, int]) -> None:
    one, another = level(), level(**other)
    assert levels.join([one, another, one]) == [[one, one], [another]]


def test_what_levels_need_not_share() -> None:
    alike = [level(), level(1), level(2**40), level(size0=2**30 - 2), level(x_step1=2**40), level(x_step1=16)]
    assert levels.join([alike[0], level(0), *alike[1:]]) == [alike]
    assert [len(joined) for joined in levels.join(alike * 4)] == [8, 8, 8]


def test_sizes_beyond_32_bits_are_not_joined() -> None:
    """Else divisions by them would be of 64 bits, in all levels."""
    large = [level(size0=2**30), level(size0=2**30 + 1)]
    assert levels.join(large) == [[large[0]], [large[1]]]


def test_codes_are_of_one_kind() -> None:
    """Not 1, nor a multiple of 16, so that Triton does not compile anew."""
    codes = [levels._code(value) for value in range(100)]
    assert all(code > 1 and code % 2 for code in codes)
    assert levels._code(levels._MOST_CODED) < 2**31


@triton.jit
def tiles_kernel(walks, out, POINTERS: tl.constexpr, ARGUMENTS: tl.constexpr, UNIT: tl.constexpr):  # type: ignore[no-untyped-def]
    program = tl.program_id(0)
    tile, name, num_logits, size0, step0, step1 = levels.level_of(program, walks, POINTERS, ARGUMENTS, UNIT)
    tl.store(out + 6 * program, tile)
    tl.store(out + 6 * program + 1, tl.load(name))
    tl.store(out + 6 * program + 2, num_logits)
    tl.store(out + 6 * program + 3, size0)
    tl.store(out + 6 * program + 4, step0)
    tl.store(out + 6 * program + 5, step1)


@pytest.mark.parametrize("unit", [1, 16])
def test_every_program_finds_its_level(unit: int) -> None:
    tiles, names = [1, 4, 2, 1, 3], torch.arange(5)
    # In units they have 32 bits, and are to be multiplied in 64.
    numbers = [16 * n for n in (1, 2**29, 3, 5, 2**28)]
    sizes, steps = [2, 3, 5, 2**30 - 2, 7], [0, 2**40, 1, 16, 3]
    first = tuple(levels._code(n) for n in accumulate(tiles[:-1], initial=0))
    out = torch.full((sum(tiles), 6), -1)
    walks = (
        first,
        tuple(names[i:] for i in range(5)),
        tuple(levels._code(n // unit) for n in numbers),
        tuple(levels._code(n) for n in sizes),
        (None,) * 5,
        tuple(levels._code(n) for n in steps),
    )
    with on_device_of(out):
        tiles_kernel[(sum(tiles),)](walks, out, POINTERS=1, ARGUMENTS=len(walks), UNIT=unit)
    expected = [
        [tile, i, numbers[i], sizes[i], 1, steps[i]] for i, number in enumerate(tiles) for tile in range(number)
    ]
    assert out.tolist() == expected
