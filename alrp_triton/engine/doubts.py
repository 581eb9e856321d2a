"""Warnings of arguments that are allowed and usually a mistake. They read values, for which the host would wait."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from .inputs import Levels, debug_checks
from .labels import equals

# So many scores within [0, 1] are no logits.
_MANY = 1000


def asked() -> bool:
    """Whether ``ALRP_TRITON_DEBUG=1`` asks for them. False in a graph of torch.compile, which has no values."""
    return not torch.compiler.is_compiling() and debug_checks()


def warn_of_scores(levels: Levels) -> None:
    """Warn if the logits look like probabilities, or if all are ignored."""
    logits = [level.detach() for level in levels.logits if level.numel()]
    if levels.num_logits() >= _MANY:
        ends = torch.stack([end.float() for level in logits for end in level.aminmax()])
        lowest, highest = ends.aminmax()
        # Scores that are all equal are those of a head whose weights are 0.
        if 0 <= lowest < highest <= 1:
            warnings.warn(
                f"logits: expected scores before the sigmoid, got {levels.num_logits()} from {lowest:.3g} to "
                f"{highest:.3g}, as probabilities are",
                stacklevel=2,
            )
    if logits and all(bool(equals(labels, levels.ignore_index).all()) for labels in levels.labels):
        warnings.warn(
            f"labels: expected some that are not ignored, got ignore_index, {levels.ignore_index}, everywhere; the "
            "loss and its gradients are 0",
            stacklevel=2,
        )


def warn_of_boxes(target_boxes: Tensor) -> None:
    """Warn if targets ``[P, 4]``, or ``[P, 6]`` in volumes, are inverted."""
    low, high = target_boxes.chunk(2, 1)
    num_inverted = int((high < low).any(1).sum())
    if num_inverted:
        form = "(x1, y1, x2, y2)" if target_boxes.shape[1] == 4 else "(x1, y1, z1, x2, y2, z2)"
        warnings.warn(
            f"target_boxes: expected {form} with x1 <= x2 and so on, got {num_inverted} of {target_boxes.shape[0]} "
            "otherwise, which count as empty",
            stacklevel=2,
        )
