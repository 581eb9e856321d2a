"""What MMDetection's heads do with other members of the family, one ranking per image, and centre-ness."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("mmdet", reason="needs MMDetection: pip install '.[frameworks]'")
pytest.importorskip("torchvision", reason="needs torchvision: pip install '.[frameworks]'")

from adapters import assert_nothing_to_learn, heard
from mmdet_heads import (
    ANCHOR_HEADS,
    FOCAL,
    IGNORED,
    METAS,
    OBJECTS,
    PLAIN,
    STRIDES,
    C,
    assert_same_gradients,
    bbox_head,
    fovea_head,
    predictions,
    regions,
)
from mmdet_setup import instances
from mmengine.structures import InstanceData

import alrp_triton


def test_atss_can_keep_its_centerness():
    settings = {"type": "CrossEntropyLoss", "use_sigmoid": True, "loss_weight": 1.0}
    head, plain = (ANCHOR_HEADS["atss"](loss_centerness=setting) for setting in (settings, None))
    assert set(head.state_dict()) - set(plain.state_dict()) == {"atss_centerness.weight", "atss_centerness.bias"}
    features = [torch.randn(3, 8, 64 // stride, 64 // stride) for stride in STRIDES]
    assert [len(head(features)), len(plain(features))] == [3, 2]

    scores, deltas = predictions(2)
    _, factors = predictions(2, seed=5)
    centernesses = [level[:, :2] for level in factors]
    losses = head.loss_by_feat(scores, deltas, centernesses, OBJECTS, METAS, IGNORED)
    expected = plain.loss_by_feat(scores, deltas, OBJECTS, METAS, IGNORED)
    assert list(losses) == [*expected, "loss_centerness"]
    assert all(torch.equal(losses[key], expected[key]) for key in expected)

    # MMDetection's own head, whose loss of the centre-ness is a sum over levels.
    config = {"type": "ATSSHead", "loss_cls": {**FOCAL, "use_sigmoid": True}, "loss_bbox": {"type": "GIoULoss"}}
    own = ANCHOR_HEADS["atss"](loss_centerness=settings, **config)
    wanted = own.loss_by_feat(scores, deltas, centernesses, OBJECTS, METAS, IGNORED)
    torch.testing.assert_close(losses["loss_centerness"], sum(wanted["loss_centerness"]))

    empty = head.loss_by_feat(*head(features), [instances([], [])] * 3, METAS, None)
    assert_nothing_to_learn(head, empty)


@pytest.mark.parametrize("loss", ["ALRPLoss", "RankSortLoss", "APLoss", "NDCGLoss"])
def test_a_configuration_turns_statistics_on(loss):
    boxes = {"loss_bbox": {"type": "L1Loss"}} if loss in ("APLoss", "NDCGLoss") else {}
    head, silent = (
        ANCHOR_HEADS["retina"](loss_cls={"type": loss, "monitor": monitor, "loss_weight": 2.0}, **boxes)
        for monitor in (True, False)
    )
    batch = *predictions(2), OBJECTS, METAS, IGNORED
    losses, expected = head.loss_by_feat(*batch), silent.loss_by_feat(*batch)
    assert losses == expected
    assert head.loss_cls.stats["cls"] == losses["loss_cls"] / 2
    assert head.loss_cls.stats["num_positives"] > 3
    assert silent.loss_cls.stats == {}


@pytest.mark.parametrize(
    ("name", "own_type", "loss_bbox", "decoded_boxes"),
    [
        ("retina", "RetinaHead", {"type": "L1Loss"}, False),
        ("retina", "RetinaHead", {"type": "SmoothL1Loss", "beta": 0.11}, False),
        ("retina", "RetinaHead", {"type": "GIoULoss"}, True),
        ("atss", "ATSSHead", {"type": "GIoULoss", "loss_weight": 2.0}, True),
        ("rpn", "RPNHead", {"type": "L1Loss"}, False),
    ],
)
def test_a_loss_on_scores_leaves_the_boxes_to_the_head(name, own_type, loss_bbox, decoded_boxes):
    settings = {"loss_bbox": loss_bbox, "reg_decoded_bbox": decoded_boxes}
    head = ANCHOR_HEADS[name](loss_cls={"type": "APLoss", "delta": 0.5, "loss_weight": 2.0}, **settings)
    own = ANCHOR_HEADS[name](type=own_type, loss_cls={**FOCAL, "use_sigmoid": True}, **settings)
    num_classes = 1 if name == "rpn" else C
    scores, deltas = predictions(2, num_classes)
    factors = [[torch.zeros(3, 2, *s.shape[-2:]) for s in scores]] if name == "atss" else []
    batch = [InstanceData(bboxes=o.bboxes, labels=o.labels.clamp(max=num_classes - 1)) for o in OBJECTS], METAS, IGNORED
    seen = heard(head.loss_cls)
    (_, cls), (_, loc) = head.loss_by_feat(scores, deltas, *batch).items()
    (_, _), (_, wanted), *_ = own.loss_by_feat(scores, deltas, *factors, *batch).items()

    torch.testing.assert_close(loc, sum(wanted))
    assert_same_gradients(loc, sum(wanted), deltas)
    torch.testing.assert_close(cls, 2 * alrp_triton.ap_loss(*seen[0], delta=0.5))
    cls.backward()
    assert all(level.grad.abs().sum() > 0 for level in scores)


def test_losses_on_scores_in_fovea_and_the_second_stage():
    smooth = {"type": "SmoothL1Loss", "beta": 0.11}
    head = fovea_head(loss_cls={"type": "NDCGLoss"}, loss_bbox=smooth)
    own = fovea_head(type="FoveaHead", loss_cls={**FOCAL, "use_sigmoid": True}, loss_bbox=smooth)
    scores, logs = predictions(1)
    losses = head.loss_by_feat(scores, logs, OBJECTS, METAS, None)
    wanted = own.loss_by_feat(scores, logs, OBJECTS, METAS, None)
    torch.testing.assert_close(losses["loss_bbox"], wanted["loss_bbox"])
    assert 0 < losses["loss_cls"] < 1

    rois, labels, _, true, box_weights = regions()
    for decoded_boxes in (False, True):
        settings = {"loss_bbox": {"type": "L1Loss"}, "reg_decoded_bbox": decoded_boxes}
        head = bbox_head(loss_cls={"type": "APLoss"}, **settings)
        own = bbox_head(type="Shared2FCBBoxHead", loss_cls={"type": "CrossEntropyLoss"}, **settings)
        deltas = torch.randn(6, 4 * C)
        arguments = deltas, rois, labels, torch.ones(6), true, box_weights
        losses = head.loss(torch.randn(6, C), *arguments)
        wanted = own.loss(torch.randn(6, C + 1), *arguments)
        torch.testing.assert_close(losses["loss_bbox"], wanted["loss_bbox"])
        assert 0 < losses["loss_cls"] < 1


@pytest.mark.parametrize("name", ["retina", "fovea", "second stage"])
def test_one_ranking_per_image(name):
    """Without ignored positives the loss is the mean of the images' own; those without objects do not count."""
    criterion = {**PLAIN, "per_image": True}
    if name == "second stage":
        rois, labels, weights, true, box_weights = regions()
        scores, deltas = torch.randn(6, C), torch.randn(6, 4 * C)
        arguments = [scores, deltas, rois, labels, weights, true, box_weights]
        together = bbox_head(loss_cls=criterion).loss(*arguments)
        alone = [bbox_head().loss(*(a[rois[:, 0] == image] for a in arguments)) for image in (0, 1)]
    else:
        make = ANCHOR_HEADS["retina"] if name == "retina" else fovea_head
        scores, deltas = predictions(2 if name == "retina" else 1)
        together = make(loss_cls=criterion).loss_by_feat(scores, deltas, OBJECTS, METAS, IGNORED)
        alone = [
            make().loss_by_feat(
                [s[b : b + 1] for s in scores], [d[b : b + 1] for d in deltas], [OBJECTS[b]], [METAS[b]], [IGNORED[b]]
            )
            for b in (0, 1)
        ]
    for key, value in together.items():
        torch.testing.assert_close(value, (alone[0][key] + alone[1][key]) / 2)
