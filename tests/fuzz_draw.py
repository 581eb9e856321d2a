"""Random choices from a seed and an index; scores and memory layouts of every kind."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from dialect import INF
from torch import Tensor

T = TypeVar("T")

FLOATS = (torch.float32, torch.float32, torch.float32, torch.float16, torch.bfloat16, torch.float64)


class Draw:
    """Random choices; the same for the same seed and index on any machine."""

    def __init__(self, seed: int, index: int) -> None:
        self.random = random.Random(f"{seed}:{index}")
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(62))

    def choice(self, options: Sequence[T]) -> T:
        return self.random.choice(options)

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def whole(self, low: int, high: int) -> int:
        return self.random.randint(low, high)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float64)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """From ``low`` up to and without ``high``."""
        return torch.randint(low, high, shape, generator=self.generator)

    def pick(self, options: Sequence[float], *shape: int) -> Tensor:
        return torch.tensor(options, dtype=torch.float64)[self.integers(0, len(options), *shape)]


def lay_out(draw: Draw, tensor: Tensor, filling: float) -> Tensor:
    """The same numbers with other strides or another offset; what lies between them holds ``filling``."""
    how = draw.choice(["as it is", "as it is", "permuted", "sliced", "sliced", "offset", "negated"])
    if how == "permuted" and tensor.dim() > 1:
        order = list(range(tensor.dim()))
        draw.random.shuffle(order)
        back = [order.index(axis) for axis in range(tensor.dim())]
        return tensor.permute(order).contiguous().permute(back)
    if how == "sliced" and tensor.dim() > 0:
        steps = [draw.choice([1, 1, 2, 3]) for _ in tensor.shape]
        begins = [draw.whole(0, 2) for _ in tensor.shape]
        size = [begin + step * n + draw.whole(0, 2) for begin, step, n in zip(begins, steps, tensor.shape)]
        whole = torch.full(size, filling, dtype=tensor.dtype)
        part = whole[tuple(slice(b, b + s * n, s) for b, s, n in zip(begins, steps, tensor.shape))]
        part.copy_(tensor)
        return part
    if how == "offset":
        whole = torch.full((tensor.numel() + 7,), filling, dtype=tensor.dtype)
        whole[3 : 3 + tensor.numel()] = tensor.reshape(-1)
        return whole[3 : 3 + tensor.numel()].view(tensor.shape)
    if how == "negated" and tensor.is_floating_point():
        # A view that has PyTorch's lazy minus sign: memory holds the opposite.
        return torch._neg_view(-tensor)
    return tensor


class Flavour:
    """What scores of a problem are like: a few kinds, mixed."""

    def __init__(self, draw: Draw, delta: float, dtype: torch.dtype) -> None:
        self.draw, self.dtype, self.delta = draw, dtype, float(delta)
        self.limits = torch.finfo(dtype)
        kinds: list[Callable[[int], Tensor]] = [
            *[self._normal, self._grid] * 2, self._few, self._tiny, self._huge, self._any, self._edges,
        ]  # fmt: skip
        self.kinds = [draw.choice(kinds) for _ in range(draw.choice([1, 1, 2, 3]))]
        self.step = draw.choice([1.0, 0.25, 0.1, 0.05, 0.5 * self.delta, self.delta])
        self.centre, self.width = draw.choice([0.0, -4.6, 3.0, 1e4, -1e9]), draw.choice([0.05, 1.0, 4.0, 100.0])
        self.apart = draw.choice([0.0, 0.0, 2.0, -2.0, 9.0])
        self.anchors = (self.centre + self.width * draw.normal(3)).tolist()
        self.infinite = draw.choice([0.0, 0.0, 0.0, 0.1, 0.6])
        self.nan_where_ignored, self.nan = draw.chance(0.3), draw.chance(0.05)

    def scores(self, size: int) -> Tensor:
        """``[size]`` in the dtype."""
        columns = torch.stack([kind(size) for kind in self.kinds]).to(self.dtype)
        chosen = columns.gather(0, self.draw.integers(0, len(self.kinds), 1, size))[0]
        infinities = self.draw.pick([-INF, INF], size).to(self.dtype)
        return torch.where(self.draw.uniform(size) < self.infinite, infinities, chosen)

    def _normal(self, size: int) -> Tensor:
        return self.centre + self.width * self.draw.normal(size)

    def _grid(self, size: int) -> Tensor:
        return self.draw.integers(-4, 5, size) * self.step

    def _few(self, size: int) -> Tensor:
        return self.draw.pick(self.anchors, size)

    def _tiny(self, size: int) -> Tensor:
        smallest = self.limits.smallest_normal * self.limits.eps
        return self.draw.integers(-9, 10, size) * self.draw.choice([smallest, self.limits.smallest_normal])

    def _huge(self, size: int) -> Tensor:
        return self.limits.max * self.draw.pick([-1.0, -0.75, -0.5, 0.25, 0.5, 1.0 - self.limits.eps, 1.0], size)

    def _any(self, size: int) -> Tensor:
        low, high = math.log(self.limits.smallest_normal), math.log(self.limits.max)
        return self.draw.pick([-1.0, 1.0], size) * (low + (high - low) * self.draw.uniform(size)).exp()

    def _edges(self, size: int) -> Tensor:
        """A ramp's width apart, but for a few units in the last place."""
        scores = (self.draw.pick(self.anchors, size) + self.delta * self.draw.pick([-2, -1, 0, 1, 2], size)).to(
            self.dtype
        )
        for _ in range(self.draw.whole(0, 2)):
            towards = self.draw.pick([-INF, INF], size).to(self.dtype)
            moved = (
                torch.nextafter(scores.float(), towards.float())
                if self.limits.bits == 16
                else torch.nextafter(scores, towards)
            )
            scores = torch.where(self.draw.uniform(size) < 0.5, moved.to(self.dtype), scores)
        return scores.double()
