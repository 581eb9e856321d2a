"""What the losses are compared with: loops as their authors published them, all pairs, buckets, and focal loss.

All but focal loss take ``logits`` of any shape, ``labels`` of that shape (1 positive, 0 negative, others are ignored),
a number for each positive in flat order, and ``delta``, the half width of the ramp.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

PAIRS_AT_ONCE = 1 << 26
"""Bounds the memory of the forms by pairs: 256 MB for each of a few float32 matrices."""


def ramp(x: Tensor, delta: float) -> Tensor:
    """H(x); for delta = 0 the step."""
    if delta == 0:
        return (x >= 0).to(x.dtype)
    return torch.clamp(x / (2 * delta) + 0.5, min=0, max=1)


class _WithGradient(torch.autograd.Function):
    """A value, and the gradient that was computed along with it."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_value: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_value, None, None


def with_gradient(logits: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
    """``value`` with ``gradient`` as its derivative with respect to ``logits``."""
    result: Tensor = _WithGradient.apply(logits, value, gradient)  # type: ignore[no-untyped-call]
    return result


class _Scores:
    """The scores of the positives, and of the negatives that the ramp of some positive reaches."""

    def __init__(self, logits: Tensor, labels: Tensor, delta: float) -> None:
        self.logits, scores = logits, logits.detach()
        self.is_pos = (labels == 1).nonzero(as_tuple=True)
        self.pos = scores[self.is_pos]
        lowest = self.pos.min() - delta if len(self.pos) else float("inf")
        self.is_neg = ((labels == 0) & (scores >= lowest)).nonzero(as_tuple=True)
        self.neg = scores[self.is_neg]

    def loss(self, value: Tensor, pos_gradient: Tensor, neg_gradient: Tensor) -> Tensor:
        """The value, with gradients that are divided by P."""
        gradient = torch.zeros_like(self.logits)
        gradient[self.is_pos], gradient[self.is_neg] = pos_gradient / len(self.pos), neg_gradient / len(self.pos)
        return with_gradient(self.logits, value, gradient)


def per_positive_loop(
    logits: Tensor, labels: Tensor, loc_errors: Tensor, delta: float = 1.0, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """aLRP Loss by a loop over the positives, O(P M) time: what the paper's authors run, in their order and precision.

    Written from the paper and from what the authors' code does (https://github.com/kemaloksuz/aLRPLoss): it takes
    positives in ascending order of score, leaves out negatives that no ramp reaches, and adds up the score gradient in
    forward. A positive with at most ``eps`` false positives sends no gradient.

    Returns:
        ``(cls, rank)``: the classification component, with a derivative with respect to ``logits``, and ``[P]`` ranks.
    """
    scores, loc_errors = _Scores(logits, labels, delta), loc_errors.detach()
    pos, neg = scores.pos, scores.neg
    rank, excess, precision_loss = torch.zeros_like(pos), torch.zeros_like(pos), torch.zeros_like(pos)
    if len(pos) == 0:
        return with_gradient(logits, logits.new_zeros(()), torch.zeros_like(logits)), rank
    neg_gradient = torch.zeros_like(neg)
    for i in pos.argsort():
        above, false = ramp(pos - pos[i], delta), ramp(neg - pos[i], delta)
        above[i] = 0
        num_false_positives = false.sum()
        rank[i] = 1 + above.sum() + num_false_positives
        precision_loss[i] = num_false_positives / rank[i]
        if num_false_positives > eps:
            excess[i] = ((above * loc_errors).sum() + num_false_positives) / rank[i]
            neg_gradient += false * (excess[i] / num_false_positives)
    return scores.loss(precision_loss.mean(), -excess, neg_gradient), rank


def ap_loop(logits: Tensor, labels: Tensor, delta: float = 1.0) -> Tensor:
    """AP Loss, interpolated, by a loop over at least one positive: from the same source."""
    scores = _Scores(logits, labels, delta)
    pos, neg = scores.pos, scores.neg
    neg_gradient, precision, best = torch.zeros_like(neg), torch.zeros_like(pos), pos.new_zeros(())
    for i in pos.argsort():
        rank_positive, false = ramp(pos - pos[i], delta).sum() + 0.5, ramp(neg - pos[i], delta)
        rank = rank_positive + false.sum()
        own = rank_positive / rank
        share = false / rank
        if best > own:
            share *= (1 - best) / (1 - own)
        best = torch.maximum(best, own)
        neg_gradient += share
        precision[i] = best
    return scores.loss(1 - precision.mean(), precision - 1, neg_gradient)


def rank_sort_loop(logits: Tensor, labels: Tensor, ious: Tensor, delta: float = 0.5, eps: float = 1e-10) -> Tensor:
    """Rank & Sort Loss, both errors added, by a loop over at least one positive: what its authors run, in their order.

    Written from K. Oksuz et al., ICCV 2021, and from what their code does (https://github.com/kemaloksuz/RankSortLoss).
    A positive with at most ``eps`` false, or missorted, positives sends no gradient.
    """
    scores = _Scores(logits, labels, delta)
    pos, neg = scores.pos, scores.neg
    neg_gradient, pos_gradient = torch.zeros_like(neg), torch.zeros_like(pos)
    ranking, sorting = torch.zeros_like(pos), torch.zeros_like(pos)
    for i in pos.argsort():
        above, false = ramp(pos - pos[i], delta), ramp(neg - pos[i], delta)
        rank_positive, num_false_positives = above.sum(), false.sum()
        ranking[i] = num_false_positives / (rank_positive + num_false_positives)
        better = ious >= ious[i]
        proper = better * above
        target = (proper * (1 - ious)).sum() / proper.sum()
        sorting[i] = (above * (1 - ious)).sum() / rank_positive - target
        if num_false_positives > eps:
            pos_gradient[i] -= ranking[i]
            neg_gradient += false * (ranking[i] / num_false_positives)
        missorted = ~better * above
        num_missorted = missorted.sum()
        if num_missorted > eps:
            pos_gradient[i] -= sorting[i]
            pos_gradient += missorted * (sorting[i] / num_missorted)
    return scores.loss(ranking.mean() + sorting.mean(), pos_gradient, neg_gradient)


class _Pairs(NamedTuple):
    cls: Tensor
    excess: Tensor  # `[P]`: what each positive loses, times P
    share: Tensor  # `[N]`: what a single negative of each column receives, times P


def _all_pairs(pos: Tensor, neg: Tensor, sizes: Tensor | None, errors: Tensor, delta: float, eps: float) -> _Pairs:
    """aLRP by matrices of positives against columns; ``sizes`` says how many negatives a column stands for."""
    cls, excess, share = pos.new_zeros(()), torch.empty_like(pos), torch.zeros_like(neg)
    step = max(1, PAIRS_AT_ONCE // max(1, len(pos), len(neg)))
    for begin in range(0, len(pos), step):
        rows = slice(begin, begin + step)
        above = ramp(pos - pos[rows, None], delta)
        above.diagonal(begin).zero_()
        false = ramp(neg - pos[rows, None], delta)
        num_false_positives = false.sum(1) if sizes is None else false @ sizes
        rank = 1 + above.sum(1) + num_false_positives
        cls += (num_false_positives / rank).sum()
        active = num_false_positives > eps
        excess[rows] = torch.where(active, (above @ errors + num_false_positives) / rank, 0)
        share += torch.where(active, excess[rows] / num_false_positives, 0) @ false
    return _Pairs(cls / len(pos), excess, share)


def vectorised(logits: Tensor, labels: Tensor, loc_errors: Tensor, delta: float = 1.0, eps: float = 1e-5) -> Tensor:
    """What :func:`per_positive_loop` computes, by all P x M pairs, in chunks of positives; at least one positive."""
    scores = _Scores(logits, labels, delta)
    pairs = _all_pairs(scores.pos, scores.neg, None, loc_errors.detach(), delta, eps)
    return scores.loss(pairs.cls, -pairs.excess, pairs.share)


def bucketed_by_means(
    logits: Tensor, labels: Tensor, loc_errors: Tensor, delta: float = 1.0, eps: float = 1e-5
) -> Tensor:
    """aLRP's classification component with negatives in buckets, O(M log M + P^2) time; an approximation.

    From the description by F. Yavuz et al., "Bucketed Ranking-based Losses for Efficient Training of Object Detectors",
    ECCV 2024: all scores are sorted, the negatives between two neighbouring positives become a bucket at the mean of
    their scores, positives are compared with buckets, and the members of a bucket share its gradient equally. Exact for
    the step (``delta`` = 0), and if no bucket holds two different scores; otherwise the ramp at the mean stands for the
    mean of the ramps. At least one positive.
    """
    scores = _Scores(logits, labels, delta)
    pos, ascending = scores.pos.sort()
    neg, errors = scores.neg, loc_errors.detach()[ascending]
    # Stable, positives first: a negative that equals a positive counts as above it and belongs to the bucket above.
    in_order, places = torch.cat([pos, neg]).sort(stable=True)
    negatives = places >= len(pos)
    is_first = (~negatives).nonzero().squeeze(1)
    limits = torch.cat([is_first.new_tensor([-1]), is_first, is_first.new_tensor([len(in_order)])])
    sizes = limits.diff() - 1
    means = _means(in_order[negatives], sizes)
    pairs = _all_pairs(pos, means, sizes.to(pos.dtype), errors, delta, eps)
    received, pos_gradient = torch.empty_like(neg), torch.empty_like(pos)
    received[places[negatives] - len(pos)] = pairs.share.repeat_interleave(sizes, output_size=len(neg))
    pos_gradient[ascending] = -pairs.excess
    return scores.loss(pairs.cls, pos_gradient, received)


def _means(members: Tensor, sizes: Tensor) -> Tensor:
    """The mean of each run of ``sizes`` sorted members; 0 for an empty one."""
    if len(members) == 0:
        return torch.zeros(len(sizes), dtype=members.dtype, device=members.device)
    # In float64: over millions of members float32 sums would be off by more than the ramps are wide.
    sums = torch.cat([members.new_zeros(1, dtype=torch.float64), members.cumsum(0, dtype=torch.float64)])
    ends = sizes.cumsum(0)
    means = ((sums[ends] - sums[ends - sizes]) / sizes.clamp(min=1)).to(members.dtype)
    # Rounding may not carry a mean past the bucket's own positive.
    last = len(members) - 1
    means = means.maximum(members[(ends - sizes).clamp(max=last)]).minimum(members[(ends - 1).clamp(min=0)])
    return torch.where(sizes > 0, means, 0)


def focal_loss(logits: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Sigmoid focal loss, summed (T.-Y. Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017).

    Operation by operation as torchvision's ``sigmoid_focal_loss``. ``targets`` are 0 or 1, of the logits' shape and
    dtype; ``alpha`` weighs the positives, 1 - alpha the negatives; ``gamma`` is the exponent of the modulating factor.
    """
    probability = logits.sigmoid()
    cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    of_truth = probability * targets + (1 - probability) * (1 - targets)
    weight = alpha * targets + (1 - alpha) * (1 - targets)
    return (weight * (cross_entropy * (1 - of_truth) ** gamma)).sum()
