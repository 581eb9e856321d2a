"""What the passes over all logits take and give, whoever does them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from ..inputs import Levels
from ..knots import Table


class Found(NamedTuple):
    """The positives of this process."""

    indices: Tensor
    """``[P]`` int64: flat indices (row-major, level after level)."""
    logits: Tensor
    """``[P]`` in the compute dtype; NaN, all of them, where the host was not to be told of a mistake."""
    groups: Tensor | None
    """``[P]`` int64"""
    numbers: Tensor | None = None
    """None for positives in flat order. Else they come in any order, their logits as they are: ``[2]`` int64, how many
    there are, and whether (> 0) any label is out of range."""


class Own(NamedTuple):
    """What the scores of the positives of this process get."""

    indices: Tensor
    """``[P]`` int64: flat indices, ascending."""
    gradients: Tensor
    """``[K, P]`` float64: the derivatives of K scalars."""


class Passes(Protocol):
    """Who does the passes."""

    def find(self, levels: Levels, num_positives: int | None, ignore_index: int, name: str) -> Found:
        """The positives. Without their number the host waits to hear it. A wrong number of them, or a label out of
        range, raises ``ValueError`` where the host may look; ``name`` is the argument that said the number."""

    def count(
        self, levels: Levels, table: Table, own: Found, totals: Tensor, delta: float, ignore_index: int, scale: float
    ) -> None:
        """Add up the negatives in ``totals``, int64 zeros in ``scale`` units to 1, of the form that the table's maker
        gave them. In the linear form ``[2, 2P + 2]``: for each bucket how many negatives it has, and the sum of their
        offsets from its floor over 2 delta; in the last column the number of NaN. Of bucket 0 nothing is ever asked.
        ``own`` are the positives of this process."""

    def write(
        self,
        levels: Levels,
        table: Table,
        lines: Tensor,
        own: Own,
        factors: Sequence[Tensor],
        delta: float,
        ignore_index: int,
    ) -> list[Tensor]:
        """The gradient of every logit, in the logits' dtype and layout: in the linear form ``lines`` ``[2, 2P + 1]``,
        level and slope of each bucket, times the first of the upstream gradients; for positives the sum over K of each
        one's own times its factor; 0 for what is ignored."""
