"""Faster R-CNN: both stages as published, from assignment to inference."""

import pytest
import torch

pytest.importorskip("torchvision")

from adapters import Recorder, assert_same_gradients, by_batch_or_image
from detectors import NUM_CLASSES, batch_for, build_faster_rcnn, constant, criteria, spread
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import box_convert, box_iou, clip_boxes_to_image, generalized_box_iou

import alrp_triton
from alrp_triton import RankSortLoss, SelfBalance
from alrp_triton.integrations.torchvision import use_alrp, use_loss, use_rank_sort


def decode(deltas, box, weights):
    """One box, from the formulas of R-CNN."""
    dx, dy, dw, dh = deltas / torch.tensor(weights)
    x, y, w, h = box_convert(box, "xyxy", "cxcywh")
    return box_convert(torch.stack([x + dx * w, y + dy * h, w * dw.exp(), h * dh.exp()])[None], "cxcywh", "xyxy")


def error(box, target, tau):
    return (1 - generalized_box_iou(box, target[None])[0, 0]) / 2 / (1 - tau)


class Stages:
    """What passes between the stages of a model in training, computed by its own layers."""

    def __init__(self, model, images, targets):
        self.images, self.targets = model.transform(images, targets)
        self.features = model.backbone(self.images.tensors)
        maps = list(self.features.values())
        self.anchors = model.rpn.anchor_generator(self.images, maps)
        objectness, deltas = model.rpn.head(maps)
        batch = len(images)
        # The anchors of a place follow one another, the places of a row, the rows, the levels.
        self.objectness = torch.cat([one.permute(0, 2, 3, 1).reshape(batch, -1) for one in objectness], 1)
        self.deltas = torch.cat([one.permute(0, 2, 3, 1).reshape(batch, -1, 4) for one in deltas], 1)
        self.proposals, self.rpn_losses = model.rpn(self.images, self.features, self.targets)

    def rpn_by_hand(self):
        labels, errors = [], []
        for image, target in enumerate(self.targets):
            overlaps = box_iou(self.anchors[image], target["boxes"])
            for anchor, row in enumerate(overlaps):
                best = bool((row == overlaps.max(0).values).any()) if len(row) else False
                if len(row) == 0 or (row.max() < 0.3 and not best):
                    labels.append(0)
                elif row.max() >= 0.7 or best:
                    labels.append(1)
                    box = decode(self.deltas[image, anchor], self.anchors[image][anchor], (1.0, 1, 1, 1))
                    errors.append(error(box, target["boxes"][row.argmax()], 0.7))
                else:
                    labels.append(-1)
        assert {-1, 0, 1} == set(labels)
        return alrp_triton.alrp_loss(self.objectness.flatten(), torch.tensor(labels), torch.stack(errors))

    def second_by_hand(self, model):
        heads = model.roi_heads
        rows = heads.box_head(heads.box_roi_pool(self.features, self.proposals, self.images.image_sizes))
        logits, deltas = heads.box_predictor(rows)
        labels, errors, row = [], [], 0
        for proposals, target in zip(self.proposals, self.targets):
            for proposal in proposals:
                overlaps = box_iou(proposal[None], target["boxes"])[0]
                matches = len(overlaps) > 0 and overlaps.max() >= 0.5
                number = int(target["labels"][overlaps.argmax()]) if matches else 0
                labels.append(number - 1 if matches else NUM_CLASSES)
                if matches:
                    box = decode(deltas[row, 4 * number : 4 * number + 4], proposal, (10.0, 10, 5, 5))
                    errors.append(error(box, target["boxes"][overlaps.argmax()], 0.5))
                row += 1
        assert row == len(logits)
        assert len(errors) > 3
        assert NUM_CLASSES in labels
        return alrp_triton.alrp_loss(logits[:, 1:], torch.tensor(labels), torch.stack(errors))


@pytest.mark.parametrize("boxes_per_image", [(2, 1), (0, 2), (1, 0, 2)])
def test_losses_equal_those_computed_by_hand(boxes_per_image):
    model = constant("faster_rcnn")
    batch = batch_for("faster_rcnn", boxes_per_image)
    losses = model(*batch)
    stages = Stages(model, *batch)
    first, second = stages.rpn_by_hand(), stages.second_by_hand(model)
    expected = {
        "loss_objectness": 0.2 * first.cls,
        "loss_rpn_box_reg": 0.2 * 2.0 * first.loc,
        "loss_classifier": second.cls,
        "loss_box_reg": 3.0 * second.loc,
    }
    assert losses.keys() == expected.keys()
    for part, value in expected.items():
        torch.testing.assert_close(losses[part], value, rtol=1e-4, atol=1e-6)
    # The background's column gets none.
    predictor, inputs = model.roi_heads.box_predictor, dict(model.named_parameters())
    assert_same_gradients(sum(losses.values()), sum(expected.values()), list(inputs.values()), rtol=1e-3, atol=1e-6)
    sum(losses.values()).backward()
    for layer, rows in ((predictor.cls_score, 1), (predictor.bbox_pred, 4)):
        assert not layer.weight.grad[:rows].any()
        assert not layer.bias.grad[:rows].any()


def test_the_defaults_are_those_published():
    model = use_alrp(build_faster_rcnn())
    first, second = criteria(model).values()
    assert (first.tau, second.tau, first.box_error, second.box_error) == (0.7, 0.5, "giou", "giou")
    assert first.self_balance is not second.self_balance
    assert all(type(each.self_balance) is SelfBalance for each in (first, second))
    assert model.rpn.ranking_weight == 0.2
    first, second = criteria(use_rank_sort(model)).values()
    assert type(first) is type(second) is RankSortLoss
    assert first is not second


def test_the_weight_of_the_proposal_network():
    batch = batch_for("faster_rcnn")
    plain, half, none = (constant("faster_rcnn", rpn_weight=weight)(*batch) for weight in (1, 0.5, 0))
    for part, value in plain.items():
        share = 0.5 if part in ("loss_objectness", "loss_rpn_box_reg") else 1
        torch.testing.assert_close(half[part], share * value)
        assert none[part] == (0 if share == 0.5 else value)


@by_batch_or_image
def test_what_the_criteria_are_given(per_image):
    """All anchors and all proposals; those of the sampler, 4 in an image, would be fewer."""
    few = {"rpn_batch_size_per_image": 4, "box_batch_size_per_image": 4, "rpn_post_nms_top_n_train": 30}
    model = spread(build_faster_rcnn(**few))
    use_loss(model, Recorder(), rpn_criterion=Recorder(), per_image=per_image)
    batch = batch_for("faster_rcnn", (2, 0, 1))
    model(*batch)
    stages = Stages(model, *batch)
    (logits, labels, *boxes), options = model.rpn.ranking_criterion.arguments, model.rpn.ranking_criterion.options
    assert torch.equal(logits, stages.objectness[..., None])
    assert set(labels.flatten().tolist()) == {0, 1, -7}
    assert (labels[1] == 1).all()  # no objects: background
    assert [each.shape for each in boxes] == [(int((labels == 0).sum()), 4)] * 2
    assert options.keys() == ({"groups"} if per_image else set())
    if per_image:
        assert torch.equal(options["groups"], torch.arange(3)[:, None].expand(labels.shape))

    second = model.roi_heads.ranking_criterion
    (logits, labels, *boxes), options = second.arguments, second.options
    sizes = [len(proposals) for proposals in stages.proposals]
    assert 4 < max(sizes) <= 30  # nor are the objects' own boxes added
    assert logits.shape == (sum(sizes), NUM_CLASSES)
    assert labels.shape == (sum(sizes),)
    assert (labels.split(sizes)[1] == NUM_CLASSES).all()
    assert set(labels.tolist()) <= set(range(NUM_CLASSES + 1))
    assert [each.shape for each in boxes] == [(int((labels < NUM_CLASSES).sum()), 4)] * 2
    assert len(boxes[0]) > 0
    if per_image:
        assert options["groups"].tolist() == [image for image, size in enumerate(sizes) for _ in range(size)]


def test_proposals_between_the_thresholds_of_the_matcher_take_no_part():
    model = use_loss(spread(build_faster_rcnn(box_bg_iou_thresh=0.2)), Recorder(), rpn_criterion=Recorder())
    batch = batch_for("faster_rcnn")
    model(*batch)
    stages = Stages(model, *batch)
    overlaps = [
        box_iou(boxes, target["boxes"]).max(1).values for boxes, target in zip(stages.proposals, stages.targets)
    ]
    taken = [(each < 0.2) | (each >= 0.5) for each in overlaps]
    logits, labels, *_ = model.roi_heads.ranking_criterion.arguments
    assert len(labels) == len(logits) == sum(int(each.sum()) for each in taken) < sum(map(len, overlaps))
    assert (labels < NUM_CLASSES).sum() == sum(int((each >= 0.5).sum()) for each in overlaps)


@pytest.mark.parametrize("no_proposals", [(0,), (0, 1)])
def test_images_without_a_proposal(no_proposals):
    model = constant("faster_rcnn")
    filter_proposals = model.rpn.filter_proposals

    def few(*arguments):
        boxes, scores = filter_proposals(*arguments)
        for image in no_proposals:
            boxes[image], scores[image] = boxes[image][:0], scores[image][:0]
        return boxes, scores

    model.rpn.filter_proposals = few
    losses = model(*batch_for("faster_rcnn"))
    assert (losses["loss_classifier"] == 0) == (len(no_proposals) == 2)
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def suppressed(boxes, scores, threshold):
    """Non-maximum suppression by hand, of one class: the places of what is left, best first."""
    left = []
    for place in scores.argsort(descending=True).tolist():
        if all(box_iou(boxes[place : place + 1], boxes[other : other + 1])[0, 0] <= threshold for other in left):
            left.append(place)
    return left


@pytest.mark.parametrize("threshold", [0.0, 0.4])
def test_detections_equal_those_computed_by_hand(threshold):
    model = use_alrp(spread(build_faster_rcnn(box_score_thresh=threshold, rpn_post_nms_top_n_test=25))).eval()
    images, _ = batch_for("faster_rcnn")
    shown, _ = model.transform(images)
    features = model.backbone(shown.tensors)
    proposals, _ = model.rpn(shown, features)
    heads = model.roi_heads
    logits, deltas = heads.box_predictor(heads.box_head(heads.box_roi_pool(features, proposals, shown.image_sizes)))
    start = 0
    for image, detected in enumerate(model(images)):
        rows = range(start, start + len(proposals[image]))
        start += len(rows)
        found = []
        for number in range(1, 1 + NUM_CLASSES):
            columns = slice(4 * number, 4 * number + 4)
            boxes = torch.cat(
                [
                    decode(deltas[row, columns], proposal, (10.0, 10, 5, 5))
                    for row, proposal in zip(rows, proposals[image])
                ]
            )
            boxes, scores = clip_boxes_to_image(boxes, shown.image_sizes[image]), logits[list(rows), number].sigmoid()
            wide = ((boxes[:, 2:] - boxes[:, :2] >= 1e-2).all(1) & (scores > threshold)).nonzero()[:, 0]
            boxes, scores = boxes[wide], scores[wide]
            found += [(scores[i].item(), number, boxes[i]) for i in suppressed(boxes, scores, 0.5)]
        found = sorted(found, key=lambda each: -each[0])[:100]
        assert len(found) > 4
        assert detected["labels"].tolist() == [number for _, number, _ in found]
        torch.testing.assert_close(detected["scores"], torch.tensor([score for score, _, _ in found]))
        torch.testing.assert_close(detected["boxes"], torch.stack([box for _, _, box in found]), rtol=1e-4, atol=1e-3)
        assert detected["scores"].sum() > 1  # no distribution over classes


def test_an_image_in_which_nothing_passes_the_threshold():
    model = use_alrp(build_faster_rcnn(box_score_thresh=0.999)).eval()
    for detected in model(batch_for("faster_rcnn")[0]):
        assert detected["boxes"].shape == (0, 4)
        assert detected["scores"].shape == detected["labels"].shape == (0,)


def test_what_torchvision_has_stays():
    model = use_alrp(build_faster_rcnn())
    assert isinstance(model.rpn, RegionProposalNetwork)
    assert isinstance(model.roi_heads, RoIHeads)
    with pytest.raises(ValueError, match="targets"):
        model.roi_heads({}, [], [])
