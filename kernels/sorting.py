"""Rank & Sort's sorting error: every positive against every other, by score and by IoU. O(P^2) work, O(P) memory.

Which pairs count depends on the order of their scores and of their IoUs at once, of which no prefix sum knows. So each
program takes some positives past all others, in the same order every time, without atomics; scores are subtracted in
their own dtype, and what they make is summed in float64.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configurations import choose
from .pairs import differences, pair_constants, ramp
from .walk import load_groups, on_device_of


@triton.jit
def missorted(
    positive,
    iou,
    group,
    pos_logits,
    ious,
    pos_groups,
    num_positives,
    INVERSE_WIDTH: tl.constexpr,
    SATURATE: tl.constexpr,
    GROUPED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Over the positives that stand above each of a block of them, by their IoUs: the sums of H and of H (1 - IoU) over
    those that belong there, and over those that do not; float64."""
    kept = tl.zeros([BLOCK_P, BLOCK], tl.float64)
    kept_error = tl.zeros([BLOCK_P, BLOCK], tl.float64)
    lost = tl.zeros([BLOCK_P, BLOCK], tl.float64)
    lost_error = tl.zeros([BLOCK_P, BLOCK], tl.float64)
    for begin in range(0, num_positives, BLOCK):
        k = begin + tl.arange(0, BLOCK)
        # Of NaN, every ramp is 0.
        other = tl.load(pos_logits + k, mask=k < num_positives, other=float("nan"))
        other_iou = tl.load(ious + k, mask=k < num_positives, other=0)
        h = ramp(differences(other[None, :], positive[:, None]), INVERSE_WIDTH, SATURATE).to(tl.float64)
        if GROUPED:
            other_group = load_groups(pos_groups, k, k < num_positives, GROUPED)
            h = tl.where(other_group[None, :] == group[:, None], h, 0.0)
        error = h * (1 - other_iou.to(tl.float64))[None, :]
        below = other_iou[None, :] < iou[:, None]
        kept += tl.where(below, 0.0, h)
        kept_error += tl.where(below, 0.0, error)
        lost += tl.where(below, h, 0.0)
        lost_error += tl.where(below, error, 0.0)
    return tl.sum(kept, axis=1), tl.sum(kept_error, axis=1), tl.sum(lost, axis=1), tl.sum(lost_error, axis=1)


@triton.jit
def errors_kernel(
    pos_logits,
    ious,
    pos_groups,
    num_positives,
    errors,
    INVERSE_WIDTH: tl.constexpr,
    SATURATE: tl.constexpr,
    GROUPED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    there = i < num_positives
    positive = tl.load(pos_logits + i, mask=there, other=0)
    iou = tl.load(ious + i, mask=there, other=0)
    group = load_groups(pos_groups, i, there, GROUPED)
    target, target_error, lost, lost_error = missorted(
        positive,
        iou,
        group,
        pos_logits,
        ious,
        pos_groups,
        num_positives,
        INVERSE_WIDTH,
        SATURATE,
        GROUPED,
        BLOCK,
        BLOCK_P,
    )
    tl.store(errors + i, target + lost, mask=there)
    tl.store(errors + num_positives + i, target_error + lost_error, mask=there)
    tl.store(errors + 2 * num_positives + i, target, mask=there)
    tl.store(errors + 3 * num_positives + i, target_error, mask=there)
    tl.store(errors + 4 * num_positives + i, lost, mask=there)


@triton.jit
def received_by(
    positive,
    iou,
    group,
    pos_logits,
    ious,
    pos_groups,
    pos_weights,
    num_positives,
    INVERSE_WIDTH: tl.constexpr,
    SATURATE: tl.constexpr,
    GROUPED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """For each of a block of positives k the sum of w_i H(p_k - p_i) over those of higher IoU, float64."""
    sums = tl.zeros([BLOCK_P, BLOCK], tl.float64)
    for begin in range(0, num_positives, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        other = tl.load(pos_logits + i, mask=i < num_positives, other=float("nan"))
        other_iou = tl.load(ious + i, mask=i < num_positives, other=0)
        weight = tl.load(pos_weights + i, mask=i < num_positives, other=0)
        # The difference of the other kernel, p_k - p_i, to the bit.
        h = ramp(-differences(other[None, :], positive[:, None]), INVERSE_WIDTH, SATURATE).to(tl.float64)
        counts = other_iou[None, :] > iou[:, None]
        if GROUPED:
            other_group = load_groups(pos_groups, i, i < num_positives, GROUPED)
            counts = counts & (other_group[None, :] == group[:, None])
        sums += tl.where(counts, h * weight[None, :], 0.0)
    return tl.sum(sums, axis=1)


@triton.jit
def received_kernel(
    pos_logits,
    ious,
    pos_groups,
    num_positives,
    pos_weights,
    received,
    INVERSE_WIDTH: tl.constexpr,
    SATURATE: tl.constexpr,
    GROUPED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    k = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    there = k < num_positives
    positive = tl.load(pos_logits + k, mask=there, other=0)
    iou = tl.load(ious + k, mask=there, other=0)
    group = load_groups(pos_groups, k, there, GROUPED)
    total = received_by(
        positive,
        iou,
        group,
        pos_logits,
        ious,
        pos_groups,
        pos_weights,
        num_positives,
        INVERSE_WIDTH,
        SATURATE,
        GROUPED,
        BLOCK,
        BLOCK_P,
    )
    tl.store(received + k, total, mask=there)


def sorting_errors(pos_logits: Tensor, ious: Tensor, inverse_width: float, pos_groups: Tensor | None = None) -> Tensor:
    """What stands above each positive i, and how much of it belongs there; see the sorting error of Oksuz et al.,
    *Rank & Sort Loss for Object Detection and Instance Segmentation*, ICCV 2021.

    Args:
        pos_logits: ``[P]`` scores p, float32 or float64.
        ious: ``[P]`` IoUs t in the same dtype.
        inverse_width: 1 / (2 delta), 0 for delta = 0.
        pos_groups: ``[P]`` int64: the group of each positive, where only those of one group are compared.

    Returns:
        ``[5, P]`` float64. Over all k, i itself among them: the sums of H(p_k - p_i), and of H(p_k - p_i) (1 - t_k);
        the same two over those with t_k >= t_i; and the sum of H(p_k - p_i) over those with t_k < t_i.
    """
    errors = torch.empty(5, len(pos_logits), dtype=torch.float64, device=pos_logits.device)
    _launch(errors_kernel, pos_logits, ious, pos_groups, inverse_width, errors)
    return errors


def sorting_received(
    pos_logits: Tensor, ious: Tensor, weights: Tensor, inverse_width: float, pos_groups: Tensor | None = None
) -> Tensor:
    """What each positive k is to answer for: the sum of w_i H(p_k - p_i) over those with t_i > t_k.

    Args:
        pos_logits, ious, inverse_width, pos_groups: as for :func:`sorting_errors`.
        weights: ``[P]`` float64, the w.

    Returns:
        ``[P]`` float64.
    """
    received = torch.empty(len(pos_logits), dtype=torch.float64, device=pos_logits.device)
    _launch(received_kernel, pos_logits, ious, pos_groups, inverse_width, weights, received)
    return received


def _launch(
    kernel: Any, pos_logits: Tensor, ious: Tensor, pos_groups: Tensor | None, inverse_width: float, *tensors: Tensor
) -> None:
    num_pos = len(pos_logits)
    if num_pos == 0:
        return

    def launch(block: int, block_p: int, num_warps: int) -> None:
        kernel[(triton.cdiv(num_pos, block_p),)](
            pos_logits,
            ious,
            pos_groups,
            num_pos,
            *tensors,
            **pair_constants(pos_logits, inverse_width),
            GROUPED=pos_groups is not None,
            BLOCK=block,
            BLOCK_P=block_p,
            num_warps=num_warps,
        )

    with on_device_of(pos_logits):
        launch(**choose("sorting", pos_logits, launch))
