"""Self-balancing in one launch: record the losses of an iteration, end a full period, and give the weight.

See ``alrp_triton.SelfBalance``, whose buffers it changes, and which says what counts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import on_device_of


class State(NamedTuple):
    """The buffers of ``SelfBalance``."""

    weight: Any
    """float32"""
    sums: Any
    """``[2]`` float64"""
    count: Any
    """int64"""


@triton.jit(do_not_specialize=["period"])
def balance_kernel(cls, loc, state, weight, period, BY_MEANS: tl.constexpr):
    error = tl.load(loc).to(tl.float64)
    total = tl.load(cls).to(tl.float64) + error
    ratio = total / error
    rounded = ratio.to(tl.float32)
    counts = rounded - rounded == 0  # finite
    numerator = tl.load(state.sums) + tl.where(counts, total if BY_MEANS else ratio, 0.0)
    denominator = tl.load(state.sums + 1) + tl.where(counts, error if BY_MEANS else 1.0, 0.0)
    number = tl.load(state.count) + counts.to(tl.int64)
    ends = (period > 0) & (number >= period)
    current = tl.where(ends, (numerator / denominator).to(tl.float32), tl.load(state.weight))
    tl.store(state.weight, current)
    tl.store(weight, current)
    tl.store(state.sums, tl.where(ends, 0.0, numerator))
    tl.store(state.sums + 1, tl.where(ends, 0.0, denominator))
    tl.store(state.count, tl.where(ends, 0, number))


def balance(cls: Tensor, loc: Tensor, state: State, period: int, by_means: bool) -> Tensor:
    """The weight of this iteration, float32; changes the state.

    Args:
        cls, loc: the losses, of any floating-point dtypes.
        state: on the same device.
        period: iterations that count in a period; 0 if it ends otherwise.
        by_means: whether the weight is a quotient of means, or the mean of quotients.
    """
    weight = torch.empty_like(state.weight)
    with on_device_of(loc):
        balance_kernel[(1,)](cls, loc, state, weight, period, BY_MEANS=by_means, num_warps=1)
    return weight
