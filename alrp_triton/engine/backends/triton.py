"""The linear form by Triton kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.arrange import search_table
from ...kernels.buckets import count_into_buckets
from ...kernels.gradient import combine, write_linear_gradient
from ...kernels.walk import Walk, make_walk
from ..inputs import Levels
from ..knots import Ramps, bucket_floors, inverse_width


def count_negatives(
    levels: Levels,
    ramps: Ramps,
    pos_logits: Tensor,
    pos_groups: Tensor | None,
    ignore_index: int,
    scale: float,
) -> Tensor:
    """Pass 1; see ``backends.torch.count_negatives``. Bucket 0, of which nothing depends, is not counted."""
    return count_into_buckets(
        walks_to_read(levels),
        *_searched(ramps),
        inverse_width(ramps.delta),
        scale,
        ignore_index,
        ramps.groups,
    )


def write_gradient(
    levels: Levels,
    ramps: Ramps,
    coefficients: Tensor,
    pos_index: Tensor,
    pos_gradient: Tensor,
    ignore_index: int,
    grad_output: Tensor,
) -> list[Tensor]:
    """Pass 2; see ``backends.torch.write_gradient``."""
    walks, dtype = walks_to_write(levels), ramps.thresholds.dtype
    if len(grad_output) == 1:
        # The kernel multiplies by what there is only one of.
        factor: Tensor | None = grad_output
        coefficients, pos_gradient = coefficients[0].to(dtype), pos_gradient[0]
    else:
        factor = None
        coefficients = combine(coefficients, grad_output, dtype)
        pos_gradient = combine(pos_gradient, grad_output, torch.float64)
    write_linear_gradient(
        walks,
        *_searched(ramps),
        coefficients,
        inverse_width(ramps.delta),
        ignore_index,
        ramps.groups,
        pos_index=pos_index,
        pos_gradient=pos_gradient,
        factor=factor,
        pos_factor=factor,
    )
    return written(walks, levels)


def _searched(ramps: Ramps) -> tuple[Tensor, Tensor]:
    """Thresholds and finite floors of the buckets."""
    if ramps.groups is None:
        return search_table(ramps.thresholds)
    return ramps.thresholds, bucket_floors(ramps.thresholds)


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
