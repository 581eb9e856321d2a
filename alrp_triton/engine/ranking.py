"""The ranking of P positives among M logits: statistics for a loss to use, and a way to give the logits its
gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from . import knots, operators
from .inputs import Levels
from .sums import prefix_sums


class Ranking:
    """Per-positive statistics, all float64 ``[P]`` and without a derivative.

    A loss reads :attr:`num_false_positives`, :attr:`rank_positive` and :attr:`rank`, sums any values over the
    positives with :meth:`sums_above` and :meth:`sums_received`, and hands what it makes of them to :meth:`attach`.

    Args:
        levels: checked logits and labels.
        num_positives: P, known on the host.
        delta: half width of the ramp H.
        ignore_index: label of what takes part in nothing.
        backend: ``"torch"``, ``"triton"`` or ``"pairwise"``.
        values: ``[P]`` further numbers of the loss, in which a NaN is to make everything NaN.
    """

    def __init__(
        self, levels: Levels, num_positives: int, *, delta: float, ignore_index: int, backend: str, values: Tensor
    ) -> None:
        self.levels, self.delta, self.ignore_index, self.backend = levels, float(delta), ignore_index, backend
        with torch.no_grad():
            logits = [level.detach() for level in levels.logits]
            self.pos_index, pos_logits = operators.find_positives(logits, levels.labels, num_positives, ignore_index)
            self.knots = knots.make_knots(pos_logits, self.delta)
            self.thresholds = pos_logits if backend == "pairwise" else self.knots.thresholds
            totals, unit = operators.count_negatives(
                logits, levels.labels, self.thresholds, pos_logits, self.delta, ignore_index, backend
            )
            has_nan = (totals[0, -1] > 0) | pos_logits.isnan().any() | values.isnan().any()
            #: 0, or NaN where a NaN takes part: added to every result, so that none is hidden by a comparison.
            self.poison = torch.where(has_nan, torch.nan, 0.0).double()
            #: N_FP(i) = sum over negatives of H(n_j - p_i).
            self.num_false_positives = self._num_false_positives(totals[:, :-1].double(), unit) + self.poison
            #: rank+(i) = 1 + sum over k != i of H(p_k - p_i).
            self.rank_positive = 1 + self.sums_above(torch.ones_like(self.num_false_positives))
            #: rank(i) = rank+(i) + N_FP(i).
            self.rank = self.rank_positive + self.num_false_positives

    def _num_false_positives(self, totals: Tensor, unit: Tensor) -> Tensor:
        if self.backend == "pairwise":
            return totals[0, :-2] * unit + (totals[0, -2:, None] * self._at_infinities()).sum(0)
        counts, offsets = totals
        return knots.false_positives(self.knots, counts, offsets * unit * (2 * self.delta))

    def _at_infinities(self) -> Tensor:
        """``[2, P]``: H(0) where positives are +inf, and where they are -inf; else 0. The pairwise form leaves out what
        scores at the same infinity give, whose differences would cost it a comparison for each pair."""
        pos_logits = self.knots.pos_logits
        return torch.stack([pos_logits == torch.inf, pos_logits == -torch.inf]) * knots.ramp_at_0(self.knots)

    def sums_above(self, values: Tensor) -> Tensor:
        """sum over k != i of v_k H(p_k - p_i), for ``[P]`` float64 values: what stands above positive i."""
        return knots.ramp_sums(self.knots, values[None])[0] + self.poison

    def sums_received(self, values: Tensor) -> Tensor:
        """sum over i != k of v_i H(p_k - p_i): the transpose of :meth:`sums_above`."""
        return knots.received_sums(self.knots, values) + self.poison

    def sums_sorted_received(self, values: Tensor) -> Tensor:
        """Sum of v_i over k itself and what follows it in descending order; of two equal ones the later in flat order
        comes first (a stable ascending sort, flipped)."""
        order = self.knots.order
        received = torch.empty_like(values)
        received[order] = prefix_sums(values[order][None])[0, 1:]
        return received + self.poison

    def attach(self, value: Tensor, pos_gradient: Tensor, weights: Tensor) -> Tensor:
        """``value`` with the derivative ``pos_gradient[i]`` for positive i and sum_i weights[i] H(n_j - p_i) for
        negative j.

        Args:
            value: the loss, any shape.
            pos_gradient: ``[P]`` float64.
            weights: ``[P]`` float64, >= 0.
        """
        with torch.no_grad():
            if self.backend == "pairwise":
                at_infinities = (self._at_infinities() * weights).sum(1)
                coefficients = torch.cat([weights, at_infinities, self.poison[None]])[None]
            else:
                coefficients = knots.ramp_coefficients(self.knots, weights) + self.poison
        attached: Tensor = operators.attach_gradient(
            value.detach(),
            self.levels.logits,
            self.levels.labels,
            self.thresholds,
            coefficients,
            self.pos_index,
            pos_gradient + self.poison,
            self.delta,
            self.ignore_index,
            self.backend,
        )
        return attached
