"""The sorting error: the order of the positives by score, compared with their order by a second value.

Its sums are over positives above a score *and* above a value. Sums over one of the two are differences of prefix sums.
For both, :func:`dominance_sums` sorts the positives by value bit by bit, and follows each sum through these steps:
O(P log P) work for each bit of the ranks of the values, and O(P) memory. The structure is the wavelet matrix of
F. Claude, G. Navarro and A. Ordóñez, "The Wavelet Matrix", Information Systems 47, 2015.

Few positives are compared in pairs, which is faster. The differences of sums over several groups would be rounded, and
a group must not feel the others. So groups are sorted one by one, or some small ones in pairs. Where the host does not
know the groups without waiting, they are sorted together, and each sum ends with its group, which takes O(log P) more.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .blocks import differences, pair_blocks
from .devices import is_asynchronous
from .knots import Knots, inverse_width, make_knots, ramp_steps, sort_by_group
from .scans import prefix_sums

_FEW = 512
# Where groups are sorted together: below it, launches would cost more than pairs, by counting both.
_FEW_OF_GROUPS_ON_DEVICE = 1 << 15
# Pairs in one block: on the CPU they and their temporaries stay in the cache; on a GPU they hide the launch overhead.
_PAIRS_PER_BLOCK, _PAIRS_PER_BLOCK_ON_DEVICE = 1 << 16, 1 << 22


def sort_by_value(
    logits: Tensor,
    values: Tensor,
    groups: Tensor | None,
    share: Tensor,
    delta: float,
    eps: float,
    ranks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The sorting error: positives of lower values above positives of higher values.

    With h = H(p_k - p_i), where k includes i: the error of i is the mean of 1 - v_k, weighted by h, over all positives,
    minus that over the positives whose value is at least v_i. It is distributed over the other positives, which should
    not be above i, in proportion to h. If their sum of h is ``eps`` or less, i sends nothing. With ``ranks`` the error
    of i is that sum over the rank of i instead.

    Args:
        logits: ``[P]``.
        values: ``[P]``, of the dtype of ``logits``.
        groups: ``[P]`` int64, or None.
        share: ``[P]`` float64, the share of each positive in the loss.
        delta: half width of the ramp H.
        eps: >= 0.
        ranks: ``[P]`` float64, or None.

    Returns:
        ``(errors [P], gradients [P])`` float64, times the share. A gradient is what a positive receives minus what it
        sends.
    """
    # By group, score and value: sums over positives in this order have the same bits for any flat order.
    by_value = values.argsort(stable=True)
    order = by_value[sort_by_group(logits[by_value], None if groups is None else groups[by_value])[1]]
    logits, values, groups = logits[order], values[order], None if groups is None else groups[order]
    sums = _sums_of(logits, values, groups, delta)
    ramps, above, target_ramps, target_above, missorted = sums.above()
    lost = above / ramps - target_above / target_ramps if ranks is None else missorted / ranks[order]
    errors = lost * share[order]
    sent = torch.where(missorted > eps, errors, 0.0)
    received = sums.received(torch.where(missorted > eps, sent / missorted, 0.0))
    found, gradients = (torch.empty_like(errors).index_copy(0, order, row) for row in (errors, received - sent))
    return found, gradients


def sorting_sums(logits: Tensor, values: Tensor, groups: Tensor | None, delta: float) -> Tensor:
    """Sums over the positives above each positive, itself included with H(0): ``[5, P]`` float64.

    With h = H(p_k - p_i): the sums of h and of h (1 - v_k) over all k; the same over the k whose value is at least v_i;
    and the sum of h over the others, which should not be above i. Groups, if any, are in ascending order.
    """
    return _sums_of(logits, values, groups, delta).above()


def _sums_of(logits: Tensor, values: Tensor, groups: Tensor | None, delta: float) -> _Pairs | _Dominance | _Parts:
    together = groups is not None and is_asynchronous(logits.device)
    if len(logits) <= (_FEW_OF_GROUPS_ON_DEVICE if together else _FEW):
        return _Pairs(logits, values, groups, delta)
    if groups is None or together:
        return _Dominance(logits, values, delta, groups)
    return _Parts(logits, values, groups, delta)


class _Pairs:
    """The sums by all pairs of positives: O(P^2) work, in blocks."""

    def __init__(self, logits: Tensor, values: Tensor, groups: Tensor | None, delta: float) -> None:
        self._logits, self._values, self._groups, self._delta = logits, values, groups, delta

    def above(self) -> Tensor:
        """See :func:`sorting_sums`."""
        columns, values, below_1 = [], self._values, 1 - self._values.double()
        for i, heights in self._blocks():
            proper = torch.where(values >= values[i, None], heights, 0.0)
            rows = [heights.sum(1), (heights * below_1).sum(1), proper.sum(1), (proper * below_1).sum(1)]
            columns.append(torch.stack([*rows, torch.where(values < values[i, None], heights, 0.0).sum(1)]))
        return torch.cat(columns, dim=1)

    def received(self, weights: Tensor) -> Tensor:
        """For each positive k the sum of w_i H(p_k - p_i) over the positives i of higher value, ``[P]``."""
        found, values = torch.zeros_like(weights), self._values
        for i, heights in self._blocks():
            found += torch.where(values < values[i, None], heights * weights[i, None], 0.0).sum(0)
        return found

    def _blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Some positives i, and H(p_k - p_i) for them and all k: ``[I, P]`` float64."""
        logits, groups = self._logits, self._groups
        held = _PAIRS_PER_BLOCK_ON_DEVICE if is_asynchronous(logits.device) else _PAIRS_PER_BLOCK
        return pair_blocks(_ramps, logits, groups, logits, groups, self._delta, held)


def _ramps(s_j: Tensor, s_i: Tensor, delta: float) -> Tensor:
    """H(s_j - s_i), ``[I, J]`` float64. Differences are in the scores' own dtype, as in the kernels."""
    x = differences(s_j, s_i).double()
    return (x * inverse_width(delta) + 0.5).clamp(0, 1) if delta else (x >= 0).double()


class _Parts:
    """The sums of one group after the other, of small ones together; positives are in the order of their groups."""

    def __init__(self, logits: Tensor, values: Tensor, groups: Tensor, delta: float) -> None:
        self._parts: list[_Pairs | _Dominance] = []
        self._sizes: list[int] = []
        begin = 0
        for size in _together(groups.unique_consecutive(return_counts=True)[1].tolist()):
            part = slice(begin, begin + size)
            # So many are of one group.
            self._parts.append(
                _Dominance(logits[part], values[part], delta)
                if size > _FEW
                else _Pairs(logits[part], values[part], groups[part], delta)
            )
            self._sizes.append(size)
            begin += size

    def above(self) -> Tensor:
        """See :func:`sorting_sums`."""
        return torch.cat([part.above() for part in self._parts], dim=1)

    def received(self, weights: Tensor) -> Tensor:
        """As :meth:`_Pairs.received`."""
        return torch.cat([part.received(own) for part, own in zip(self._parts, weights.split(self._sizes))])


def _together(sizes: list[int]) -> list[int]:
    """The sizes of consecutive groups, such that those that are few together are one."""
    found: list[int] = []
    for size in sizes:
        if found and found[-1] + size <= _FEW:
            found[-1] += size
        else:
            found.append(size)
    return found


class _Dominance:
    """The sums without pairs, of one ranking, or of groups in ascending order."""

    def __init__(self, logits: Tensor, values: Tensor, delta: float, groups: Tensor | None = None) -> None:
        self._knots, self._values, self._groups = make_knots(logits, delta, groups), values, groups
        ordered, order, grouped = sort_by_group(values, groups)
        rank = F.pad((ordered[1:] != ordered[:-1]).cumsum(0), (1, 0))
        self._first, self._end = torch.zeros_like(rank), torch.full_like(rank, len(rank))
        if grouped is not None:
            self._first, self._end = (torch.searchsorted(grouped, grouped, right=right) for right in (False, True))
            rank = rank - rank[self._first]
        # The number of different values below each, in its group.
        self._ranks = torch.empty_like(rank).scatter_(0, order, rank)

    def above(self) -> Tensor:
        """See :func:`sorting_sums`."""
        knots: Knots = self._knots
        # The places of the first positive on each ramp, of the first one beyond it, and of the end.
        at = torch.stack([knots.below_begin, torch.minimum(knots.below_end, self._end), self._end])
        masses = torch.stack([torch.ones_like(knots.place), 1 - self._values.double()])
        rows = torch.cat([masses, masses * knots.place])[:, knots.order]

        def ramp_sums(found: Tensor) -> Tensor:
            inside, beyond = (found[:, 1:] - found[:, :-1]).unbind(1)
            mass, moment = inside.chunk(2)
            return beyond[:2] + (moment - knots.ramp_begin * mass) * knots.inverse_width

        ranks, bounds = self._ranks, (knots.order_groups, self._first)
        proper, others = dominance_sums(rows, ranks[knots.order], at, ranks, *bounds)
        everything = _sums_before(rows, at, *bounds)
        return torch.cat([ramp_sums(everything), ramp_sums(proper), ramp_sums(others)[:1]])

    def received(self, weights: Tensor) -> Tensor:
        """As :meth:`_Pairs.received`."""
        knots, ranks = self._knots, self._ranks
        by_threshold = torch.empty(2 * len(ranks), dtype=torch.int64, device=ranks.device)
        by_threshold[knots.begin - 1] = by_threshold[knots.end - 1] = ranks
        first = 2 * self._first
        at = torch.stack([first, knots.bucket])
        found, _ = dominance_sums(
            ramp_steps(knots, weights), by_threshold, at, ranks + 1, knots.threshold_groups, first
        )
        ended, active, active_begin = found[:, 1] - found[:, 0]
        received: Tensor = ended + (knots.place * active - active_begin) * knots.inverse_width
        return received


def _sums_before(rows: Tensor, at: Tensor, runs: Tensor | None, first: Tensor) -> Tensor:
    """Sums over the columns ``[K, m]`` before places ``[q, n]``; with runs ``[m]``, from the first place ``[n]`` of a
    run on: ``[K, q, n]``."""
    found = prefix_sums(rows, runs)[:, at]
    return found if runs is None else torch.where(at > first, found, 0.0)


def dominance_sums(
    rows: Tensor, ranks: Tensor, at: Tensor, least: Tensor, groups: Tensor | None, first: Tensor
) -> tuple[Tensor, Tensor]:
    """Sums over the columns before a place whose rank is at least some number, and over the others before it. Each
    result lacks a number that is the same for all places of one n; so take differences.

    Args:
        rows: ``[K, m]`` float64.
        ranks: ``[m]`` int64, >= 0, less than m.
        at: ``[q, n]`` int64: the places.
        least: ``[n]`` int64, from 0 to the highest rank plus 1.
        groups: ``[m]`` int64, ascending; sums are over columns of one group. None if there is one.
        first: ``[n]`` int64, the place at which the group of each n begins.

    Returns:
        Two tensors ``[K, q, n]``.
    """
    higher, lower = rows.new_zeros(2, len(rows), *at.shape)
    # Small ranks need fewer steps; to read them on a GPU would be to wait for it.
    most = len(ranks) if is_asynchronous(rows.device) or not len(ranks) else int(ranks.max()) + 1
    for bit in reversed(range(most.bit_length())):
        # From here on each n follows the columns with its own higher bits: they are neighbours, in their old order.
        is_one, up = (ranks >> bit) & 1 == 1, (least >> bit) & 1 == 1
        ones = F.pad(is_one.cumsum(0), (1, 0))
        runs = None if groups is None else _runs(groups, ranks >> (bit + 1))
        of_ones, of_zeros = (_sums_before(torch.where(mask, rows, 0.0), at, runs, first) for mask in (is_one, ~is_one))
        higher += torch.where(up, 0.0, of_ones)
        lower += torch.where(up, of_zeros, 0.0)
        at, first = (torch.where(up, len(ranks) - ones[-1] + ones[place], place - ones[place]) for place in (at, first))
        order = torch.where(
            is_one, len(ranks) - ones[-1] + ones[:-1], torch.arange(len(ranks), device=at.device) - ones[:-1]
        )
        rows, ranks = (
            torch.empty_like(rows).index_copy(1, order, rows),
            torch.empty_like(ranks).scatter(0, order, ranks),
        )
        if groups is not None:
            groups = torch.empty_like(groups).scatter(0, order, groups)
    return higher + _sums_before(rows, at, None if groups is None else _runs(groups, ranks), first), lower


def _runs(groups: Tensor, ranks: Tensor) -> Tensor:
    """Numbers, ascending, of the runs of equal groups and ranks ``[m]``."""
    return F.pad(((groups[1:] != groups[:-1]) | (ranks[1:] != ranks[:-1])).cumsum(0), (1, 0))
