"""Sums over P-sized rows whose order of additions is fixed on every device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def prefix_sums(rows: Tensor) -> Tensor:
    """Exclusive and total prefix sums of each row: ``[K, n] -> [K, n + 1]``, float64 or int64.

    On CUDA the scan of a one-dimensional tensor may add floats in another order each time; the scan along the inner
    axis of a matrix of several rows does not. So a lone row gets a companion.
    """
    if rows.is_cuda and len(rows) == 1:
        return prefix_sums(torch.cat([rows, rows]))[:1]
    return F.pad(rows.cumsum(dim=1), (1, 0))


def suffix_sums(rows: Tensor) -> Tensor:
    """Sums from each place to the end of the row, and a last 0: ``[K, n] -> [K, n + 1]``.

    Summed from the end, so that the small sums near it do not come out as differences of large ones.
    """
    return prefix_sums(rows.flip(1)).flip(1)
