"""Pass 1 over so many logits that several tables share them."""

from __future__ import annotations

import pytest
import torch
from alrp_triton.kernels import count as kernel
from alrp_triton.kernels.launch import code, constant, programs_at_once
from drawn import BY_TORCH, DELTA, LINEAR, levels_of, place, same_numbers
from torch import Tensor

from alrp_triton.engine.inputs import Levels
from alrp_triton.engine.knots import Table
from alrp_triton.engine.passes.protocol import Found

MANY = 2**17 + 5000
POSITIVES = torch.linspace(-1, 1, 9)
NOBODY = Found(torch.empty(0, dtype=torch.int64), POSITIVES[:0], None)
UNIT = 2.0**-30


def negatives(*scores: Tensor, groups: bool = False) -> Levels:
    """Levels without a positive, some of whose logits are ignored."""
    labels = [torch.zeros(x.shape, dtype=torch.int64).masked_fill(torch.arange(len(x)) % 5 == 3, -1) for x in scores]
    if groups:
        return levels_of(*((x, y, torch.arange(len(x)) % 2) for x, y in zip(scores, labels)))
    return levels_of(*zip(scores, labels))


@pytest.fixture(autouse=True, params=["shared", "global"])
def _memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where tables lie, if they may be in shared memory."""
    if request.param == "global":
        monkeypatch.setattr(kernel, "MOST_WORDS", 0)


def totals_of(
    levels: Levels,
    dtype: torch.dtype = torch.float32,
    num_logits: int | None = None,
    positives: Tensor = POSITIVES,
) -> tuple[Tensor, Tensor]:
    """Of the kernels and of PyTorch, without what has no meaning."""
    groups = torch.arange(len(positives)) % 2 if levels.groups else None
    placed = place(positives.to(dtype), DELTA, groups)
    own = NOBODY._replace(logits=NOBODY.logits.to(dtype), groups=None if groups is None else groups[:0])
    found = []
    for passes in (LINEAR, BY_TORCH):
        found.append(torch.zeros_like(placed.totals))
        passes.count(levels, Table(*placed.table), own, found[-1], DELTA, num_logits or levels.num_logits())
        found[-1] = torch.cat([found[-1][:, 1:-1], found[-1][:1, -1:].expand(2, 1)], dim=1)
    return found[0], found[1]


def check_each(levels: Levels, positives: Tensor = POSITIVES) -> tuple[Tensor, Tensor]:
    """Counts are the same; offsets are rounded to a unit, and those of PyTorch cut off at a smaller one. Returns by how
    much offsets differ, and the counts."""
    ours, expected = totals_of(levels, positives=positives)
    same_numbers("counts", ours[0], expected[0])
    off = (expected[1, :-1] - ours[1, :-1]).abs() * 2.0**-36
    assert (off <= (UNIT / 2 + 2.0**-36) * expected[0, :-1]).all()
    return off, expected[0, :-1]


def check(levels: Levels) -> None:
    """And rounding up and down makes up for each other."""
    off, counts = check_each(levels)
    assert off.sum() <= 6 * UNIT * counts.sum().sqrt()


def scores(number: int, seed: int = 0) -> Tensor:
    drawn = torch.randn(number, generator=torch.Generator().manual_seed(seed))
    drawn[::1000] = torch.nan
    return drawn


@pytest.mark.parametrize(("number", "groups"), [(2**16, False), (MANY, False), (MANY, True), (2 * MANY, False)])
def test_scattered_scores(number: int, groups: bool) -> None:
    """In one table, or two, or three."""
    check(negatives(scores(number), groups=groups))


@pytest.mark.parametrize("score", [5.0, -5.0, 0.1])
def test_all_in_one_bucket(score: float) -> None:
    """Beyond all ramps an offset is 1: the largest sum that a table takes."""
    check(negatives(torch.full((MANY,), score)))


def test_in_one_bucket_of_which_every_tile_has_another_score() -> None:
    """So each logit is added by itself; table and word are as full as they can be."""
    check(negatives(torch.full((2 * MANY,), 5.0).index_fill(0, torch.arange(0, 2 * MANY, 64), -5.0)))


def test_offsets_are_rounded_not_cut_off() -> None:
    """Just above where a ramp begins offsets have digits below a unit."""
    check(negatives(POSITIVES[0] - DELTA + scores(2**16).abs() / 4096))


@pytest.mark.parametrize("packed", [True, False])
def test_more_tables_than_a_program_adds(packed: bool) -> None:
    """Several programs add to the same totals."""
    words = torch.randint(-(2**56), 2**56, (70, 20 if packed else 40), generator=torch.Generator().manual_seed(0))
    totals = torch.ones(2, 20, dtype=torch.int64)
    kernel.fold(
        kernel.Tables(words, code(words.shape[1]), code(20), constant(packed), constant(False)), len(words), totals, 6
    )
    if packed:
        words = torch.cat([words >> 47 & 2**17 - 1, (words & 2**47 - 1) << 6], dim=1)
    same_numbers("totals", totals, words.sum(0).view(2, 20) + 1)


def test_levels_have_the_bits_of_one_tensor() -> None:
    x = scores(MANY)
    whole, _ = totals_of(negatives(x))
    parts, _ = totals_of(negatives(*(part.clone() for part in x.split([50_000, 30_000, 40_005, 7, MANY - 120_012]))))
    labels = negatives(x).labels[0]
    parts, _ = totals_of(levels_of(*((a.clone(), b) for a, b in zip(x.split(60_000), labels.split(60_000)))))
    assert torch.equal(parts, whole)


def test_float64_and_several_processes_are_not_packed() -> None:
    x = scores(MANY)
    for ours, expected in (
        totals_of(negatives(x.double()), torch.float64),
        totals_of(negatives(x), num_logits=2 * MANY),
        totals_of(negatives(x, groups=True), num_logits=2 * MANY),
    ):
        same_numbers("totals", ours, expected)


@pytest.mark.parametrize("number", [1023, 1024])
@pytest.mark.parametrize("kind", ["scattered", "equal", "extreme"])
def test_the_largest_table_in_shared_memory(number: int, kind: str) -> None:
    """And one that is too large for it. Equal thresholds all lie in one cell."""
    generator = torch.Generator().manual_seed(1)
    positives = torch.randn(number, generator=generator)
    if kind == "equal":
        positives = 0 * positives
    if kind == "extreme":
        ends = torch.tensor([-torch.inf, torch.inf, torch.nan, 3e38, -3e38])
        positives[torch.randperm(number, generator=generator)[:50]] = ends.repeat(10)
    x = scores(2**16 + 3)
    x[:number] = positives
    x[number : 2 * number] = positives - DELTA
    off, counts = check_each(negatives(x), positives)
    # In each bucket by itself; ties of small offsets go up.
    assert (off <= 6 * UNIT * counts.sqrt() + UNIT / 8 * counts).all()


def test_levels_of_several_structures() -> None:
    """Each of which is a launch of its own."""
    x = scores(2 * MANY)
    flat, transposed = x[: MANY // 2 * 2], x[MANY // 2 * 2 : MANY * 2].view(-1, 4).t()
    labels = torch.zeros(transposed.shape, dtype=torch.int64)
    labels[1, ::3] = -1
    both = negatives(flat)
    check(levels_of((flat, both.labels[0]), (transposed, labels)))


def test_when_there_are_several() -> None:
    totals = torch.zeros(2, 2002, dtype=torch.int64)
    for num_logits, num_levels, found in (
        (2**16 - 1, 1, totals),
        (10**6, 9, totals),  # no room for tiles that are not full
        (2**31, 1, torch.zeros(2, 100_002, dtype=torch.int64)),
    ):
        tables, number = kernel.tables_for(num_logits, num_levels, found, True)
        assert (tables.words is found, number, tables.PACKED.value) == (True, 0, False)
    for num_logits, num_levels in ((2**16, 1), (31_426_560, 5), (2**31, 7)):
        tables, number = kernel.tables_for(num_logits, num_levels, totals, True)
        # In a launch a table may get one tile more than others, and in each level there is a tile that is not full.
        assert num_logits / number + 2 * num_levels * 4096 < 2**17
        enough = num_logits / 2**16 + 1
        assert number <= (max(enough, programs_at_once(totals.device)) if tables.SHARED.value else enough)
        assert tables.words.numel() * 8 <= num_logits
