"""Larger problems than elsewhere: what kernels make of them is what PyTorch makes of them, in every regime, dtype and
layout, for any number of positives."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle, product

import pytest
import torch
from cases import FLOAT_MAX, INF, INTERPRETED, NAN, REGIMES
from family import ALRP, AP, FAMILY, NDCG, PLAIN_AP, RANK_SORT, Member, assert_agree, evaluate
from torch import Tensor

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter would take minutes for each")

CLASSES = 20
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SIZES = ((0, 2000), (1, 3000), (7, 20_000), (300, 24_000), (1000, 60_000))
Problem = tuple[list[Tensor], list[Tensor], Tensor]


def draw(num_pos: int, num_logits: int, regime: str, seed: int) -> tuple[Tensor, Tensor]:
    """Logits ``[M / C, C]`` and class labels, a twentieth ignored."""
    generator = torch.Generator().manual_seed(seed)
    (neg_mean, neg_std), (pos_mean, pos_std) = REGIMES[regime]
    rows = num_logits // CLASSES
    logits = torch.randn(rows, CLASSES, generator=generator) * neg_std + neg_mean
    labels, order = torch.full((rows,), CLASSES), torch.randperm(rows, generator=generator)
    labels[order[:num_pos]] = torch.randint(CLASSES, (num_pos,), generator=generator)
    labels[order[num_pos : num_pos + rows // 20]] = -1
    own = torch.randn(num_pos, generator=generator) * pos_std + pos_mean
    logits[order[:num_pos], labels[order[:num_pos]]] = own
    return logits, labels


def by_logit(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    labels = (torch.arange(CLASSES) == y[:, None]).to(torch.int8)
    return x.view(-1), labels.masked_fill(y[:, None] == -1, -1).view(-1)


def channels_first(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    x = x[: len(x) // 8 * 8].view(1, 8, -1, CLASSES)
    return x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1), y[: len(y) // 8 * 8].view(1, 8, -1)


def strided(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return torch.cat([x[:, :1], x, x[:, :2]], dim=1)[:, 1:-2], torch.stack([y, y], dim=1)[:, 0]


LAYOUTS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "rows": lambda x, y: (x, y),
    "by logit": by_logit,
    "channels first": channels_first,
    "strided": strided,
}
SPECIAL: dict[str, Callable[[Tensor], Tensor]] = {
    "ordinary": lambda x: x,
    "ties": lambda x: (4 * x).round() / 4,
    "infinite": lambda x: x.where(x < x.quantile(0.99), INF).where(x > x.quantile(0.01), -INF),
    "far": lambda x: x.where(x < x.quantile(0.98), 0.9 * FLOAT_MAX).where(x > x.quantile(0.02), -0.9 * FLOAT_MAX),
    "nan": lambda x: x.index_fill(0, torch.tensor(len(x) // 2), NAN),
}


def make_problem(num_pos: int, num_logits: int, regime: str, layout: str, special: str, dtype: torch.dtype) -> Problem:
    x, y = draw(num_pos, num_logits, regime, seed=num_pos)
    x = SPECIAL[special](x)
    parts = [slice(None)] if layout != "levels" else [slice(0, len(x) // 2), slice(len(x) // 2, -8), slice(-8, None)]
    arrange = LAYOUTS.get(layout, LAYOUTS["rows"])
    logits, labels = zip(*(arrange(x[part], y[part]) for part in parts))
    levels = [level.to(dtype) for level in logits]
    count = sum(
        int(((y >= 0) & (y < CLASSES)).sum() if x.dim() != y.dim() else (y == 1).sum()) for x, y in zip(levels, labels)
    )
    values = torch.rand(count, generator=torch.Generator().manual_seed(1))
    return levels, list(labels), values


def cases() -> list[object]:
    """Sizes, dtypes and layouts with one another; regimes, specialities, losses, deltas in turns of other lengths."""
    turns = zip(
        product(SIZES, DTYPES, (*LAYOUTS, "levels")),
        cycle(REGIMES),
        cycle(SPECIAL),
        cycle((ALRP, AP, PLAIN_AP, NDCG, RANK_SORT, *FAMILY[5:])),
        cycle((1.0, 0.5, 0.0)),
    )
    return [
        pytest.param(*size, dtype, layout, regime, special, member, delta, id=f"{size[0]}-{dtype}-{layout}-{member}")
        for (size, dtype, layout), regime, special, member, delta in turns
    ]


def tolerance(dtype: torch.dtype) -> float:
    return {torch.float64: 1e-12, torch.float32: 1e-6}.get(dtype, 2 * torch.finfo(dtype).eps)


@pytest.mark.thinned(12)
@pytest.mark.parametrize(("num_pos", "num_logits", "dtype", "layout", "regime", "special", "member", "delta"), cases())
def test_problems_of_every_kind(
    num_pos: int,
    num_logits: int,
    dtype: torch.dtype,
    layout: str,
    regime: str,
    special: str,
    member: Member,
    delta: float,
) -> None:
    problem = make_problem(num_pos, num_logits, regime, layout, special, dtype)
    found, expected = (evaluate(member, *problem, backend, delta=delta) for backend in ("triton", "torch"))
    assert_agree(found, expected, tolerance(dtype))
    if num_pos <= 300 and special != "nan":
        assert_agree(evaluate(member, *problem, "pairwise", delta=delta), expected, max(tolerance(dtype), 2e-6))


@pytest.mark.nightly
@pytest.mark.parametrize("num_pos", [4096, 5000])
@pytest.mark.parametrize("member", [ALRP, AP, RANK_SORT], ids=repr)
def test_as_many_positives_as_are_compared_and_more(member: Member, num_pos: int) -> None:
    problem = make_problem(num_pos, 20 * num_pos, "middle", "rows", "ordinary", torch.float32)
    found, expected = (evaluate(member, *problem, backend) for backend in ("triton", "torch"))
    assert_agree(found, expected)
