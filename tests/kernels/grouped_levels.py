"""Levels with groups of every layout, and the same flat: what the launchers are held against in plain torch."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from alrp_triton.kernels import configurations
from alrp_triton.kernels.walk import Walk, make_walk
from torch import Tensor

INF, NAN = float("inf"), float("nan")
LARGEST_ID = torch.iinfo(torch.int64).max
IDS = {
    torch.int64: [-LARGEST_ID - 1, -5, 0, 2**40, 2**40 + 1, LARGEST_ID],
    torch.int32: [-(2**31), -1, 7, 2**31 - 1],
    torch.int8: [-128, -1, 0, 127],
    torch.uint8: [0, 1, 128, 255],
}
LAYOUTS = ["per image", "class labels", "group labels", "both per logit", "channels first", "six axes", "one group"]


class Flat(NamedTuple):
    """All levels in row-major order, level after level."""

    scores: Tensor
    kinds: Tensor
    """1 positive, 0 negative, -1 ignored."""
    groups: Tensor

    @property
    def positives(self) -> tuple[Tensor, Tensor]:
        """Scores and groups of the positives."""
        return self.scores[self.kinds == 1], self.groups[self.kinds == 1]

    @property
    def negative(self) -> Tensor:
        return self.kinds == 0

    def own_gradients(self) -> dict[str, Tensor]:
        """Flat indices of the positives, and a gradient for each."""
        index = (self.kinds == 1).nonzero().squeeze(1)
        generator = torch.Generator().manual_seed(2)
        return {
            "pos_index": index,
            "pos_gradient": torch.randn(len(index), generator=generator, dtype=torch.float64),
        }


class Level(NamedTuple):
    logits: Tensor
    labels: Tensor
    groups: Tensor | None

    def walk(self, writes: bool = False) -> Walk:
        gradient = torch.full_like(self.logits, NAN) if writes else None
        return make_walk(self.logits, self.labels, gradient, self.groups)

    def flat(self) -> Flat:
        per_class = self.labels.dim() != self.logits.dim()
        # Without groups, one of all.
        groups = torch.tensor(0).expand(self.logits.shape) if self.groups is None else self.groups
        rows = groups.unsqueeze(-1) if groups.dim() != self.logits.dim() else groups
        if per_class:
            labels = self.labels.long().unsqueeze(-1)
            own = torch.arange(self.logits.shape[-1]) == labels
            kinds = torch.where(labels == -1, -1, own.long())
        else:
            kinds = self.labels.long()
        return Flat(
            self.logits.reshape(-1), kinds.reshape(-1), rows.expand(self.logits.shape).reshape(-1).to(torch.int64)
        )


def flatten(levels: list[Level]) -> Flat:
    return Flat(*(torch.cat(parts) for parts in zip(*(level.flat() for level in levels))))


def gradient_of(walks: list[Walk]) -> Tensor:
    return torch.cat([walk.gradient.reshape(-1) for walk in walks])


def make_level(
    layout: str,
    dtype: torch.dtype = torch.float32,
    id_dtype: torch.dtype = torch.int64,
    seed: int = 0,
    size: int = 13,
) -> Level:
    """Scores on a coarse grid, so that many are equal, some infinite; ``size`` is the length of one axis."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor(IDS[id_dtype], dtype=id_dtype)

    def scores(*shape: int) -> Tensor:
        x = torch.randint(-8, 9, shape, generator=generator).to(dtype) / 4
        at = torch.rand(shape, generator=generator)
        return x.masked_fill(at < 0.05, INF).masked_fill(at > 0.95, -INF)

    def groups(*shape: int) -> Tensor:
        return ids[torch.randint(len(ids), shape, generator=generator)]

    def classes(num: int, *shape: int) -> Tensor:
        return torch.randint(-1, num + 1, shape, generator=generator)

    def flags(*shape: int) -> Tensor:
        return torch.tensor([-1, 0, 0, 0, 1])[torch.randint(5, shape, generator=generator)]

    if layout == "per image":
        return Level(scores(2, size, 5), classes(5, 2, size).to(torch.int16), groups(2, 1).expand(2, size))
    if layout == "class labels":
        return Level(scores(2, size, 5), classes(5, 2, size), groups(2, size, 5))
    if layout == "group labels":
        return Level(scores(3, size, 2), flags(3, size, 2), groups(3, size))
    if layout == "both per logit":
        return Level(scores(size, 9).t(), flags(9, size), groups(size, 9).t())
    if layout == "channels first":
        x = scores(2, 3 * 4, size, 2).view(2, 3, 4, size, 2).permute(0, 3, 4, 1, 2)
        return Level(x, classes(4, 2, size, 2, 3), groups(2, 1, 1, 1).expand(2, size, 2, 3))
    if layout == "six axes":
        x = scores(3, 2, 2, size, 3, 2).permute(5, 3, 1, 4, 0, 2)
        return Level(x, flags(*x.shape), groups(3, 2, 3, size, 2).permute(4, 3, 1, 2, 0))
    if layout == "one group":
        return Level(scores(size), flags(size), groups(1)[0])
    raise AssertionError(layout)


def by_group(values: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Sorted by group, then by value, NaN last."""
    order = values.argsort(stable=True)
    order = order[groups[order].argsort(stable=True)]
    return values[order], groups[order]


def check_close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert found.shape == expected.shape
    assert torch.equal(found.isnan(), expected.isnan())
    assert ((found.double() - expected.double()).abs().nan_to_num() <= tolerance).all()


def small_blocks(monkeypatch: pytest.MonkeyPatch, block: int = 64) -> None:
    """Several tiles and a last one that is not full, in levels small enough for the interpreter."""
    for kernel, table in configurations.PINNED.items():
        smaller = {"block": block} | {name: 2 for name in ("tiles", "blocks") if name in table["default"]}
        monkeypatch.setitem(configurations.PINNED, kernel, {"default": table["default"] | smaller})
