"""The losses of MMDetection's heads against what a plain reading of its conventions gives, on concatenated tensors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

pytest.importorskip("mmdet", reason="needs MMDetection: pip install '.[frameworks]'")
pytest.importorskip("torchvision", reason="needs torchvision: pip install '.[frameworks]'")

from adapters import assert_nothing_to_learn, heard
from mmdet.models.dense_heads import FoveaHead
from mmdet_heads import (
    ANCHOR_HEADS,
    IGNORED,
    METAS,
    OBJECTS,
    STRIDES,
    C,
    alrp_by_hand,
    assert_same_gradients,
    bbox_head,
    decoded,
    fovea_head,
    giou,
    predictions,
    regions,
    rows,
)
from mmdet_setup import img_meta, instances
from mmengine.config import ConfigDict
from mmengine.structures import InstanceData

every_anchor_head = pytest.mark.parametrize("name", ANCHOR_HEADS)


def anchors_by_hand(head, scores, deltas, num_classes=C, tau=0.5) -> tuple[Tensor, Tensor, int, int]:
    """Assigned image by image, then put together level by level."""
    anchors = head.prior_generator.grid_priors([s.shape[-2:] for s in scores], device="cpu")
    counts = [len(level) for level in anchors]
    flat = torch.cat(anchors)
    labels, boxes = [], []
    for objects, ignored, meta in zip(OBJECTS, IGNORED, METAS):
        objects = InstanceData(bboxes=objects.bboxes, labels=objects.labels.clamp(max=num_classes - 1))
        valid = head.prior_generator.valid_flags([s.shape[-2:] for s in scores], meta["pad_shape"], device="cpu")
        inside = torch.cat(valid)
        extra = [[int(v.sum()) for v in valid]] if "topk" in vars(head.assigner) else []
        found = head.assigner.assign(InstanceData(priors=flat[inside]), *extra, objects, ignored).gt_inds
        image_labels = torch.full((len(flat),), -1)
        index = torch.full((len(flat),), -1)
        index[inside] = found
        image_labels[index == 0] = num_classes
        image_labels[index > 0] = objects.labels[index[index > 0] - 1]
        labels.append(image_labels.split(counts))
        at = torch.zeros(len(flat), 4)
        at[index > 0] = objects.bboxes[index[index > 0] - 1]
        boxes.append(at.split(counts))
    flat_labels = torch.cat([torch.cat(level) for level in zip(*labels)])
    flat_boxes = torch.cat([torch.cat(level) for level in zip(*boxes)])
    flat_anchors = torch.cat([level.repeat(len(METAS), 1) for level in anchors])
    positive = (flat_labels >= 0) & (flat_labels < num_classes)
    flat_deltas = torch.cat([level.flatten(0, 1) for level in rows(deltas, 4)])[positive]
    errors = (1 - giou(decoded(flat_anchors[positive], flat_deltas), flat_boxes[positive])) / 2 / (1 - tau)
    flat_scores = torch.cat([level.flatten(0, 1) for level in rows(scores, num_classes)])
    cls, loc = alrp_by_hand(flat_scores, flat_labels, errors)
    return cls, loc, int(positive.sum()), int((flat_labels == -1).sum())


@every_anchor_head
def test_losses_equal_those_computed_by_hand(name):
    head = ANCHOR_HEADS[name]()
    num_classes, tau, weight = (1, 0.7, 0.2) if name == "rpn" else (C, 0.5, 1.0)
    scores, deltas = predictions(2, num_classes)
    objects = OBJECTS
    if name == "rpn":  # as MMDetection's two-stage detectors call it
        objects = [InstanceData(bboxes=o.bboxes, labels=torch.zeros_like(o.labels)) for o in OBJECTS]
    losses = head.loss_by_feat(scores, deltas, objects, METAS, IGNORED)
    cls, loc, num_positives, num_ignored = anchors_by_hand(head, scores, deltas, num_classes, tau)

    assert num_positives >= 4
    assert num_ignored > 20
    prefix = "loss_rpn_" if name == "rpn" else "loss_"
    assert list(losses) == [f"{prefix}cls", f"{prefix}bbox"]
    torch.testing.assert_close(losses[f"{prefix}cls"], weight * cls)
    torch.testing.assert_close(losses[f"{prefix}bbox"], 3 * weight * loc)
    assert_same_gradients(sum(losses.values()), weight * (cls + 3 * loc), [*scores, *deltas])


def test_levels_are_ranked_together_and_in_place():
    head = ANCHOR_HEADS["retina"]()
    scores, deltas = predictions(2)
    seen = heard(head.loss_cls)
    losses = head.loss_by_feat(scores, deltas, OBJECTS, METAS, IGNORED)

    logits, labels, pred_boxes, true_boxes = seen[0]
    for view, level, label in zip(logits, scores, labels):
        assert view.data_ptr() == level.data_ptr()  # neither concatenated nor copied
        batch, _, height, width = level.shape
        assert view.shape == (batch, height, width, 2, C)
        assert label.shape == (batch, height, width, 2)
    one = torch.cat([level.flatten(0, 3) for level in logits]), torch.cat([level.flatten() for level in labels])
    # However the levels are cut: the same bits.
    for count in (1, 7, 50):
        parts = (part.split(count) for part in one)
        split = head.loss_cls(*parts, pred_boxes, true_boxes)
        assert torch.equal(split.cls, losses["loss_cls"])
        assert torch.equal(split.loc, losses["loss_bbox"])
    assert len(pred_boxes) == len(true_boxes) > 0


def test_fovea_equals_what_is_computed_by_hand():
    head = fovea_head()
    scores, logs = predictions(1)
    seen = heard(head.loss_cls)
    losses = head.loss_by_feat(scores, logs, OBJECTS, METAS, None)

    plain = FoveaHead(C, 8, strides=STRIDES, base_edge_list=(8, 16, 32), scale_ranges=((1, 24), (12, 40), (24, 128)))
    sizes = [s.shape[-2:] for s in scores]
    points = plain.prior_generator.grid_priors(sizes, device="cpu")
    labels, targets = plain.get_targets(OBJECTS, sizes, points)
    place = torch.cat([p.repeat(3, 1) for p in points])
    edges = torch.cat([torch.full((3 * len(p), 1), edge) for p, edge in zip(points, (8.0, 16.0, 32.0))])
    positive = labels < C
    assert positive.sum() >= 5

    def boxes(flat: Tensor) -> Tensor:
        left, top, right, bottom = (flat.exp() * edges)[positive].unbind(1)
        x, y = place[positive].unbind(1)
        return torch.stack([x - left, y - top, x + right, y + bottom], 1)

    flat = torch.cat([level.flatten(0, 1) for level in rows(logs, 4)])
    # In pixels: GIoU alone would not tell other units, nor left from right.
    torch.testing.assert_close(seen[0][2], boxes(flat))
    torch.testing.assert_close(seen[0][3], boxes(targets))
    errors = 1 - giou(boxes(flat), boxes(targets))  # divided by 2 and by 1 - tau, which is 1/2
    flat_scores = torch.cat([level.flatten(0, 1) for level in rows(scores, C)])
    cls, loc = alrp_by_hand(flat_scores, labels, errors)
    torch.testing.assert_close(losses["loss_cls"], cls)
    torch.testing.assert_close(losses["loss_bbox"], 3 * loc)
    assert_same_gradients(sum(losses.values()), cls + 3 * loc, [*scores, *logs])


@pytest.mark.parametrize("name", [*ANCHOR_HEADS, "fovea"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_taken_for_what_it_is(name, dtype):
    """Boxes come from it in float32, and scores are not rounded any further: the same bits as from float32 copies."""
    head = fovea_head() if name == "fovea" else ANCHOR_HEADS[name]()
    scores, deltas = predictions(1 if name == "fovea" else 2, 1 if name == "rpn" else C)
    batch = [InstanceData(bboxes=o.bboxes, labels=o.labels * (name != "rpn")) for o in OBJECTS], METAS, IGNORED
    seen = heard(head.loss_cls)
    halves = [[level.detach().to(dtype).requires_grad_() for level in levels] for levels in (scores, deltas)]
    losses = head.loss_by_feat(*halves, *batch)
    expected = head.loss_by_feat(*([level.detach().float() for level in levels] for levels in halves), *batch)
    assert all(torch.equal(losses[key], expected[key]) for key in losses)
    assert torch.equal(seen[0][2], seen[1][2])
    assert seen[0][0][0].dtype == dtype
    sum(losses.values()).backward()
    assert all(level.grad.dtype == dtype and level.grad.isfinite().all() for level in halves[0] + halves[1])


def test_points_of_wide_images_are_not_rounded():
    """In bfloat16 every other point of a stride of 8 is off from 1024 pixels on."""
    head = fovea_head()
    seen = heard(head.loss_cls)
    sizes = [(32 // stride, 1600 // stride) for stride in STRIDES]
    levels = [[torch.randn(1, n, *size).bfloat16() for size in sizes] for n in (C, 4)]
    for inputs in (levels, [[level.float() for level in some] for some in levels]):
        head.loss_by_feat(*inputs, [instances([[1493, 6, 1517, 30]], [0])], [img_meta(32, 1600)])
    assert len(seen[0][2]) > 0
    assert torch.equal(seen[0][2], seen[1][2])
    assert torch.equal(seen[0][3], seen[1][3])


@pytest.mark.parametrize("agnostic", [False, True])
def test_second_stage_equals_what_is_computed_by_hand(agnostic):
    head = bbox_head(reg_class_agnostic=agnostic)
    assert head.fc_cls.out_features == C
    assert head.fc_reg.out_features == (4 if agnostic else 4 * C)
    generator = torch.Generator().manual_seed(0)
    scores = (3 * torch.randn(6, C, generator=generator)).requires_grad_()
    deltas = torch.randn(6, head.fc_reg.out_features, generator=generator).requires_grad_()
    rois, labels, weights, true, box_weights = regions()
    losses = head.loss(scores, deltas, rois, labels, weights, true, box_weights)

    chosen = [0, 1, 4]
    moved = torch.stack([deltas[i, 0 if agnostic else 4 * labels[i] :][:4] for i in chosen])
    errors = 1 - giou(decoded(rois[chosen, 1:], moved), true[chosen])
    cls, loc = alrp_by_hand(scores, labels.masked_fill(weights == 0, -1), errors)
    assert list(losses) == ["loss_cls", "loss_bbox"]
    torch.testing.assert_close(losses["loss_cls"], cls)
    torch.testing.assert_close(losses["loss_bbox"], 3 * loc)
    assert_same_gradients(sum(losses.values()), cls + 3 * loc, [scores, deltas])


def test_second_stage_scores_are_sigmoids():
    head = bbox_head().eval()
    logits = torch.tensor([[2.0, -1.0, 0.5], [-3.0, -4.0, 1.5]])
    rois = regions()[0][:2]
    (found,) = head.predict_by_feat((rois,), (logits,), (torch.zeros(2, 4 * C),), [img_meta(64, 64)], None)
    torch.testing.assert_close(found.scores, torch.cat([logits.sigmoid(), torch.zeros(2, 1)], 1))
    torch.testing.assert_close(found.bboxes, rois[:, 1:].repeat(1, C))

    settings = ConfigDict(score_thr=0.3, nms={"type": "nms", "iou_threshold": 0.5}, max_per_img=10)
    (found,) = head.predict_by_feat((rois,), (logits,), (torch.zeros(2, 4 * C),), [img_meta(64, 64)], settings)
    torch.testing.assert_close(found.scores, torch.tensor([2.0, 1.5, 0.5]).sigmoid())
    assert found.labels.tolist() == [0, 2, 2]
    torch.testing.assert_close(found.bboxes, rois[[0, 1, 0], 1:])
    assert head.loss_cls.get_activation(logits.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("name", [*ANCHOR_HEADS, "fovea"])
def test_no_positives(name):
    """All parameters attached: distributed training need not look for unused ones."""
    head = fovea_head() if name == "fovea" else ANCHOR_HEADS[name]()
    features = [torch.randn(3, 8, 64 // stride, 64 // stride) for stride in STRIDES]
    assert_nothing_to_learn(head, head.loss_by_feat(*head(features), [instances([], [])] * 3, METAS, None))


@pytest.mark.parametrize("count", [0, 5])
def test_no_positives_in_the_second_stage(count):
    head = bbox_head()
    scores, deltas = head(torch.randn(count, 4, 7, 7))
    zeros = torch.zeros(count, 4)
    labels = torch.full((count,), C)
    losses = head.loss(scores, deltas, torch.rand(count, 5), labels, torch.ones(count), zeros, zeros)
    assert_nothing_to_learn(head, losses)


def test_nan_is_not_hidden():
    scores, deltas = predictions(2)
    with torch.no_grad():
        scores[1][0, 0, 0, 0] = math.nan
    losses = ANCHOR_HEADS["retina"]().loss_by_feat(scores, deltas, OBJECTS, METAS, IGNORED)
    assert losses["loss_cls"].isnan()


def test_a_head_that_does_not_rank_is_named():
    from mmdet.registry import MODELS

    head = MODELS.build({"type": "RetinaHead", "num_classes": C, "in_channels": 8, "loss_cls": {"type": "APLoss"}})
    scores, labels = torch.randn(6, C), torch.arange(6) % C
    wanted = "loss_cls: expected a head that ranks, such as RankingRetinaHead instead of RetinaHead, got one that"
    with pytest.raises(TypeError, match=wanted):
        head.loss_cls(scores, labels, torch.ones(6), avg_factor=3.0)
