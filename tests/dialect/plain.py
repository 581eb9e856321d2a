"""Definition 1 and Algorithm 1 number by number: what each loss of the family is, in loops over pairs of floats.

Nothing here is shared with the package, nor with its reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from .cases import Case
from .family import ALRP, AP, APE, DEPTH, NDCG, PLAIN_AP, RANK_SORT, WEIGHTED, Member


def ramp(x: float, delta: float) -> float:
    """H of a number."""
    if delta == 0:
        return float(x >= 0)
    return min(max(x / (2 * delta) + 0.5, 0.0), 1.0)


class Plain:
    """A case as lists of Python numbers; pairs go by their places among the logits."""

    def __init__(self, case: Case, delta: float, values: list[float]) -> None:
        self.scores = [float(x) for x in case.logits]
        labels = case.labels.tolist()
        self.positives = [i for i, label in enumerate(labels) if label == 1]
        self.negatives = [j for j, label in enumerate(labels) if label == 0]
        self.values = dict(zip(self.positives, values))
        self.delta = delta
        self.false = {i: math.fsum(self.h(i, j) for j in self.negatives) for i in self.positives}
        self.true = {i: 1 + math.fsum(self.h(i, k) for k in self.others(i)) for i in self.positives}
        self.rank = {i: self.true[i] + self.false[i] for i in self.positives}

    def h(self, i: int, j: int) -> float:
        """H(s_j - s_i); equal infinities differ by 0."""
        below, above = self.scores[i], self.scores[j]
        return ramp(0.0 if above == below else above - below, self.delta)

    def others(self, i: int) -> list[int]:
        return [k for k in self.positives if k != i]

    def descending(self, i: int) -> list[int]:
        """i, and the positives that precede it in descending order."""
        return [k for k in self.positives if (self.scores[k], k) >= (self.scores[i], i)]


class Terms(NamedTuple):
    """What positive i makes of the loss: L_ij = l(i) p(j|i), and targets L*_ij = l*(i) p(j|i)."""

    error: float
    """l(i)"""
    target: float
    """l*(i)"""
    receivers: dict[int, float]
    """H(x_ij) of those that i sends its error to: p(j|i) before it is divided by its sum."""

    @property
    def spread(self) -> float:
        return math.fsum(self.receivers.values())

    def primary(self) -> list[float]:
        """L_ij for all j; what has no j to be attributed to is a term by itself."""
        spread = self.spread
        return [self.error * h / spread for h in self.receivers.values()] if spread else [self.error]


class PlainLoss(NamedTuple):
    """A loss L = (1/Z) sum_i l(i), or one component of several."""

    components: tuple[str, ...]
    """Results that add up to L."""
    gradient: str
    terms: Callable[[Plain, int], Terms]
    eps: float = 0.0
    normaliser: Callable[[Plain], float] = lambda plain: len(plain.positives)
    among_positives: bool = False
    """Whether errors are sent to positives, not to negatives."""

    def value(self, plain: Plain) -> float:
        """Theorem 1: the sum of the primary terms."""
        every = [term for i in plain.positives for term in self.terms(plain, i).primary()]
        return math.fsum(every) / self.normaliser(plain)

    def update(self, plain: Plain) -> list[float]:
        """Algorithm 1: dL/ds of every logit."""
        gradient, normaliser = [0.0] * len(plain.scores), self.normaliser(plain)
        for i in plain.positives:
            terms = self.terms(plain, i)
            spread = terms.spread
            for j, h in terms.receivers.items() if spread > self.eps else ():
                amount = (terms.error - terms.target) * h / spread / normaliser
                gradient[i] -= amount
                gradient[j] += amount
        return gradient


def _to_negatives(p: Plain, i: int, error: float, target: float = 0.0) -> Terms:
    return Terms(error, target, {j: p.h(i, j) for j in p.negatives})


def _lrp(p: Plain, i: int) -> Terms:
    above = math.fsum(p.values[k] * p.h(i, k) for k in p.others(i))
    return _to_negatives(p, i, (p.false[i] + p.values[i] + above) / p.rank[i], p.values[i] / p.rank[i])


def _imprecision(p: Plain, i: int) -> Terms:
    return _to_negatives(p, i, 1 - p.true[i] / p.rank[i])


def _interpolated(p: Plain, i: int) -> Terms:
    below = [k for k in p.positives if (p.scores[k], k) <= (p.scores[i], i)]
    return _to_negatives(p, i, 1 - max(p.true[k] / p.rank[k] for k in below))


def _best_gain(p: Plain) -> float:
    return math.fsum(1 / math.log2(1 + place) for place in range(1, len(p.positives) + 1))


def _missing_gain(p: Plain, i: int) -> Terms:
    best = _best_gain(p) / len(p.positives)
    return _to_negatives(p, i, best - 1 / math.log2(1 + p.rank[i]), best - 1 / math.log2(1 + p.true[i]))


def _ranking(p: Plain, i: int) -> Terms:
    """A positive is above itself by H(0)."""
    return _to_negatives(p, i, p.false[i] / (p.rank[i] - 1 + p.h(i, i)))


def _sorting(p: Plain, i: int) -> Terms:
    def mean_error(members: list[int]) -> float:
        return math.fsum(p.h(i, k) * (1 - p.values[k]) for k in members) / math.fsum(p.h(i, k) for k in members)

    proper = [k for k in p.positives if p.values[k] >= p.values[i]]
    missorted = {k: p.h(i, k) for k in p.positives if p.values[k] < p.values[i]}
    return Terms(mean_error(p.positives) - mean_error(proper), 0.0, missorted)


def _share_of_false(p: Plain, i: int) -> Terms:
    return _to_negatives(p, i, p.values[i] * p.false[i] / (p.rank[i] - 1 + p.h(i, i)))


def _share_of_missorted(p: Plain, i: int) -> Terms:
    missorted = {k: p.h(i, k) for k in p.positives if p.values[k] < p.values[i]}
    return Terms(p.values[i] * math.fsum(missorted.values()) / (p.rank[i] - 1 + p.h(i, i)), 0.0, missorted)


def _weighted(p: Plain, i: int) -> Terms:
    return _to_negatives(p, i, p.values[i] * p.false[i] / p.rank[i])


def _depth(p: Plain, i: int) -> Terms:
    costs = math.fsum(p.values[k] for k in p.descending(i)) / p.true[i]
    return _to_negatives(p, i, math.log1p(p.false[i]) + costs, costs / 2)


PLAIN: dict[Member, list[PlainLoss]] = {
    ALRP: [PlainLoss(("cls", "loc"), "cls by logits", _lrp, 1e-5)],
    AP: [PlainLoss(("loss",), "loss by logits", _interpolated)],
    PLAIN_AP: [PlainLoss(("loss",), "loss by logits", _imprecision)],
    NDCG: [PlainLoss(("loss",), "loss by logits", _missing_gain, 0.0, _best_gain)],
    RANK_SORT: [
        PlainLoss(("ranking",), "ranking by logits", _ranking, 1e-10),
        PlainLoss(("sorting",), "sorting by logits", _sorting, 1e-10, among_positives=True),
    ],
    APE: [
        PlainLoss(("ranking",), "ranking by logits", _share_of_false, 1e-10),
        PlainLoss(("sorting",), "sorting by logits", _share_of_missorted, 1e-10, among_positives=True),
    ],
    WEIGHTED: [PlainLoss(("loss",), "loss by logits", _weighted, 0.3)],
    DEPTH: [PlainLoss(("loss",), "loss by logits", _depth, 0.0, lambda plain: len(plain.positives) + 1)],
}
