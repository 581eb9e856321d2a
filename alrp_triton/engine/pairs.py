"""Functions of the difference of two scores that replace the ramp H or give the shares p(j|i) of errors. PyTorch
evaluates them for every pair of a positive and a score, in blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .blocks import differences, pair_blocks
from .inputs import Levels
from .labels import LabelKinds, group_of_each, pieces
from .passes import Own
from .passes.eager import overwrite_positives
from .placed import Ranks, Sorted, poison_of
from .scans import unit_of
from .transforms import refuse_twice

PairFunction = Callable[[Tensor, float], Tensor]
"""f(x, delta) of differences x = s_j - s_i, elementwise, clamped to [0, 1]. For equal scores x is 0, also for equal
infinities."""

# Logits in one step, and pairs in one block.
_PIECE, _PAIRS = 1 << 16, 1 << 20


def values_of(function: PairFunction, s_j: Tensor, s_i: Tensor, delta: float) -> Tensor:
    """f for all pairs, ``[I, J]``; 0 if the difference is NaN, and NaN if f returns NaN for a number."""
    x = differences(s_j, s_i)
    nan = x.isnan()
    values = function(x.masked_fill(nan, 0), delta)
    if not isinstance(values, Tensor) or values.shape != x.shape:
        shape = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        name = getattr(function, "__name__", type(function).__name__)
        raise ValueError(f"{name}: expected a tensor of the differences' shape {list(x.shape)}, got {shape}")
    return values.to(x.dtype).clamp(0, 1).masked_fill(nan, 0)


class Pairs:
    """A ranking by pair functions.

    Args:
        smoothing: replaces the ramp; None for the ramp.
        distribution: p(j|i) is proportional to it; None for the smoothing.
        placed: the positives.
        levels, delta: of the loss.
    """

    spread: Tensor
    """``[P]``: the sum of the distribution over the negatives."""

    def __init__(
        self,
        smoothing: PairFunction | None,
        distribution: PairFunction | None,
        placed: Sorted,
        levels: Levels,
        delta: float,
    ) -> None:
        self.smoothing, self.distribution, self.placed = smoothing, distribution, placed
        self.levels, self.delta = levels, delta

    def rank(self, num_logits: int, values: Sequence[Tensor], add: Callable[[Tensor], Tensor]) -> Ranks:
        """The ranks of the positives; ``add`` sums totals over all processes."""
        placed = self.placed
        unit = unit_of(num_logits, placed.logits.device)
        if self.smoothing is None:
            ranks = placed.rank(num_logits, values)
        else:
            totals = add(self._count(self.smoothing, unit))
            poison = poison_of(totals[-1], (placed.logits, *values))
            found = totals[:-1].double() * unit
            ranks = placed.ranks(found, poison, 1 + self.sums(torch.ones_like(found), "above", poison))
        self.spread = ranks.num_false_positives
        if self.distribution is not None:
            totals = add(self._count(self.distribution, unit))
            self.spread = totals[:-1].double() * unit
            poison = poison_of(totals[-1], ())
            ranks = Ranks(*(statistic + poison for statistic in ranks))
        return ranks

    def _count(self, function: PairFunction, unit: Tensor) -> Tensor:
        """``[P + 1]`` int64: the sum of the function over the negatives for each positive, in units; last, the number
        of negatives that are NaN or for which the function is NaN."""
        placed = self.placed
        totals = torch.zeros(len(placed.logits) + 1, dtype=torch.int64, device=placed.logits.device)
        for scores, groups, negative, _ in self._pieces():
            totals[-1] += (negative & scores.isnan()).sum()
            for i, pairs in self._blocks(function, scores, groups):
                counted = torch.where(negative, pairs, 0.0)
                failed = counted.isnan()
                totals[-1] += failed.sum()
                totals[i] += (counted.masked_fill(failed, 0) / unit).to(torch.int64).sum(1)
        return totals

    def sums(self, values: Tensor, kind: str, poison: Tensor) -> Tensor:
        """The sums ``"above"`` and ``"received"`` of ``placed.Sorted``, with the smoothing as the ramp."""
        placed = self.placed
        if self.smoothing is None:
            return placed.sums(values, kind, poison)
        everyone = torch.arange(len(placed.logits), device=placed.logits.device)
        total, rows = torch.zeros_like(values), []
        for i, pairs in self._blocks(self.smoothing, placed.logits, placed.groups):
            others = pairs.masked_fill(everyone == i[:, None], 0)
            if kind == "above":
                rows.append((others * values).sum(1))
            else:
                total = total + (others * values[i, None]).sum(0)
        return (torch.cat(rows) if kind == "above" else total) + poison

    def lines(self, weights: Tensor, poison: Tensor) -> Tensor:
        """``[P + 1]``: weights, and a term that is added to all."""
        return torch.cat([weights, weights.new_zeros(1)]) + poison

    def attach(
        self, first: Tensor, given: Tensor | None, derivative: Tensor | None, index: Tensor, lines: Tensor, own: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See ``operators.attach``; for one scalar."""
        levels = self.levels
        attached: Tensor = _Attached.apply(  # type: ignore[no-untyped-call]
            first, given, derivative, lines, own, index, self, *levels.logits
        )
        return attached, attached

    def gradients(self, factor: Tensor, lines: Tensor, own: Tensor, index: Tensor) -> list[Tensor]:
        """Of every logit."""
        function = self.distribution or self.smoothing
        assert function is not None
        weights = lines * factor.double()
        gradients = [torch.empty_like(logits) for logits in self.levels.logits]
        for scores, groups, negative, out in self._pieces(gradients):
            value = torch.zeros(scores.shape, dtype=torch.float64, device=scores.device) + weights[-1]
            for i, pairs in self._blocks(function, scores, groups):
                value += (pairs * weights[i, None]).sum(0)
            out.copy_(torch.where(negative, value, 0).view(out.shape))
        overwrite_positives(gradients, Own(index, own), [factor])
        return gradients

    def _pieces(self, gradients: list[Tensor] | None = None) -> Iterator[tuple[Tensor, Tensor | None, Tensor, Tensor]]:
        """Scores ``[n]`` of each piece of the levels, their groups, a mask of the negatives, and the gradient to
        write."""
        for k, (logits, labels, groups) in enumerate(self.levels.each()):
            per_class = logits.dim() != labels.dim()
            out = None if gradients is None else gradients[k]
            for x, y, written, group in pieces(logits.detach(), labels, _PIECE, out, groups):
                kinds = LabelKinds(y, x.shape[1], per_class, self.levels.ignore_index)
                negative = ~kinds.ignored[:, None].expand(x.shape)
                if per_class:
                    negative = negative & (torch.arange(x.shape[1], device=x.device) != y[:, None])
                else:
                    negative = negative & ~kinds.positive[:, None]
                group_ids = None if group is None else group_of_each(group, *x.shape).long()
                scores = x.to(self.placed.logits.dtype).reshape(-1)
                yield scores, group_ids, negative.reshape(-1), written

    def _blocks(self, function: PairFunction, scores: Tensor, groups: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
        """Some positives, and the function of their pairs with all scores."""

        def of_scores(s_j: Tensor, s_i: Tensor, delta: float) -> Tensor:
            return values_of(function, s_j, s_i, delta)

        placed = self.placed
        return pair_blocks(of_scores, scores, groups, placed.logits, placed.groups, self.delta, _PAIRS)


class _Attached(torch.autograd.Function):
    """A scalar with the derivatives of :meth:`Pairs.attach`."""

    @staticmethod
    def forward(
        ctx: Any,
        first: Tensor,
        given: Tensor | None,
        derivative: Tensor | None,
        lines: Tensor,
        own: Tensor,
        index: Tensor,
        pairs: Pairs,
        *logits: Tensor,
    ) -> Tensor:
        ctx.pairs, ctx.given_dtype = pairs, None if given is None else given.dtype
        ctx.save_for_backward(derivative, lines, own, index, *logits)
        return first.clone()

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> tuple[Any, ...]:
        derivative, lines, own, index, *logits = ctx.saved_tensors
        of_given = None if derivative is None else (derivative * factor).to(ctx.given_dtype)
        gradients = ctx.pairs.gradients(factor.detach(), lines, own, index)
        return None, of_given, None, None, None, None, None, *map(refuse_twice, gradients, logits)
