"""Detectors whose scores people can threshold, and a detector's life: trained, resumed, calibrated, restored."""

import copy
import io
import math

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("pycocotools")

from adapters import balances, weigh
from detectors import BUILDERS, SIZE, batch_for, every_detector, same, spread
from torch import nn
from torchvision.ops import box_iou

from alrp_triton.calibration import fit
from alrp_triton.integrations.torchvision import (
    calibrate,
    collect,
    restore,
    stock_state_dict,
    thresholds,
    use_alrp,
    use_rank_sort,
)
from alrp_triton.metrics import evaluate

DEFAULT = 0.05  # torchvision's score_thresh


def train(model, optimizer, steps):
    images, targets = batch_for("retinanet", (2, 1) * 6)
    for _ in range(steps):
        optimizer.zero_grad()
        sum(model(images, targets).values()).backward()
        optimizer.step()
    return model


def start(use, seed=0):
    model = weigh(use(BUILDERS["retinanet"](seed, score_thresh=DEFAULT)), 1.0)
    return model, torch.optim.Adam(model.parameters(), lr=2e-3)


def validation(name="retinanet"):
    return [batch_for(name, (2, 1), seed=seed) for seed in (11, 12, 13)]


def shown(model, threshold=0.5):
    """The number of detections, and that of objects that one of them finds."""
    model.eval()
    number = hits = 0
    for images, targets in validation():
        for found, target in zip(model(images), targets):
            sure = found["scores"] >= threshold
            number += int(sure.sum())
            right = target["labels"][:, None] == found["labels"][sure]
            hits += int(((box_iou(target["boxes"], found["boxes"][sure]) > 0.5) & right).any(1).sum())
    return number, hits


@pytest.fixture(scope="module")
def trained():
    """A RetinaNet that finds objects, with Rank & Sort Loss: its scores are low."""
    return train(*start(use_rank_sort), steps=80)


def test_a_calibrated_detector_shows_what_it_finds(trained):
    model, data = copy.deepcopy(trained), validation()
    assert shown(model) == (0, 0)
    before = evaluate(*collect(model, data))
    report = calibrate(model, data)
    number, hits = shown(model)
    assert 3 <= hits <= number <= 12  # of 9 objects
    after = evaluate(*collect(model, data))
    assert before.ap > 0.2
    assert after.ap == pytest.approx(before.ap, abs=1e-6)
    assert model.score_thresh == DEFAULT
    assert report.thresholds == pytest.approx(thresholds(model, data), rel=1e-3, nan_ok=True)
    text = str(report)
    assert str(report.calibration) in text
    assert {row[0]: row[3] for row in report.overall[1]} == {"before": "0", "after": str(number)}
    assert [row[0] for row in report.by_class[1]] == ["0", "1", "2", "3"]
    assert all(cell in text for row in (*report.overall[1], *report.by_class[1]) for cell in row)
    # Of a calibrated model the map is close to the identity.
    again = calibrate(model, data).calibration.common
    assert (again.a, again.b) == (pytest.approx(1, abs=0.02), pytest.approx(0, abs=0.05))


@pytest.mark.parametrize("name", ["retinanet", "faster_rcnn"])
@pytest.mark.parametrize("per_class", [False, True])
def test_scores_are_the_calibrated_ones(name, per_class):
    model, data = use_alrp(spread(BUILDERS[name]())), validation(name)
    holder = model.roi_heads if name == "faster_rcnn" else model
    holder.nms_thresh, holder.detections_per_img = 1.0, 10**6  # all detections
    truth, found = collect(model, data)
    report = calibrate(model, data, per_class=per_class, min_per_class=1, iou=0.3, max_detections=10**6)
    expected = report.calibration
    assert expected == fit(truth, found, per_class=per_class, min_per_class=1, iou=0.3, max_detections=10**6)
    assert bool(expected.per_class) == per_class
    calibrated = collect(model, data)[1]
    for label in {one["category_id"] for one in found}:
        one, other = (
            torch.tensor(sorted(each["score"] for each in results if each["category_id"] == label))
            for results in (expected.apply(found), calibrated)
        )
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


@every_detector
def test_collecting_changes_nothing(name):
    options = {"box_score_thresh": 0.7} if name == "faster_rcnn" else {"score_thresh": 0.7}
    model = use_alrp(spread(BUILDERS[name](**options)))
    model.backbone.eval()
    modes = [part.training for part in model.modules()]
    state = copy.deepcopy(model.state_dict())
    images, targets = batch_for(name, (2, 0))
    targets[0]["iscrowd"] = torch.tensor([0, 1])
    truth, found = collect(model, [(images, targets)])
    assert [part.training for part in model.modules()] == modes
    assert (model.roi_heads if name == "faster_rcnn" else model).score_thresh == 0.7
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert [image["id"] for image in truth["images"]] == [0, 1]
    assert [category["id"] for category in truth["categories"]] == list(
        range(name == "faster_rcnn", 4 + (name[1] == "a"))
    )
    assert [one["iscrowd"] for one in truth["annotations"]] == [0, 1]
    assert [one["category_id"] for one in truth["annotations"]] == targets[0]["labels"].tolist()
    x1, y1, x2, y2 = targets[0]["boxes"][0].tolist()
    assert truth["annotations"][0]["bbox"] == [x1, y1, x2 - x1, y2 - y1]
    assert min(one["score"] for one in found) < 0.7
    assert {one["image_id"] for one in found} == {0, 1}


@every_detector
def test_thresholds_are_those_of_optimal_lrp(name):
    model, data = use_alrp(spread(BUILDERS[name]())), validation(name)
    expected = evaluate(*collect(model, data)).per_class
    found = thresholds(model, data)
    assert found == pytest.approx({label: one.olrp_threshold for label, one in expected.items()}, nan_ok=True)
    assert any(not math.isnan(value) for value in found.values())
    assert thresholds(restore(model), data).keys() == found.keys()


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: use_alrp(BUILDERS["fcos"]()), TypeError, "model: expected scores by sigmoid.*, got FCOS"),
        (BUILDERS["faster_rcnn"], TypeError, "model: expected scores by sigmoid.*, got FasterRCNN"),
        (lambda: nn.DataParallel(BUILDERS["retinanet"]()), TypeError, "model: expected a torchvision .*DataParallel"),
    ],
)
def test_models_that_cannot_be_calibrated(build, error, message):
    with pytest.raises(error, match=message):
        calibrate(build(), validation())


def test_wrong_data_are_named():
    model = use_alrp(BUILDERS["retinanet"](score_thresh=DEFAULT))
    images, targets = batch_for("retinanet")
    for data, message in (
        ([], "data: expected batches of images and targets, got none"),
        ([(images, targets[:1])], "data: expected a target for each of 2 images, got 1"),
        (
            [(images, [targets[0], {**targets[1], "labels": torch.tensor([4])}])],
            "labels of image 1: 4, expected below 4",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            calibrate(model, data)
    assert model.training
    assert torch.is_grad_enabled()
    assert model.score_thresh == DEFAULT


def test_the_life_of_a_detector():
    """Trained, saved, resumed, calibrated, asked at the default threshold, restored and exported."""
    model, optimizer = start(use_alrp)
    train(model, optimizer, 40)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    model, optimizer = start(use_alrp, seed=1)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    train(model, optimizer, 40)
    assert balances(model)[0].count == 80

    report = calibrate(model, validation())
    checkpoint = model.state_dict()
    number, hits = shown(model, DEFAULT)
    assert hits >= 6
    assert number <= 60  # of 900 without a threshold
    sure = {label: value for label, value in report.thresholds.items() if not math.isnan(value)}
    assert sure
    assert all(0 < value < 1 for value in sure.values())

    images, _ = validation()[0]
    with torch.no_grad():
        before = model(images)
        _, exported = torch.jit.script(restore(model))(images)
    assert same(exported, before)
    plain = BUILDERS["retinanet"](seed=2, score_thresh=DEFAULT, min_size=SIZE).eval()
    plain.load_state_dict(stock_state_dict(checkpoint))
    assert same(plain(images), before)
