"""Arguments and results of the passes over all logits, for every backend."""

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
    """``[P]`` in the compute dtype; all NaN if there is a mistake and the host does not wait to learn of it."""
    groups: Tensor | None
    """``[P]`` int64"""
    numbers: Tensor | None = None
    """None for positives in flat order. Otherwise positives are in any order with their actual logits, and this is
    ``[2]`` int64: their number, and whether (> 0) a label is out of range."""


class Own(NamedTuple):
    """The gradients of the scores of this process's positives."""

    indices: Tensor
    """``[P]`` int64: flat indices, ascending."""
    gradients: Tensor
    """``[K, P]`` float64: the derivatives of K scalars."""


class Passes(Protocol):
    """The passes of a backend."""

    def find(self, levels: Levels, num_positives: int | None, name: str) -> Found:
        """The positives. Without their number the host waits for it. A wrong number, or a label out of range, raises
        ``ValueError`` if the host may read the labels; ``name`` is the argument that gives the number."""

    def count(self, levels: Levels, table: Table, own: Found, totals: Tensor, delta: float, num_logits: int) -> None:
        """Add up the negatives in ``totals``, int64 zeros, in fixed point with
        ``scans.fraction_bits`` for ``num_logits`` of all processes. In the linear form they are
        ``[2, 2P + 2]``: for each bucket the number of its negatives, and the sum of their offsets from its floor
        divided by 2 delta; the last column has the number of NaN. Bucket 0 is not used. ``own`` are the positives of
        this process."""

    def write(
        self, levels: Levels, table: Table, lines: Tensor, own: Own, factors: Sequence[Tensor], delta: float
    ) -> list[Tensor]:
        """The gradient of every logit, in the logits' dtype and layout. In the linear form ``lines`` are
        ``[2, 2P + 1]``, level and slope of each bucket; they are multiplied by the first upstream gradient. The
        gradient of a positive is the sum over K of its own derivatives times their factors. It is 0 for ignored
        logits."""
