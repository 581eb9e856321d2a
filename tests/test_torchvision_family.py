"""The RetinaNet integration with any member of the family; what is aLRP's own is in test_torchvision.py."""

import copy

import pytest
import torch
from test_torchvision import (
    NUM_CLASSES,
    Backbone,
    RenamedHead,
    batch,
    build,
    head_inputs,
    spread,
    through_pickle,
    through_torch_save,
)
from torch import nn
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import box_iou, generalized_box_iou

import alrp_triton
from alrp_triton.framework import RankingLoss, ranking_loss
from alrp_triton.integrations import torchvision as integration


def false_alarm_error(ranking):
    """A formula that the package does not have."""
    return ranking.num_false_positives.log1p()


def use_custom(model, criterion=None, **options):
    criterion = RankingLoss(false_alarm_error, delta=0.5) if criterion is None else criterion
    return integration.use_classification_loss(model, criterion, **options)


SCORES_ONLY = {"ap": integration.use_ap, "ndcg": integration.use_ndcg, "custom": use_custom}
WITH_BOXES = {"alrp": integration.use_alrp, "rank_sort": integration.use_rank_sort}
MEMBERS = {**WITH_BOXES, **SCORES_ONLY}
DIRECT = {
    "ap": alrp_triton.ap_loss,
    "ndcg": alrp_triton.ndcg_loss,
    "custom": lambda *arguments: ranking_loss(*arguments, false_alarm_error, delta=0.5),
}
every_member = pytest.mark.parametrize("name", MEMBERS)


def labels_by_hand(targets, matched_idxs, ignored=-1):
    """Class labels [B, A], anchor by anchor."""
    rows = []
    for target, matched in zip(targets, matched_idxs):
        codes = {-1: NUM_CLASSES, -2: ignored, **dict(enumerate(target["labels"].tolist()))}
        rows.append([codes[index] for index in matched.tolist()])
    return torch.tensor(rows)


def boxes_by_hand(head, targets, outputs, anchors, matched_idxs):
    """Predicted and true boxes of the positives [P, 4], image by image."""
    predicted, true = [], []
    for target, deltas, anchor, matched in zip(targets, outputs["bbox_regression"], anchors, matched_idxs):
        predicted.append(head.regression_head.box_coder.decode_single(deltas[matched >= 0], anchor[matched >= 0]))
        true.append(target["boxes"][matched[matched >= 0]])
    return torch.cat(predicted), torch.cat(true)


def image_of(inputs, b):
    """The arguments of ``compute_loss`` for one image of the batch."""
    targets, outputs, anchors, matched = inputs
    return [targets[b]], {key: value[b : b + 1] for key, value in outputs.items()}, [anchors[b]], [matched[b]]


def score_gradient(losses, outputs, name="classification"):
    return torch.autograd.grad(losses[name], outputs["cls_logits"], retain_graph=True)[0]


@pytest.mark.parametrize("boxes_per_image", [(3, 2), (0, 4)])
@pytest.mark.parametrize("box_loss", ["l1", "smooth_l1", "giou"])
@pytest.mark.parametrize("name", SCORES_ONLY)
def test_only_the_classification_part_is_replaced(name, box_loss, boxes_per_image):
    plain, model = spread(build()), SCORES_ONLY[name](spread(build()))
    for each in (plain, model):
        each.head.regression_head._loss_type = box_loss
    inputs = head_inputs(model, *batch(boxes_per_image))
    targets, outputs, _, matched = inputs
    losses, unpatched = model.head.compute_loss(*inputs), plain.head.compute_loss(*inputs)
    direct = DIRECT[name](outputs["cls_logits"], labels_by_hand(targets, matched))

    assert list(losses) == ["classification", "bbox_regression"]
    assert 0 < losses["classification"] == direct != unpatched["classification"]
    gradient = score_gradient(losses, outputs)
    assert gradient.abs().sum() > 0
    assert torch.equal(gradient, torch.autograd.grad(direct, outputs["cls_logits"], retain_graph=True)[0])

    assert 0 < losses["bbox_regression"] == unpatched["bbox_regression"]
    deltas = [
        torch.autograd.grad(sum(each.values()), outputs["bbox_regression"], retain_graph=True)[0]
        for each in (losses, unpatched)
    ]
    assert torch.equal(*deltas)


@pytest.mark.parametrize("boxes_per_image", [(3, 2), (2, 0, 3)])
def test_rank_sort_of_boxes_decoded_by_hand(boxes_per_image):
    model = integration.use_rank_sort(spread(build()))
    inputs = head_inputs(model, *batch(boxes_per_image))
    targets, outputs, _, matched = inputs
    losses = model.head.compute_loss(*inputs)

    labels = labels_by_hand(targets, matched)
    predicted, true = boxes_by_hand(model.head, *inputs)
    expected = alrp_triton.rank_sort_loss(outputs["cls_logits"], labels, box_iou(predicted, true).diagonal())
    cls = expected.ranking + expected.sorting
    weights = outputs["cls_logits"].detach()[(labels >= 0) & (labels < NUM_CLASSES)].amax(1).sigmoid()
    errors = 1 - generalized_box_iou(predicted, true).diagonal()
    loc = (weights * errors).sum() / weights.sum()
    loc = loc * (cls / loc).detach()

    torch.testing.assert_close(losses["classification"], cls)
    torch.testing.assert_close(losses["bbox_regression"], loc)
    for key in ("cls_logits", "bbox_regression"):
        got, want = (
            torch.autograd.grad(total, outputs[key], retain_graph=True)[0]
            for total in (sum(losses.values()), cls + loc)
        )
        assert want.abs().sum() > 0
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("boxes_per_image", [(3, 2), (4, 0, 1)])
@every_member
def test_per_image_is_the_mean_over_the_images_with_objects(name, boxes_per_image):
    arguments = (alrp_triton.ALRPLoss(self_balance=2.0),) if name == "alrp" else ()
    whole = MEMBERS[name](spread(build()), *arguments)
    model = MEMBERS[name](spread(build()), *arguments, per_image=True)
    inputs = head_inputs(model, *batch(boxes_per_image))
    outputs = inputs[1]
    losses = model.head.compute_loss(*inputs)
    single = [whole.head.compute_loss(*image_of(inputs, b)) for b, n in enumerate(boxes_per_image) if n]

    expected = sum(each["classification"] for each in single) / len(single)
    torch.testing.assert_close(losses["classification"], expected)
    assert abs(expected - whole.head.compute_loss(*inputs)["classification"]) > 1e-4  # the images do not just add up
    want = torch.autograd.grad(expected, outputs["cls_logits"], retain_graph=True)[0]
    torch.testing.assert_close(score_gradient(losses, outputs), want, rtol=1e-4, atol=1e-7)
    if name == "alrp":
        mean = sum(each["bbox_regression"] for each in single) / len(single)
        torch.testing.assert_close(losses["bbox_regression"], mean)
    elif name == "rank_sort":  # balanced against its classification
        torch.testing.assert_close(losses["bbox_regression"], expected)
    else:
        assert losses["bbox_regression"] == whole.head.compute_loss(*inputs)["bbox_regression"]


class Recorder(nn.Module):
    """A criterion of either kind."""

    ignore_index = -7

    def forward(self, *arguments, **options):
        self.arguments, self.options = arguments, options
        zero = arguments[0].sum() * 0
        return alrp_triton.ALRPLossOutput(zero, zero, zero) if len(arguments) == 4 else zero


@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("use", [integration.use_alrp, integration.use_classification_loss])
def test_what_a_criterion_is_given(use, per_image):
    model = use(build(), Recorder(), per_image=per_image)
    inputs = head_inputs(model, *batch((3, 0, 2)))
    model.head.compute_loss(*inputs)
    targets, outputs, _, matched = inputs
    (logits, labels, *boxes), options = model.head.ranking_criterion.arguments, model.head.ranking_criterion.options

    assert logits is outputs["cls_logits"]  # neither flattened nor copied
    assert torch.equal(labels, labels_by_hand(targets, matched, ignored=-7))
    assert (labels == -7).any()
    num_positives = int(((labels >= 0) & (labels < NUM_CLASSES)).sum())
    if use is integration.use_alrp:
        assert [box.shape for box in boxes] == [(num_positives, 4)] * 2
    else:
        assert boxes == []
        assert type(options["num_positives"]) is int  # counted already: nothing to wait for
        assert options.pop("num_positives") == num_positives > 0
    if per_image:
        groups = options.pop("groups")
        assert groups.tolist() == [[b] * labels.shape[1] for b in range(3)]
        assert groups.stride() == (1, 0)  # B numbers, not B A
    assert options == {}


@pytest.mark.thinned(2)
@pytest.mark.parametrize("per_image", [False, True])
@every_member
def test_training_steps_lower_the_loss(name, per_image):
    arguments = (alrp_triton.ALRPLoss(self_balance=None),) if name == "alrp" else ()
    model = MEMBERS[name](build(), *arguments, per_image=per_image)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    values = []
    for _ in range(30):
        losses = model(*batch())
        loss = sum(losses.values())
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        values.append([loss.item(), losses["classification"].item()])
    for first, last in zip(values[0], values[-1]):
        assert last < 0.9 * first


@pytest.mark.parametrize("per_image", [False, True])
@every_member
def test_batch_without_objects(name, per_image):
    model = MEMBERS[name](build(), per_image=per_image)
    images, _ = batch((1, 1))
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0)}
    losses = model(images, [empty, empty])
    assert losses["classification"] == losses["bbox_regression"] == 0
    sum(losses.values()).backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@every_member
def test_under_autocast(name):
    model = MEMBERS[name](spread(build()), per_image=True)
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(*batch())
    assert losses["classification"].dtype == torch.float32
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@every_member
def test_inference_is_unchanged(name):
    images, _ = batch()
    plain, model = spread(build()).eval(), MEMBERS[name](spread(build())).eval()
    for expected, got in zip(plain(images), model(images)):
        assert len(expected["boxes"]) > 0
        for key in ("boxes", "scores", "labels"):
            assert torch.equal(expected[key], got[key])


@pytest.mark.parametrize("head", [None, RenamedHead])
def test_each_call_replaces_what_the_one_before_did(head):
    def fresh():
        torch.manual_seed(0)
        return spread(build(head=head and head(Backbone.out_channels, 2, NUM_CLASSES)))

    images, targets = batch()
    model = fresh()
    for name in ("alrp", "ap", "rank_sort", "custom", "ndcg", "alrp"):
        for per_image in (True, False):
            expected = MEMBERS[name](fresh(), per_image=per_image)
            assert MEMBERS[name](model, per_image=per_image) is model
            assert type(model.head) is type(expected.head)
            assert model(images, targets) == expected(images, targets)
            assert model.state_dict().keys() == expected.state_dict().keys()
    assert isinstance(model.head, head or RetinaNetHead)


class Scaled(alrp_triton.APLoss):
    """A criterion with a state."""

    def __init__(self, scale):
        super().__init__(delta=0.5)
        self.register_buffer("scale", torch.tensor(scale))

    def forward(self, *arguments, **options):
        return self.scale * super().forward(*arguments, **options)


@pytest.mark.parametrize("per_image", [False, True])
@every_member
def test_state_dict_round_trip(name, per_image):
    criterion = {"alrp": alrp_triton.ALRPLoss, "ap": lambda: Scaled(3.0)}.get(name, lambda: None)()
    other = Scaled(1.0) if name == "ap" else None
    images, targets = batch()
    model = MEMBERS[name](spread(build()), criterion, per_image=per_image)
    restored = MEMBERS[name](build(seed=5), other, per_image=per_image)
    assert restored(images, targets) != model(images, targets)
    restored.load_state_dict(model.state_dict(), strict=True)
    assert restored(images, targets) == model(images, targets)

    added = model.state_dict().keys() - build().state_dict().keys()
    assert bool(added) == (name in ("alrp", "ap"))
    assert all(key.startswith("head.ranking_criterion.") for key in added)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle, through_torch_save])
@pytest.mark.parametrize("per_image", [False, True])
@every_member
def test_copies_keep_the_loss(name, per_image, duplicate):
    images, targets = batch()
    model = MEMBERS[name](spread(build()), Scaled(3.0) if name == "ap" else None, per_image=per_image)
    twin = duplicate(model)
    assert type(twin.head) is type(model.head)
    assert twin.head.ranking_criterion is not model.head.ranking_criterion
    losses = model(images, targets)
    assert twin(images, targets) == losses

    integration.use_ap(twin, Scaled(0.0))  # the copy is on its own
    assert twin(images, targets)["classification"] == 0
    assert model(images, targets) == losses


def test_the_criterion_moves_with_the_model():
    model = integration.use_ap(build(), Scaled(3.0)).double()
    assert model.head.ranking_criterion.scale.dtype == torch.float64
    meta = build().to("meta")
    assert integration.use_ap(meta, Scaled(3.0)).head.ranking_criterion.scale.device.type == "meta"


@every_member
def test_wrong_arguments_are_named_and_change_nothing(name):
    wrong = [
        ((nn.Linear(1, 1), None), {}, "model must be.*RetinaNet.*Linear"),
        ((build(head=nn.Identity()), None), {}, "model.head must be.*Identity"),
        ((build(), 0.5), {}, "criterion must be.*Module; got float"),
        ((build(), alrp_triton.APLoss), {}, "criterion must be.*Module; got type"),
        ((build(), None), {"per_image": 1}, "per_image must be a bool; got int"),
    ]
    if name in WITH_BOXES:
        for criterion in (alrp_triton.APLoss(), alrp_triton.NDCGLoss(), RankingLoss(false_alarm_error)):
            message = f"on boxes: pass it to use_classification_loss; got {type(criterion).__name__}"
            wrong.append(((build(), criterion), {}, message))
    else:
        for criterion in (alrp_triton.ALRPLoss(), alrp_triton.RankSortLoss()):
            message = f"scores alone: pass it to use_alrp; got {type(criterion).__name__}"
            wrong.append(((build(), criterion), {}, message))
    for arguments, options, message in wrong:
        before = type(arguments[0].head) if hasattr(arguments[0], "head") else None
        with pytest.raises(TypeError, match=message):
            MEMBERS[name](*arguments, **options)
        assert before is None or type(arguments[0].head) is before


def test_a_classification_loss_has_no_default():
    with pytest.raises(TypeError, match=r"criterion must be.*NoneType"):
        integration.use_classification_loss(build(), None)
