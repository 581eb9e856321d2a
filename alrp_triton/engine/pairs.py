"""Functions of the difference of two scores, other than the ramp; for these every pair has to be looked at."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

# Pairs held at once.
_PAIRS_PER_BLOCK = 1 << 20

# Weak, so that one made in every iteration goes when the iteration's graph does, with all that its function holds.
_known: WeakValueDictionary[str, PairFunction] = WeakValueDictionary()
_numbers = itertools.count()


class PairFunction:
    """A function f(x, delta) of differences x = s_j - s_i, with values in [0, 1]; what lies outside is clamped.

    It can be found under :attr:`key` as long as something holds it: a criterion, or the graph of a loss.

    Args:
        torch: computes f for a tensor of differences, elementwise, and a number delta; for equal scores x is 0, also
            for equal infinities.
        triton: the same as a ``@triton.jit`` function of a block and a constexpr, for the kernels.
    """

    def __init__(self, torch: Callable[[Tensor, float], Tensor], triton: Any = None) -> None:
        if not callable(torch):
            raise TypeError(f"torch: expected a function of differences and delta, got {type(torch).__name__}")
        self.torch, self.triton = torch, triton
        #: A name by which registered operators, which take no functions, can be told of it.
        self.key = f"{getattr(torch, '__name__', type(torch).__name__)}#{next(_numbers)}"
        _known[self.key] = self

    def __call__(self, s_j: Tensor, s_i: Tensor, delta: float) -> Tensor:
        """f for all pairs, ``[I, J]``; 0 where a difference is NaN, and NaN where f makes one of a number."""
        x = differences(s_j, s_i)
        nan = x.isnan()
        values = self.torch(x.masked_fill(nan, 0), delta)
        if not isinstance(values, Tensor) or values.shape != x.shape:
            shape = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(f"{self.key}: expected a tensor of the differences' shape {list(x.shape)}, got {shape}")
        return values.to(x.dtype).clamp(0, 1).masked_fill(nan, 0)

    def __repr__(self) -> str:
        return f"PairFunction({self.key})"

    def __reduce__(self) -> tuple[type[PairFunction], tuple[Any, ...]]:
        # A copy, here or in another process, is one of its own, known under a key of its own.
        return PairFunction, (self.torch, self.triton)


def pair_function(key: str) -> PairFunction:
    """The one with this :attr:`PairFunction.key`."""
    return _known[key]


def differences(s_j: Tensor, s_i: Tensor) -> Tensor:
    """s_j - s_i for all pairs, ``[I, J]``, in the scores' own dtype; 0 for equal infinities."""
    above, own = s_j[None, :], s_i[:, None]
    return torch.where(above == own, 0.0, above - own)


def pair_blocks(
    function: Callable[[Tensor, Tensor, float], Tensor],
    scores: Tensor,
    groups: Tensor | None,
    pos_logits: Tensor,
    pos_groups: Tensor | None,
    delta: float,
    held: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Walk all pairs of a positive and a score, in blocks of positives.

    Args:
        function: of scores ``[n]``, some positives' scores ``[I]`` and delta, ``[I, n]``.
        scores: ``[n]``.
        groups: ``[n]`` int64, or None.
        pos_logits: ``[P]``.
        pos_groups: ``[P]`` int64, or None.
        delta: handed to ``function``.
        held: pairs in a block, at the most (but never less than a positive's).

    Yields:
        Indices of some positives ``[I]``, and the function of them and all scores, ``[I, n]`` float64; 0 across groups.
    """
    everyone = torch.arange(pos_logits.shape[0], device=pos_logits.device)
    for i in everyone.split(max(1, held // max(len(scores), 1))):
        pairs = function(scores, pos_logits[i], delta).double()
        if groups is not None and pos_groups is not None:
            pairs = torch.where(groups == pos_groups[i, None], pairs, 0.0)
        yield i, pairs


class PairSums:
    """Sums of a pair function over the positives, each by all others.

    Args:
        function: takes the place of the ramp.
        pos_logits: ``[P]``.
        pos_groups: ``[P]`` int64, or None.
        delta: handed to ``function``.
    """

    def __init__(self, function: PairFunction, pos_logits: Tensor, pos_groups: Tensor | None, delta: float) -> None:
        self.function, self.pos_logits, self.pos_groups, self.delta = function, pos_logits, pos_groups, delta

    def sums_above(self, values: Tensor) -> Tensor:
        """sum over k != i of v_k f(p_k - p_i): ``[P] -> [P]`` float64."""
        return torch.cat([(pairs * values).sum(1) for _, pairs in self._blocks()])

    def sums_received(self, values: Tensor) -> Tensor:
        """sum over i != k of v_i f(p_k - p_i): ``[P] -> [P]`` float64."""
        total = torch.zeros_like(values)
        for i, pairs in self._blocks():
            total = total + (pairs * values[i, None]).sum(0)
        return total

    def _blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Some positives i, and f(p_k - p_i) for them and all k: ``[I, P]`` float64, 0 for k = i."""
        logits, groups = self.pos_logits, self.pos_groups
        everyone = torch.arange(logits.shape[0], device=logits.device)
        for i, pairs in pair_blocks(self.function, logits, groups, logits, groups, self.delta, _PAIRS_PER_BLOCK):
            yield i, pairs.masked_fill(everyone == i[:, None], 0)
