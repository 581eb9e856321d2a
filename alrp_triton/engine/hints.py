"""What to write instead: the ends of error messages, for frequent mistakes. Only a call that fails gets here."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor


def for_no_tensor(value: Any) -> str:
    """For what is no tensor, but has numbers."""
    return "; torch.as_tensor makes one of it" if hasattr(value, "__array__") or isinstance(value, (int, float)) else ""


def for_dtype_of_logits(logits: Tensor, labels: Tensor) -> str:
    """For logits that are no floats."""
    swapped = labels.is_floating_point() and not logits.is_complex()
    return "; logits come first, then labels" if swapped else ""


def for_dtype_of_labels(logits: Tensor, labels: Tensor) -> str:
    """For labels that are no integers."""
    if labels.is_floating_point() and labels.shape == logits.shape[:-1]:
        return "; labels.long() makes class indices"
    return _without_background(logits, labels)


def for_shape_of_labels(logits: Tensor, labels: Tensor) -> str:
    """For labels that are not beside the logits."""
    shape = logits.shape
    if logits.dim() > 2 and labels.shape == shape[:1] + shape[2:]:
        return "; logits have their classes in the last axis: logits.movedim(1, -1)"
    for wanted in (shape, shape[:-1]):
        if labels.numel() == math.prod(wanted) > 0:
            return f"; labels.reshape({', '.join(map(str, wanted))}) if they are in that order"
    return _without_background(logits, labels)


def _without_background(logits: Tensor, labels: Tensor) -> str:
    one_hot = (*logits.shape[:-1], logits.shape[-1] + 1)
    return "; one-hot labels have no column for the background" if labels.shape == one_hot else ""


def for_values(values: Tensor) -> str:
    """For values that are not ``[P]``."""
    if values.dim() == 0:
        return "; without a mean or a sum over them, such as by reduction='none'"
    return "; alrp_triton.at_positives picks them from values of all labels"
