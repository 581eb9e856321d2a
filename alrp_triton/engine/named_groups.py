"""Groups by name: a ranking for each image, for each class, or for both."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .processes import Processes

NAMES = ("image", "class", "image_class")


def named_groups(name: str, logits: Sequence[Tensor], processes: Processes | None) -> list[Tensor]:
    """The groups of levels ``[B, ..., C]``: views of B, C or B C integers, of the shape of a level, or without its last
    axis.

    Image b of each level is the same image, class c the same class. Images of other processes are other images.

    Raises:
        ValueError: an unknown name, a level without an axis of images and one of classes, or several levels that have
            no axis between these, such as a list of images.
    """
    if name not in NAMES:
        raise ValueError(f"groups: expected integers, one of {NAMES}, or None, got {name!r}")
    for level in logits:
        if level.dim() < 2:
            raise ValueError(f"groups: {name!r} needs logits [B, ..., C], got shape {list(level.shape)}")
    if name != "class" and len(logits) > 1 and all(level.dim() == 2 for level in logits):
        shapes = [list(level.shape) for level in logits]
        raise ValueError(
            f"groups: {name!r} needs levels [B, ..., C] with anchors of each image, got {shapes}; a list holds levels, "
            "never images: torch.stack makes one tensor of images of one size"
        )
    first, step = (0, 1) if processes is None else (processes.rank, processes.size)
    classes = max([0, *(level.shape[-1] for level in logits)])
    found = []
    for level in logits:
        of_image = first + step * torch.arange(len(level), device=level.device).view(-1, *[1] * (level.dim() - 1))
        of_class = torch.arange(level.shape[-1], device=level.device)
        if name == "image":
            found.append(of_image.squeeze(-1).expand(level.shape[:-1]))
        else:
            found.append((of_class if name == "class" else of_image * classes + of_class).expand(level.shape))
    return found
