"""RetinaNet with ATSS or another assigner in the place of its matcher."""

import copy

import pytest
import torch

pytest.importorskip("torchvision")

from detectors import NUM_CLASSES, batch_for, build_retinanet
from test_torchvision import head_inputs, losses_by_hand, through_pickle
from test_torchvision_detectors import overfit
from test_torchvision_family import MEMBERS, SCORES_ONLY
from torchvision.models.detection.anchor_utils import AnchorGenerator

from alrp_triton import ALRPLoss
from alrp_triton.assigners import ATSS
from alrp_triton.integrations.torchvision import use_alrp

SIDES = ((32, 32 * 2**0.5), (64, 64 * 2**0.5))  # 4 strides, and half an octave more


def build(seed=0):
    """The published anchors: square, two at each place."""
    model = build_retinanet(seed)
    published = build_retinanet(seed)
    published.anchor_generator = AnchorGenerator(SIDES, ((1.0,),) * 2)
    assert published.anchor_generator.num_anchors_per_location() == model.anchor_generator.num_anchors_per_location()
    return published


def places(model, images):
    """How many anchors each level has."""
    maps = model.backbone(model.transform(images)[0].tensors).values()
    return [2 * level.shape[-2] * level.shape[-1] for level in maps]


def recorded(assigner):
    calls = []

    def call(anchors, boxes):
        calls.append((anchors, boxes))
        return assigner(anchors, boxes)

    call.calls = calls
    return call


@pytest.mark.parametrize("boxes_per_image", [(2, 1), (0, 3), (0, 0)])
@pytest.mark.parametrize("name", MEMBERS)
def test_the_losses_are_those_of_its_matches(name, boxes_per_image):
    """As if torchvision's matcher had found what the assigner finds, image by image."""
    arguments = (ALRPLoss(self_balance=2.0),) if name == "alrp" else ()
    model = MEMBERS[name](build(), *arguments, assigner=ATSS(4))
    plain = MEMBERS[name](build(), *arguments)
    images, targets = batch_for("retinanet", boxes_per_image, sizes=[(64, 64), (64, 96)])
    given = head_inputs(model, images, targets)
    targets, outputs, anchors, by_matcher = given
    sizes = places(model, images)
    matched = [ATSS(4)(list(boxes.split(sizes)), target["boxes"]) for boxes, target in zip(anchors, targets)]
    losses, expected = model.head.compute_loss(*given), plain.head.compute_loss(targets, outputs, anchors, matched)
    assert losses == expected
    if any(boxes_per_image):
        assert {-1, 0} <= set(torch.cat(matched).tolist())
        other = plain.head.compute_loss(targets, outputs, anchors, by_matcher)
        assert losses["classification"] != other["classification"]
        if name in SCORES_ONLY or name == "alrp":
            assert losses["bbox_regression"] != other["bbox_regression"]


def test_losses_equal_those_computed_by_hand():
    model = use_alrp(build(), ALRPLoss(self_balance=3.0), assigner=ATSS())
    images, targets = batch_for("retinanet")
    targets, outputs, anchors, _ = head_inputs(model, images, targets)
    matched = [
        ATSS()(list(boxes.split(places(model, images))), target["boxes"]) for boxes, target in zip(anchors, targets)
    ]
    expected = losses_by_hand(model.head, targets, outputs, anchors, matched)
    losses = model(*batch_for("retinanet"))
    torch.testing.assert_close(losses["classification"], expected.cls)
    torch.testing.assert_close(losses["bbox_regression"], 3.0 * expected.loc)


def test_an_assigner_is_called_for_each_image_with_the_anchors_of_each_level():
    call = recorded(ATSS())
    model = use_alrp(build(), assigner=call)
    images, targets = batch_for("retinanet", (2, 0), sizes=[(64, 64), (64, 96)])
    model(images, targets)
    assert [[len(level) for level in anchors] for anchors, _ in call.calls] == [places(model, images)] * 2
    for anchors, _ in call.calls:
        for level, sides in zip(anchors, SIDES):
            assert ((level[:2, 2] - level[:2, 0]) - torch.tensor(sides)).abs().max() < 1
    assert [len(boxes) for _, boxes in call.calls] == [2, 0]


def test_ignored_anchors_of_an_assigner():
    def all_ignored_but_one(anchors, boxes):
        matched = torch.full((sum(map(len, anchors)),), -2)
        matched[3] = 0
        return matched

    criterion = ALRPLoss(self_balance=1.0)
    labels = []
    criterion.register_forward_pre_hook(lambda _, arguments: labels.append(arguments[1]))
    model = use_alrp(build(), criterion, assigner=all_ignored_but_one)
    losses = model(*batch_for("retinanet", (1, 1)))
    assert (labels[0][:, 3] < NUM_CLASSES).all()
    assert (labels[0] != -1).sum() == (labels[0][:, 3] >= 0).sum() == 2
    sum(losses.values()).backward()


def test_two_images_are_learned():
    model = use_alrp(build_retinanet(), ALRPLoss(self_balance=1.0), assigner=ATSS())
    values, found = overfit(model, "retinanet", 60)
    assert found == 1
    assert sum(values[-5:]) / 5 < 0.5 * values[0]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle])
def test_copies_keep_it_and_another_call_takes_it_away(duplicate):
    batch = batch_for("retinanet")
    model = use_alrp(build(), assigner=ATSS())
    losses = model(*batch)
    twin = duplicate(use_alrp(build(), assigner=ATSS()))
    assert twin(*batch) == losses
    assert use_alrp(twin)(*batch) == use_alrp(build())(*batch) != losses


def test_inference_is_unchanged():
    images, _ = batch_for("retinanet")
    for expected, got in zip(build().eval()(images), use_alrp(build(), assigner=ATSS()).eval()(images)):
        assert len(expected["boxes"]) > 0
        assert all(torch.equal(expected[key], got[key]) for key in expected)


def test_under_autocast():
    model = use_alrp(build(), assigner=ATSS())
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(*batch_for("retinanet"))
    assert losses["classification"] > 0
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
