"""Rank & Sort's sorting error on the device: compares every positive with every other by score and by IoU.

Whether a pair counts depends on the order of scores and on that of IoUs, so prefix sums do not work. Scores are
subtracted in their own dtype, and results are summed in float64 in a fixed order. See the
sorting error of Oksuz et al., *Rank & Sort Loss for Object Detection and Instance Segmentation*, ICCV 2021.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .ramp import heights_in_kind


@triton.jit
def missorted(i, group, positives, ious, num_positives, ramp, BLOCK: tl.constexpr, BLOCK_P: tl.constexpr):
    """For each of a block of positives, the sums of H and of H (1 - IoU) over the positives above it: over those of at
    least its IoU, and over the others; float64."""
    there = i < num_positives
    positive = tl.load(positives.logits + i, mask=there, other=0)[:, None]
    iou = tl.load(ious + i, mask=there, other=0)[:, None]
    kept = tl.zeros([BLOCK_P, BLOCK], tl.float64)
    kept_error = tl.zeros([BLOCK_P, BLOCK], tl.float64)
    lost = tl.zeros([BLOCK_P, BLOCK], tl.float64)
    lost_error = tl.zeros([BLOCK_P, BLOCK], tl.float64)
    for begin in range(0, num_positives, BLOCK):
        k = begin + tl.arange(0, BLOCK)
        # For NaN every ramp is 0.
        other = tl.load(positives.logits + k, mask=k < num_positives, other=float("nan"))[None, :]
        other_iou = tl.load(ious + k, mask=k < num_positives, other=0)[None, :]
        h = heights_in_kind(other, positive, ramp).to(tl.float64)
        if positives.groups is not None:
            other_group = tl.load(positives.groups + k, mask=k < num_positives, other=0)
            h = tl.where(other_group[None, :] == group[:, None], h, 0.0)
        error = h * (1 - other_iou.to(tl.float64))
        below = other_iou < iou
        kept += tl.where(below, 0.0, h)
        kept_error += tl.where(below, 0.0, error)
        lost += tl.where(below, h, 0.0)
        lost_error += tl.where(below, error, 0.0)
    return tl.sum(kept, axis=1), tl.sum(kept_error, axis=1), tl.sum(lost, axis=1), tl.sum(lost_error, axis=1)


@triton.jit
def received(k, group, positives, ious, weights, num_positives, ramp, BLOCK: tl.constexpr, BLOCK_P: tl.constexpr):
    """For each of a block of positives k, the sum of w_i H(p_k - p_i) over those of higher IoU, float64."""
    there = k < num_positives
    positive = tl.load(positives.logits + k, mask=there, other=0)[:, None]
    iou = tl.load(ious + k, mask=there, other=0)[:, None]
    sums = tl.zeros([BLOCK_P, BLOCK], tl.float64)
    for begin in range(0, num_positives, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        other = tl.load(positives.logits + i, mask=i < num_positives, other=float("nan"))[None, :]
        other_iou = tl.load(ious + i, mask=i < num_positives, other=0)[None, :]
        weight = tl.load(weights + i, mask=i < num_positives, other=0)[None, :]
        h = heights_in_kind(positive, other, ramp).to(tl.float64)
        counts = other_iou > iou
        if positives.groups is not None:
            other_group = tl.load(positives.groups + i, mask=i < num_positives, other=0)
            counts = counts & (other_group[None, :] == group[:, None])
        sums += tl.where(counts, h * weight, 0.0)
    return tl.sum(sums, axis=1)
