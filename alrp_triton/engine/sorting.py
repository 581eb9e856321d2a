"""The sorting error: the order of the positives by score, compared with their order by a second value.

Its sums are over positives above a score *and* above a value. Sums over one of the two are differences of prefix sums.
For both, :func:`dominance_sums` sorts the positives by value bit by bit, and follows each sum through these steps:
O(P log P) work for each bit of the ranks of the values, and O(P) memory. The structure is the wavelet matrix of
F. Claude, G. Navarro and A. Ordóñez, "The Wavelet Matrix", Information Systems 47, 2015.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .devices import is_asynchronous
from .knots import Knots, make_knots, ramp_steps
from .scans import prefix_sums


def sort_by_value(
    logits: Tensor, values: Tensor, groups: Tensor | None, share: Tensor, delta: float, eps: float
) -> tuple[Tensor, Tensor]:
    """The sorting error: positives of lower values above positives of higher values.

    With h = H(p_k - p_i), where k includes i: the error of i is the mean of 1 - v_k, weighted by h, over all positives,
    minus that over the positives whose value is at least v_i. It is distributed over the other positives, which should
    not be above i, in proportion to h. If their sum of h is ``eps`` or less, i sends nothing.

    Args:
        logits: ``[P]``.
        values: ``[P]``, of the dtype of ``logits``.
        groups: ``[P]`` int64, or None.
        share: ``[P]`` float64, the share of each positive in the loss.
        delta: half width of the ramp H.
        eps: >= 0.

    Returns:
        ``(errors [P], gradients [P])`` float64, times the share. A gradient is what a positive receives minus what it
        sends.
    """
    # By value first, so that sums over positives of equal scores have the same bits for any flat order.
    order = values.argsort(stable=True)
    logits, values, groups = logits[order], values[order], None if groups is None else groups[order]
    knots, ranks = make_knots(logits, delta, groups), _ranks(values)
    ramps, above, target_ramps, target_above, missorted = _sums(knots, values, ranks, groups)
    errors = (above / ramps - target_above / target_ramps) * share[order]
    sent = torch.where(missorted > eps, errors, 0.0)
    weights = torch.where(missorted > eps, sent / missorted, 0.0)
    received = _received(knots, weights, ranks, groups)
    found, gradients = (torch.empty_like(errors).index_copy(0, order, row) for row in (errors, received - sent))
    return found, gradients


def sorting_sums(logits: Tensor, values: Tensor, groups: Tensor | None, delta: float) -> Tensor:
    """Sums over the positives above each positive, itself included with H(0): ``[5, P]`` float64.

    With h = H(p_k - p_i): the sums of h and of h (1 - v_k) over all k; the same over the k whose value is at least v_i;
    and the sum of h over the others, which should not be above i.
    """
    return _sums(make_knots(logits, delta, groups), values, _ranks(values), groups)


def _ranks(values: Tensor) -> Tensor:
    """``[P]`` int64: the number of different values below each."""
    ordered, order = values.sort(stable=True)
    rank = F.pad((ordered[1:] != ordered[:-1]).cumsum(0), (min(1, len(values)), 0))
    return torch.empty_like(rank).scatter_(0, order, rank)


def _sums(knots: Knots, values: Tensor, ranks: Tensor, groups: Tensor | None) -> Tensor:
    num_pos = values.shape[0]
    group_end = torch.full_like(knots.below_end, num_pos)
    if knots.order_groups is not None and groups is not None:
        group_end = torch.searchsorted(knots.order_groups, groups, right=True)
    # The places of the first positive on each ramp, of the first one beyond it, and of the end of its group.
    at = torch.stack([knots.below_begin, torch.minimum(knots.below_end, group_end), group_end])
    masses = torch.stack([torch.ones_like(knots.place), 1 - values.double()])
    rows = torch.cat([masses, masses * knots.place])[:, knots.order]

    def ramp_sums(found: Tensor) -> Tensor:
        inside, beyond = (found[:, 1:] - found[:, :-1]).unbind(1)
        mass, moment = inside.chunk(2)
        return beyond[:2] + (moment - knots.ramp_begin * mass) * knots.inverse_width

    proper, others = dominance_sums(rows, ranks[knots.order], at, ranks)
    return torch.cat([ramp_sums(prefix_sums(rows)[:, at]), ramp_sums(proper), ramp_sums(others)[:1]])


def _received(knots: Knots, weights: Tensor, ranks: Tensor, groups: Tensor | None) -> Tensor:
    """For each positive k the sum of w_i H(p_k - p_i) over the positives of higher value."""
    by_threshold = torch.empty(2 * len(ranks), dtype=torch.int64, device=ranks.device)
    by_threshold[knots.begin - 1] = by_threshold[knots.end - 1] = ranks
    group_begin = torch.zeros_like(knots.bucket)
    if knots.order_groups is not None and groups is not None:
        group_begin = 2 * torch.searchsorted(knots.order_groups, groups)
    at = torch.stack([group_begin, knots.bucket])
    found, _ = dominance_sums(ramp_steps(knots, weights), by_threshold, at, ranks + 1)
    ended, active, active_begin = found[:, 1] - found[:, 0]
    received: Tensor = ended + (knots.place * active - active_begin) * knots.inverse_width
    return received


def dominance_sums(rows: Tensor, ranks: Tensor, at: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over the columns before a place whose rank is at least some number, and over the others before it. Each
    result lacks a number that is the same for all places of one n; so take differences.

    Args:
        rows: ``[K, m]`` float64.
        ranks: ``[m]`` int64, >= 0, less than m.
        at: ``[q, n]`` int64: the places.
        least: ``[n]`` int64, from 0 to the highest rank plus 1.

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
        of_ones, of_zeros = (prefix_sums(torch.where(mask, rows, 0.0))[:, at] for mask in (is_one, ~is_one))
        higher += torch.where(up, 0.0, of_ones)
        lower += torch.where(up, of_zeros, 0.0)
        ones_before = ones[at]
        at = torch.where(up, len(ranks) - ones[-1] + ones_before, at - ones_before)
        order = torch.where(
            is_one, len(ranks) - ones[-1] + ones[:-1], torch.arange(len(ranks), device=at.device) - ones[:-1]
        )
        rows, ranks = (
            torch.empty_like(rows).index_copy(1, order, rows),
            torch.empty_like(ranks).scatter(0, order, ranks),
        )
    return higher + prefix_sums(rows)[:, at], lower
