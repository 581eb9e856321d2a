"""A stand-in for the parts of Detectron2 that the integration touches, since no package registry has Detectron2.

Written from the documented interfaces of Detectron2 0.6: the same names, argument order, shapes and results, with as
little behind them as works: one linear layer for each level, a matcher by thresholds, inference by the highest scores.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
from contextlib import contextmanager
from unittest import mock

import torch
from torch import nn
from torch.nn import functional
from torchvision.ops import box_iou, sigmoid_focal_loss


class CfgNode(dict):
    """Attribute access to a dictionary."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __setattr__(self, name, value):
        self[name] = value


def configurable(init):
    """Lets a constructor take a config, which the class's ``from_config`` turns into its arguments."""
    assert inspect.isfunction(init)
    assert init.__name__ == "__init__"

    @functools.wraps(init)
    def wrapped(self, *args, **kwargs):
        if args and isinstance(args[0], CfgNode):
            assert next(iter(inspect.signature(type(self).from_config).parameters)) == "cfg"
            init(self, **{**type(self).from_config(*args), **kwargs})
        else:
            init(self, *args, **kwargs)

    return wrapped


class Registry(dict):
    def register(self):
        def add(thing):
            assert thing.__name__ not in self
            self[thing.__name__] = thing
            return thing

        return add


META_ARCH_REGISTRY = Registry()


class Boxes:
    """Boxes [N, 4] as (x1, y1, x2, y2), under ``tensor``."""

    def __init__(self, tensor):
        self.tensor = tensor

    def __len__(self):
        return len(self.tensor)

    @classmethod
    def cat(cls, boxes_list):
        return cls(torch.cat([boxes.tensor for boxes in boxes_list]))


class Instances:
    """Fields of the objects in an image."""

    def __init__(self, image_size, **fields):
        self.image_size = image_size
        self.__dict__.update(fields)

    def __len__(self):
        return len(next(value for name, value in self.__dict__.items() if name != "image_size"))


class EventStorage:
    """Where a training step logs; the innermost ``with`` is the one that counts."""

    stack: list[EventStorage] = []  # noqa: RUF012

    def __init__(self, start_iter=0):
        self.scalars = {}

    def put_scalar(self, name, value):
        self.scalars[name] = float(value)

    def __enter__(self):
        self.stack.append(self)
        return self

    def __exit__(self, *exception):
        self.stack.pop()


def get_event_storage():
    assert EventStorage.stack, "get_event_storage() has to be called inside a 'with EventStorage(...)' context!"
    return EventStorage.stack[-1]


class Box2BoxTransform:
    def __init__(self, weights, scale_clamp=4.135):
        self.weights, self.scale_clamp = weights, scale_clamp

    def get_deltas(self, src_boxes, target_boxes):
        weights = torch.tensor(self.weights)
        size, target_size = (boxes[:, 2:] - boxes[:, :2] for boxes in (src_boxes, target_boxes))
        offset = (target_boxes[:, :2] + target_boxes[:, 2:] - src_boxes[:, :2] - src_boxes[:, 2:]) / 2
        return torch.cat([offset / size, (target_size / size).log()], 1) * weights

    def apply_deltas(self, deltas, boxes):
        deltas = deltas.float() / torch.tensor(self.weights)
        size = boxes[:, 2:] - boxes[:, :2]
        centre = (boxes[:, :2] + boxes[:, 2:]) / 2 + deltas[:, :2] * size
        half = deltas[:, 2:].clamp(max=self.scale_clamp).exp() * size / 2
        return torch.cat([centre - half, centre + half], 1)


class Matcher:
    def __init__(self, thresholds, labels, allow_low_quality_matches=False):
        self.thresholds, self.labels = thresholds, torch.tensor(labels)

    def __call__(self, match_quality_matrix):
        if match_quality_matrix.numel() == 0:
            none = torch.zeros(match_quality_matrix.shape[1], dtype=torch.int64)
            return none, none.to(torch.int8)
        quality, matches = match_quality_matrix.max(0)
        best = (match_quality_matrix == match_quality_matrix.max(1, keepdim=True).values).any(0)
        labels = self.labels[torch.bucketize(quality, torch.tensor(self.thresholds), right=True)]
        return matches, torch.where(best, 1, labels).to(torch.int8)


@META_ARCH_REGISTRY.register()
class RetinaNet(nn.Module):
    @configurable
    def __init__(
        self,
        *,
        backbone,
        head,
        head_in_features,
        anchor_generator,
        box2box_transform,
        anchor_matcher,
        num_classes,
        focal_loss_alpha=0.25,
        focal_loss_gamma=2.0,
        max_detections_per_image=100,
        pixel_mean,
        pixel_std,
    ):
        super().__init__()
        self.backbone, self.head, self.anchor_generator = backbone, head, anchor_generator
        self.box2box_transform, self.anchor_matcher = box2box_transform, anchor_matcher
        self.head_in_features, self.num_classes = head_in_features, num_classes
        self.focal_loss_alpha, self.focal_loss_gamma = focal_loss_alpha, focal_loss_gamma
        self.max_detections_per_image = max_detections_per_image
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)

    @classmethod
    def from_config(cls, cfg):
        return cfg.MODEL.RETINANET.make(cfg)

    def forward(self, batched_inputs):
        images = torch.stack([(each["image"] - self.pixel_mean) / self.pixel_std for each in batched_inputs])
        features = [self.backbone(images)[name] for name in self.head_in_features]
        logits, deltas = ([each.flatten(2).transpose(1, 2) for each in levels] for levels in self.head(features))
        anchors = self.anchor_generator(features)
        if self.training:
            labels, boxes = self.label_anchors(anchors, [each["instances"] for each in batched_inputs])
            return self.losses(anchors, logits, labels, deltas, boxes)
        found = []
        for image, each in enumerate(batched_inputs):
            scores = torch.cat([level[image] for level in logits]).sigmoid()
            boxes = torch.cat(
                [self.box2box_transform.apply_deltas(d[image], a.tensor) for d, a in zip(deltas, anchors)]
            )
            best, index = scores.flatten().topk(self.max_detections_per_image)
            fields = {"scores": best, "pred_classes": index % self.num_classes}
            size = tuple(each["image"].shape[1:])
            found.append({"instances": Instances(size, pred_boxes=Boxes(boxes[index // self.num_classes]), **fields)})
        return found

    @torch.no_grad()
    def label_anchors(self, anchors, gt_instances):
        anchors = Boxes.cat(anchors)
        gt_labels, matched_gt_boxes = [], []
        for each in gt_instances:
            matches, anchor_labels = self.anchor_matcher(box_iou(each.gt_boxes.tensor, anchors.tensor))
            if len(each):
                labels, boxes = each.gt_classes[matches], each.gt_boxes.tensor[matches]
                labels[anchor_labels == 0] = self.num_classes
                labels[anchor_labels == -1] = -1
            else:
                labels, boxes = torch.full_like(matches, self.num_classes), torch.zeros_like(anchors.tensor)
            gt_labels.append(labels)
            matched_gt_boxes.append(boxes)
        return gt_labels, matched_gt_boxes

    def losses(self, anchors, pred_logits, gt_labels, pred_anchor_deltas, gt_boxes):
        labels = torch.stack(gt_labels)
        valid, positive = labels >= 0, (labels >= 0) & (labels != self.num_classes)
        get_event_storage().put_scalar("num_pos_anchors", positive.sum() / len(labels))
        one_hot = functional.one_hot(labels[valid], self.num_classes + 1)[:, :-1]
        logits, deltas = torch.cat(pred_logits, 1)[valid], torch.cat(pred_anchor_deltas, 1)[positive]
        cls = sigmoid_focal_loss(logits, one_hot.to(logits.dtype), self.focal_loss_alpha, self.focal_loss_gamma)
        image, anchor = positive.nonzero(as_tuple=True)
        wanted = self.box2box_transform.get_deltas(
            Boxes.cat(anchors).tensor[anchor], torch.stack(gt_boxes)[image, anchor]
        )
        normaliser = max(len(image), 1)
        return {"loss_cls": cls.sum() / normaliser, "loss_box_reg": (deltas - wanted).abs().sum() / normaliser}


@contextmanager
def installed():
    """Within this, ``import detectron2`` finds the stand-in."""
    contents = {
        "detectron2": {},
        "detectron2.config": {"CfgNode": CfgNode, "configurable": configurable},
        "detectron2.modeling": {"META_ARCH_REGISTRY": META_ARCH_REGISTRY, "RetinaNet": RetinaNet},
        "detectron2.utils": {},
        "detectron2.utils.events": {"get_event_storage": get_event_storage},
    }
    modules = {name: types.ModuleType(name) for name in contents}
    for name, names in contents.items():
        modules[name].__dict__.update(names)
    with mock.patch.dict(sys.modules, modules):
        yield
