"""What the linear form is compared with: the losses as their authors published them, and focal loss."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def per_positive_loop(
    logits: Tensor, labels: Tensor, loc_errors: Tensor, delta: float = 1.0, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """aLRP Loss by a loop over the positives, O(P M) time: what the paper's authors run, in their order and precision.

    Written from the paper and from what the authors' code does (https://github.com/kemaloksuz/aLRPLoss): positives in
    ascending order of score, negatives that no ramp reaches left out, the score gradient accumulated in forward.

    Args:
        logits: scores, any shape and device.
        labels: of the logits' shape: 1 positive, 0 negative, anything else ignored.
        loc_errors: ``[P]``, one for each positive in flat order.
        delta: half width of the ramp, > 0.
        eps: a positive with at most this many false positives sends no gradient.

    Returns:
        ``(cls, rank)``: the classification component, with a derivative with respect to ``logits``, and ``[P]`` ranks.
    """
    scores, gradient = logits.detach(), torch.zeros_like(logits)
    is_pos = labels == 1
    pos = scores[is_pos]
    loc_errors = loc_errors.detach()
    rank, excess, precision_loss = torch.zeros_like(pos), torch.zeros_like(pos), torch.zeros_like(pos)
    if len(pos) == 0:
        return with_gradient(logits, logits.new_zeros(()), gradient), rank
    is_neg, neg = within_reach(scores, labels, pos, delta)
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
    gradient[is_pos], gradient[is_neg] = -excess / len(pos), neg_gradient / len(pos)
    return with_gradient(logits, precision_loss.mean(), gradient), rank


def ramp(x: Tensor, delta: float) -> Tensor:
    """H(x); for delta = 0 the step."""
    if delta == 0:
        return (x >= 0).to(x.dtype)
    return torch.clamp(x / (2 * delta) + 0.5, min=0, max=1)


def within_reach(scores: Tensor, labels: Tensor, pos: Tensor, delta: float) -> tuple[tuple[Tensor, ...], Tensor]:
    """Which negatives are not below the ramps of all positives, and their scores. As indices along each axis, which a
    mask would be turned into each time it is used."""
    is_neg = ((labels == 0) & (scores >= pos.min() - delta)).nonzero(as_tuple=True)
    return is_neg, scores[is_neg]


class _WithGradient(torch.autograd.Function):
    """A value, and the gradient that a loop accumulated beside it."""

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


def ap_loop(logits: Tensor, labels: Tensor, delta: float = 1.0) -> Tensor:
    """AP Loss, interpolated, by a loop over the positives: as :func:`per_positive_loop`, from the same source.

    Args:
        logits, labels, delta: see :func:`per_positive_loop`; at least one positive.
    """
    scores, gradient = logits.detach(), torch.zeros_like(logits)
    is_pos = labels == 1
    pos = scores[is_pos]
    is_neg, neg = within_reach(scores, labels, pos, delta)
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
    gradient[is_pos] = (precision - 1) / len(pos)
    gradient[is_neg] = neg_gradient / len(pos)
    return with_gradient(logits, 1 - precision.mean(), gradient)


def rank_sort_loop(logits: Tensor, labels: Tensor, ious: Tensor, delta: float = 0.5, eps: float = 1e-10) -> Tensor:
    """Rank & Sort Loss, both errors added, by a loop over the positives: what its authors run, in their order.

    Written from K. Oksuz et al., ICCV 2021, and from what their code does (https://github.com/kemaloksuz/RankSortLoss).

    Args:
        logits, labels, delta: see :func:`per_positive_loop`; at least one positive.
        ious: ``[P]``, one for each positive in flat order.
        eps: a positive with at most this many false, or missorted, positives sends no gradient.
    """
    scores, gradient = logits.detach(), torch.zeros_like(logits)
    is_pos = labels == 1
    pos = scores[is_pos]
    is_neg, neg = within_reach(scores, labels, pos, delta)
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
    gradient[is_pos], gradient[is_neg] = pos_gradient / len(pos), neg_gradient / len(pos)
    return with_gradient(logits, ranking.mean() + sorting.mean(), gradient)


def focal_loss(logits: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Sigmoid focal loss, summed (T.-Y. Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017).

    Operation by operation as torchvision's ``sigmoid_focal_loss`` computes it.

    Args:
        logits: scores, any shape.
        targets: 0 or 1, of the logits' shape and dtype.
        alpha: weight of the positives; 1 - alpha of the negatives.
        gamma: exponent of the modulating factor.
    """
    probability = logits.sigmoid()
    cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    of_truth = probability * targets + (1 - probability) * (1 - targets)
    weight = alpha * targets + (1 - alpha) * (1 - targets)
    return (weight * (cross_entropy * (1 - of_truth) ** gamma)).sum()
