"""Compile the kernels of a training before it starts."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .engine.inputs import FLOAT_DTYPES, LABEL_DTYPES
from .losses import ALRPLoss, RankSortLoss

_OF_BOXES = (ALRPLoss, RankSortLoss)
# Kernels differ in whether there are so many logits.
_MANY_LOGITS = 1 << 16
# Up to so many positives pass 1 sums in shared memory.
_MOST_IN_SHARED_MEMORY = 1023


def warm_up(
    num_classes: int,
    max_positives: int = 1000,
    dtype: torch.dtype = torch.float32,
    *,
    criterion: nn.Module | None = None,
    device: torch.device | str = "cuda",
    num_levels: int = 1,
    anchors: int | None = None,
    label_dtype: torch.dtype = torch.int64,
    by_image: bool = False,
) -> None:
    """Compile what a training with these inputs needs, so that no iteration waits for a compiler.

    It runs forward and backward of small inputs. Afterwards images of any size and any number of positives up to
    ``max_positives`` compile nothing, if the tensors have the structure that the arguments tell.

    Args:
        num_classes: C of logits ``[..., C]`` with class labels ``[...]``.
        max_positives: the most positives of a batch. Up to 4096 of them are compared with one another; kernels differ
            if there are more.
        dtype: of the logits; float16 or bfloat16 under autocast.
        criterion: ``ALRPLoss``, ``RankSortLoss``, ``APLoss`` or ``NDCGLoss``, or any module that takes logits, labels
            and ``num_positives``; it is copied, so its state does not change. The default is ``ALRPLoss()``.
        device: on which the training runs. On a CPU, Numba's loops are compiled.
        num_levels: tensors in the list of logits.
        anchors: None for logits that are contiguous. Otherwise each level is a view ``[B, H, W, A, C]`` of what a
            convolution wrote, ``[B, A C, H, W]``, with this A.
        label_dtype: of the labels.
        by_image: whether each image ranks by itself (``groups`` with a number of the image for each anchor).

    Raises:
        TypeError: for another dtype.
        ValueError: for numbers below 1.

    Example:
        >>> alrp_triton.warm_up(80, 1000, torch.bfloat16, criterion=criterion, num_levels=5)
    """
    for name, value in (("num_classes", num_classes), ("max_positives", max_positives), ("num_levels", num_levels)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"dtype: expected float16, bfloat16, float32 or float64, got {dtype}")
    if label_dtype not in LABEL_DTYPES:
        raise TypeError(f"label_dtype: expected an integer dtype, got {label_dtype}")
    criterion = copy.deepcopy(ALRPLoss() if criterion is None else criterion).to(device)
    with torch.device(device):
        sides = _sides(num_classes * (anchors or 1))
        for side, num_positives in itertools.product(sides, _numbers(max_positives)):
            levels = [_level(side, num_classes, anchors, dtype) for _ in range(num_levels)]
            labels = [_labels(x, num_positives if i == 0 else 0, label_dtype) for i, x in enumerate(levels)]
            num_positives = sum(int((y < num_classes).sum()) for y in labels)
            settings: dict[str, Any] = {}
            if by_image:
                images = torch.arange(len(levels[0]))
                settings["groups"] = [images.view(-1, *[1] * (y.dim() - 1)).expand(y.shape) for y in labels]
            if isinstance(criterion, _OF_BOXES):
                boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).repeat(num_positives, 1).requires_grad_()
                loss = criterion(levels, labels, boxes, boxes.detach() + 0.5, **settings)
            else:
                loss = criterion(levels, labels, num_positives=num_positives, **settings)
            scalars = [loss] if isinstance(loss, Tensor) else [x for x in loss if x.requires_grad]
            torch.autograd.backward(scalars, [torch.ones_like(x) for x in scalars])


def _sides(channels: int) -> tuple[int, ...]:
    """Of levels with few logits and with many; their numbers are multiples of 16 and, if that can be, not."""
    many = 4 * math.ceil(math.sqrt(_MANY_LOGITS / (2 * channels)) / 4)
    return 4, 5, many, many + 1


def _numbers(max_positives: int) -> Iterator[int]:
    """Numbers of positives for which kernels differ."""
    if max_positives > _MOST_IN_SHARED_MEMORY:
        yield _MOST_IN_SHARED_MEMORY
    yield max_positives


def _level(side: int, num_classes: int, anchors: int | None, dtype: torch.dtype) -> Tensor:
    """Logits of two images."""
    if anchors is None:
        x = torch.zeros(2, side * side, num_classes, dtype=dtype)
    else:
        x = torch.zeros(2, anchors * num_classes, side, side, dtype=dtype)
        x = x.view(2, anchors, num_classes, side, side).permute(0, 3, 4, 1, 2)
    return x.requires_grad_()


def _labels(logits: Tensor, num_positives: int, dtype: torch.dtype) -> Tensor:
    """Background, but for some anchors."""
    labels = torch.full(logits.shape[:-1], logits.shape[-1], dtype=dtype)
    labels.view(-1)[:num_positives] = 0
    return labels
