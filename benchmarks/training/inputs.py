"""What the trained part of a detector reads: features of the frozen part of the backbone, computed once and kept on
disk, of each image and of its mirror image."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.io import ImageReadMode, read_image

from .backbone import MEAN, STD, EfficientNetLite0
from .data import Split

# Few, since larger activations would leave the cache.
_BATCH = 2
Target = dict[str, Tensor]


class Inputs:
    """The inputs of one split.

    Args:
        split: its images and objects.
        folder: where inputs are kept, a folder for each choice of images, size and frozen stages.
        backbone: on the CPU; its frozen part is run.
        size: the longer side of an image, in pixels.
        canvas: height and width; images are put into its upper left corner.
        progress: called with the number of images that are done.
    """

    def __init__(
        self,
        split: Split,
        folder: Path,
        backbone: EfficientNetLite0,
        size: int,
        canvas: tuple[int, int],
        progress: Callable[[int], None] = lambda done: None,
    ) -> None:
        self.samples, self.size = split.samples, size
        images = [(str(sample.path), sample.path.stat().st_size) for sample in split.samples]
        key = json.dumps([images, size, canvas, backbone.frozen])
        self._folder = folder / hashlib.sha256(key.encode()).hexdigest()[:16]
        if not (self._folder / "done").exists():
            self._make(backbone, canvas, progress)
        self._arrays = [np.load(path, mmap_mode="r") for path in sorted(self._folder.glob("*.npy"))]

    def __len__(self) -> int:
        return len(self.samples)

    def batch(
        self, indices: list[int], mirrored: list[bool], device: torch.device
    ) -> tuple[list[Tensor], list[Target]]:
        """Inputs of the trained part, a tensor for each kind of features, and the targets of each image."""
        rows = [2 * index + flip for index, flip in zip(indices, mirrored)]
        inputs = [
            torch.from_numpy(array[rows]).to(device, torch.float32, memory_format=torch.channels_last)
            for array in self._arrays
        ]
        targets = [
            {name: x.to(device) for name, x in self._target(index, flip).items()}
            for index, flip in zip(indices, mirrored)
        ]
        return inputs, targets

    def scale(self, index: int) -> float:
        """Pixels of the canvas for one of the image."""
        sample = self.samples[index]
        return self.size / max(sample.width, sample.height)

    def shape(self, index: int) -> tuple[int, int]:
        """Height and width of an image on the canvas."""
        sample, scale = self.samples[index], self.scale(index)
        return round(sample.height * scale), round(sample.width * scale)

    def _target(self, index: int, flip: bool) -> Target:
        sample = self.samples[index]
        boxes = sample.boxes * self.scale(index)
        if flip:
            x1, y1, x2, y2 = boxes.unbind(1)
            width = self.shape(index)[1]
            boxes = torch.stack([width - x2, y1, width - x1, y2], 1)
        return {"boxes": boxes, "labels": sample.labels}

    def _make(self, backbone: EfficientNetLite0, canvas: tuple[int, int], progress: Callable[[int], None]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        arrays: list[np.ndarray[Any, Any]] = []
        for begin in range(0, len(self), _BATCH):
            indices = range(begin, min(begin + _BATCH, len(self)))
            images = torch.cat([self._images(index, canvas) for index in indices])
            for k, features in enumerate(backbone.of_frozen(images)):
                if begin == 0:
                    shape = (2 * len(self), *features.shape[1:])
                    path = self._folder / f"{k}.npy"
                    arrays.append(np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape))
                arrays[k][2 * begin : 2 * begin + len(features)] = features.half().numpy()
            progress(indices.stop)
        for array in arrays:
            array.flush()  # type: ignore[attr-defined]
        (self._folder / "done").touch()

    def _images(self, index: int, canvas: tuple[int, int]) -> Tensor:
        """The image and its mirror image, normalised, ``[2, 3, H, W]``; the rest of the canvas is 0."""
        sample = self.samples[index]
        try:
            image = read_image(str(sample.path), ImageReadMode.RGB)
        except RuntimeError as error:
            raise ValueError(f"{sample.path}: {error}") from None
        if tuple(image.shape[1:]) != (sample.height, sample.width):
            wanted, found = f"{sample.width} x {sample.height}", f"{image.shape[2]} x {image.shape[1]}"
            raise ValueError(f"{sample.path}: expected {wanted} pixels, as the annotations say, got {found}")
        height, width = self.shape(index)
        x = (image[None].float() / 255 - MEAN) / STD
        if (height, width) != tuple(image.shape[1:]):
            x = F.interpolate(x, size=(height, width), mode="bilinear", antialias=True)
        both = torch.cat([x, x.flip(-1)])
        return F.pad(both, (0, canvas[1] - width, 0, canvas[0] - height))
