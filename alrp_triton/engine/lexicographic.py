"""Sorting and searching P-sized values by group first, by value second. Without groups, by value alone."""

from __future__ import annotations

import torch
from torch import Tensor


def sort(values: Tensor, groups: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Stable ascending sort, NaN last within its group: sorted values, permutation, sorted groups; ``[n]`` each."""
    ordered, order = values.sort(stable=True)
    if groups is None:
        return ordered, order, None
    grouped, by_group = groups[order].sort(stable=True)
    order = order[by_group]
    return values[order], order, grouped


def count_below(
    table: Tensor, values: Tensor, table_groups: Tensor | None, groups: Tensor | None, *, or_equal: bool = False
) -> Tensor:
    """How many entries of a sorted table lie below each value, or at it: ``[n]`` int64.

    Args:
        table: ``[m]`` as :func:`sort` leaves it.
        values: ``[n]``, in any order.
        table_groups, groups: ``[m]`` sorted and ``[n]``; entries of lower groups lie below. None for neither.
        or_equal: whether an entry equal to the value counts.
    """
    if table_groups is None or groups is None:
        return torch.searchsorted(table, values, right=or_equal)
    # Of equals the first in the concatenation comes first: merge both, and count table entries on the way.
    parts = [(table, table_groups), (values, groups)]
    merged, merged_groups = (torch.cat(tensors) for tensors in zip(*(parts if or_equal else parts[::-1])))
    _, order, _ = sort(merged, merged_groups)
    first_value = len(table) if or_equal else 0
    is_value = (order >= first_value) & (order < first_value + len(values))
    count = torch.empty_like(order)
    count[order] = (~is_value).cumsum(0)
    return count[first_value : first_value + len(values)]
