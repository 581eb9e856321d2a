"""For the reference, which computes the gradients itself: only write remains."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..inputs import Levels
from ..knots import Table
from .protocol import Found, Own


class Whole:
    """The reference has no other passes."""

    def find(self, levels: Levels, num_positives: int | None, name: str) -> Found:
        raise NotImplementedError("the reference computes losses whole")

    def count(self, levels: Levels, table: Table, own: Found, totals: Tensor, delta: float, num_logits: int) -> None:
        raise NotImplementedError("the reference computes losses whole")

    def write(
        self, levels: Levels, table: Table, lines: Tensor, own: Own, factors: Sequence[Tensor], delta: float
    ) -> list[Tensor]:
        """``lines`` are ``[K, M]``, the derivatives of the scalars."""
        sizes = [level.numel() for level in levels.logits]
        of_all = sum(row * factor.to(row.dtype) for row, factor in zip(lines, factors))
        # Rounded once to the dtype of the logits.
        parts = zip(levels.logits, torch.as_tensor(of_all).split(sizes))
        return [torch.empty_like(level).copy_(part.view(level.shape)) for level, part in parts]
