"""A stand-in for mmcv's compiled part, so that MMDetection runs with mmcv-lite: NMS and RoIAlign by torchvision."""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
import torchvision
from torch import Tensor


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    assert offset == 0
    # In float32, since torchvision has no bfloat16 on the CPU; so below.
    return torchvision.ops.nms(boxes.float(), scores.float(), iou_threshold)


def roi_align_forward(features: Tensor, rois: Tensor, output: Tensor, *argmax: Tensor, **options: Any) -> None:
    assert options["pool_mode"] == 1  # the average
    size = (options["aligned_height"], options["aligned_width"])
    settings = (options["spatial_scale"], options["sampling_ratio"], options["aligned"])
    output.copy_(torchvision.ops.roi_align(features.float(), rois.float(), size, *settings))


def roi_align_backward(grad_output: Tensor, rois: Tensor, *argmax_and_grad: Tensor, **options: Any) -> None:
    grad_input = argmax_and_grad[-1]
    size = (options["aligned_height"], options["aligned_width"])
    settings = (*grad_input.shape, options["sampling_ratio"], options["aligned"])
    grad = torch.ops.torchvision._roi_align_backward(
        grad_output.float(), rois.float(), options["spatial_scale"], *size, *settings
    )
    grad_input.copy_(grad)


class Extension(ModuleType):
    """``mmcv._ext``: it has every function that mmcv looks for at import, those above to be called."""

    nms = staticmethod(nms)
    roi_align_forward = staticmethod(roi_align_forward)
    roi_align_backward = staticmethod(roi_align_backward)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*arguments: Any, **options: Any) -> None:
            raise NotImplementedError(f"{name} needs mmcv with its compiled operators")

        return missing


def install() -> None:
    """Puts it where mmcv looks, unless mmcv has a compiled part of its own."""
    if importlib.util.find_spec("mmcv._ext") is None:
        extension = Extension("mmcv._ext")
        # MMEngine asks for it, to learn whether there is a compiled part.
        extension.__spec__ = ModuleSpec("mmcv._ext", None)
        sys.modules["mmcv._ext"] = extension
