"""What the linear form is compared with: the method as its authors published it, and focal loss in eager PyTorch."""

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
    cls, rank = _PerPositiveLoop.apply(logits, labels, loc_errors, delta, eps)
    return cls, rank


class _PerPositiveLoop(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, loc_errors: Tensor, delta: float, eps: float
    ) -> tuple[Tensor, Tensor]:
        is_pos = labels == 1
        pos = logits[is_pos]
        num_pos = len(pos)
        rank, excess = torch.zeros_like(pos), torch.zeros_like(pos)
        precision_loss = torch.zeros_like(pos)
        gradient = torch.zeros_like(logits)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(rank)
        if num_pos == 0:
            return logits.new_zeros(()), rank

        # A negative below this stands below the ramp of every positive.
        is_neg = (labels == 0) & (logits >= pos.min() - delta)
        neg = logits[is_neg]
        neg_gradient = torch.zeros_like(neg)
        for i in pos.argsort():
            above = torch.clamp((pos - pos[i]) / (2 * delta) + 0.5, min=0, max=1)
            above[i] = 0
            false = torch.clamp((neg - pos[i]) / (2 * delta) + 0.5, min=0, max=1)
            num_false_positives = false.sum()
            rank[i] = 1 + above.sum() + num_false_positives
            precision_loss[i] = num_false_positives / rank[i]
            if num_false_positives > eps:
                excess[i] = ((above * loc_errors).sum() + num_false_positives) / rank[i]
                neg_gradient += false * (excess[i] / num_false_positives)
        gradient[is_pos] = -excess / num_pos
        gradient[is_neg] = neg_gradient / num_pos
        return precision_loss.mean(), rank

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_cls: Tensor, grad_rank: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_cls, None, None, None, None


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
