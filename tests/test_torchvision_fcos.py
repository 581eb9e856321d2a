"""FCOS: its conventions, and what becomes of centre-ness."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("torchvision")

from detectors import NUM_CLASSES, batch_for, build_fcos
from test_torchvision import head_inputs
from torchvision.models.detection.fcos import FCOSHead
from torchvision.ops import batched_nms, generalized_box_iou

import alrp_triton
from alrp_triton import ALRPLoss
from alrp_triton.framework import RankingLoss
from alrp_triton.integrations.torchvision import use_alrp, use_ap, use_classification_loss, use_ndcg

SCORES_ONLY = {
    "ap": use_ap,
    "ndcg": use_ndcg,
    "own": lambda model, **options: use_classification_loss(
        model, RankingLoss(lambda ranking: ranking.num_false_positives.log1p()), **options
    ),
}
with_and_without = pytest.mark.parametrize("centerness", ["keep", "drop"])


def spread(model):
    """Larger last-layer weights: scores that differ by more than the ramp, boxes that differ from their points."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for layer in (model.head.classification_head.cls_logits, model.head.regression_head.bbox_ctrness):
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator))
        model.head.regression_head.bbox_reg.bias.copy_(torch.tensor([4.0, 2, 5, 3]))
    return model


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
    model = use_alrp(model, ALRPLoss(self_balance=3.0), centerness=centerness)
    inputs = head_inputs(model, *batch_for("fcos", boxes_per_image))
    _, outputs, anchors, matched = inputs
    found = torch.stack(matched)
    sizes = torch.stack([boxes[:, 2] - boxes[:, 0] for boxes in anchors])
    assert set(sizes[found >= 0].tolist()) == {2.0, 4.0}  # both levels take part

    losses = model.head.compute_loss(*inputs)
    expected = losses_by_hand(*inputs)
    torch.testing.assert_close(losses["classification"], expected.cls)
    torch.testing.assert_close(losses["bbox_regression"], 3.0 * expected.loc)
    for key in ("cls_logits", "bbox_regression"):
        got, want = (
            torch.autograd.grad(total, outputs[key], retain_graph=True)[0]
            for total in (losses["classification"] + losses["bbox_regression"], expected.cls + 3.0 * expected.loc)
        )
        assert want.abs().sum() > 0
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-7)


@with_and_without
@pytest.mark.parametrize("name", ["alrp", *SCORES_ONLY])
def test_what_stays_is_the_model_s_own(name, centerness):
    use = SCORES_ONLY.get(name, use_alrp)
    plain, model = spread(build_fcos()), use(spread(build_fcos()), centerness=centerness)
    inputs = head_inputs(model, *batch_for("fcos"))
    outputs = inputs[1]
    losses, own = model.head.compute_loss(*inputs), plain.head.compute_loss(*inputs)
    kept = {"bbox_ctrness"} & {"bbox_ctrness" if centerness == "keep" else ""}
    kept |= {"bbox_regression"} if name in SCORES_ONLY else set()
    assert set(losses) == {"classification", "bbox_regression"} | kept
    for part in kept:
        assert 0 < losses[part] == own[part]
        for key in ("bbox_regression", "bbox_ctrness"):
            got, want = (
                torch.autograd.grad(each[part], outputs[key], retain_graph=True, allow_unused=True)[0]
                for each in (losses, own)
            )
            assert (got is None) == (want is None)
            assert got is None or torch.equal(got, want)
        assert torch.autograd.grad(losses[part], outputs["cls_logits"], retain_graph=True, allow_unused=True)[0] is None
    assert 0 < losses["classification"] != own["classification"]


def score_root(model, images):
    """The square roots of the class probabilities of all points, as detections by the class scores alone."""
    outputs = FCOSHead.forward(model.head, list(model.backbone(model.transform(images)[0].tensors).values()))
    return outputs["cls_logits"].sigmoid().sqrt()


def test_dropped_centerness_leaves_the_scores_to_the_classes():
    images, _ = batch_for("fcos")
    options = {"detections_per_img": 10**6, "topk_candidates": 10**6, "nms_thresh": 1.0}
    model = use_alrp(spread(build_fcos(**options)), centerness="drop").eval()
    for detected, root in zip(model(images), score_root(model, images)):
        every = root.flatten().sort(descending=True).values
        assert len(every) == len(detected["scores"])
        torch.testing.assert_close(detected["scores"], every, rtol=1e-5, atol=1e-7)
        assert detected["scores"].max() - detected["scores"].min() > 0.1
    kept = use_alrp(spread(build_fcos(**options))).eval()
    plain = spread(build_fcos(**options)).eval()
    for detected, unchanged, dropped in zip(kept(images), plain(images), model(images)):
        assert all(torch.equal(detected[key], unchanged[key]) for key in detected)
        assert not torch.equal(detected["scores"], dropped["scores"])


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
    losses = model(*batch_for("fcos"))
    sum(losses.values()).backward()
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == [
        f"head.regression_head.bbox_ctrness.{name}" for name in ("weight", "bias")
    ]
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    twin = copy.deepcopy(model)
    use_alrp(model, centerness="drop")
    assert not any(p.requires_grad for p in branch.parameters())
    use_ap(model)
    assert all(p.requires_grad for p in model.parameters())
    use_ap(twin, centerness="keep")
    assert all(p.requires_grad for p in twin.parameters())

    branch.bias.requires_grad_(False)  # by the user
    for centerness in ("drop", "keep"):
        use_alrp(model, centerness=centerness)
    assert branch.weight.requires_grad
    assert not branch.bias.requires_grad


@with_and_without
def test_copies_keep_the_choice(centerness):
    model = use_alrp(spread(build_fcos()), centerness=centerness)
    twin = copy.deepcopy(model)
    images, targets = batch_for("fcos")
    assert twin(images, targets) == model(images, targets)
    for a, b in zip(model.eval()(images), twin.eval()(images)):
        assert torch.equal(a["scores"], b["scores"])


def test_what_a_criterion_is_given():
    class Recorder(nn.Module):
        ignore_index = -7

        def forward(self, *arguments, **options):
            self.arguments, self.options = arguments, options
            zero = arguments[0].sum() * 0
            return alrp_triton.ALRPLossOutput(zero, zero, zero) if len(arguments) == 4 else zero

    for use in (use_alrp, use_classification_loss):
        model = use(build_fcos(), Recorder(), per_image=True, centerness="drop")
        inputs = head_inputs(model, *batch_for("fcos", (2, 0, 1)))
        targets, outputs, _, matched = inputs
        model.head.compute_loss(*inputs)
        logits, labels, *boxes = model.head.ranking_criterion.arguments
        options = model.head.ranking_criterion.options
        assert logits is outputs["cls_logits"]  # neither flattened nor copied
        expected = [
            [NUM_CLASSES if index < 0 else int(target["labels"][index]) for index in one.tolist()]
            for target, one in zip(targets, matched)
        ]
        assert labels.tolist() == expected
        num_positives = sum(label < NUM_CLASSES for row in expected for label in row)
        assert [len(each) for each in boxes] == ([num_positives] * 2 if use is use_alrp else [])
        assert options.get("num_positives", num_positives) == num_positives > 0
        assert torch.equal(options["groups"], torch.arange(3)[:, None].expand(labels.shape))
