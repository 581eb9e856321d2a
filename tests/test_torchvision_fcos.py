"""FCOS: its conventions, and what becomes of centre-ness."""

import copy

import pytest
import torch

pytest.importorskip("torchvision")

from adapters import Recorder, assert_same_gradients, of_either_kind
from detectors import MEMBERS, NUM_CLASSES, SCORES_ONLY, batch_for, build_fcos, head_inputs, same, spread
from torchvision.models.detection.fcos import FCOSHead
from torchvision.ops import batched_nms, generalized_box_iou

import alrp_triton
from alrp_triton.integrations.torchvision import use_alrp, use_ap, use_loss

with_and_without = pytest.mark.parametrize("centerness", ["keep", "drop"])


def losses_by_hand(targets, outputs, anchors, matched_idxs):
    """aLRP, point by point: a box is the distances to its sides in units of the point's stride."""
    labels, errors = [], []
    for image, matched in enumerate(matched_idxs):
        for point, index in enumerate(matched.tolist()):
            labels.append(NUM_CLASSES if index < 0 else int(targets[image]["labels"][index]))
            if index >= 0:
                x1, y1, x2, y2 = anchors[image][point]
                left, top, right, bottom = outputs["bbox_regression"][image, point] * (x2 - x1)
                x, y = (x1 + x2) / 2, (y1 + y2) / 2
                box = torch.stack([x - left, y - top, x + right, y + bottom])
                errors.append(1 - generalized_box_iou(box[None], targets[image]["boxes"][index : index + 1])[0, 0])
    logits = outputs["cls_logits"].flatten(0, 1)  # (1 - GIoU) / 2 / (1 - tau) with tau = 0.5
    return alrp_triton.alrp_loss(logits, torch.tensor(labels), torch.stack(errors))


@with_and_without
@pytest.mark.parametrize("boxes_per_image", [(2, 1), (0, 2), (1, 0, 2)])
def test_losses_equal_those_computed_by_hand(boxes_per_image, centerness):
    model = spread(build_fcos(sides=(2, 4), center_sampling_radius=4.0))
    model = use_loss(model, alrp_triton.ALRPLoss(self_balance=3.0), centerness=centerness)
    inputs = head_inputs(model, *batch_for("fcos", boxes_per_image))
    _, outputs, anchors, matched = inputs
    sizes = torch.stack([boxes[:, 2] - boxes[:, 0] for boxes in anchors])
    assert set(sizes[torch.stack(matched) >= 0].tolist()) == {2.0, 4.0}  # both levels take part

    losses, expected = model.head.compute_loss(*inputs), losses_by_hand(*inputs)
    torch.testing.assert_close(losses["classification"], expected.cls)
    torch.testing.assert_close(losses["bbox_regression"], 3.0 * expected.loc)
    losses.pop("bbox_ctrness", None)
    inputs = [outputs["cls_logits"], outputs["bbox_regression"]]
    assert_same_gradients(sum(losses.values()), expected.cls + 3.0 * expected.loc, inputs)


@with_and_without
@pytest.mark.parametrize("member", MEMBERS)
def test_what_stays_is_the_model_s_own(member, centerness):
    plain, model = spread(build_fcos()), MEMBERS[member](spread(build_fcos()), centerness=centerness)
    inputs = head_inputs(model, *batch_for("fcos"))
    losses, own = model.head.compute_loss(*inputs), plain.head.compute_loss(*inputs)
    kept = ["bbox_ctrness"] * (centerness == "keep") + ["bbox_regression"] * (member in SCORES_ONLY)
    assert set(losses) == {"classification", "bbox_regression", *kept}
    for part in kept:
        assert 0 < losses[part] == own[part]
        assert_same_gradients(losses[part], own[part], [inputs[1][part]], rtol=0, atol=0)
        assert torch.autograd.grad(losses[part], inputs[1]["cls_logits"], None, True, allow_unused=True)[0] is None
    assert 0 < losses["classification"] != own["classification"]


def test_dropped_centerness_leaves_the_scores_to_the_classes():
    images, _ = batch_for("fcos")
    options = {"detections_per_img": 10**6, "topk_candidates": 10**6, "nms_thresh": 1.0}
    model = use_alrp(spread(build_fcos(**options)), centerness="drop").eval()
    outputs = FCOSHead.forward(model.head, list(model.backbone(model.transform(images)[0].tensors).values()))
    found, roots = model(images), outputs["cls_logits"].sigmoid().sqrt()
    for detected, root in zip(found, roots):
        every = root.flatten().sort(descending=True).values
        assert len(every) == len(detected["scores"])
        torch.testing.assert_close(detected["scores"], every, rtol=1e-5, atol=1e-7)
        assert detected["scores"].max() - detected["scores"].min() > 0.1
    assert not same(use_alrp(model, centerness="keep")(images), found)


def test_dropped_centerness_ranks_before_suppression_too():
    """What survives is what suppression by the class probabilities alone leaves."""
    images, _ = batch_for("fcos")
    model = use_alrp(spread(build_fcos(topk_candidates=10**6)), centerness="drop").eval()
    wide = copy.deepcopy(model)
    wide.nms_thresh, wide.detections_per_img = 1.0, 10**6
    for detected, candidates in zip(model(images), wide(images)):
        probability = candidates["scores"] ** 2
        keep = batched_nms(candidates["boxes"], probability, candidates["labels"], 0.6)[:100]
        assert torch.equal(detected["labels"], candidates["labels"][keep])
        torch.testing.assert_close(detected["scores"], probability[keep].sqrt())


def test_a_dropped_branch_is_frozen_until_it_is_kept_again():
    model = use_alrp(build_fcos(), centerness="drop")
    branch = model.head.regression_head.bbox_ctrness
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen == [f"head.regression_head.bbox_ctrness.{name}" for name in ("weight", "bias")]
    twin = copy.deepcopy(model)
    use_alrp(model, centerness="drop")
    assert not any(p.requires_grad for p in branch.parameters())
    for thawed in (use_ap(model), use_ap(twin, centerness="keep")):
        assert all(p.requires_grad for p in thawed.parameters())

    branch.bias.requires_grad_(False)  # by the user
    for centerness in ("drop", "keep"):
        use_alrp(model, centerness=centerness)
    assert branch.weight.requires_grad
    assert not branch.bias.requires_grad


@of_either_kind
def test_what_a_criterion_is_given(takes_boxes):
    model = use_loss(build_fcos(), Recorder(takes_boxes), per_image=True, centerness="drop")
    inputs = head_inputs(model, *batch_for("fcos", (2, 0, 1)))
    targets, outputs, _, matched = inputs
    model.head.compute_loss(*inputs)
    (logits, labels, *boxes), options = model.head.ranking_criterion.arguments, model.head.ranking_criterion.options
    assert logits is outputs["cls_logits"]  # neither flattened nor copied
    codes = [{-1: NUM_CLASSES, **dict(enumerate(target["labels"].tolist()))} for target in targets]
    assert labels.tolist() == [[code[index] for index in one.tolist()] for code, one in zip(codes, matched)]
    num_positives = int((labels < NUM_CLASSES).sum())
    assert [len(each) for each in boxes] == [num_positives] * 2 * takes_boxes
    assert options.get("num_positives", num_positives) == num_positives > 0
    assert torch.equal(options["groups"], torch.arange(3)[:, None].expand(labels.shape))
