"""Small heads, a batch of targets and predictions for them, and the loss as its formulas have it."""

from __future__ import annotations

import torch
from mmdet.registry import MODELS
from mmdet_setup import CLASSES, img_meta, instances
from mmengine.config import ConfigDict
from torch import Tensor
from torchvision.ops import box_convert, generalized_box_iou

from alrp_triton.compat import aLRPLoss

C = len(CLASSES)
STRIDES = (8, 16, 32)
IOU = {"type": "MaxIoUAssigner", "pos_iou_thr": 0.5, "neg_iou_thr": 0.4, "min_pos_iou": 0.2, "ignore_iof_thr": 0.5}
ATSS = {"type": "ATSSAssigner", "topk": 9, "ignore_iof_thr": 0.5}
CODER = {"type": "DeltaXYWHBBoxCoder", "target_means": (0.0,) * 4, "target_stds": (0.1, 0.1, 0.2, 0.2)}
PLAIN = {"type": "ALRPLoss", "self_balance": 3.0}
FOCAL = {"type": "FocalLoss"}
# Images of other sizes in one batch, of which the second is padded; one with an ignored instance, one without objects.
METAS = [img_meta(64, 64), img_meta(40, 64), img_meta(64, 64)]
OBJECTS = [
    instances([[2, 2, 26, 30], [30, 20, 62, 60], [36, 4, 52, 20]], [1, 0, 2]),
    instances([[10, 8, 40, 38]], [1]),
    instances([], []),
]
IGNORED = [instances([], []), instances([], []), instances([[20, 20, 50, 50]], [0])]


def anchor_head(kind: str, assigner: dict | None = IOU, **settings):
    config = {
        "type": kind,
        "in_channels": 8,
        "feat_channels": 32,
        "anchor_generator": {
            "type": "AnchorGenerator",
            "octave_base_scale": 2,
            "scales_per_octave": 2,
            "ratios": [1.0],
            "strides": STRIDES,
        },
        "bbox_coder": CODER,
        "loss_cls": PLAIN,
        "train_cfg": ConfigDict(assigner=assigner, allowed_border=-1, pos_weight=-1, debug=False),
        **({"num_classes": C, "stacked_convs": 1} if kind != "RankingRPNHead" else {}),
        **settings,
    }
    return MODELS.build(config)


ANCHOR_HEADS = {
    "retina": lambda **settings: anchor_head("RankingRetinaHead", **settings),
    "retina-atss": lambda **settings: anchor_head("RankingRetinaHead", ATSS, **settings),
    "atss": lambda **settings: anchor_head("RankingATSSHead", ATSS, **settings),
    "rpn": lambda **settings: anchor_head(
        "RankingRPNHead",
        **{"loss_cls": {"type": "ALRPLoss", "tau": 0.7, "self_balance": 3.0, "loss_weight": 0.2}, **settings},
    ),
}


def fovea_head(**settings):
    config = {
        "type": "RankingFoveaHead",
        "num_classes": C,
        "in_channels": 8,
        "feat_channels": 8,
        "stacked_convs": 1,
        "strides": STRIDES,
        "base_edge_list": [8, 16, 32],
        "scale_ranges": ((1, 24), (12, 40), (24, 128)),
        "loss_cls": PLAIN,
    }
    return MODELS.build({**config, **settings})


def bbox_head(**settings):
    config = {
        "type": "RankingShared2FCBBoxHead",
        "in_channels": 4,
        "fc_out_channels": 8,
        "num_classes": C,
        "bbox_coder": CODER,
        "loss_cls": PLAIN,
    }
    return MODELS.build({**config, **settings})


def regions() -> tuple[Tensor, ...]:
    """Of two images: regions, labels, weights, true boxes, their weights. The fourth is ignored."""
    boxes = torch.tensor(
        [[2.0, 2, 28, 30], [30, 20, 60, 60], [0, 0, 9, 9], [5, 5, 40, 40], [8, 8, 44, 40], [40, 1, 60, 9]]
    )
    images = torch.tensor([0.0, 0, 0, 0, 1, 1])
    true = torch.tensor([[2.0, 2, 26, 30], [30, 20, 62, 60], [0, 0, 0, 0], [9, 9, 9, 9], [10, 8, 40, 38], [0, 0, 0, 0]])
    labels = torch.tensor([1, 0, C, 2, 1, C])
    weights = torch.tensor([1.0, 1, 1, 0, 1, 1])
    return torch.cat([images[:, None], boxes], 1), labels, weights, true, (labels < C).float()[:, None].expand(6, 4)


def predictions(num_anchors: int, num_classes: int = C, seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """Scores that differ by more than the ramp, deltas that move boxes, of the three levels of a 64 x 64 batch."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [64 // stride for stride in STRIDES]
    scores = [3 * torch.randn(3, num_anchors * num_classes, n, n, generator=generator) for n in sizes]
    deltas = [torch.randn(3, num_anchors * 4, n, n, generator=generator) for n in sizes]
    return [s.requires_grad_() for s in scores], [d.requires_grad_() for d in deltas]


def rows(levels: list[Tensor], size: int) -> list[Tensor]:
    """Of each level ``[B, cells * anchors, size]``, copied."""
    return [level.permute(0, 2, 3, 1).reshape(len(level), -1, size) for level in levels]


def decoded(anchors: Tensor, deltas: Tensor) -> Tensor:
    x, y, w, h = box_convert(anchors, "xyxy", "cxcywh").unbind(-1)
    dx, dy, dw, dh = (deltas * torch.tensor([0.1, 0.1, 0.2, 0.2])).unbind(-1)
    return box_convert(torch.stack([x + dx * w, y + dy * h, w * dw.exp(), h * dh.exp()], -1), "cxcywh", "xyxy")


def giou(pred: Tensor, target: Tensor) -> Tensor:
    return generalized_box_iou(pred, target).diagonal()


def alrp_by_hand(scores: Tensor, labels: Tensor, errors: Tensor) -> tuple[Tensor, Tensor]:
    """From flat rows: one-hot labels, the authors' signature, and their sum over sorted errors."""
    one_hot = (labels[:, None] == torch.arange(scores.shape[1])).long()
    one_hot[labels == -1] = -1
    cls, rank, order = aLRPLoss.apply(scores.reshape(-1), one_hot.reshape(-1), errors)
    order = order.flip(0)
    return cls, (errors[order].cumsum(0) / rank[order]).mean()


def assert_same_gradients(found: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    for got, want in zip(
        torch.autograd.grad(found, inputs, retain_graph=True), torch.autograd.grad(expected, inputs, retain_graph=True)
    ):
        assert (got - want).norm() <= 1e-5 * want.norm()
    assert sum(g.abs().sum() for g in torch.autograd.grad(expected, inputs)) > 0
