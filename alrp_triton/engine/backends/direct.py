"""The direct form in plain torch: every logit against every positive, for pair functions without a Triton kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from ..inputs import Levels
from ..knots import Ramps
from ..labels import LabelKinds, group_of_each, pieces
from ..pairs import pair_blocks, pair_function
from .factors import combine
from .torch import overwrite_positives

# Logits looked at in one step, and pairs held at once.
_PIECE, _PAIRS = 1 << 16, 1 << 20


def count_negatives(
    levels: Levels,
    ramps: Ramps,
    pos_logits: Tensor,
    pos_groups: Tensor | None,
    ignore_index: int,
    scale: float,
) -> Tensor:
    """Pass 1: ``[1, P + 3]`` int64, the sum of the function over the negatives for each positive, in fixed point; two
    zeros (see ``backends.pairwise``); and how many negatives are NaN."""
    apply = pair_function(ramps.function)
    totals = torch.zeros(1, len(ramps.thresholds) + 3, dtype=torch.int64, device=ramps.thresholds.device)
    for logits, labels, groups in levels.each():
        per_class = logits.dim() != labels.dim()
        for x, y, _, group in pieces(logits.detach(), labels, _PIECE, groups=groups):
            scores, group_ids, negative = _spread(x.to(ramps.thresholds.dtype), y, group, per_class, ignore_index)
            totals[0, -1] += (negative & scores.isnan()).sum()
            for i, pairs in pair_blocks(apply, scores, group_ids, *ramps[:2], ramps.delta, _PAIRS):
                counted = torch.where(negative, pairs, 0.0)
                # A NaN that the function made counts as one that it was given.
                failed = counted.isnan()
                totals[0, -1] += failed.sum()
                totals[0, i] += counted.masked_fill_(failed, 0).mul_(scale).to(torch.int64).sum(1)
    return totals


def write_gradient(
    levels: Levels,
    ramps: Ramps,
    coefficients: Tensor,
    pos_index: Tensor,
    pos_gradient: Tensor,
    ignore_index: int,
    grad_output: Tensor,
) -> list[Tensor]:
    """Pass 2: ``coefficients`` ``[K, 1, P + 3]`` are the positives' weights, two numbers without use here, and what is
    added to all; the rest as in ``backends.torch.write_gradient``."""
    apply = pair_function(ramps.function)
    gradients = [torch.empty_like(logits) for logits in levels.logits]
    weights = combine(coefficients, grad_output)[0]
    for (logits, labels, groups), gradient in zip(levels.each(), gradients):
        per_class = logits.dim() != labels.dim()
        for x, y, out, group in pieces(logits.detach(), labels, _PIECE, gradient, groups):
            scores, group_ids, negative = _spread(x.to(ramps.thresholds.dtype), y, group, per_class, ignore_index)
            value = torch.zeros(scores.shape, dtype=torch.float64, device=scores.device) + weights[-1]
            for i, pairs in pair_blocks(apply, scores, group_ids, ramps.thresholds, ramps.groups, ramps.delta, _PAIRS):
                value += (pairs * weights[i, None]).sum(0)
            out.copy_(torch.where(negative, value, 0).view(out.shape))
    overwrite_positives(gradients, pos_index, combine(pos_gradient, grad_output))
    return gradients


def _spread(
    x: Tensor, y: Tensor, group: Tensor | None, per_class: bool, ignore_index: int
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Scores ``[n]`` of a piece, their groups, and which of them are negatives."""
    kinds = LabelKinds(y, x.shape[1], per_class, ignore_index)
    negative = ~kinds.ignored[:, None].expand(x.shape)
    if per_class:
        negative = negative & (torch.arange(x.shape[1], device=x.device) != y[:, None])
    else:
        negative = negative & ~kinds.positive[:, None]
    group_ids = None if group is None else group_of_each(group, *x.shape).long()
    return x.reshape(-1), group_ids, negative.reshape(-1)
