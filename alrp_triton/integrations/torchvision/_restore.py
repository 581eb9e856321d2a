"""Take the loss away again: of a model, and of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet

from ._parts import RankingPart, mix_out

__all__ = ["check_model", "restore", "stock_state_dict"]

Model = TypeVar("Model", bound=nn.Module)

_CRITERION = "ranking_criterion"
_BACKGROUND = ("roi_heads.box_predictor.cls_score.weight", "roi_heads.box_predictor.cls_score.bias")


def check_model(model: nn.Module) -> None:
    if not isinstance(model, (RetinaNet, FCOS, FasterRCNN)):
        wanted = "a torchvision RetinaNet, FCOS or FasterRCNN, not yet wrapped"
        raise TypeError(f"model: expected {wanted}, got {type(model).__name__}")


def restore(model: Model) -> Model:
    """Make a detector torchvision's own again, with its trained weights.

    Classes, losses, forward and the keys of ``state_dict()`` are those from before the call of ``use_...``, and what it
    froze is trained again. So whatever works on torchvision's model works: TorchScript, ONNX, pickles without this
    package.

    Detections of a RetinaNet do not change, bit for bit. Those of an FCOS do not either; if its centre-ness was
    dropped, the branch's weights become 0 and its bias 100, so that its centre-ness is 1. A Faster R-CNN has a softmax
    again, with a background whose weights and bias become 0: score c is exp(z_c) / (1 + sum of all exp(z_k)) instead of
    exp(z_c) / (1 + exp(z_c)). With one class this is the same. With several it is lower for a box with more than one
    likely class. So calibrate before this call.

    Args:
        model: a ``RetinaNet``, ``FCOS`` or ``FasterRCNN``, not wrapped; changed in place. A model without the loss
            remains as it is.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: ``model`` is none of these, or has a predictor that is not built as torchvision's. It has then not
            changed.
    """
    check_model(model)
    parts = [part for part in model.modules() if isinstance(part, RankingPart)]
    for part in reversed(parts):  # roi_heads first, which may refuse
        mix_out(part)
    return model


def stock_state_dict(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The weights of a model with the loss, for a model without it.

    It leaves out the state of criteria and, as :func:`restore`, sets the background of a Faster R-CNN to 0.

    Args:
        state_dict: ``model.state_dict()`` of a model with the loss, also if it was wrapped; not changed. Of an FCOS
            whose centre-ness was dropped, load it into a model with the loss and call :func:`restore` instead.

    Returns:
        A new dict with the same tensors.

    Raises:
        ValueError: it is of a Faster R-CNN and has no state of a criterion, as with Rank & Sort Loss. It may then be a
            checkpoint without the loss, whose background counts.
    """
    stock = {key: value for key, value in state_dict.items() if _CRITERION not in key.split(".")}
    background = [key for key in stock if key.endswith(_BACKGROUND)]
    if background and len(stock) == len(state_dict):
        wanted = "state of a criterion; load it into a model with the loss and call restore(model)"
        raise ValueError(f"state_dict: expected {wanted}, got none")
    for key in background:
        stock[key] = _without_first(stock[key])
    return stock


def _without_first(rows: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(rows[:1]), rows[1:]])
