"""Sums whose bits do not depend on the device: scans of rows of size P in a fixed order, and 64-bit fixed point. Sums
of integers have the same bits in any order, on any number of threads or processes.

``groups`` are sorted integers ``[n]``; each run of equal ones has its own scan. Differences of sums over the whole row
would lose the digits of a group of small numbers after a group of large ones.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .devices import is_gpu

# float32 numbers up to 1, scaled by a power of two, are exact in float32, and 2^17 of them in float64.
_MOST_BITS = 36


def fraction_bits(num_logits: int) -> int:
    """Bits after the binary point for numbers in [0, 1], so that 64 bits hold the sum of ``num_logits`` of them: 36 up
    to 67 million logits, 32 at a billion; a float32 logit near 4 has 22."""
    return min(_MOST_BITS, 62 - num_logits.bit_length())


def unit_of(num_logits: int, device: torch.device) -> Tensor:
    """2 to the power of minus :func:`fraction_bits`, a float64 scalar, for a number that is symbolic in a graph."""
    # x = m 2^e with m in [1/2, 1), so e is the bit length of an integer.
    length = torch.frexp(torch.full((), num_logits, dtype=torch.float64, device=device)).exponent
    return torch.ldexp(torch.ones_like(length, dtype=torch.float64), (length - 62).clamp(min=-_MOST_BITS))


def prefix_sums(rows: Tensor, groups: Tensor | None = None) -> Tensor:
    """Sums up to each place: ``[K, n] -> [K, n + 1]``, float64 or int64, a 0 first.

    On CUDA the scan of a one-dimensional tensor may add floats in a different order each time; the scan along the inner
    axis of a matrix of several rows does not. So a single row is duplicated.
    """
    if groups is not None:
        return F.pad(_scan(rows, groups, torch.add), (1, 0))
    if is_gpu(rows.device) and len(rows) == 1:
        return prefix_sums(torch.cat([rows, rows]))[:1]
    return F.pad(rows.cumsum(dim=1), (1, 0))


def suffix_sums(rows: Tensor, groups: Tensor | None = None) -> Tensor:
    """Sums from each place to the end of the row, or of its group: ``[K, n] -> [K, n + 1]``, a 0 last.

    Summed from the end, so that the small sums near it are not differences of large sums.
    """
    return prefix_sums(rows.flip(1), None if groups is None else groups.flip(0)).flip(1)


def total(values: Tensor) -> Tensor:
    """The sum of ``[n]`` float64, added from the smallest on: the same bits for any order and any number of threads."""
    return prefix_sums(values.sort().values[None])[0, -1]


def running_max(values: Tensor, groups: Tensor | None = None) -> Tensor:
    """The largest value up to each place: ``[n] -> [n]``."""
    if groups is None:
        return values.cummax(0).values
    return _scan(values[None], groups, torch.maximum)[0]


def _scan(rows: Tensor, groups: Tensor, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """A scan in log2(n) steps; each step doubles the range of every place (Hillis and Steele). Tensors keep their
    shapes, so a graph with a symbolic n depends only on the number of steps."""
    n, step = rows.shape[1], 1
    place = torch.arange(n, device=rows.device)
    while step < n:
        before = (place - step).clamp(min=0)
        within = (place >= step) & (groups[before] == groups)
        rows = torch.where(within, combine(rows, rows[:, before]), rows)
        step *= 2
    return rows
