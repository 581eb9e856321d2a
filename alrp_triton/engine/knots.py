r"""Knots: the sorted ends of the ramps of the positives. They are the tables of size P of the linear form.

As a function of a score t, each ramp H(t - p_i) is 0 below p_i - delta, linear up to p_i + delta, then 1. Sorting these
2P knots cuts the axis of scores into 2P + 1 buckets; within a bucket every sum of ramps is linear in t.

Three choices keep this exact for every finite and infinite score:

* A knot is *rounded up* to the scores' own dtype: the smallest t with t - p_i >= -delta (the ramp begins) or >= delta
  (it ends). Comparing t with the rounded knot then gives the same result as comparing with the exact knot. Even if
  delta is less than the spacing of floats, a score equal to p_i lies between the two knots, as H(0) = 1/2 requires. The
  end of the ramp of p_i = inf lies above every float and is stored as NaN: no t >= NaN, and sorting puts NaN last.
* Offsets inside a bucket are measured from its lower knot: t - knot is exact to one rounding *relative to itself* for
  any t. Only ``ramp_begin`` contains the rounding of a knot (at most delta).
* Positions of buckets are measured from the top on an axis on which gaps without a rising ramp are shortened to at most
  2 delta (``coordinate``). So tables hold no large numbers whose differences would lose digits.

With groups everything is sorted by group first, and every sum ends with its group. A score is in bucket 0 if it is
below all thresholds of its group, or if its group has none.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .scans import prefix_sums, suffix_sums


class Table(NamedTuple):
    """The 2P sorted knots (thresholds), in which both passes search each score.

    Bucket b >= 1 holds the scores from threshold b - 1 up to the next one; bucket 0 holds those below all thresholds.
    With groups, thresholds are sorted by group first, and bucket 0 holds the scores below all thresholds of their
    group.
    """

    thresholds: Tensor
    """``[4P + 1]`` in the compute dtype: 2P thresholds, NaN last in its group; then NaN, which no score reaches. With
    groups, the highest and the lowest threshold of all are in the last two places."""
    cells: Tensor
    """The grid in which kernels begin a search, see ``kernels.grid``; empty for the other backends."""
    groups: Tensor | None = None
    """``[4P + 1]`` int64: the group of each threshold, the highest number beyond them; None for one ranking."""

    def num_thresholds(self) -> int:
        """2P."""
        return self.thresholds.shape[0] // 2


class Knots(NamedTuple):
    """Sorted ramps of P positives."""

    pos_logits: Tensor
    """``[P]``, in the compute dtype."""
    table: Table
    begin: Tensor
    """``[P]`` int64: the bucket that begins at the beginning of the ramp of positive i."""
    end: Tensor
    """``[P]`` int64: the bucket that begins at the end of the ramp of positive i."""
    coordinate: Tensor
    """``[2P + 1]`` float64: position of each bucket's lower threshold on the shortened axis."""
    ramp_begin: Tensor
    """``[P]`` float64: position of the exact p_i - delta on the shortened axis."""
    inverse_width: float
    """1 / (2 delta), or 0 for delta = 0, where no ramp has an inside."""
    order: Tensor
    """``[P]`` int64: the positives in ascending order; equal ones in flat order."""
    bucket: Tensor
    """``[P]`` int64: the bucket of each positive's own score."""
    place: Tensor
    """``[P]`` float64: position of each positive's own score on the shortened axis, the middle of its ramp."""
    below_begin: Tensor
    """``[P]`` int64: number of positives below the beginning of the ramp of positive i."""
    below_end: Tensor
    """``[P]`` int64: number of positives below the end of the ramp of positive i; P if all of its group are."""
    first: Tensor
    """``[2P]`` int64: for each threshold the first one that equals it. Nothing lies between them, but the sums up to
    them may differ in the last bit. Positives of equal scores must have equal sums."""
    threshold_groups: Tensor | None
    """``[2P]`` int64: the group of each threshold."""
    order_groups: Tensor | None
    """``[P]`` int64: the groups of the positives in ``order``."""


def bucket_floors(thresholds: Tensor) -> Tensor:
    """``[n + 1]``: finite lower end of each bucket of sorted thresholds ``[n]``, for subtraction; the lowest finite
    number for bucket 0."""
    return _finite(F.pad(thresholds.masked_fill(thresholds.isnan(), torch.inf), (1, 0), value=-torch.inf))


def make_table(thresholds: Tensor, groups: Tensor | None) -> Table:
    """The table of ``[2P]`` sorted thresholds and their groups."""
    padding = 0, thresholds.shape[0] + 1
    padded = F.pad(thresholds, padding, value=torch.nan)
    if groups is None:
        return Table(padded, thresholds.new_empty(0))
    unknown = thresholds.isnan()
    if len(thresholds):
        padded[-2] = thresholds.masked_fill(unknown, -torch.inf).amax()
    padded[-1] = F.pad(thresholds.masked_fill(unknown, torch.inf), (0, 1), value=torch.inf).amin()
    # F.pad would convert the number to a float.
    beyond = groups.new_full((padding[1],), torch.iinfo(torch.int64).max)
    return Table(padded, thresholds.new_empty(0), torch.cat([groups, beyond]))


def make_knots(pos_logits: Tensor, delta: float, groups: Tensor | None = None) -> Knots:
    """Sort the ramps of the positives' logits ``[P]`` (float32 or float64), by their groups ``[P]`` int64 if given."""
    num_pos = pos_logits.shape[0]
    lower, upper = _knots_of(pos_logits, delta)

    # One sort is enough. Among equal values the knots come first: what precedes a knot lies below it, and what precedes
    # a score lies at or below it. A search would use several threads even for little work, and these would then still
    # spin in the next step.
    # The knots are given by score, so among equal knots that of the lower positive is first in any flat order. Sums
    # over the knots then have the same bits.
    knots, ascending = torch.cat([lower, upper]), pos_logits.argsort(stable=True)
    ascending = (ascending + num_pos * torch.arange(3, device=ascending.device)[:, None]).view(-1)
    _, permutation, _ = sort_by_group(
        torch.cat([knots, pos_logits])[ascending], None if groups is None else groups.repeat(3)[ascending]
    )
    permutation = ascending[permutation]
    place = _inverse(permutation)
    scores_up_to = (permutation >= 2 * num_pos).cumsum(0)[place]
    below_begin, below_end, own = scores_up_to.view(3, num_pos).unbind()
    own = own - 1
    rank_of, bucket = place[: 2 * num_pos] - scores_up_to[: 2 * num_pos], place[2 * num_pos :] - own
    begin, end = (rank_of + 1).view(2, num_pos).unbind()
    order, by_threshold = _inverse(own), _inverse(rank_of)
    thresholds, order_groups, threshold_groups = knots[by_threshold], None, None
    if groups is not None:
        order_groups, threshold_groups = groups[order], groups.repeat(2)[by_threshold]
        group_end = torch.searchsorted(order_groups, groups, right=True)
        below_end = torch.where(below_end == group_end, num_pos, below_end)

    floors = bucket_floors(thresholds).double()
    # From each threshold to the next, from the top down; 0 from the last to the first, which is not above it. No
    # distance is measured in bucket 0.
    gaps = (floors[1:].roll(-1) - floors[1:]).clamp_(0, 2 * delta)
    if threshold_groups is not None:
        gaps = gaps.masked_fill(threshold_groups.roll(-1) != threshold_groups, 0)
    first = _first_of_equals(thresholds, threshold_groups)
    coordinate = F.pad(-suffix_sums(gaps[None], threshold_groups)[0, first], (1, 0))
    rounding = (_finite(lower).double() - _finite(pos_logits).double()) + delta

    return Knots(
        pos_logits=pos_logits,
        table=make_table(thresholds, threshold_groups),
        begin=begin,
        end=end,
        coordinate=coordinate,
        ramp_begin=coordinate[begin] - rounding,
        inverse_width=inverse_width(delta),
        order=order,
        bucket=bucket,
        place=coordinate[bucket] + (_finite(pos_logits).double() - floors[bucket]),
        below_begin=below_begin,
        below_end=below_end,
        first=first,
        threshold_groups=threshold_groups,
        order_groups=order_groups,
    )


def inverse_width(delta: float) -> float:
    """1 / (2 delta); 0 for delta = 0, where no ramp has an inside."""
    return 0.5 / delta if delta > 0 else 0.0


def buckets_of(values: Tensor, thresholds: Tensor) -> Tensor:
    """``[n]`` int64: number of thresholds at or below each value, for values other than NaN."""
    # bucketize treats NaN as the lowest value; replace it by +inf and limit the result.
    above = thresholds.isnan()
    found = torch.bucketize(values.contiguous(), thresholds.masked_fill(above, torch.inf), right=True)
    return torch.minimum(found, (~above).sum())


def ramp_sums(knots: Knots, values: Tensor) -> Tensor:
    """sum_{k != i} v_k H(p_k - p_i) for each row of values: ``[K, P] -> [K, P]`` float64."""
    ordered = torch.cat([values, values * knots.place])[:, knots.order]
    suffix = suffix_sums(ordered, knots.order_groups)
    above = _partial_sums(knots, suffix, knots.below_begin, knots.below_end)
    return above - values * ramp_at_0(knots.inverse_width)


def received_sums(knots: Knots, values: Tensor) -> Tensor:
    """sum_{i != k} v_i H(p_k - p_i) for values ``[P]``: what positive k receives from the other ramps."""
    level, slope = ramp_coefficients(knots, values)[:, knots.bucket]
    offset = knots.place - knots.coordinate[knots.bucket]
    received: Tensor = level + slope * (offset * knots.inverse_width) - values * ramp_at_0(knots.inverse_width)
    return received


def false_positives(knots: Knots, counts: Tensor, offsets: Tensor) -> Tensor:
    """N_FP(i) = sum_j H(n_j - p_i) from the count and offsets of each bucket.

    Args:
        knots: of the positives.
        counts: ``[2P + 1]`` float64, number of negatives in each bucket.
        offsets: ``[2P + 1]`` float64, sum of their distances from the bucket's lower threshold. Those of bucket 0 and
            of buckets without a rising ramp are not used.

    Returns:
        ``[P]`` float64.
    """
    moment = offsets + counts * knots.coordinate
    suffix = suffix_sums(torch.stack([counts, moment])[:, 1:], knots.threshold_groups)
    found = _partial_sums(knots, suffix, knots.first[knots.begin - 1], knots.first[knots.end - 1])[0]
    # Smaller numbers are rounding of the fixed point of pass 1, and a loss would divide by them.
    return torch.where(found < 1e-10, 0.0, found)


def num_inside(knots: Knots, counts: Tensor) -> tuple[Tensor, Tensor]:
    """The number of negatives and of other positives on each positive's ramp, ``[P]`` float64 each; ``counts`` as
    :func:`false_positives` takes them."""
    negatives = suffix_sums(counts[None, 1:], knots.threshold_groups)[0]
    positives = suffix_sums(torch.ones_like(knots.place)[None], knots.order_groups)[0]
    begin, end = knots.first[knots.begin - 1], knots.first[knots.end - 1]
    others = positives[knots.below_begin] - positives[knots.below_end] - 1
    return negatives[begin] - negatives[end], others


def sort_by_group(values: Tensor, groups: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Stable ascending sort by group first, by value second, NaN last within its group: sorted values, permutation,
    sorted groups; ``[n]`` each."""
    ordered, order = values.sort(stable=True)
    if groups is None:
        return ordered, order, None
    grouped, by_group = groups[order].sort(stable=True)
    order = order[by_group]
    return values[order], order, grouped


def _first_of_equals(thresholds: Tensor, groups: Tensor | None) -> Tensor:
    """See :attr:`Knots.first`."""
    differs = thresholds[1:] != thresholds[:-1]
    if groups is not None:
        differs = differs | (groups[1:] != groups[:-1])
    places = torch.arange(thresholds.shape[0], device=thresholds.device)
    return torch.cat([places[:1], torch.where(differs, places[1:], 0)]).cummax(0).values


def ramp_coefficients(knots: Knots, weights: Tensor) -> Tensor:
    """The piecewise-linear g(t) = sum_i w_i H(t - p_i) as ``[2, 2P + 1]`` float64.

    In bucket b, g(t) = level[b] + slope[b] * u, with u = (t - floor[b]) / (2 delta), and u = 0 for delta = 0.
    """
    # Weights of the ramps that have ended, and of those that rise here, with their beginnings.
    ended, active, active_begin = prefix_sums(ramp_steps(knots, weights), knots.threshold_groups)
    level = ended + (knots.coordinate * active - active_begin) * knots.inverse_width
    return torch.stack([level, active])


def ramp_steps(knots: Knots, weights: Tensor) -> Tensor:
    """What changes at each threshold, ``[3, 2P]`` float64: the weights of the ramps that have ended, of those that
    rise, and the latter times the beginnings of the ramps."""
    num_pos = weights.shape[0]
    zero = torch.zeros_like(weights)
    at_begin = torch.stack([zero, weights, weights * knots.ramp_begin])
    at_end = torch.stack([weights, -weights, -weights * knots.ramp_begin])
    steps = torch.empty(3, 2 * num_pos, dtype=torch.float64, device=weights.device)
    steps[:, knots.begin - 1], steps[:, knots.end - 1] = at_begin, at_end
    return steps


def _partial_sums(knots: Knots, suffix: Tensor, begin: Tensor, end: Tensor) -> Tensor:
    """For each ramp, the masses above its end plus (position - ramp_begin) / (2 delta) of the masses inside it, from
    the suffix sums of K rows of masses and their moments: ``[2K, n] -> [K, P]``."""
    mass_above, moment_above = suffix[:, end].chunk(2)
    mass, moment = suffix[:, begin].chunk(2)
    inside = (moment - moment_above) - knots.ramp_begin * (mass - mass_above)
    return mass_above + inside * knots.inverse_width


def ramp_at_0(width: float) -> float:
    """H(0), the ramp of a positive at its own score. ``width`` is delta or its inverse; both are 0 for the step."""
    return 0.5 if width > 0 else 1.0


def _finite(values: Tensor) -> Tensor:
    largest = torch.finfo(values.dtype).max
    return values.clamp(-largest, largest)


def _next_above(values: Tensor) -> Tensor:
    return torch.nextafter(values, torch.full_like(values, torch.inf))


def _inverse(permutation: Tensor) -> Tensor:
    """The position of each index."""
    places = torch.arange(permutation.shape[0], device=permutation.device)
    return torch.empty_like(permutation).scatter_(0, permutation, places)


def _knots_of(values: Tensor, delta: float) -> tuple[Tensor, Tensor]:
    """Beginnings and ends of the ramps of values: values -/+ delta, rounded up, ``[P]`` each."""
    lower, upper = _round_up_sums(values, delta)
    if delta > 0:
        # A sum with an infinity does not give the end of its ramp: it ends just above -inf, or above every float.
        upper = torch.where(values == -torch.inf, _next_above(values), upper)
        upper = upper.masked_fill(values == torch.inf, torch.nan)
    return lower, upper


def _round_up_sums(values: Tensor, delta: float) -> Tensor:
    """The smallest numbers of the values' dtype that are not below the exact values - delta and values + delta:
    ``[2, P]``; infinities stay."""
    exact = values.double()
    shifts = exact.new_full((2, 1), delta)
    shifts[0] = -delta
    total = exact + shifts
    # The rounding error of the sum (Knuth's two-sum); NaN for infinities, which have none.
    moved = total - exact
    lost = (exact - (total - moved)) + (shifts - moved)
    rounded = total.to(values.dtype)
    too_low = (rounded.double() < total) | ((rounded.double() == total) & (lost > 0))
    return torch.where(too_low, _next_above(rounded), rounded)
