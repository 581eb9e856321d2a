"""Device code shared by both passes of the linear form: the bucket of a score, and its offset in it.

With groups, thresholds are sorted by group and then by value, so that one table holds all rankings: a bucket counts the
thresholds that come before a score in that order, and bucket 0 stands for all scores below their own group's ramps.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

# Beyond all indices.
NONE = tl.constexpr(0x7FFFFFFFFFFFFFFF)


class SearchTable(NamedTuple):
    """Thresholds padded to 2^steps places for a binary search, of which it never reads the last."""

    thresholds: Tensor
    groups: Tensor | None
    steps: int

    def arguments(self) -> dict[str, Any]:
        """The kernels' arguments."""
        return {
            "thresholds": self.thresholds,
            "threshold_groups": self.groups,
            "STEPS": self.steps,
            "GROUPED": self.groups is not None,
        }


def make_table(thresholds: Tensor, groups: Tensor | None, number: int) -> SearchTable:
    """Pad with what no score reaches: NaN, in the highest of groups.

    Args:
        thresholds: ``[2P]``, ascending within each group, NaN last.
        groups: ``[2P]`` int64, ascending.
        number: 2P; without groups ``thresholds`` may be padded already.
    """
    steps = number.bit_length()
    missing = (1 << steps) - len(thresholds)
    padded = F.pad(thresholds, (0, missing), value=torch.nan) if missing else thresholds
    if groups is None:
        return SearchTable(padded, None, steps)
    # The lowest threshold, which comes first where there is one group, goes to the place that is never read.
    padded[-1] = padded.masked_fill(padded.isnan(), torch.inf).amin()
    highest = groups.new_full((missing,), torch.iinfo(torch.int64).max)
    return SearchTable(padded, torch.cat([groups, highest]), steps)


@triton.jit
def reaches_any(score, thresholds, STEPS: tl.constexpr, GROUPED: tl.constexpr):
    """Whether a score reaches the lowest threshold of all groups."""
    if GROUPED:
        return score >= tl.load(thresholds + ((1 << STEPS) - 1))
    else:
        return score >= tl.load(thresholds)


@triton.jit
def find_bucket(score, group, thresholds, threshold_groups, STEPS: tl.constexpr, GROUPED: tl.constexpr):
    """How many thresholds lie at or below each score; with groups, how many come before it or at it, but 0 where none
    of them is of the score's own group. 0 for NaN."""
    bucket = tl.zeros_like(score).to(tl.int32)
    for step in tl.static_range(STEPS):
        half = 1 << (STEPS - 1 - step)
        reached = score >= tl.load(thresholds + bucket + (half - 1))
        if GROUPED:
            other = tl.load(threshold_groups + bucket + (half - 1))
            reached = (other < group) | ((other == group) & reached)
        bucket += tl.where(reached, half, 0)
    if GROUPED:
        own = tl.load(threshold_groups + bucket - 1, mask=bucket > 0, other=0)
        bucket = tl.where(own == group, bucket, 0)
    return bucket


@triton.jit
def number_below(value, ascending, length, highest):
    """How many of the integers in a table lie below a scalar. ``highest`` is the largest power of two up to
    ``length``; 0 for an empty table."""
    below = highest * 0
    step = highest
    while step > 0:
        reached = below + step
        other = tl.load(ascending + (reached - 1), mask=reached <= length, other=NONE)
        below = tl.where(other < value, reached, below)
        step = step // 2
    return below


@triton.jit
def offset_in_bucket(score, bucket, floors, INVERSE_WIDTH: tl.constexpr, LARGEST: tl.constexpr):
    """(score - floor) / (2 delta), at most 1. Infinities count as the largest finite number, as they do in
    ``floors``."""
    if INVERSE_WIDTH == 0:
        return tl.zeros_like(score)
    else:
        finite = tl.minimum(tl.maximum(score, -LARGEST), LARGEST)
        return tl.minimum((finite - tl.load(floors + bucket)) * INVERSE_WIDTH, 1.0)
