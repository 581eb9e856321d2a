"""Lookups in small tables, and sums into them, by all cores.

On the CPU, PyTorch shares the rows of a matrix out among its threads, but leaves a vector to one of them. So vectors
are folded into as many rows as there are threads. What is summed is integers, so that the rows' sums add up to the same
bits whatever their number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..devices import is_asynchronous


def _rows(index: Tensor) -> int:
    threads = torch.get_num_threads() if not is_asynchronous(index.device) else 1
    return threads if len(index) % threads == 0 else 1


def look_up(table: Tensor, index: Tensor) -> Tensor:
    """``table[index]`` for ``[n]`` int64."""
    if is_asynchronous(index.device):
        return table.index_select(0, index)
    rows = _rows(index)
    return torch.gather(table.expand(rows, -1), 1, index.view(rows, -1)).view(-1)


class Sums:
    """Integers summed into places: ``[places]`` int64, starting at 0."""

    def __init__(self, places: int, device: torch.device) -> None:
        rows = torch.get_num_threads() if not is_asynchronous(device) else 1
        self._by_row = torch.zeros(rows, places, dtype=torch.int64, device=device)

    def add(self, place: Tensor, values: Tensor) -> None:
        """Add ``[n]`` int64 values at ``[n]`` int64 places."""
        # A thread of autograd may have another number of threads than the one that made the sums.
        rows = min(_rows(place), len(self._by_row))
        rows = rows if len(place) % rows == 0 else 1
        self._by_row[:rows].scatter_add_(1, place.view(rows, -1), values.view(rows, -1))

    def add_at(self, place: int, value: Tensor | int) -> None:
        """Add one number at one place."""
        self._by_row[0, place] += value

    def total(self) -> Tensor:
        """``[places]``"""
        return self._by_row.sum(0)
