"""A small model of each torchvision detector, with random weights, and what tests of several files do with them."""

from typing import NamedTuple

import pytest
import torch
from adapters import own_loss
from torch import nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import MultiScaleRoIAlign

from alrp_triton import ALRPLoss
from alrp_triton.assigners import ATSS
from alrp_triton.integrations.torchvision import use_alrp, use_ap, use_loss, use_ndcg, use_rank_sort

NUM_CLASSES = 4
SIZE = 64


class Backbone(nn.Module):
    """Two levels, of strides 8 and 16."""

    def __init__(self, channels=32):
        super().__init__()
        self.out_channels = channels
        self.fine = nn.Sequential(nn.Conv2d(3, channels, 5, 4, 2), nn.ReLU(), nn.Conv2d(channels, channels, 3, 2, 1))
        self.coarse = nn.Sequential(nn.ReLU(), nn.Conv2d(channels, channels, 3, 2, 1))

    def forward(self, images):
        fine = self.fine(images)
        return {"0": fine, "1": self.coarse(fine)}


def start(seed, sizes):
    torch.manual_seed(seed)
    sizes = {"min_size": SIZE, "max_size": SIZE, **sizes}
    return Backbone(), {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, **sizes}


def build_retinanet(seed=0, num_classes=NUM_CLASSES, **options):
    backbone, options = start(seed, options)
    anchors = AnchorGenerator(((16, 24), (32, 48)), ((1.0,), (1.0,)))
    return RetinaNet(backbone, num_classes, anchor_generator=anchors, **{"score_thresh": 0.0, **options})


def build_fcos(seed=0, num_classes=NUM_CLASSES, sides=(4, 8), **options):
    """Small ``sides`` of what stands for the points make small objects those of the second level."""
    backbone, options = start(seed, options)
    anchors = AnchorGenerator(tuple((side,) for side in sides), ((1.0,),) * 2)
    return FCOS(backbone, num_classes, anchor_generator=anchors, **{"score_thresh": 0.0, **options})


def build_faster_rcnn(seed=0, num_classes=NUM_CLASSES, **options):
    """``num_classes`` without the background, unlike torchvision's."""
    backbone, options = start(seed, options)
    return FasterRCNN(
        backbone,
        rpn_anchor_generator=AnchorGenerator(((16, 24), (32, 48)), ((1.0,), (1.0,))),
        box_roi_pool=MultiScaleRoIAlign(["0", "1"], output_size=3, sampling_ratio=2),
        box_head=TwoMLPHead(backbone.out_channels * 9, 48),
        box_predictor=FastRCNNPredictor(48, 1 + num_classes),
        **{"box_score_thresh": 0.0, **options},
    )


BUILDERS = {"retinanet": build_retinanet, "fcos": build_fcos, "faster_rcnn": build_faster_rcnn}
LOSSES = {
    "retinanet": ["classification", "bbox_regression"],
    "fcos": ["classification", "bbox_regression", "bbox_ctrness"],
    "faster_rcnn": ["loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"],
}
BOX_LOSS = {"retinanet": "bbox_regression", "fcos": "bbox_regression", "faster_rcnn": "loss_box_reg"}


def use_own(model, **options):
    return use_loss(model, own_loss(), **options)


WITH_BOXES = {"alrp": use_alrp, "rank_sort": use_rank_sort}
SCORES_ONLY = {"ap": use_ap, "ndcg": use_ndcg, "own": use_own}
MEMBERS = {**WITH_BOXES, **SCORES_ONLY}


class Case(NamedTuple):
    """A detector with a member of the family."""

    name: str
    member: str = "alrp"
    options: dict = {}  # noqa: RUF012

    def build(self, seed=0, **more):
        return self.use(BUILDERS[self.name](seed), **more)

    def use(self, model, **more):
        return MEMBERS[self.member](model, **self.options, **more)


CASES = {f"{name}-{member}": Case(name, member) for name in ("retinanet", "fcos") for member in MEMBERS}
CASES |= {f"faster_rcnn-{member}": Case("faster_rcnn", member) for member in WITH_BOXES}
CASES |= {"retinanet-atss": Case("retinanet", options={"assigner": ATSS()})}
CASES |= {"fcos-drop": Case("fcos", options={"centerness": "drop"})}
every_detector = pytest.mark.parametrize("name", BUILDERS)
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def constant(name, **options):
    """A detector with aLRP Loss and constant weights of the boxes: 3, and 2 in a proposal network."""
    if name == "faster_rcnn":
        options.setdefault("rpn_criterion", ALRPLoss(tau=0.7, self_balance=2.0))
    return use_loss(spread(BUILDERS[name]()), ALRPLoss(self_balance=3.0), **options)


def spread(model):
    """Larger last-layer weights: scores that differ by more than the ramp, boxes that differ from their anchors."""
    generator = torch.Generator().manual_seed(7)
    scales = {"cls_logits": 2.0, "bbox_reg": 0.5, "bbox_ctrness": 1.0, "bbox_pred": 0.3, "cls_score": 1.0}
    with torch.no_grad():
        for name, layer in model.named_modules():
            if scale := scales.get(name.rpartition(".")[2]):
                layer.weight.copy_(scale * torch.randn(layer.weight.shape, generator=generator))
        if isinstance(model, FCOS):
            model.head.regression_head.bbox_reg.weight.mul_(0.02)
            model.head.regression_head.bbox_reg.bias.copy_(torch.tensor([4.0, 2, 5, 3]))
    return model


def criteria(model):
    """Those of a model, by where they are."""
    return {name: part for name, part in model.named_modules() if name.endswith(".ranking_criterion")}


def head_inputs(model, images, targets):
    """The arguments that torchvision hands to ``head.compute_loss``, recorded in a training step of ``model``."""
    recorded = []

    class Listening(type(model.head)):
        def compute_loss(self, *arguments):
            recorded.extend(arguments)
            return {}

    original, model.head.__class__ = model.head.__class__, Listening
    try:
        model(images, targets)
    finally:
        model.head.__class__ = original
    return recorded


def same(one, other):
    """Whether two lists of detections are the same."""
    pairs = list(zip(one, other))
    return all(len(a["boxes"]) > 0 and all(torch.equal(a[key], b[key]) for key in a) for a, b in pairs)


def objects(boxes_per_image=(2, 1), seed=1, sizes=None, background=0):
    """Images [3, H, W] of noise with squares of their class's colour, and their targets.

    Labels begin at 0, or at 1 where the ``background`` is that of Faster R-CNN.
    """
    generator = torch.Generator().manual_seed(seed)
    images, targets = [], []
    for image, num in enumerate(boxes_per_image):
        height, width = sizes[image] if sizes else (SIZE, SIZE)
        picture = 0.4 + 0.2 * torch.rand(3, height, width, generator=generator)
        corners = torch.rand(num, 2, generator=generator) * torch.tensor([width / 2 - 26, height - 27])
        corners = corners.round() + torch.arange(num)[:, None] * torch.tensor([width / max(num, 1), 0]).round()
        sides = torch.randint(18, 27, (num, 1), generator=generator).expand(num, 2)
        boxes = torch.cat([corners, corners + sides], 1)
        boxes[:, 2::2] = boxes[:, 2::2].clamp(max=width)
        labels = torch.randint(NUM_CLASSES, (num,), generator=generator)
        for (x1, y1, x2, y2), label in zip(boxes.int().tolist(), labels.tolist()):
            colour = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]][label])
            picture[:, y1:y2, x1:x2] = colour[:, None, None]
        images.append(picture)
        targets.append({"boxes": boxes, "labels": labels + background})
    return images, targets


def batch_for(name, *arguments, **options):
    """As :func:`objects`, with labels as the detector of that name counts them."""
    return objects(*arguments, background=int(name == "faster_rcnn"), **options)
