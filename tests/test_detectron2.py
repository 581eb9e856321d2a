"""The Detectron2 integration, on a stand-in for Detectron2 (see detectron2_double.py): the interfaces are Detectron2's,
the detector behind them is not."""

import copy
import importlib
import sys

import pytest
import torch

pytest.importorskip("torchvision")

import detectron2_double as double
from adapters import (
    Recorder,
    assert_nothing_to_learn,
    assert_same_gradients,
    assert_trained,
    by_batch_or_image,
    heard,
    monitored,
    of_either_kind,
    own_loss,
)
from detectron2_model import (
    NUM_CLASSES,
    ALRPRetinaNet,
    arguments,
    arguments_of_losses,
    batch,
    build,
    integration,
    losses_of,
)
from torchvision.ops import generalized_box_iou

from alrp_triton import ALRPLoss, APLoss, NDCGLoss, RankSortLoss, SelfBalance, alrp_loss
from alrp_triton.calibration import Affine, Calibration, fold

LOSSES = {"alrp": ALRPLoss, "rank_sort": RankSortLoss, "ap": APLoss, "ndcg": NDCGLoss}
every_loss = pytest.mark.parametrize("name", LOSSES)


@pytest.mark.parametrize("objects_per_image", [(3, 2), (0, 4), (2, 0, 3)])
def test_losses_equal_those_computed_by_hand(objects_per_image, monkeypatch):
    model = build(SELF_BALANCE_INIT=3.0, DELTA=0.5, TAU=0.25)
    anchors, logits, gt_labels, deltas, gt_boxes = arguments_of_losses(model, batch(objects_per_image), monkeypatch)
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
    expected = alrp_loss(flat, torch.cat(one_hot), torch.stack(errors), delta=0.5)

    assert list(losses) == ["loss_cls", "loss_box_reg"]
    torch.testing.assert_close(losses["loss_cls"], expected.cls)
    torch.testing.assert_close(losses["loss_box_reg"], 3.0 * expected.loc)
    assert storage.scalars["num_pos_anchors"] == pytest.approx(len(errors) / len(objects_per_image))
    assert_same_gradients(sum(losses.values()), expected.cls + 3.0 * expected.loc, [*logits, *deltas])


@by_batch_or_image
@of_either_kind
def test_what_a_criterion_is_given(takes_boxes, per_image):
    """A hand-written assignment: classes, background, ignored; boxes level after level, then image after image."""
    model = ALRPRetinaNet(criterion=Recorder(takes_boxes), per_image=per_image, **arguments())
    logits = [torch.zeros(2, n, NUM_CLASSES) for n in (3, 2)]
    deltas = [torch.zeros(2, n, 4) for n in (3, 2)]
    boxes = torch.arange(1.0, 6)[:, None] * torch.tensor([1.0, 1, 2, 3])
    anchors = [double.Boxes(boxes[:3]), double.Boxes(boxes[3:])]
    gt_labels = [torch.tensor([3, 1, -1, 0, 3]), torch.tensor([2, 3, 3, -1, 1])]
    gt_boxes = [boxes + 0.5, boxes + 0.25]
    with double.EventStorage():
        losses = model.losses(anchors, logits, gt_labels, deltas, gt_boxes)

    given = model.criterion.arguments
    assert given[0] is logits  # neither flattened nor copied
    assert [level.tolist() for level in given[1]] == [[[3, 1, -1], [2, 3, 3]], [[0, 3], [-1, 1]]]
    if takes_boxes:
        torch.testing.assert_close(given[2], boxes[[1, 0, 3, 4]])
        true = [boxes[1] + 0.5, boxes[0] + 0.25, boxes[3] + 0.5, boxes[4] + 0.25]
        torch.testing.assert_close(given[3], torch.stack(true))
    else:
        assert len(given) == 2
    assert (losses["loss_box_reg"] == 0) == takes_boxes
    model.criterion.assert_told(4, [[[0] * 3, [1] * 3], [[0] * 2, [1] * 2]] if per_image else None)


@pytest.mark.parametrize("name", ["ap", "ndcg"])
def test_losses_on_scores_leave_the_boxes_to_retinanet(name, monkeypatch):
    model, plain = build(LOSS=name), build(cls=double.RetinaNet)
    given = arguments_of_losses(model, batch(), monkeypatch)
    with double.EventStorage():
        losses, own = model.losses(*given), plain.losses(*given)
    assert losses["loss_box_reg"] == own["loss_box_reg"] > 0
    assert losses["loss_cls"] != own["loss_cls"]
    assert_same_gradients(losses["loss_box_reg"], own["loss_box_reg"], given[3], rtol=0, atol=0)
    assert all(gradient.any() for gradient in torch.autograd.grad(losses["loss_cls"], given[1]))


def train(model, batches, optimizer=None):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.01)
    history = []
    for inputs in batches:
        losses = losses_of(model, inputs)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        assert_trained(model)
        optimizer.step()
        history.append({part: loss.item() for part, loss in losses.items()})
    return history


@by_batch_or_image
@every_loss
def test_training_steps_lower_the_loss_and_the_model_predicts(name, per_image):
    model = build(LOSS=name, PER_IMAGE=per_image)
    assert type(model.criterion) is LOSSES[name]
    values = train(model, [batch()] * 30, torch.optim.Adam(model.parameters(), lr=3e-3))
    assert values[-1]["loss_cls"] < 0.9 * values[0]["loss_cls"]
    assert [len(each["instances"]) for each in model.eval()(batch())] == [7, 7]


@every_loss
def test_batch_without_objects(name):
    model = build(LOSS=name)
    assert_nothing_to_learn(model, losses_of(model, batch((0, 0))))


@every_loss
def test_under_autocast(name):
    model = build(LOSS=name)
    calls = heard(model.criterion)
    with torch.autocast("cpu", torch.bfloat16):
        losses = losses_of(model, batch())
    sum(losses.values()).backward()
    assert losses["loss_cls"].dtype == torch.float32
    assert_trained(model)
    logits, _, *boxes = calls[0]
    assert {level.dtype for level in logits} == {torch.bfloat16}
    assert all(box.dtype == torch.float32 for box in boxes)


def test_a_resumed_run_gives_the_same_numbers(tmp_path):
    settings = {"SELF_BALANCE_PERIOD": 2, "SELF_BALANCE_INIT": 10.0}
    model, resumed = build(**settings), build(seed=5, **settings)
    train(model, [batch(seed=seed) for seed in range(3)])
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    resumed.load_state_dict(torch.load(tmp_path / "model.pth")["model"], strict=True)
    balance = resumed.criterion.self_balance
    assert (balance.period, balance.count.item()) == (2, 1)
    assert balance.weight != 10
    later = [batch(seed=seed) for seed in range(7, 10)]
    assert train(resumed, later) == train(model, later)
    added = model.state_dict().keys() - build(cls=double.RetinaNet).state_dict().keys()
    assert added == {f"criterion.self_balance.{name}" for name in ("weight", "sums", "count")}


def test_calibrated_weights_load_into_detectron2s_own_model():
    model, plain = build(LOSS="rank_sort").eval(), build(cls=double.RetinaNet, seed=3).eval()
    calibration = Calibration(Affine(0.5, 1.0))
    before = model(batch())
    fold(calibration, model.head.logits, NUM_CLASSES)
    plain.load_state_dict(model.state_dict())
    for old, *new in zip(before, model(batch()), plain(batch())):
        for each in new:
            found = each["instances"]
            assert torch.equal(found.pred_boxes.tensor, old["instances"].pred_boxes.tensor)
            torch.testing.assert_close(found.scores, calibration(old["instances"].scores))


def test_explicit_arguments_and_copies():
    criterion = ALRPLoss(self_balance=SelfBalance(10.0, period=3))
    model = ALRPRetinaNet(criterion=criterion, **arguments())
    assert model.criterion is criterion
    assert not model.per_image
    twin = copy.deepcopy(model)
    train(model, [batch(seed=seed) for seed in range(3)])
    assert (twin.criterion.self_balance.weight, twin.criterion.self_balance.count) == (10, 0)
    losses = losses_of(ALRPRetinaNet(criterion=own_loss(), **arguments()).train(), batch())
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


@every_loss
def test_the_config_turns_statistics_on(name):
    (numbers_of,) = monitored("numbers_of")
    model, silent = build(LOSS=name, MONITOR=True), build(LOSS=name)
    losses, expected = losses_of(model, batch()), losses_of(silent, batch())
    assert losses == expected
    numbers = numbers_of(model)
    assert numbers["criterion/num_positives"] > 0
    assert numbers["criterion/cls"] == losses["loss_cls"].item()
    assert numbers_of(silent) == {}


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"cfg.MODEL.ALRP.LOSS: expected \('alrp', .*, got 'focal'"):
        build(LOSS="focal")
    with pytest.raises(TypeError, match=r"criterion: expected a torch\.nn\.Module, got float"):
        ALRPRetinaNet(criterion=0.5, **arguments())
    with pytest.raises(TypeError, match="per_image: expected a bool, got int"):
        ALRPRetinaNet(criterion=APLoss(), per_image=1, **arguments())
    with pytest.raises(TypeError, match="criterion"):
        ALRPRetinaNet(**arguments())


def test_where_the_framework_is_missing_an_error_says_so(monkeypatch):
    with double.installed():
        monkeypatch.setitem(sys.modules, "detectron2.config", None)
        with pytest.raises(ImportError, match="needs Detectron2, which is installed from its repository"):
            importlib.import_module(integration.__name__)
