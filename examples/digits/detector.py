"""A small RetinaNet for the digit scenes: torchvision's detector on a backbone that trains in a minute on a CPU."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import Conv2dNormActivation as conv  # 3 x 3, batch norm, ReLU

CHANNELS = 64
# Square roots of anchor areas on the levels of stride 8 and 16, pixels; height to width of a digit's box is about 1.4.
ANCHOR_SIZES = ((14, 18, 22), (26, 32, 39))
ASPECT_RATIO = 1.4


class Backbone(nn.Module):
    """Grey images [B, 1, H, W] to features [B, 64, H/8, W/8] and [B, 64, H/16, W/16].

    Two levels of a feature pyramid: the fine one also receives the coarse one, enlarged.
    """

    out_channels = CHANNELS

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(1, 24, stride=2), conv(24, 48, stride=2), conv(48, CHANNELS, stride=2))
        self.fine = conv(CHANNELS, CHANNELS)
        self.coarse = nn.Sequential(conv(CHANNELS, CHANNELS, stride=2), conv(CHANNELS, CHANNELS))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.stem(images)
        coarse = self.coarse(features)
        fine = self.fine(features) + F.interpolate(coarse, scale_factor=2.0)
        return {"fine": fine, "coarse": coarse}


def build_detector(num_classes: int, image_size: int) -> RetinaNet:
    """A randomly initialised RetinaNet for grey square images of ``image_size`` pixels."""
    anchors = AnchorGenerator(ANCHOR_SIZES, ((ASPECT_RATIO,),) * len(ANCHOR_SIZES))
    return RetinaNet(
        Backbone(),
        num_classes,
        min_size=image_size,
        max_size=image_size,
        image_mean=[0.5],
        image_std=[0.25],
        anchor_generator=anchors,
        head=RetinaNetHead(
            CHANNELS, anchors.num_anchors_per_location()[0], num_classes, norm_layer=partial(nn.GroupNorm, 8)
        ),
        # Ranking losses order the scores and leave open how high they are: the best detections are kept, by order.
        score_thresh=0.0,
        detections_per_img=50,
    )
