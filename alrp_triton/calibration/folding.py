"""The affine map within the last layer of a classification head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from .maps import Affine, Calibration

__all__ = ["fold"]

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@torch.no_grad()
def fold(
    calibration: Calibration, layer: nn.Module, num_classes: int, categories: Sequence[int | None] | None = None
) -> None:
    """Change a layer in place, so that the sigmoid of its output is the calibrated score.

    Each output channel's weights become a w, and its bias becomes a c + b. Call it once. It is exact, but for rounding
    in the layer's dtype, if a detector's score is the sigmoid of one logit, as in RetinaNet, YOLO and the DETR family.
    No change of this layer can calibrate a score that also has a factor, such as the centre-ness in FCOS and ATSS, or
    that is a softmax or a root; apply the calibration to the scores there.

    Args:
        calibration: with affine maps only.
        layer: an ``nn.Linear`` or ``nn.Conv1d`` to ``nn.Conv3d`` that gives the logits. Its output channels are
            anchor * C + class for A anchors, as in torchvision, Detectron2, MMDetection, MONAI and effdet; A * C in
            all. Without a bias it gets one.
        num_classes: C, with the background if the layer has a channel for it.
        categories: [C], the category id of each class in the order of the channels; ``None`` for a background.
            Needed if classes have own maps; the others take the common one.

    Raises:
        TypeError, ValueError: a map is isotonic, the layer is no such layer, or numbers of channels, classes and
            categories do not go together. The layer has then not changed.
    """
    if not isinstance(layer, _LAYERS) or "weight" not in dict(layer.named_parameters(recurse=False)):
        raise TypeError(
            f"layer: expected nn.Linear or nn.Conv1d to nn.Conv3d with a parameter weight, got {type(layer).__name__}"
        )
    channels = layer.weight.shape[0]
    if num_classes < 1 or channels % num_classes:
        raise ValueError(f"num_classes: expected a divisor of the {channels} output channels, got {num_classes}")
    if categories is None:
        if calibration.per_class:
            raise ValueError("categories: expected the category ids of the channels, because classes have own maps")
        categories = [None] * num_classes
    if len(categories) != num_classes:
        raise ValueError(f"categories: expected num_classes = {num_classes} of them, got {len(categories)}")
    maps = [calibration.common if c is None else calibration.per_class.get(c, calibration.common) for c in categories]
    affine = [one for one in maps if isinstance(one, Affine)]
    if len(affine) < len(maps):
        raise ValueError("calibration: expected affine maps, because no weights of a layer make an isotonic one")
    # Once for each anchor. What is multiplied by them is float64, on the CPU, since some devices have no float64.
    per_class = torch.tensor([[one.a, one.b] for one in affine], dtype=torch.float64)
    scale, shift = per_class.T.repeat(1, channels // num_classes)
    weight, bias = layer.weight, layer.bias
    weight.copy_((weight.cpu() * scale.view(-1, *[1] * (weight.dim() - 1))).to(weight.dtype))
    if bias is None:
        layer.bias = nn.Parameter(shift.to(weight.dtype).to(weight.device), requires_grad=weight.requires_grad)
    else:
        bias.copy_((bias.cpu() * scale + shift).to(bias.dtype))
