"""The statistics of a ranking that a criterion with ``monitor=True`` keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..engine import Ranking
from ..engine.scans import total


class Ranked(NamedTuple):
    """What the statistics are made of: the positives of all processes."""

    scores: Tensor
    """``[P]``"""
    num_false_positives: Tensor
    """``[P]`` float64."""
    precision: Tensor
    """The mean of rank+(i) / rank(i), or the mean over the groups of theirs; NaN if there is a NaN anywhere."""
    values: Sequence[Tensor]
    """``[P]`` each, the values of the loss."""


@torch.no_grad()
def ranked(ranking: Ranking) -> Ranked:
    """From the ranks, which come from the counts of pass 1; no logits are read."""
    precision = total(ranking.rank_positive / ranking.rank * ranking.share) + ranking.poison
    values = [value.detach() for value in ranking.counted.values]
    return Ranked(ranking.counted.placed.logits, ranking.num_false_positives, precision, values)


def ranked_exactly(logits: Tensor, labels: Tensor, values: Mapping[str, Tensor], **settings: Any) -> Ranked:
    """From :mod:`alrp_triton.reference`, for flat tensors."""
    found = [logits.new_empty(0, dtype=torch.float64)]

    def precision(ranking: reference.ReferenceRanking, **_: Tensor) -> Tensor:
        found.append(ranking.num_false_positives)
        return ranking.rank_positive / ranking.rank

    mean = reference.ranking_loss(logits, labels, precision, extras=dict(values), **settings).value
    # Group after group, whereas scores and values are in flat order; nothing compares the two.
    return Ranked(logits[labels == 1], torch.cat(found), mean, [*values.values()])


@torch.no_grad()
def statistics(found: Ranked, cls: Tensor, better: int = 0, **parts: Tensor | float) -> dict[str, Tensor]:
    """See ``Criterion.stats``.

    Args:
        found: the ranking.
        cls: the classification part of the loss; all statistics get its dtype.
        better: 1 if the first value of a positive is larger for a better box, -1 if it is smaller, 0 if there is none.
        parts: further statistics by name.
    """
    num_positives = found.num_false_positives.shape[0]
    # In front what is shown without positives.
    ordered = torch.cat([found.precision.new_zeros(1), found.num_false_positives.sort().values])
    ranks = {
        # The smallest number that so many tenths of the positives do not exceed.
        **{f"num_false_positives_p{n}0": ordered[(num_positives * n + 9) // 10] for n in (1, 5, 9)},
        "share_solved": (found.num_false_positives == 0).double().sum() / max(num_positives, 1),
        "precision": found.precision,
    }
    if better:
        ranks["score_loc_correlation"] = better * rank_correlation(found.scores, found.values[0])
    # Comparisons hide a NaN.
    numbers = torch.stack([*ranks.values()]) + 0 * found.precision
    everything = {"num_positives": num_positives, **dict(zip(ranks, numbers.unbind())), "cls": cls, **parts}
    return {
        name: value.to(cls.dtype, copy=True) if isinstance(value, Tensor) else cls.new_full((), value)
        for name, value in everything.items()
    }


def rank_correlation(first: Tensor, second: Tensor) -> Tensor:
    """Spearman's correlation, a float64 scalar: equal values share the mean of their ranks. 0 for fewer than two, or
    if all of either are equal."""
    x, y = (_mean_ranks(values) for values in (first, second))
    covariance, variance_x, variance_y = torch.stack([x * y, x * x, y * y]).sum(1)
    scale = (variance_x * variance_y).sqrt()
    return torch.where(scale > 0, (covariance / scale).clamp(-1, 1), 0.0)


def _mean_ranks(values: Tensor) -> Tensor:
    """Twice the rank of each, from the middle of all: whole numbers, whose products add up exactly in any order, unless
    there are 200,000."""
    values = values.contiguous()
    ordered = values.sort().values
    below = torch.searchsorted(ordered, values) + torch.searchsorted(ordered, values, right=True)
    return (below - values.shape[0]).double()
