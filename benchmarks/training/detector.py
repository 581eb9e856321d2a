"""The detector that all losses train: torchvision's RetinaNet with a small neck and head on EfficientNet-Lite0.

It has the strides 8 to 64. Convolutions of neck and head are separable (as in EfficientDet, arXiv:1911.09070), so that
a CPU trains them. Anchors are three quarters as large as in the papers that they come from, since images are small.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import RetinaNetHead

from .backbone import CHANNELS, EfficientNetLite0

_WIDTH, _DEPTH = 64, 2
_STRIDES = (8, 16, 32, 64)


class Anchors(NamedTuple):
    """The anchors at each location."""

    sizes: tuple[float, ...]
    """Square roots of their areas, in strides."""
    shapes: tuple[float, ...]
    """Heights divided by widths; each size has all of them."""

    def number(self) -> int:
        """At each location."""
        return len(self.sizes) * len(self.shapes)


NINE = Anchors((3.0, 3 * 2 ** (1 / 3), 3 * 2 ** (2 / 3)), (0.5, 1.0, 2.0))
"""As in RetinaNet (arXiv:1708.02002)."""
ONE = Anchors((6.0,), (1.0,))
"""As in ATSS (arXiv:1912.02424)."""
_PRIOR = 0.01


def _separable() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(_WIDTH, _WIDTH, 3, padding=1, groups=_WIDTH, bias=False),
        nn.Conv2d(_WIDTH, _WIDTH, 1, bias=False),
        nn.GroupNorm(8, _WIDTH),
        nn.ReLU(inplace=True),
    )


class _Neck(nn.Module):
    """A feature pyramid (arXiv:1612.03144) of the trained part of the backbone."""

    out_channels = _WIDTH

    def __init__(self, backbone: EfficientNetLite0) -> None:
        super().__init__()
        self.backbone = backbone
        self.inner = nn.ModuleList(nn.Conv2d(channels, _WIDTH, 1) for channels in CHANNELS.values())
        self.outer = nn.ModuleList(_separable() for _ in CHANNELS)
        self.coarsest = nn.Conv2d(_WIDTH, _WIDTH, 3, 2, 1)

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        levels = [layer(x) for layer, x in zip(self.inner, self.backbone.after_frozen(inputs))]
        for k in (1, 0):
            levels[k] = levels[k] + F.interpolate(levels[k + 1], size=levels[k].shape[-2:])
        levels = [layer(x) for layer, x in zip(self.outer, levels)]
        return [*levels, self.coarsest(levels[-1])]


def _head(num_classes: int, num_anchors: int) -> RetinaNetHead:
    head = RetinaNetHead(_WIDTH, num_anchors, num_classes)
    scores, boxes = head.classification_head, head.regression_head
    for part in (scores, boxes):
        part.conv = nn.Sequential(*(_separable() for _ in range(_DEPTH)))
    scores.cls_logits = nn.Conv2d(_WIDTH, num_anchors * num_classes, 1)
    boxes.bbox_reg = nn.Conv2d(_WIDTH, num_anchors * 4, 1)
    for layer in (scores.cls_logits, boxes.bbox_reg):
        nn.init.normal_(layer.weight, std=0.01)
        nn.init.zeros_(layer.bias)
    nn.init.constant_(scores.cls_logits.bias, -math.log((1 - _PRIOR) / _PRIOR))
    return head


class Detector(RetinaNet):  # type: ignore[misc]
    """A RetinaNet that takes the outputs of the frozen part of its backbone instead of images.

    Args:
        num_classes: C.
        canvas: height and width of the images.
        backbone: EfficientNet-Lite0.
        anchors: at each location.
    """

    def __init__(
        self, num_classes: int, canvas: tuple[int, int], backbone: EfficientNetLite0, anchors: Anchors = NINE
    ) -> None:
        sizes = tuple(tuple(size * stride for size in anchors.sizes) for stride in _STRIDES)
        super().__init__(
            _Neck(backbone),
            num_classes,
            anchor_generator=AnchorGenerator(sizes, (anchors.shapes,) * len(sizes)),
            head=_head(num_classes, anchors.number()),
            # Every score counts, since scores of ranking losses are not probabilities.
            score_thresh=0.0,
            topk_candidates=300,
            detections_per_img=100,
        )
        self.canvas = canvas

    def parameter_groups(self, learning_rate: float, factor: float) -> list[dict[str, Any]]:
        """Neck and head with the learning rate, and the trained part of the backbone with ``factor`` times it."""
        of_backbone = [x for x in self.backbone.backbone.parameters() if x.requires_grad]
        others = [x for name, x in self.named_parameters() if not name.startswith("backbone.backbone.")]
        groups = [{"params": others, "lr": learning_rate}]
        return [*groups, {"params": of_backbone, "lr": factor * learning_rate}] if of_backbone else groups

    def _outputs(self, inputs: list[Tensor]) -> tuple[dict[str, Tensor], list[Tensor], list[int]]:
        features = self.backbone(inputs)
        outputs = self.head(features)
        images = ImageList(features[0].new_empty(0, 3, *self.canvas), [self.canvas] * len(features[0]))
        anchors: list[Tensor] = self.anchor_generator(images, features)
        places = [x.shape[-2] * x.shape[-1] for x in features]
        at_each = outputs["cls_logits"].shape[1] // sum(places)
        return outputs, anchors, [at_each * number for number in places]

    def losses(self, inputs: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The parts of the loss by name, of a batch in training mode."""
        outputs, anchors, _ = self._outputs(inputs)
        found: dict[str, Tensor] = self.compute_loss(targets, outputs, anchors)
        return found

    @torch.no_grad()
    def detect(self, inputs: list[Tensor], shapes: Sequence[tuple[int, int]]) -> list[dict[str, Tensor]]:
        """For each image ``boxes`` [n, 4], ``scores`` [n] and ``labels`` [n], best first; ``shapes`` are heights and
        widths of the images."""
        outputs, anchors, sizes = self._outputs(inputs)
        levels = {name: list(x.split(sizes, 1)) for name, x in outputs.items() if isinstance(x, Tensor)}
        found: list[dict[str, Tensor]] = self.postprocess_detections(
            levels, [list(x.split(sizes)) for x in anchors], list(shapes)
        )
        return found
