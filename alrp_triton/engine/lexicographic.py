"""Sorting P-sized values by group first, by value second. Without groups, by value alone."""

from __future__ import annotations

from torch import Tensor


def sort(values: Tensor, groups: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Stable ascending sort, NaN last within its group: sorted values, permutation, sorted groups; ``[n]`` each."""
    ordered, order = values.sort(stable=True)
    if groups is None:
        return ordered, order, None
    grouped, by_group = groups[order].sort(stable=True)
    order = order[by_group]
    return values[order], order, grouped
