"""The linear form by Triton kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.buckets import count_into_buckets
from ...kernels.gradient import write_linear_gradient, write_positives
from ...kernels.walk import Walk, make_walk
from ..inputs import Levels
from ..knots import bucket_floors, inverse_width


def count_negatives(
    levels: Levels,
    thresholds: Tensor,
    threshold_groups: Tensor | None,
    pos_logits: Tensor,
    pos_groups: Tensor | None,
    delta: float,
    ignore_index: int,
    scale: float,
) -> Tensor:
    """Pass 1; see ``backends.torch.count_negatives``. Bucket 0, of which nothing depends, is not counted."""
    floors = bucket_floors(thresholds)
    return count_into_buckets(
        walks_to_read(levels), thresholds, floors, inverse_width(delta), scale, ignore_index, threshold_groups
    )


def write_gradient(
    levels: Levels,
    thresholds: Tensor,
    threshold_groups: Tensor | None,
    coefficients: Tensor,
    pos_index: Tensor,
    pos_gradient: Tensor,
    delta: float,
    ignore_index: int,
) -> list[Tensor]:
    """Pass 2; see ``backends.torch.write_gradient``."""
    walks = walks_to_write(levels)
    floors = bucket_floors(thresholds)
    coefficients = coefficients.to(floors.dtype)
    write_linear_gradient(walks, thresholds, floors, coefficients, inverse_width(delta), ignore_index, threshold_groups)
    write_positives(walks, pos_index, pos_gradient)
    return written(walks, levels)


def walks_to_read(levels: Levels) -> list[Walk]:
    """A walk over each level."""
    return [make_walk(logits.detach(), labels, groups=groups) for logits, labels, groups in levels.each()]


def walks_to_write(levels: Levels) -> list[Walk]:
    """A walk over each level with a new gradient to be written."""
    return [
        make_walk(logits.detach(), labels, torch.empty_like(logits), groups) for logits, labels, groups in levels.each()
    ]


def written(walks: list[Walk], levels: Levels) -> list[Tensor]:
    """The walks' gradients, with the strides that ``empty_like`` gives, as the operator promises."""
    like = [torch.empty_like(logits, device="meta") for logits in levels.logits]
    return [
        walk.gradient if walk.gradient.stride() == meta.stride() else torch.empty_like(logits).copy_(walk.gradient)
        for walk, meta, logits in zip(walks, like, levels.logits)
    ]
