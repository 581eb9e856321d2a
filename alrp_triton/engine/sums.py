"""Scans of P-sized rows whose order of operations is fixed on every device.

With ``groups``, sorted integers ``[n]``, each run of equal ones is scanned by itself. Its sums are not differences of
sums over the whole row, in which a group of small numbers would lose its digits to a group of large ones.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .devices import is_gpu


def prefix_sums(rows: Tensor, groups: Tensor | None = None) -> Tensor:
    """Sums up to each place: ``[K, n] -> [K, n + 1]``, float64 or int64, a 0 first.

    On CUDA the scan of a one-dimensional tensor may add floats in another order each time; the scan along the inner
    axis of a matrix of several rows does not. So a lone row gets a companion.
    """
    if groups is not None:
        return F.pad(_scan(rows, groups, torch.add), (1, 0))
    if is_gpu(rows.device) and len(rows) == 1:
        return prefix_sums(torch.cat([rows, rows]))[:1]
    return F.pad(rows.cumsum(dim=1), (1, 0))


def suffix_sums(rows: Tensor, groups: Tensor | None = None) -> Tensor:
    """Sums from each place to the end of the row, or of its group: ``[K, n] -> [K, n + 1]``, a 0 last.

    Summed from the end, so that the small sums near it do not come out as differences of large ones.
    """
    return prefix_sums(rows.flip(1), None if groups is None else groups.flip(0)).flip(1)


def total(values: Tensor) -> Tensor:
    """The sum of ``[n]`` float64, added up from the smallest on: the same bits in whatever order they come, and on any
    number of threads."""
    return prefix_sums(values.sort().values[None])[0, -1]


def running_max(values: Tensor, groups: Tensor | None = None) -> Tensor:
    """The largest value up to each place: ``[n] -> [n]``."""
    if groups is None:
        return values.cummax(0).values
    return _scan(values[None], groups, torch.maximum)[0]


def _scan(rows: Tensor, groups: Tensor, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """In log2(n) steps, each of which doubles the reach of every place (Hillis and Steele). Tensors keep their shapes,
    so that a graph with a symbolic n depends on the number of steps alone."""
    n, step = rows.shape[1], 1
    place = torch.arange(n, device=rows.device)
    while step < n:
        before = (place - step).clamp(min=0)
        within = (place >= step) & (groups[before] == groups)
        rows = torch.where(within, combine(rows, rows[:, before]), rows)
        step *= 2
    return rows
