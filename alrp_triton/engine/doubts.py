"""Warnings of arguments that are allowed and usually a mistake. They read values, for which the host would wait."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from .inputs import Levels, debug_checks
from .labels import equals

# So many scores within [0, 1] are no logits, and so many labels are typical ones.
_MANY = 1000
# So many rows of one label are background.
_MOST = 0.9


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
    elif levels.num_logits() >= _MANY:
        _warn_of_labels(levels)


def _warn_of_labels(levels: Levels) -> None:
    """Warn if labels seem to call the background something else than they should."""
    of_rows = [(x.shape[-1], labels) for x, labels, _ in levels.each() if x.numel() and x.dim() > labels.dim()]
    of_logits = [labels for x, labels, _ in levels.each() if x.numel() and x.dim() == labels.dim()]
    if of_logits and not of_rows and not any(bool((labels == 0).any()) for labels in of_logits):
        warnings.warn("labels: expected 0 for negatives, got none, so that nothing is ranked", stacklevel=3)
    columns = sorted({number for number, _ in of_rows})
    if len(columns) > 1:
        got = ", ".join(map(str, columns))
        text = f"logits: expected as many classes, the last axis, in each level, got {got}; C is the background in each"
        warnings.warn(text, stacklevel=3)
    if len(columns) != 1:
        return
    background = columns[0]
    rows = torch.cat([labels.reshape(-1) for _, labels in of_rows])
    for label in dict.fromkeys((0, background - 1, levels.ignore_index)):
        share = float(equals(rows, label).float().mean())
        if share > _MOST and not (label == levels.ignore_index and bool(equals(rows, background).any())):
            name = f"ignore_index, {label}," if label == levels.ignore_index else f"class {label}"
            warnings.warn(
                f"labels: expected {background}, the number of classes in logits, for the background, got {name} in "
                f"{share:.1%} of the rows",
                stacklevel=3,
            )


def warn_of_boxes(target_boxes: Tensor) -> None:
    """Warn if targets ``[P, 4]``, or ``[P, 6]`` in volumes, are inverted."""
    low, high = target_boxes.chunk(2, 1)
    num_inverted = int((high < low).any(1).sum())
    if num_inverted:
        form = "(x1, y1, x2, y2)" if target_boxes.shape[1] == 4 else "(x1, y1, z1, x2, y2, z2)"
        warnings.warn(
            f"target_boxes: expected {form} with x1 <= x2 and so on, got {num_inverted} of {target_boxes.shape[0]} "
            "otherwise, which count as empty; are they (x, y, width, height)?",
            stacklevel=2,
        )


def warn_of_errors(loc_errors: Tensor) -> None:
    """Warn if a localisation error is negative, as similarities of boxes may be."""
    num_negative = int((loc_errors < 0).sum())
    if num_negative:
        text = f"loc_errors: expected errors, which are >= 0, got {num_negative} below; of a GIoU g it is (1 - g) / 2"
        warnings.warn(text, stacklevel=2)


def warn_of_gradients(logits: Sequence[Tensor], pred_boxes: Tensor, target_boxes: Tensor) -> None:
    """Warn if predictions are constants; reads no values."""
    if not pred_boxes.shape[0]:
        return
    if target_boxes.requires_grad and not pred_boxes.requires_grad:
        text = (
            "pred_boxes: expected the model's boxes, got constants, and target_boxes that require a gradient; swapped?"
        )
        warnings.warn(text, stacklevel=3)
        return
    train_scores = any(level.requires_grad for level in logits)
    for name, other, missing in (
        ("logits", "pred_boxes", pred_boxes.requires_grad and not train_scores),
        ("pred_boxes", "logits", train_scores and not pred_boxes.requires_grad),
    ):
        if missing:
            text = (
                f"{name}: expected to require a gradient, as {other} do, got constants, which train nothing; detached?"
            )
            warnings.warn(text, stacklevel=3)
