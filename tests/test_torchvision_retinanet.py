"""RetinaNet: its conventions, with torchvision's matcher and with ATSS or another assigner in its place."""

import pytest
import torch

pytest.importorskip("torchvision")

from adapters import Recorder, assert_same_gradients, by_batch_or_image, every_copy, false_alarm_error, of_either_kind
from detectors import MEMBERS, NUM_CLASSES, SCORES_ONLY, batch_for, build_retinanet, constant, head_inputs, spread
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import box_convert, box_iou, generalized_box_iou

from alrp_triton import ALRPLoss, alrp_loss, ap_loss, ndcg_loss, rank_sort_loss
from alrp_triton.assigners import ATSS
from alrp_triton.framework import ranking_loss
from alrp_triton.integrations.torchvision import use_alrp, use_loss, use_rank_sort

DIRECT = {
    "ap": ap_loss,
    "ndcg": ndcg_loss,
    "own": lambda *arguments: ranking_loss(*arguments, false_alarm_error, delta=0.5),
}
SIDES = ((32, 32 * 2**0.5), (64, 64 * 2**0.5))  # those published: 4 strides, and half an octave more


def published(model):
    """A model with square anchors, two at each place."""
    anchors = AnchorGenerator(SIDES, ((1.0,),) * 2)
    assert anchors.num_anchors_per_location() == model.anchor_generator.num_anchors_per_location()
    model.anchor_generator = anchors
    return model


def matches(model, assigner, images, targets, anchors):
    """What an assigner says, image by image."""
    maps = model.backbone(model.transform(images)[0].tensors).values()
    sizes = [2 * level.shape[-2] * level.shape[-1] for level in maps]
    return sizes, [assigner(list(boxes.split(sizes)), target["boxes"]) for boxes, target in zip(anchors, targets)]


def by_hand(targets, outputs, anchors, matched_idxs):
    """One-hot labels, anchor by anchor; predicted and true boxes of the positives from the formulas of R-CNN."""
    one_hot, predicted, true = [], [], []
    for image, matched in enumerate(matched_idxs):
        for anchor, index in enumerate(matched.tolist()):
            row = torch.full((NUM_CLASSES,), -1 if index == -2 else 0)
            if index >= 0:
                row[targets[image]["labels"][index]] = 1
                dx, dy, dw, dh = outputs["bbox_regression"][image, anchor]
                x, y, w, h = box_convert(anchors[image][anchor], "xyxy", "cxcywh")
                predicted.append(torch.stack([x + dx * w, y + dy * h, w * dw.exp(), h * dh.exp()]))
                true.append(targets[image]["boxes"][index])
            one_hot.append(row)
    return torch.stack(one_hot), box_convert(torch.stack(predicted), "cxcywh", "xyxy"), torch.stack(true)


@pytest.mark.parametrize("assigner", [None, ATSS()])
@pytest.mark.parametrize("boxes_per_image", [(3, 2), (0, 4), (2, 0, 3)])
@pytest.mark.parametrize("member", ["alrp", "rank_sort"])
def test_losses_equal_those_computed_by_hand(member, boxes_per_image, assigner):
    model = constant("retinanet", assigner=assigner)
    model = published(model) if assigner else model
    if member == "rank_sort":
        use_rank_sort(model, assigner=assigner)
    images, targets = batch_for("retinanet", boxes_per_image)
    inputs = head_inputs(model, images, targets)
    targets, outputs, anchors, matched = inputs
    if assigner:
        _, matched = matches(model, assigner, images, targets, anchors)
    assert {-1, 0} | ({-2} if assigner is None else set()) <= set(torch.cat(matched).tolist())
    losses = model.head.compute_loss(*inputs)

    labels, predicted, true = by_hand(targets, outputs, anchors, matched)
    logits, errors = outputs["cls_logits"].flatten(0, 1), 1 - generalized_box_iou(predicted, true).diagonal()
    if member == "alrp":  # (1 - GIoU) / 2 / (1 - tau) with tau = 0.5
        expected = alrp_loss(logits, labels, errors)
        cls, loc = expected.cls, 3.0 * expected.loc
    else:
        cls = sum(rank_sort_loss(logits, labels, box_iou(predicted, true).diagonal()))
        weights = logits.detach()[(labels == 1).any(1)].amax(1).sigmoid()
        loc = (weights * errors).sum() / weights.sum()
        loc = loc * (cls / loc).detach()
    assert list(losses) == ["classification", "bbox_regression"]
    torch.testing.assert_close(losses["classification"], cls)
    torch.testing.assert_close(losses["bbox_regression"], loc)
    assert_same_gradients(sum(losses.values()), cls + loc, [outputs["cls_logits"], outputs["bbox_regression"]])


@by_batch_or_image
@of_either_kind
def test_what_a_criterion_is_given(takes_boxes, per_image):
    """A hand-written assignment: classes, background, ignored, and boxes in the order of the positives."""
    head = use_loss(build_retinanet(), Recorder(takes_boxes), per_image=per_image).head
    boxes = torch.tensor([[0.0, 0, 8, 8], [8, 8, 24, 24], [2, 2, 10, 30]])
    targets = [
        {"boxes": boxes[:2], "labels": torch.tensor([3, 1])},
        {"boxes": boxes[2:], "labels": torch.tensor([0])},
    ]
    outputs = {"cls_logits": torch.zeros(2, 5, NUM_CLASSES), "bbox_regression": torch.zeros(2, 5, 4)}
    anchors = [10 * torch.rand(5, 4) for _ in range(2)]
    matched = [torch.tensor([1, -1, -2, 0, -1]), torch.tensor([-2, -1, 0, -1, -2])]
    head.compute_loss(targets, outputs, anchors, matched)

    logits, labels, *given = head.ranking_criterion.arguments
    assert logits is outputs["cls_logits"]  # neither flattened nor copied
    assert labels.tolist() == [[1, 4, -7, 3, 4], [-7, 4, 0, 4, -7]]
    if takes_boxes:
        torch.testing.assert_close(given[0], torch.stack([anchors[0][0], anchors[0][3], anchors[1][2]]))
        assert given[1].tolist() == boxes[[1, 0, 2]].tolist()
    else:
        assert given == []
    head.ranking_criterion.assert_told(3, [[[0] * 5, [1] * 5]] if per_image else None)


@pytest.mark.parametrize("boxes_per_image", [(3, 2), (0, 4)])
@pytest.mark.parametrize("box_loss", ["l1", "smooth_l1", "giou"])
@pytest.mark.parametrize("member", SCORES_ONLY)
def test_only_the_classification_part_is_replaced(member, box_loss, boxes_per_image):
    plain, model = spread(build_retinanet()), SCORES_ONLY[member](spread(build_retinanet()))
    for each in (plain, model):
        each.head.regression_head._loss_type = box_loss
    inputs = head_inputs(model, *batch_for("retinanet", boxes_per_image))
    logits, deltas = inputs[1]["cls_logits"], inputs[1]["bbox_regression"]
    losses, own = model.head.compute_loss(*inputs), plain.head.compute_loss(*inputs)
    direct = DIRECT[member](logits.flatten(0, 1), by_hand(*inputs)[0])
    assert 0 < losses["classification"] == direct != own["classification"]
    assert_same_gradients(losses["classification"], direct, [logits], rtol=0, atol=0)
    assert 0 < losses["bbox_regression"] == own["bbox_regression"]
    assert_same_gradients(sum(losses.values()), own["bbox_regression"], [deltas], rtol=0, atol=0)


@pytest.mark.parametrize("boxes_per_image", [(2, 1), (0, 3), (0, 0)])
@pytest.mark.parametrize("member", MEMBERS)
def test_the_losses_are_those_of_an_assigner_s_matches(member, boxes_per_image):
    """As if torchvision's matcher had found what the assigner finds, image by image."""
    model = MEMBERS[member](published(spread(build_retinanet())), assigner=ATSS(4))
    images, targets = batch_for("retinanet", boxes_per_image, sizes=[(64, 64), (64, 96)])
    inputs = head_inputs(model, images, targets)
    targets, outputs, anchors, by_matcher = inputs
    _, matched = matches(model, ATSS(4), images, targets, anchors)
    losses, plain = model.head.compute_loss(*inputs), MEMBERS[member](model).head
    assert losses == plain.compute_loss(targets, outputs, anchors, matched)
    if any(boxes_per_image):
        other = plain.compute_loss(targets, outputs, anchors, by_matcher)
        assert all(losses[part] != other[part] for part in losses)


def test_an_assigner_is_called_for_each_image_with_the_anchors_of_each_level():
    calls = []

    def assigner(anchors, boxes):
        calls.append((anchors, boxes))
        return ATSS()(anchors, boxes)

    model = use_alrp(published(build_retinanet()), assigner=assigner)
    images, targets = batch_for("retinanet", (2, 0), sizes=[(64, 64), (64, 96)])
    model(images, targets)
    sizes, _ = matches(model, ATSS(), images, [], [])
    assert [[len(level) for level in anchors] for anchors, _ in calls] == [sizes] * 2
    for anchors, _ in calls:
        for level, sides in zip(anchors, SIDES):
            assert ((level[:2, 2] - level[:2, 0]) - torch.tensor(sides)).abs().max() < 1
    assert [len(boxes) for _, boxes in calls] == [2, 0]


def test_ignored_anchors_of_an_assigner():
    def all_ignored_but_one(anchors, boxes):
        matched = torch.full((sum(map(len, anchors)),), -2)
        matched[3] = 0
        return matched

    model = use_loss(build_retinanet(), Recorder(), assigner=all_ignored_but_one)
    model(*batch_for("retinanet", (1, 1)))
    labels = model.head.ranking_criterion.arguments[1]
    assert (labels[:, 3] < NUM_CLASSES).all()
    assert (labels != -7).sum() == (labels[:, 3] >= 0).sum() == 2


class OwnHead(RetinaNetHead):
    """A user's own head: what it overrides must survive."""

    def forward(self, x):
        return {name: 2 * value for name, value in super().forward(x).items()}


@every_copy
def test_a_head_of_one_s_own_keeps_what_it_overrides(duplicate):
    batch = batch_for("retinanet")
    own, plain = (
        use_loss(build_retinanet(head=kind(32, 2, NUM_CLASSES)), ALRPLoss()) for kind in (OwnHead, RetinaNetHead)
    )
    plain.load_state_dict(own.state_dict())
    assert own(*batch) != plain(*batch)
    twin = duplicate(own)
    assert isinstance(twin.head, OwnHead)
    assert type(twin.head) is type(own.head) is not type(plain.head)
    assert twin(*batch) == own(*batch)
