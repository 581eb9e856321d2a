"""Strategies for scores and for memory of every layout. Few scores are drawn one by one, so that they shrink; many come
from one drawn seed."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from dialect import INF
from hypothesis import strategies as st
from hypothesis.internal.conjecture.providers import AVAILABLE_PROVIDERS, HypothesisProvider
from torch import Tensor

FLOATS = (torch.float32, torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16)


class Independent(HypothesisProvider):
    """Draws cases that have nothing to do with one another, by the seed alone. By default Hypothesis copies parts of
    most cases from other parts, and takes numbers from the code of all modules that have been imported."""

    def _maybe_draw_constant(self, *_: Any, **__: Any) -> None:
        return None


AVAILABLE_PROVIDERS["independent"] = f"{__name__}.Independent"


@functools.lru_cache(maxsize=4096, typed=True)
def one_of(*options: Any) -> st.SearchStrategy[Any]:
    """One of the options, which are made once; the first is the simplest."""
    return st.sampled_from(options)


@functools.cache
def whole(low: int, high: int) -> st.SearchStrategy[int]:
    """From ``low`` up to and with ``high``."""
    return st.integers(low, high)


@functools.cache
def odds(percent: int) -> st.SearchStrategy[bool]:
    return st.sampled_from([False] * (100 - percent) + [True] * percent)


class Numbers:
    """Many numbers from one seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float64)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def whole(self, low: int, high: int, *shape: int) -> Tensor:
        """From ``low`` up to and without ``high``."""
        return torch.randint(low, high, shape, generator=self.generator)

    def pick(self, options: Sequence[float], *shape: int) -> Tensor:
        return torch.tensor(options, dtype=torch.float64)[self.whole(0, len(options), *shape)]


NUMBERS = st.integers(0, 2**24 - 1).map(Numbers)


CENTRES, WIDTHS = one_of(0.0, 3.0, -4.6, 1e4, -1e9), one_of(1.0, 4.0, 0.05, 100.0)
# Where a slice begins, its step, and how much of the axis is left beyond it.
SLICES = one_of(*itertools.product((0, 1, 2), (1, 1, 2, 3), (0, 1, 2)))


def lay_out(draw: st.DrawFn, tensor: Tensor, filling: float) -> Tensor:
    """The same numbers with other strides or another offset; what lies between them holds ``filling``."""
    how = draw(one_of("as it is", "as it is", "offset", "negated", "stepped", "permuted", "sliced"))
    if how == "permuted" and tensor.dim() > 1:
        order = list(range(tensor.dim()))
        turn = draw(whole(0, 2 * len(order) - 1)) + 1
        order = [*order[turn // 2 :], *order[: turn // 2]][:: 1 - 2 * (turn % 2)]
        back = [order.index(axis) for axis in range(tensor.dim())]
        return tensor.permute(order).contiguous().permute(back)
    if how == "sliced" and tensor.dim() > 0:
        parts = [draw(SLICES) for _ in tensor.shape]
        size = [begin + step * n + rest for (begin, step, rest), n in zip(parts, tensor.shape)]
        memory = torch.full(size, filling, dtype=tensor.dtype)
        part = memory[tuple(slice(b, b + step * n, step) for (b, step, _), n in zip(parts, tensor.shape))]
        return part.copy_(tensor)
    if how in ("offset", "stepped"):
        step = draw(whole(2, 3)) if how == "stepped" else 1
        memory = torch.full((step * tensor.numel() + 7,), filling, dtype=tensor.dtype)
        part = memory[3 : 3 + step * tensor.numel() : step].view(tensor.shape)
        return part.copy_(tensor)
    if how == "negated" and tensor.is_floating_point():
        # A view that has PyTorch's lazy minus sign: memory holds the opposite.
        return torch._neg_view(-tensor)
    return tensor


def draw_shape(draw: st.DrawFn, budget: int) -> tuple[int, ...]:
    """Of about ``budget`` elements at most; at times of none."""
    if draw(odds(7)):
        empty: tuple[int, ...] = draw(one_of((0,), (0, 3), (3, 0), (2, 0, 4), (0, 0)))
        return empty
    budget = budget if draw(st.booleans()) else draw(whole(1, budget))
    columns = draw(one_of(1, 1, 2, 3, 5, 8, 20, 80, 127, 128, 255, 256, 300))
    if columns > budget or draw(odds(25)):
        return (budget,)
    rows, shape = budget // columns, list[int]()
    for _ in range(draw(whole(0, 2))):
        shape.append(draw(whole(1, min(rows, 6))))
        rows //= shape[-1]
    shape.insert(draw(whole(0, len(shape))), rows)
    return (*shape, columns)


def expandable(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape that expands to this one; as a rule, itself."""
    if not draw(odds(12)):
        return shape
    return tuple(1 if n > 0 and draw(st.booleans()) else n for n in shape)


class Flavour:
    """What the scores of a problem are like: a few kinds, mixed."""

    def __init__(self, draw: st.DrawFn, delta: float, dtype: torch.dtype) -> None:
        self.dtype, limits = dtype, torch.finfo(dtype)
        step, centre, width = draw(one_of(1.0, 0.25, 0.1, 0.05, -0.5, -1.0)), draw(CENTRES), draw(WIDTHS)
        # Negative ones are parts of delta.
        step = step if step > 0 else -step * delta
        anchors = (centre + width * draw(NUMBERS).normal(3)).tolist()
        least, low, high = limits.smallest_normal, math.log(limits.smallest_normal), math.log(limits.max)
        most = [-1, -0.75, -0.5, 0.25, 0.5, 1 - limits.eps, 1]
        kinds: list[Callable[[Numbers, int], Tensor]] = [
            lambda numbers, size: numbers.whole(-4, 5, size) * step,
            lambda numbers, size: centre + width * numbers.normal(size),
            lambda numbers, size: numbers.pick(anchors, size),
            lambda numbers, size: self._nudged(numbers.pick(anchors, size), delta, numbers),
            lambda numbers, size: numbers.whole(-9, 10, size) * numbers.pick([least * limits.eps, least]),
            lambda numbers, size: limits.max * numbers.pick(most, size),
            lambda numbers, size: numbers.pick([-1, 1], size) * (low + (high - low) * numbers.uniform(size)).exp(),
        ]
        self.kinds = [kinds[draw(one_of(0, 1, 0, 1, 2, 3, 4, 5, 6))] for _ in range(draw(one_of(1, 1, 2, 3)))]
        self.infinite = draw(one_of(0.0, 0.0, 0.0, 0.1, 0.6))
        self.nan_where_ignored, self.nan = draw(odds(30)), draw(odds(5))
        self.apart = draw(one_of(0.0, 0.0, 2.0, -2.0, 9.0))
        """How far positives stand above negatives, if they do."""
        ends = (
            float(delta),
            -float(delta),
            2.0 * delta,
            least,
            -least * limits.eps,
            limits.max,
            -limits.max,
            INF,
            -INF,
        )
        self.special = one_of(0.0, 1.0, -1.0, 0.25, 0.5, 2.0, 1.0 * delta, -1.0 * delta, 2.0 * delta, *ends)

    def _nudged(self, scores: Tensor, delta: float, numbers: Numbers) -> Tensor:
        """A ramp's width apart, but for a few units in the last place."""
        size, finest = len(scores), torch.float64 if self.dtype == torch.float64 else torch.float32
        scores = (scores + delta * numbers.pick([-2, -1, 0, 1, 2], size)).to(self.dtype).to(finest)
        for _ in range(int(numbers.whole(0, 3))):
            moved = torch.nextafter(scores, numbers.pick([-INF, INF], size).to(finest))
            scores = torch.where(numbers.uniform(size) < 0.5, moved, scores)
        return scores.double()

    def scores(self, draw: st.DrawFn, size: int) -> Tensor:
        """``[size]`` in the dtype."""
        if 0 < size <= 8 and draw(odds(40)):
            return torch.tensor([draw(self.special) for _ in range(size)], dtype=torch.float64).to(self.dtype)
        numbers = draw(NUMBERS)
        columns = torch.stack([kind(numbers, size) for kind in self.kinds]).to(self.dtype)
        chosen = columns.gather(0, numbers.whole(0, len(columns), 1, size))[0]
        infinities = numbers.pick([-INF, INF], size).to(self.dtype)
        return torch.where(numbers.uniform(size) < self.infinite, infinities, chosen)
