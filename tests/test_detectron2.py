"""The Detectron2 integration, on a stand-in for Detectron2 (see detectron2_double.py): the interfaces are Detectron2's,
the detector behind them is not."""

import copy
import importlib
import sys

import pytest
import torch
from torch import nn

pytest.importorskip("torchvision")

import detectron2_double as double
from torchvision.ops import generalized_box_iou

import alrp_triton
from alrp_triton import ALRPLoss, APLoss, NDCGLoss, RankSortLoss, SelfBalance
from alrp_triton.framework import RankingLoss

with double.installed():
    integration = importlib.import_module("alrp_triton.integrations.detectron2")

ALRPRetinaNet, add_alrp_config = integration.ALRPRetinaNet, integration.add_alrp_config
NUM_CLASSES = 3
LOSSES = {"alrp": ALRPLoss, "rank_sort": RankSortLoss, "ap": APLoss, "ndcg": NDCGLoss}
every_loss = pytest.mark.parametrize("name", LOSSES)


class Backbone(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 8, 3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1))

    def forward(self, images):
        fine = self[1](self[0](images))
        return {"p3": fine, "p4": self[2](fine)}


class Head(nn.Module):
    """One anchor for each place, so that [N, K, H, W] needs no unfolding."""

    def __init__(self):
        super().__init__()
        self.logits, self.deltas = nn.Conv2d(8, NUM_CLASSES, 1), nn.Conv2d(8, 4, 1)

    def forward(self, features):
        return [self.logits(each) for each in features], [self.deltas(each) for each in features]


class Anchors(nn.Module):
    def forward(self, features):
        boxes = []
        for each, stride in zip(features, (8, 16)):
            y, x = torch.meshgrid(*(stride * (torch.arange(n) + 0.5) for n in each.shape[-2:]), indexing="ij")
            centre = torch.stack([x.flatten(), y.flatten()], 1)
            boxes.append(double.Boxes(torch.cat([centre - stride, centre + stride], 1)))
        return boxes


def arguments(cfg=None):
    return {
        "backbone": Backbone(),
        "head": Head(),
        "head_in_features": ["p3", "p4"],
        "anchor_generator": Anchors(),
        "box2box_transform": double.Box2BoxTransform((1.0, 1.0, 1.0, 1.0)),
        "anchor_matcher": double.Matcher([0.2, 0.3], [0, -1, 1], allow_low_quality_matches=True),
        "num_classes": NUM_CLASSES,
        "pixel_mean": [0.5, 0.5, 0.5],
        "pixel_std": [0.25, 0.25, 0.25],
        "max_detections_per_image": 7,
    }


def config(**settings):
    cfg = double.CfgNode(MODEL=double.CfgNode(RETINANET=double.CfgNode(make=arguments)))
    add_alrp_config(cfg)
    for name, value in settings.items():
        assert name in cfg.MODEL.ALRP
        setattr(cfg.MODEL.ALRP, name, value)
    return cfg


def build(seed=0, cls=ALRPRetinaNet, **settings):
    torch.manual_seed(seed)
    model = cls(config(**settings))
    with torch.no_grad():  # scores that differ by more than the ramp, boxes that differ from their anchors
        model.head.logits.weight.mul_(8)
        model.head.deltas.weight.mul_(2)
    return model.train()


def batch(objects_per_image=(3, 2), seed=1):
    generator = torch.Generator().manual_seed(seed)
    inputs = []
    for n in objects_per_image:
        centre, size = torch.rand(2, n, 2, generator=generator).unbind()
        centre, half = 16 + 32 * centre, 6 + 8 * size
        boxes = double.Boxes(torch.cat([centre - half, centre + half], 1))
        classes = torch.randint(NUM_CLASSES, (n,), generator=generator)
        instances = double.Instances((64, 64), gt_boxes=boxes, gt_classes=classes)
        inputs.append({"image": torch.rand(3, 64, 64, generator=generator), "instances": instances})
    return inputs


def losses_of(model, inputs):
    with double.EventStorage():
        return model(inputs)


def arguments_of_losses(model, inputs):
    """What the model hands to ``losses``."""
    recorded = []
    original = type(model).losses

    def recorder(self, *given):
        recorded.extend(given)
        return original(self, *given)

    type(model).losses = recorder
    try:
        losses_of(model, inputs)
    finally:
        type(model).losses = original
    return recorded


@pytest.mark.parametrize("objects_per_image", [(3, 2), (0, 4), (2, 0, 3)])
def test_losses_equal_those_computed_by_hand(objects_per_image):
    model = build(SELF_BALANCE_INIT=3.0, DELTA=0.5, TAU=0.25)
    anchors, logits, gt_labels, deltas, gt_boxes = arguments_of_losses(model, batch(objects_per_image))
    assert {-1, NUM_CLASSES} < set(torch.cat(gt_labels).tolist())  # ignored, background and objects
    with double.EventStorage() as storage:
        losses = model.losses(anchors, logits, gt_labels, deltas, gt_boxes)

    one_hot, errors, first = [], [], 0
    for level, boxes in enumerate(anchors):
        for image, labels in enumerate(gt_labels):
            for index, box in enumerate(boxes.tensor):
                label = int(labels[first + index])
                row = torch.full((NUM_CLASSES,), -1 if label == -1 else 0)
                if 0 <= label < NUM_CLASSES:
                    row[label] = 1
                    predicted = model.box2box_transform.apply_deltas(deltas[level][image, index][None], box[None])
                    giou = generalized_box_iou(predicted, gt_boxes[image][first + index][None])[0, 0]
                    errors.append((1 - giou) / 2 / 0.75)
                one_hot.append(row)
        first += len(boxes)
    flat = torch.cat([level.reshape(-1) for level in logits])
    expected = alrp_triton.alrp_loss(flat, torch.cat(one_hot), torch.stack(errors), delta=0.5)

    assert list(losses) == ["loss_cls", "loss_box_reg"]
    torch.testing.assert_close(losses["loss_cls"], expected.cls)
    torch.testing.assert_close(losses["loss_box_reg"], 3.0 * expected.loc)
    assert storage.scalars["num_pos_anchors"] == pytest.approx(len(errors) / len(objects_per_image))
    inputs = [*logits, *deltas]
    got = torch.autograd.grad(sum(losses.values()), inputs, retain_graph=True)
    want = torch.autograd.grad(expected.cls + 3.0 * expected.loc, inputs)
    for one, other in zip(got, want):
        assert other.abs().sum() > 0
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


class Recorder(nn.Module):
    def forward(self, *given, **options):
        self.given, self.options = given, options
        zero = given[0][0].sum() * 0
        return alrp_triton.ALRPLossOutput(zero, zero, zero) if len(given) == 4 else zero


@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("takes_boxes", [True, False])
def test_what_a_criterion_is_given(takes_boxes, per_image):
    """A hand-written assignment: classes, background, ignored; boxes level after level, then image after image."""
    model = ALRPRetinaNet(criterion=Recorder(), per_image=per_image, takes_boxes=takes_boxes, **arguments())
    logits = [torch.zeros(2, n, NUM_CLASSES) for n in (3, 2)]
    deltas = [torch.zeros(2, n, 4) for n in (3, 2)]
    boxes = torch.arange(1.0, 6)[:, None] * torch.tensor([1.0, 1, 2, 3])
    anchors = [double.Boxes(boxes[:3]), double.Boxes(boxes[3:])]
    gt_labels = [torch.tensor([3, 1, -1, 0, 3]), torch.tensor([2, 3, 3, -1, 1])]
    gt_boxes = [boxes + 0.5, boxes + 0.25]
    with double.EventStorage():
        losses = model.losses(anchors, logits, gt_labels, deltas, gt_boxes)

    given, options = model.criterion.given, model.criterion.options
    assert given[0] is logits  # neither flattened nor copied
    assert [level.tolist() for level in given[1]] == [[[3, 1, -1], [2, 3, 3]], [[0, 3], [-1, 1]]]
    if takes_boxes:
        torch.testing.assert_close(given[2], boxes[[1, 0, 3, 4]])
        torch.testing.assert_close(
            given[3], torch.stack([boxes[1] + 0.5, boxes[0] + 0.25, boxes[3] + 0.5, boxes[4] + 0.25])
        )
        assert losses["loss_box_reg"] == 0
    else:
        assert len(given) == 2
        assert options.pop("num_positives") == 4
        assert losses["loss_box_reg"] > 0
    if per_image:
        groups = options.pop("groups")
        assert [level.tolist() for level in groups] == [[[0] * 3, [1] * 3], [[0] * 2, [1] * 2]]
        assert [level.stride() for level in groups] == [(1, 0)] * 2
    assert options == {}


@pytest.mark.parametrize("name", ["ap", "ndcg"])
def test_losses_on_scores_leave_the_boxes_to_retinanet(name):
    model, plain = build(LOSS=name), build(cls=double.RetinaNet)
    given = arguments_of_losses(model, batch())
    with double.EventStorage():
        losses, own = model.losses(*given), plain.losses(*given)
    assert losses["loss_box_reg"] == own["loss_box_reg"] > 0
    assert losses["loss_cls"] != own["loss_cls"]
    deltas = given[3]
    for got, want in zip(
        *(torch.autograd.grad(each["loss_box_reg"], deltas, retain_graph=True) for each in (losses, own))
    ):
        assert torch.equal(got, want)
    assert all(gradient.any() for gradient in torch.autograd.grad(losses["loss_cls"], given[1]))


@pytest.mark.parametrize("per_image", [False, True])
@every_loss
def test_training_steps_lower_the_loss_and_the_model_predicts(name, per_image):
    model = build(LOSS=name, PER_IMAGE=per_image)
    assert type(model.criterion) is LOSSES[name]
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    values = []
    for _ in range(30):
        losses = losses_of(model, batch())
        optimizer.zero_grad()
        sum(losses.values()).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        values.append(losses["loss_cls"].item())
    assert values[-1] < 0.9 * values[0]
    found = model.eval()(batch())
    assert [len(each["instances"]) for each in found] == [7, 7]


@every_loss
def test_batch_without_objects(name):
    model = build(LOSS=name)
    losses = losses_of(model, batch((0, 0)))
    assert losses["loss_cls"] == losses["loss_box_reg"] == 0
    sum(losses.values()).backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@every_loss
def test_under_autocast(name):
    model = build(LOSS=name)
    recorded = []
    model.criterion.register_forward_pre_hook(lambda _, given: recorded.append(given))
    with torch.autocast("cpu", torch.bfloat16):
        losses = losses_of(model, batch())
    sum(losses.values()).backward()
    assert losses["loss_cls"].dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in model.parameters())
    logits, _, *boxes = recorded[0]
    assert {level.dtype for level in logits} == {torch.bfloat16}
    assert all(box.dtype == torch.float32 for box in boxes)


def step(model, count, seed):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    values = []
    for i in range(count):
        losses = losses_of(model, batch(seed=seed + i))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        values.append([loss.item() for loss in losses.values()])
    return values


def test_a_resumed_run_gives_the_same_numbers(tmp_path):
    settings = {"SELF_BALANCE_PERIOD": 2, "SELF_BALANCE_INIT": 10.0}
    model, resumed = build(**settings), build(seed=5, **settings)
    step(model, 3, seed=1)
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    resumed.load_state_dict(torch.load(tmp_path / "model.pth")["model"], strict=True)
    balance = resumed.criterion.self_balance
    assert (balance.period, balance.count.item()) == (2, 1)
    assert balance.weight != 10
    assert step(resumed, 3, seed=7) == step(model, 3, seed=7)
    added = model.state_dict().keys() - build(cls=double.RetinaNet).state_dict().keys()
    assert added == {f"criterion.self_balance.{name}" for name in ("weight", "sums", "count")}


def test_explicit_arguments_and_copies():
    criterion = ALRPLoss(self_balance=SelfBalance(10.0, period=3))
    model = ALRPRetinaNet(criterion=criterion, **arguments())
    assert model.criterion is criterion
    assert not model.per_image
    twin = copy.deepcopy(model)
    step(model, 3, seed=1)
    assert (twin.criterion.self_balance.weight, twin.criterion.self_balance.count) == (10, 0)
    formula = RankingLoss(lambda ranking: ranking.num_false_positives.log1p())
    losses = losses_of(ALRPRetinaNet(criterion=formula, **arguments()).train(), batch())
    assert losses["loss_cls"] > 0


def test_the_config_is_read():
    assert double.META_ARCH_REGISTRY["ALRPRetinaNet"] is ALRPRetinaNet
    model = build(DELTA=0.25, TAU=0.1, BOX_ERROR="ciou", SELF_BALANCE_INIT=7.0, SELF_BALANCE_PERIOD=11, PER_IMAGE=True)
    criterion = model.criterion
    assert (criterion.delta, criterion.tau, criterion.box_error) == (0.25, 0.1, "ciou")
    assert (criterion.self_balance.init, criterion.self_balance.period, model.per_image) == (7.0, 11, True)
    assert build().criterion.delta == ALRPLoss().delta
    rank_sort = build(LOSS="rank_sort", BOX_ERROR="diou").criterion
    assert (rank_sort.delta, rank_sort.box_error) == (RankSortLoss().delta, "diou")
    assert build(LOSS="ndcg", DELTA=0.3).criterion.delta == build(LOSS="ap", DELTA=0.3).criterion.delta == 0.3


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"cfg.MODEL.ALRP.LOSS: expected one of \('alrp', .*, got 'focal'"):
        build(LOSS="focal")
    with pytest.raises(TypeError, match=r"criterion must be a torch\.nn\.Module; got float"):
        ALRPRetinaNet(criterion=0.5, **arguments())
    with pytest.raises(TypeError, match="per_image must be a bool; got int"):
        ALRPRetinaNet(criterion=APLoss(), per_image=1, **arguments())
    with pytest.raises(TypeError, match="criterion"):
        ALRPRetinaNet(**arguments())


def test_where_the_framework_is_missing_an_error_says_so(monkeypatch):
    with double.installed():
        monkeypatch.setitem(sys.modules, "detectron2.config", None)
        with pytest.raises(ImportError, match="needs Detectron2, which is installed from its repository"):
            importlib.import_module(integration.__name__)
