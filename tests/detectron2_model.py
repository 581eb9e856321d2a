"""A small RetinaNet of the stand-in for Detectron2, batches for it, and the integration imported with the stand-in."""

import importlib

import detectron2_double as double
import torch
from torch import nn

with double.installed():
    integration = importlib.import_module("alrp_triton.integrations.detectron2")

ALRPRetinaNet, add_alrp_config = integration.ALRPRetinaNet, integration.add_alrp_config
NUM_CLASSES = 3


class Backbone(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 8, 3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1))

    def forward(self, images):
        fine = self[1](self[0](images))
        return {"p3": fine, "p4": self[2](fine)}


class Head(nn.Module):
    """One anchor for each place, so that [N, K, H, W] needs no unfolding."""

    def __init__(self):
        super().__init__()
        self.logits, self.deltas = nn.Conv2d(8, NUM_CLASSES, 1), nn.Conv2d(8, 4, 1)

    def forward(self, features):
        return [self.logits(each) for each in features], [self.deltas(each) for each in features]


class Anchors(nn.Module):
    def forward(self, features):
        boxes = []
        for each, stride in zip(features, (8, 16)):
            y, x = torch.meshgrid(*(stride * (torch.arange(n) + 0.5) for n in each.shape[-2:]), indexing="ij")
            centre = torch.stack([x.flatten(), y.flatten()], 1)
            boxes.append(double.Boxes(torch.cat([centre - stride, centre + stride], 1)))
        return boxes


def arguments(cfg=None):
    return {
        "backbone": Backbone(),
        "head": Head(),
        "head_in_features": ["p3", "p4"],
        "anchor_generator": Anchors(),
        "box2box_transform": double.Box2BoxTransform((1.0, 1.0, 1.0, 1.0)),
        "anchor_matcher": double.Matcher([0.2, 0.3], [0, -1, 1], allow_low_quality_matches=True),
        "num_classes": NUM_CLASSES,
        "pixel_mean": [0.5, 0.5, 0.5],
        "pixel_std": [0.25, 0.25, 0.25],
        "max_detections_per_image": 7,
    }


def config(**settings):
    cfg = double.CfgNode(MODEL=double.CfgNode(RETINANET=double.CfgNode(make=arguments)))
    add_alrp_config(cfg)
    for name, value in settings.items():
        assert name in cfg.MODEL.ALRP
        setattr(cfg.MODEL.ALRP, name, value)
    return cfg


def build(seed=0, cls=ALRPRetinaNet, **settings):
    torch.manual_seed(seed)
    model = cls(config(**settings))
    with torch.no_grad():  # scores that differ by more than the ramp, boxes that differ from their anchors
        model.head.logits.weight.mul_(8)
        model.head.deltas.weight.mul_(2)
    return model.train()


def batch(objects_per_image=(3, 2), seed=1):
    generator = torch.Generator().manual_seed(seed)
    inputs = []
    for n in objects_per_image:
        centre, size = torch.rand(2, n, 2, generator=generator).unbind()
        centre, half = 16 + 32 * centre, 6 + 8 * size
        boxes = double.Boxes(torch.cat([centre - half, centre + half], 1))
        classes = torch.randint(NUM_CLASSES, (n,), generator=generator)
        instances = double.Instances((64, 64), gt_boxes=boxes, gt_classes=classes)
        inputs.append({"image": torch.rand(3, 64, 64, generator=generator), "instances": instances})
    return inputs


def losses_of(model, inputs):
    with double.EventStorage():
        return model(inputs)


def arguments_of_losses(model, inputs, monkeypatch):
    """What the model hands to ``losses``."""
    recorded = []
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "losses", lambda self, *given: recorded.extend(given))
        losses_of(model, inputs)
    return recorded
