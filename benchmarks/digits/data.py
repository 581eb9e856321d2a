"""The scenes that runs train on and are evaluated on, composed once a process and kept as bytes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from scenes import DigitScenes
from torch import Tensor

Target = dict[str, Tensor]

# Scenes of validation choose the learning rate: other scenes than those of training, of the same scans of digits.
# Those of the test show digits of which no scan is in training or validation.
_SPLITS = {"train": ("train", 0), "validation": ("train", 1), "test": ("test", 0)}


class Scenes:
    """Scenes in torchvision's form, images [1, H, W] in 0..1 with targets, on the CPU; images are kept as bytes."""

    def __init__(self, split: str, length: int) -> None:
        source, seed = _SPLITS[split]
        scenes = DigitScenes(source, length, seed)  # type: ignore[arg-type]
        images, self.targets = zip(*(scenes[i] for i in range(length)))
        self._images = (torch.stack(images) * 255).round_().to(torch.uint8)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._images[index].float() / 255, self.targets[index]

    def batches(self, size: int, order: Tensor, device: torch.device) -> Iterator[tuple[list[Tensor], list[Target]]]:
        """Full batches in the given ``order`` of indices."""
        for indices in order[: len(order) // size * size].reshape(-1, size).tolist():
            images, targets = zip(*(self[i] for i in indices))
            yield (
                [image.to(device) for image in images],
                [{name: value.to(device) for name, value in target.items()} for target in targets],
            )


@cache
def scenes(split: str, length: int) -> Scenes:
    """The first ``length`` scenes of ``"train"``, ``"validation"`` or ``"test"``."""
    return Scenes(split, length)
