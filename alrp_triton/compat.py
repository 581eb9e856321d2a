"""The signature of the aLRP authors' published code. An existing head needs only another import line.

Replace the head's ``from ... import aLRPLoss`` by ``from alrp_triton.compat import aLRPLoss``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .engine.operators import find
from .engine.passes import choose
from .losses import alrp_loss

__all__ = ["aLRPLoss"]


class aLRPLoss:
    """aLRP Loss with the interface of the authors' heads, on one flat tensor; any device, exact and deterministic."""

    @staticmethod
    def apply(
        logits: Tensor, targets: Tensor, regression_losses: Tensor, delta: float = 1.0, eps: float = 1e-5
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Classification component, ranks, and the order in which the head sorts its localisation errors.

        Args:
            logits: ``[M]`` scores, any floating-point dtype.
            targets: ``[M]``, integer or floating-point; 1 positive, 0 negative, anything else ignored.
            regression_losses: ``[P]`` localisation errors of the positives in flat order; constants here.
            delta: half width of the ramp, >= 0.
            eps: a positive with at most this many false positives sends no score gradient.

        Returns:
            ``(cls_loss, rank, order)``: the scalar whose backward gives the error-driven score gradient; the rank of
            each positive ``[P]`` in flat order; and ``[P]`` int64, the positives in ascending order of score, equal
            ones in flat order on any device. Without positives the loss is a scalar 0, attached to the graph.

        Raises:
            TypeError, ValueError: as :func:`alrp_triton.alrp_loss`.
        """
        arguments = {"logits": logits, "targets": targets, "regression_losses": regression_losses}
        for name, value in arguments.items():
            if not isinstance(value, Tensor):
                raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
        if targets.shape != logits.shape:
            raise ValueError(f"targets: expected the shape of logits, {list(logits.shape)}, got {list(targets.shape)}")
        # The published code uses only 1 and 0.
        labels = torch.where(targets == 1, 1, torch.where(targets == 0, 0, -1)).to(torch.int8)
        cls, _, rank = alrp_loss(logits, labels, regression_losses.detach(), delta=delta, eps=eps)
        backend = choose("auto", logits.device)
        in_order, name = True, "regression_losses"
        _, pos_logits, *_ = find([logits.detach()], [labels], [], -1, len(rank), in_order, name, backend)
        return cls, rank, pos_logits.argsort(stable=True)
