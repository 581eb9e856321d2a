"""The sorting error: the order of the positives by score, compared with their order by a second value.

These sums depend on ramps and on the order of the values, so they are over pairs: O(P^2) work, in blocks.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .blocks import differences, pair_blocks
from .devices import is_asynchronous
from .knots import inverse_width, sort_by_group

# Pairs in one block: on the CPU they and their temporaries stay in the cache; on a GPU they hide the launch overhead.
_PAIRS_PER_BLOCK, _PAIRS_PER_BLOCK_ON_DEVICE = 1 << 16, 1 << 22


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
    # By group, score and value: sums over positives in this order have the same bits for any flat order.
    by_value = values.argsort(stable=True)
    order = by_value[sort_by_group(logits[by_value], None if groups is None else groups[by_value])[1]]
    logits, values, groups = logits[order], values[order], None if groups is None else groups[order]
    ramps, above, target_ramps, target_above, missorted = sorting_sums(logits, values, groups, delta)
    errors = (above / ramps - target_above / target_ramps) * share[order]
    sent = torch.where(missorted > eps, errors, 0.0)
    weights = torch.where(missorted > eps, sent / missorted, 0.0)
    received = torch.zeros_like(errors)
    for i, heights in _blocks(logits, groups, delta):
        received += torch.where(values < values[i, None], heights * weights[i, None], 0.0).sum(0)
    found, gradients = (torch.empty_like(errors).index_copy(0, order, row) for row in (errors, received - sent))
    return found, gradients


def sorting_sums(logits: Tensor, values: Tensor, groups: Tensor | None, delta: float) -> Tensor:
    """Sums over the positives above each positive, itself included with H(0): ``[5, P]`` float64.

    With h = H(p_k - p_i): the sums of h and of h (1 - v_k) over all k; the same over the k whose value is at least v_i;
    and the sum of h over the others, which should not be above i.
    """
    columns, below_1 = [], 1 - values.double()
    for i, heights in _blocks(logits, groups, delta):
        proper = torch.where(values >= values[i, None], heights, 0.0)
        rows = [heights.sum(1), (heights * below_1).sum(1), proper.sum(1), (proper * below_1).sum(1)]
        columns.append(torch.stack([*rows, torch.where(values < values[i, None], heights, 0.0).sum(1)]))
    return torch.cat(columns, dim=1)


def _blocks(logits: Tensor, groups: Tensor | None, delta: float) -> Iterator[tuple[Tensor, Tensor]]:
    """Some positives i, and H(p_k - p_i) for them and all k: ``[I, P]`` float64."""
    held = _PAIRS_PER_BLOCK_ON_DEVICE if is_asynchronous(logits.device) else _PAIRS_PER_BLOCK
    return pair_blocks(_ramps, logits, groups, logits, groups, delta, held)


def _ramps(s_j: Tensor, s_i: Tensor, delta: float) -> Tensor:
    """H(s_j - s_i), ``[I, J]`` float64. Differences are in the scores' own dtype, as in the kernels."""
    x = differences(s_j, s_i).double()
    return (x * inverse_width(delta) + 0.5).clamp(0, 1) if delta else (x >= 0).double()
