"""The ranking of P positives among M logits: statistics for a loss to use, and a way to give the logits its
gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from . import operators
from .backends import LINEAR_BACKENDS, pairwise_form
from .inputs import Levels
from .knots import ramp_at_0
from .pairs import PairFunction, PairSums
from .steps import make_steps, poison_of, sent_of


class Statistics(Protocol):
    """What the formula of a loss sees: of each positive, ``[P]`` float64; with groups, within its own.

    :class:`Ranking` is one, and so is what the reference hands to formulas.
    """

    num_false_positives: Tensor
    """N_FP(i) = sum over negatives of H(n_j - p_i)."""
    rank_positive: Tensor
    """rank+(i) = 1 + sum over k != i of H(p_k - p_i)."""
    rank: Tensor
    """rank(i) = rank+(i) + N_FP(i)."""
    num_positives: Tensor
    """P, as many positives as are ranked together with i."""

    def sums_above(self, values: Tensor) -> Tensor:
        """sum over k != i of v_k H(p_k - p_i)."""

    def sums_sorted(self, values: Tensor) -> Tensor:
        """Sum of v_k over i itself and what precedes it in descending order; of two equal ones the later in flat order
        comes first."""

    def running_max(self, values: Tensor) -> Tensor:
        """The largest v_k among i itself and what follows it in that order."""


class Ranking:
    """Per-positive statistics, all float64 ``[P]`` and without a derivative.

    A loss reads :attr:`num_false_positives`, :attr:`rank_positive`, :attr:`rank` and :attr:`num_positives`, sums any
    values over the positives with :meth:`sums_above` and :meth:`sums_sorted`, and hands what it makes of them to
    :meth:`error_driven`. With groups each is a ranking of its own, and :attr:`share` makes sums over all positives
    means over the groups. Where several processes rank together, P is the number of positives of all, and each holds
    all statistics; :meth:`own` is the part of this process.

    Args:
        levels: checked logits, labels and groups.
        num_positives: P, known on the host; None to count them, for which the host waits.
        delta: half width of the ramp H.
        ignore_index: label of what takes part in nothing.
        backend: ``"torch"``, ``"numba"``, ``"triton"`` or ``"pairwise"``.
        values: further numbers of the loss, one for each positive, in which a NaN is to make everything NaN; see
            :attr:`values`.
        name: the argument that said how many positives there are, for errors.
        smoothing: takes the place of the ramp.
        distribution: q(x_ij), to which the shares p(j|i) of negatives in the error of a positive are proportional; by
            default H itself. For either, every pair is looked at.
    """

    def __init__(
        self,
        levels: Levels,
        num_positives: int | None,
        *,
        delta: float,
        ignore_index: int,
        backend: str,
        values: tuple[Tensor, ...] = (),
        name: str = "num_positives",
        smoothing: PairFunction | None = None,
        distribution: PairFunction | None = None,
    ) -> None:
        self.levels, self.delta, self.ignore_index = levels, float(delta), ignore_index
        if num_positives is None and torch.compiler.is_compiling():
            # Every shape that follows would depend on data. Where graphs may break, one does here.
            raise RuntimeError(f"{name}: expected an int where a whole graph is compiled or exported, got None")
        # As operators take them, and without a derivative.
        self._detached = [level.detach() for level in levels.logits], levels.labels, list(levels.groups)
        self.pos_index, pos_logits, self.pos_groups = self._find_positives(num_positives, name, backend)
        # Of this process alone.
        self._own_positives = pos_logits, self.pos_groups
        #: ``values``, of the positives of all processes: differentiable with respect to those of this one.
        self.values: Sequence[Tensor] = values
        self._meeting = None
        if levels.processes is not None:
            settings = {
                "delta": self.delta,
                "logits": pos_logits.dtype == torch.float64,
                "groups": bool(levels.groups),
                "extras": len(values),
                # Integers of one form cannot be added to those of another.
                "smoothing": smoothing is not None,
                "distribution": distribution is not None,
                "backend": backend in LINEAR_BACKENDS,
            }
            self._meeting = levels.processes.meet(len(pos_logits), levels.num_logits, settings)
            pos_logits, *self.values = self._meeting.gather([pos_logits, *values])
            if self.pos_groups is not None:
                (self.pos_groups,) = self._meeting.gather([self.pos_groups])
        values = tuple(value.detach() for value in self.values)
        with torch.no_grad():
            self.steps = make_steps(pos_logits, self.delta, self.pos_groups, backend)
            self._pairs = None if smoothing is None else PairSums(smoothing, pos_logits, self.pos_groups, self.delta)
            # The pass that shares errors out: its backend and its function.
            function = distribution or smoothing
            self._spreading = pairwise_form(backend) if function else backend, function
            if function is None and backend in LINEAR_BACKENDS:
                ranks = self.steps.rank(*self._totals(backend, None), values)
            else:
                ranks = self._rank(backend, smoothing, distribution, values)
            #: N_FP(i) = sum over negatives of H(n_j - p_i); rank+(i) = 1 + sum over k != i of H(p_k - p_i); their sum,
            #: rank(i). And 0, or NaN where a NaN takes part: added to every result, so that none is hidden by a
            #: comparison.
            self.num_false_positives, self.rank_positive, self.rank, self.poison = ranks
            if distribution is None:
                # The sums of q over the negatives.
                self._spread = self.num_false_positives
            #: How many positives the ranking of positive i has, P where there are no groups.
            self.num_positives, self._num_groups = self.steps.sizes()

    def own(self, of_all: Tensor) -> Tensor:
        """Of ``[..., P]`` numbers, those that belong to positives of this process."""
        return of_all if self._meeting is None else of_all[..., self._meeting.own]

    def gather(self, *columns: Tensor) -> Sequence[Tensor]:
        """``[P]`` numbers of all processes from those of this one, as :attr:`values` are; all have to call it."""
        return columns if self._meeting is None else self._meeting.gather(columns)

    @property
    def share(self) -> Tensor:
        """``[P]``: what makes a sum over all positives the mean over the groups of the means over their positives."""
        return 1 / (self.num_positives * self._num_groups) + self.poison

    def poison_where(self, bad: Tensor) -> Tensor:
        """Make everything that follows NaN if any of ``bad`` is true; returns :attr:`poison`."""
        self.poison = self.poison + torch.where(bad.any(), torch.nan, 0.0)
        return self.poison

    def sums_above(self, values: Tensor) -> Tensor:
        """sum over k != i of v_k H(p_k - p_i), for ``[P]`` float64 values: what stands above positive i.
        Differentiable in the values."""
        if not values.requires_grad:
            return self._sums_above(values)
        above: Tensor = _Above.apply(values, self)  # type: ignore[no-untyped-call]
        return above

    def _sums_above(self, values: Tensor) -> Tensor:
        if self._pairs is not None:
            return self._pairs.sums_above(values) + self.poison
        return self.steps.sums_above(values, self.poison)

    def sums_received(self, values: Tensor) -> Tensor:
        """sum over i != k of v_i H(p_k - p_i): the transpose of :meth:`sums_above`."""
        if self._pairs is not None:
            return self._pairs.sums_received(values) + self.poison
        return self.steps.sums_received(values, self.poison)

    def sums_sorted(self, values: Tensor) -> Tensor:
        """Sum of v_k over i itself and what precedes it in descending order; of two equal ones the later in flat order
        comes first (a stable ascending sort, flipped). Differentiable in the values."""
        return self.steps.sums_sorted(values, self.poison)

    def sums_sorted_received(self, values: Tensor) -> Tensor:
        """Sum of v_i over k itself and what follows it in descending order: the transpose of :meth:`sums_sorted`."""
        return self.steps.sums_sorted_received(values, self.poison)

    def running_max(self, values: Tensor) -> Tensor:
        """The largest value among i and the positives that follow it in descending order."""
        return self.steps.running_max(values, self.poison)

    def error_driven(self, value: Tensor, excess: Tensor, share: Tensor, eps: float = 0.0) -> Tensor:
        """``value`` with the gradient of Algorithm 1.

        Positive i sends its excess, times its share, down the scores of its false positives, in the proportions
        p(j|i), and up its own. One whose false positives add up to ``eps`` or less sends nothing.

        Args:
            value: the loss, a scalar.
            excess: ``[P]`` float64, l(i) - l*(i): the error of positive i beyond its target.
            share: ``[P]`` float64, 1/Z.
            eps: >= 0.
        """
        if self._spreading[0] not in LINEAR_BACKENDS:
            sent, weights = self.sent(excess * share, eps)
            return self.attach(value[None], -sent[None], weights[None])[0]
        with torch.no_grad():
            tables = self.steps.send(excess, share, self._spread, eps, self.poison)
        return self._attach(value[None], *tables)[0]

    def sent(self, excess: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """What positives with more than ``eps`` of false positives send in all, and for a whole one: ``[P]`` each."""
        return sent_of(excess, self._spread, eps)

    def attach(self, values: Tensor, pos_gradients: Tensor, weights: Tensor) -> Tensor:
        """``values``, each with the derivative ``pos_gradients[i]`` for positive i and sum_i weights[i] q(n_j - p_i)
        for negative j. However many are differentiated together, there is one pass over the logits.

        Args:
            values: ``[K]``, parts of the loss.
            pos_gradients: ``[K, P]`` float64.
            weights: ``[K, P]`` float64, >= 0.
        """
        backend, function = self._spreading
        with torch.no_grad():
            if backend in LINEAR_BACKENDS:
                coefficients = self.steps.coefficients(weights, self.poison)
            else:
                at_infinities = self._at_infinities(function)
                rows = [torch.cat([row, (at_infinities * row).sum(1), row.new_zeros(1)])[None] for row in weights]
                coefficients = torch.stack(rows) + self.poison
        return self._attach(values, coefficients, pos_gradients + self.poison)

    def _attach(self, values: Tensor, coefficients: Tensor, pos_gradients: Tensor) -> Tensor:
        backend, function = self._spreading
        if self._meeting is not None:
            # What DistributedDataParallel takes the mean of.
            coefficients, pos_gradients = coefficients * self._meeting.size, pos_gradients * self._meeting.size
        attached: Tensor = operators.attach_gradient(
            values.detach(),
            self.levels.logits,
            *self._detached[1:],
            *self._thresholds(backend),
            coefficients,
            self.pos_index,
            self.own(pos_gradients),
            *self._settings(backend, function),
        )
        return attached

    def _find_positives(
        self, num_positives: int | None, name: str, backend: str
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Flat index, logit and group of each positive of this process; no groups: None."""
        with torch.no_grad():
            pos_index, pos_logits, pos_groups = operators.find_positives(
                *self._detached, num_positives, self.ignore_index, name, backend
            )
        return pos_index, pos_logits, pos_groups if self.levels.groups else None

    def _rank(
        self,
        backend: str,
        smoothing: PairFunction | None,
        distribution: PairFunction | None,
        values: tuple[Tensor, ...],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """:meth:`Steps.rank` where pairs are looked at, in either pass or both."""
        counting = pairwise_form(backend) if smoothing else backend
        totals, unit = self._totals(counting, smoothing)
        num_nan = totals[0, -1]
        if distribution is not None:
            spread = self._totals(*self._spreading)
            self._spread, num_nan = self._of_pairs(*spread, distribution), num_nan + spread[0][0, -1]
        self.poison = poison_of(num_nan, (self.steps.pos_logits, *values))
        if counting in LINEAR_BACKENDS:
            found, rank_positive, rank, poison = self.steps.rank(totals, unit, values)
            return found + self.poison, rank_positive + self.poison, rank + self.poison, poison + self.poison
        found = self._of_pairs(totals, unit, smoothing) + self.poison
        rank_positive = 1 + self.sums_above(torch.ones_like(found))
        return found, rank_positive, rank_positive + found, self.poison

    def _totals(self, backend: str, function: PairFunction | None) -> tuple[Tensor, Tensor]:
        """Pass 1: what the negatives add up to, and the unit."""
        totals, unit = operators.count_negatives(
            *self._detached,
            *self._thresholds(backend),
            *self._own_positives,
            *self._settings(backend, function),
            None if self._meeting is None else self._meeting.num_logits,
        )
        return totals if self._meeting is None else self._meeting.add(totals), unit

    def _of_pairs(self, totals: Tensor, unit: Tensor, function: PairFunction | None) -> Tensor:
        """The sum over the negatives of a function of pairs, for each positive."""
        counted = totals[0, :-1].double()
        at_infinities = counted[-2:, None] * self._at_infinities(function)
        return counted[:-2] * unit + at_infinities.sum(0)

    def _thresholds(self, backend: str) -> tuple[Tensor, Tensor | None]:
        if backend in LINEAR_BACKENDS:
            return self.steps.thresholds, self.steps.threshold_groups
        return self.steps.pos_logits, self.pos_groups

    def _settings(self, backend: str, function: PairFunction | None) -> tuple[float, int, str, str]:
        return self.delta, self.ignore_index, backend, "" if function is None else function.key

    def _at_infinities(self, function: PairFunction | None) -> Tensor:
        """``[2, P]``: H(0) where positives are +inf, and where they are -inf; else 0. The pairwise form leaves out what
        scores at the same infinity give, whose differences would cost it a comparison for each pair; but where it
        compares in any case, because of groups or of another function, it does not."""
        pos_logits = self.steps.pos_logits
        if function is not None or self.pos_groups is not None:
            return torch.zeros(2, pos_logits.shape[0], dtype=torch.float64, device=pos_logits.device)
        return torch.stack([pos_logits == torch.inf, pos_logits == -torch.inf]) * ramp_at_0(self.delta)


class _Above(torch.autograd.Function):
    """:meth:`Ranking.sums_above` with its transpose as the derivative, so that sums keep their order in backward."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, ranking: Ranking) -> Tensor:
        ctx.ranking = ranking
        return ranking._sums_above(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.ranking.sums_received(grad), None
