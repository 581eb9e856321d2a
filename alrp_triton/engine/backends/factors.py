"""What comes from above in backward: a factor for each of the values whose gradients are written together."""

from __future__ import annotations

from torch import Tensor


def combine(tables: Tensor, factors: Tensor) -> Tensor:
    """The sum of tables ``[K, ...]`` float64, each times its factor ``[K]``."""
    return (tables * factors.double().view(-1, *[1] * (tables.dim() - 1))).sum(0)
