"""Levels of every layout, and what kernels make of them against what PyTorch does, or every pair in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from alrp_triton.kernels import settings
from dialect import INF, assert_same_bits
from torch import Tensor

from alrp_triton.engine.inputs import Levels
from alrp_triton.engine.knots import Table, make_knots
from alrp_triton.engine.passes import gpu
from alrp_triton.engine.passes.eager import Eager
from alrp_triton.engine.passes.protocol import Found, Own
from alrp_triton.engine.placed import Compared
from alrp_triton.reference import difference, ramp

SCALE, DELTA, CLASSES = 2.0**30, 0.375, 5
OF_MANY = 2**31  # logits, that fixed point of this scale belongs to
LINEAR, PAIRWISE, BY_TORCH = gpu.Linear(), gpu.Pairwise(), Eager()
IDS = {
    torch.int64: (-(2**63), -5, 0, 2**40, 2**40 + 1, 2**63 - 1),
    torch.int32: (-(2**31), -1, 7, 2**31 - 1),
    torch.int8: (-128, -1, 0, 127),
    torch.uint8: (0, 1, 128, 255),
}
Level = tuple[Tensor, ...]
"""Logits, labels, and groups if any."""


class Draw:
    """Scores on a coarse grid, so that many are equal, some infinite; labels of which some are ignored; groups."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32, ids: torch.dtype = torch.int64) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype, self.ids = dtype, torch.tensor(IDS[ids], dtype=ids)

    def choose(self, values: Tensor, shape: Sequence[int]) -> Tensor:
        return values[torch.randint(len(values), shape, generator=self.generator)]

    def scores(self, *shape: int) -> Tensor:
        return self.choose(torch.tensor([-INF, *(k / 4 for k in range(-8, 9)), INF], dtype=self.dtype), shape)

    def classes(self, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return self.choose(torch.arange(-1 if dtype.is_signed else 0, CLASSES + 1, dtype=dtype), shape)

    def flags(self, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return self.choose(torch.tensor([-1 if dtype.is_signed else 0, 0, 0, 0, 1], dtype=dtype), shape)

    def groups(self, *shape: int) -> Tensor:
        return self.choose(self.ids, shape)

    def channels_first(self, n: int) -> Tensor:
        return self.scores(2, 2 * CLASSES, n // 8 + 2, 2).unflatten(1, (2, CLASSES)).permute(0, 3, 4, 1, 2)


LAYOUTS: dict[str, Callable[[Draw, int], Level]] = {
    "rows": lambda d, n: (d.scores(n, CLASSES), d.classes(n, dtype=torch.int16)),
    "vector": lambda d, n: (d.scores(4 * n), d.flags(4 * n)),
    "bytes": lambda d, n: (d.scores(4 * n), d.flags(4 * n, dtype=torch.uint8)),
    "classes in bytes": lambda d, n: (d.scores(n, CLASSES), d.classes(n, dtype=torch.uint8)),
    "transposed": lambda d, n: (d.scores(4, n).t(), d.flags(n, 4, dtype=torch.int8)),
    "steps": lambda d, n: (d.scores(2 * n, 2 * CLASSES)[::2, ::2], d.classes(3 * n, dtype=torch.int32)[::3]),
    "expanded": lambda d, n: (d.scores(n // 2, 1, CLASSES).expand(-1, 2, -1), d.classes(2).expand(n // 2, 2)),
    "channels first": lambda d, n: (x := d.channels_first(n), d.classes(*x.shape[:-1])),
    "one class": lambda d, n: (d.scores(4 * n, 1), d.choose(torch.arange(-1, 2), (4 * n,))),
    "classes outermost": lambda d, n: (d.scores(CLASSES, n // 2, 2).permute(1, 2, 0), d.classes(n // 2, 2)),
    "large maps": lambda d, n: (x := d.channels_first(8 * n), d.classes(*x.shape[:-1])),
    "four axes": lambda d, n: (x := d.scores(6, n // 2 + 2, 4, 6)[::2, 1:-1, ::2, ::2], d.flags(*x.shape)),
    "six axes": lambda d, n: (x := d.scores(3, 2, 2, n, 3, 2).permute(5, 3, 1, 4, 0, 2)[:1], d.flags(*x.shape)),
    "six axes of classes": lambda d, n: (
        x := d.scores(2, 2, 3, CLASSES, n // 16 + 2, 2).permute(2, 4, 1, 5, 0, 3),
        d.classes(*x.shape[:-1]),
    ),
    "no rows": lambda d, n: (d.scores(0, CLASSES), d.classes(0)),
    "a row": lambda d, n: (d.scores(CLASSES), torch.tensor(2)),
}
GROUPED: dict[str, Callable[[Draw, int], Level]] = {
    "groups of rows": lambda d, n: (*LAYOUTS["rows"](d, n), d.groups(n)),
    "groups of logits": lambda d, n: (*LAYOUTS["rows"](d, n), d.groups(n, CLASSES)),
    "groups of rows, labels of logits": lambda d, n: (d.scores(n, 4), d.flags(n, 4), d.groups(n)),
    "groups of images": lambda d, n: (d.scores(4, n, CLASSES), d.classes(4, n), d.groups(4, 1).expand(-1, n)),
    "groups, channels first": lambda d, n: (*LAYOUTS["channels first"](d, n), d.groups(2, n // 8 + 2, 2, 2)),
    "groups of logits, transposed": lambda d, n: (*LAYOUTS["transposed"](d, n), d.groups(4, n).t()),
    "groups, six axes": lambda d, n: (
        *LAYOUTS["six axes of classes"](d, n),
        d.groups(2, 2, 3, n // 16 + 2, 2).permute(2, 3, 1, 4, 0),
    ),
    "a group": lambda d, n: (d.scores(4 * n), d.flags(4 * n), d.groups(1)[0]),
}


def levels_of(*levels: Level) -> Levels:
    logits, labels, *groups = (list(tensors) for tensors in zip(*levels))
    return Levels(logits, labels, groups[0] if groups else ())


def split(logits: Tensor, labels: Tensor, sizes: Sequence[int]) -> Levels:
    """Levels of these sizes, all of which begin where they may be read several at a time."""
    return levels_of(*((x.clone(), y.clone()) for x, y in zip(logits.split(sizes), labels.split(sizes))))


def draw_levels(names: Sequence[str], n: int = 60, **how: object) -> Levels:
    layouts = LAYOUTS | GROUPED
    return levels_of(*(layouts[name](Draw(seed, **how), n) for seed, name in enumerate(names)))


def flatten(levels: Levels) -> tuple[Tensor, Tensor, Tensor]:
    """Scores; labels of logits: 1 positive, 0 negative, -1 ignored; groups."""
    flat = []
    for x, y, z in levels.each():
        y = y.long()
        if y.dim() != x.dim():
            y = torch.where(y[..., None] == -1, -1, (torch.arange(x.shape[-1]) == y[..., None]).long())
        z = torch.zeros((), dtype=torch.int64) if z is None else z
        z = z[..., None] if z.dim() == x.dim() - 1 else z
        flat.append([tensor.expand(x.shape).reshape(-1) for tensor in (x, y, z.long())])
    return tuple(torch.cat(parts) for parts in zip(*flat))


def same_numbers(name: str, found: Tensor, expected: Tensor, rtol: float = 0.0, atol: float = 0.0) -> None:
    """With NaN in the same places, whatever NaN; to the bit without tolerances."""
    if rtol or atol:
        torch.testing.assert_close(found, expected, rtol=rtol, atol=atol, equal_nan=True)
    else:
        assert_same_bits(name, found, expected)


def place(logits: Tensor, delta: float, groups: Tensor | None = None) -> Compared:
    """Positives in flat order, for kernels that compare them with one another."""
    placed = gpu.place_positives(Found(torch.arange(len(logits)), logits, groups), delta, logits.dtype)
    ends = [placed.positives.begin, placed.positives.end, *([] if groups is None else [placed.num_groups])]
    return Compared(logits, groups, delta, Table(*placed.table), placed.totals, ends)


def check_linear(levels: Levels, delta: float = DELTA, scalars: int = 1) -> Tensor:
    """Positives found and placed, negatives counted and the gradient written, against PyTorch; the totals."""
    wanted = BY_TORCH.find(levels, None, "")
    found = LINEAR.find(levels, len(wanted.indices), "")
    assert found.numbers is not None
    assert found.numbers.tolist() == [len(wanted.indices), 0]
    placed = gpu.place_positives(found, delta, levels.logits[0].dtype)
    same_numbers("index", placed.indices, wanted.indices)
    same_numbers("positives", placed.positives.logits, wanted.logits)
    if wanted.groups is not None:
        same_numbers("groups", placed.positives.groups, wanted.groups)
        assert placed.num_groups.tolist() == [len(wanted.groups.unique())]
    table, totals = make_knots(wanted.logits, delta, wanted.groups).table, torch.zeros_like(placed.totals)
    same_numbers("thresholds", placed.table.thresholds, table.thresholds)
    if table.groups is not None:
        same_numbers("groups of thresholds", placed.table.groups, table.groups)
    LINEAR.count(levels, Table(*placed.table), found, placed.totals, delta, OF_MANY)
    BY_TORCH.count(levels, table, wanted, totals, delta, OF_MANY)
    # Of bucket 0 nothing is asked, and of NaN how many there are.
    same_numbers("totals", placed.totals[:, 1:-1], totals[:, 1:-1])
    same_numbers("NaN", placed.totals[0, -1], totals[0, -1])
    check_written(levels, table, wanted.indices, delta, scalars)
    return placed.totals


def check_written(levels: Levels, table: Table, index: Tensor, delta: float, scalars: int = 1) -> None:
    """Pass 2, for some table, with own gradients at some places."""
    generator = torch.Generator().manual_seed(1)
    lines = torch.rand(2, table.num_thresholds() + 1, generator=generator, dtype=torch.float64) + 0.5
    lines[1, 0] = 0  # bucket 0 has no slope
    own = Own(index, torch.randn(scalars, len(index), generator=generator, dtype=torch.float64))
    factors = [torch.tensor(-0.7), torch.tensor(3.0)][:scalars]
    given = levels, table, lines, own, factors, delta
    for x, one, other in zip(levels.logits, LINEAR.write(*given), BY_TORCH.write(*given)):
        assert one.stride() == other.stride()
        # Of a NaN the tables would be NaN throughout. A multiplication and an addition may be rounded once or twice.
        known, margin = ~x.isnan(), 2 * torch.finfo(x.dtype).eps
        same_numbers("gradient", one[known], other[known], margin, margin)


def check_pairwise(levels: Levels, delta: float = DELTA, tolerance: float = 2e-7) -> Tensor:
    """Both passes that compare every score with every positive, against float64; N_FP."""
    scores, labels, groups = flatten(levels)
    positive, negative = labels == 1, labels == 0
    found, num_pos = BY_TORCH.find(levels, None, ""), int(positive.sum())
    table = Table(found.logits, found.logits.new_empty(0), found.groups)
    h = ramp(difference(scores.double(), found.logits.double()), delta).nan_to_num(0.0)
    h *= (groups == groups[positive, None]) & negative
    totals = torch.zeros(num_pos + 1, dtype=torch.int64)
    PAIRWISE.count(levels, table, found, totals, delta, OF_MANY)
    same_numbers("N_FP", totals[:-1] / SCALE, h.sum(1).float(), tolerance, tolerance * len(scores) + 1e-30)
    assert totals[-1] == (negative & scores.isnan()).sum()
    weights = torch.rand(num_pos + 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    own = torch.randn(1, num_pos, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    written = PAIRWISE.write(levels, table, weights, Own(found.indices, own), [torch.tensor(-0.7)], delta)
    expected = (weights[:-1] @ h + weights[-1]).masked_fill(~negative, 0)
    expected[positive] = own[0]
    margin = max(tolerance, torch.finfo(scores.dtype).eps) if scores.dtype.itemsize < 4 else tolerance
    gradient, expected = torch.cat([x.reshape(-1) for x in written]), (-0.7 * expected).to(scores.dtype)
    same_numbers("gradient", gradient, expected, margin, margin * max(1, num_pos))
    return totals[:-1] / SCALE


def small_blocks(monkeypatch: pytest.MonkeyPatch, block: int = 64) -> None:
    """Several tiles and a last one that is not full, of levels small enough for the interpreter; several blocks of few
    positives."""
    for kernel, table in settings.PINNED.items():
        smaller = {"block": 16, "block_p": 8} if kernel == "compare" else {"block": block, "block_p": 32, "tiles": 2}
        chosen = {name: smaller.get(name, value) for name, value in table["default"].items()}
        monkeypatch.setitem(settings.PINNED, kernel, {"default": chosen})
