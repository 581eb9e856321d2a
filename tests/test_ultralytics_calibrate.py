"""Scores of Ultralytics YOLO that people can threshold, and what becomes of a detector from training to export."""

from __future__ import annotations

import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coco_scenes import scene
from yolo_scenes import SIDE, TRAINING, write_data, write_model
from yolo_scenes import alone as alone

pytest.importorskip("ultralytics", reason="needs Ultralytics")

from torchvision.ops import box_convert, box_iou
from ultralytics import YOLO

from alrp_triton.calibration import Affine
from alrp_triton.calibration.fitting import matches_by_class, pool
from alrp_triton.integrations.ultralytics import calibrate, thresholds, use_rank_sort
from alrp_triton.integrations.ultralytics._calibrate import _Image, _of_class

ASKED: dict[str, Any] = {"imgsz": SIDE, "device": "cpu", "verbose": False}
BRANCHES = (None, False)  # the argument nms: one-to-many, one-to-one


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[str, str]:
    """A model of two branches after some epochs of Rank & Sort Loss, and its data."""
    folder = tmp_path_factory.mktemp("trained")
    data = write_data(folder, number=24)
    yolo = use_rank_sort(YOLO(write_model(folder, end2end=True)))
    still = {"scale": 0.0, "translate": 0.0, "erasing": 0.0, "hsv_v": 0.0, "val": False}
    yolo.train(data=data, project=str(folder), **{**TRAINING, **still, "epochs": 16, "batch": 8, "nbs": 8})
    return str(yolo.trainer.best), data


def shown(yolo: YOLO, data: str, nms: bool | None, **options: Any) -> list[Any]:
    """The boxes of each validation image, at the default threshold of 0.25."""
    images = str(Path(data).parent / "images" / "val")
    return [found.boxes for found in yolo.predict(images, nms=nms, **ASKED, **options)]


def precision_of(yolo: YOLO, data: str, nms: bool | None) -> float:
    """mAP of all detections; the framework's own threshold of 0.001 would cut at other places after calibration."""
    return yolo.val(data=data, conf=0.0, plots=False, nms=nms, **ASKED).box.map


def test_a_detector_shows_objects_only_after_calibration(trained, tmp_path):
    weights, data = trained
    yolo = YOLO(weights)
    before = {nms: (precision_of(yolo, data, nms), sum(map(len, shown(yolo, data, nms)))) for nms in BRANCHES}
    report = calibrate(yolo, data, **ASKED)
    for nms in BRANCHES:
        precision, number = before[nms]
        assert precision > 0.2
        assert precision_of(yolo, data, nms) == pytest.approx(precision, abs=1e-3)
        assert number == 0
        assert 20 < sum(map(len, shown(yolo, data, nms))) < 90  # 48 objects
    assert "all classes: sigmoid(" in str(report)
    assert report.by_class[0][0] == "class"
    best = thresholds(yolo, data, **ASKED)
    assert best == pytest.approx(report.thresholds, abs=1e-3)
    assert all(0 < value < 1 for value in best.values())
    assert isinstance(report.calibration.common, Affine)

    # What is saved and exported needs nothing of this package, and shows the same.
    found = shown(yolo, data, None)
    yolo.save(tmp_path / "calibrated.pt")
    saved = shown(YOLO(tmp_path / "calibrated.pt"), data, None)
    exported = YOLO(yolo.export(format="torchscript", **ASKED), task="detect")
    scripted = exported.predict(str(Path(data).parent / "images" / "val"), rect=False, **ASKED)
    for one, other, third in zip(found, saved, scripted):
        # A file has weights in half precision.
        assert abs(len(one) - len(other)) <= 1
        assert third.boxes.conf.tolist() == pytest.approx(one.conf.tolist(), abs=1e-4)


def test_a_map_for_each_class(trained):
    weights, data = trained
    yolo = YOLO(weights)
    layer = yolo.model.model[-1].one2one_cv3[0][-1]
    before = deepcopy(layer)
    report = calibrate(yolo, data, per_class=True, min_per_class=5, **ASKED)
    assert sorted(report.calibration.per_class) == [0, 1]
    ratios = (layer.weight / before.weight).flatten(1)
    assert not torch.allclose(ratios[0], ratios[1])
    torch.testing.assert_close(ratios, ratios[:, :1].expand_as(ratios))


def test_a_fused_model_has_one_branch_left(trained):
    weights, data = trained
    yolo = YOLO(weights)
    shown(yolo, data, None)
    yolo.model.fuse(verbose=False)
    assert calibrate(yolo, data, **ASKED).thresholds
    assert yolo.predictor is None


@pytest.mark.parametrize("task", ["segment", "obb"])
def test_other_tasks(tmp_path, task):
    data, yolo = write_data(tmp_path, task, number=4), YOLO(write_model(tmp_path, task))
    bias = yolo.model.model[-1].cv3[1][-1].bias.clone()
    report = calibrate(yolo, data, **ASKED)
    assert set(thresholds(yolo, data, **ASKED)) == set(report.thresholds) == {0, 1}
    assert not torch.equal(yolo.model.model[-1].cv3[1][-1].bias, bias)


def test_detections_are_matched_as_in_coco():
    truth, found = scene(3, crowds=0.0)
    pytest.importorskip("pycocotools", reason="needs pycocotools")
    expected = matches_by_class(truth, found, iou=0.5, iou_type="bbox", max_detections=4)
    images = []
    for image in truth["images"]:
        here = [[each for each in some if each["image_id"] == image["id"]] for some in (found, truth["annotations"])]
        classes, true = (np.array([each["category_id"] for each in some], int) for some in here)
        ious = overlaps(*(torch.tensor([each["bbox"] for each in some], dtype=torch.float64) for some in here[::-1]))
        images.append(_Image(np.array([each["score"] for each in here[0]]), classes, true, ious))
    for category, matches in expected.items():
        ours = pool(_of_class(image, category, 0.5, 4) for image in images)
        assert ours.num_ground_truth == matches.num_ground_truth
        order = np.argsort(matches.scores), np.argsort(ours.scores)
        for name in ("scores", "is_true_positive", "ious"):
            theirs, own = (getattr(one, name)[place] for one, place in zip((matches, ours), order))
            np.testing.assert_allclose(own.astype(float), theirs.astype(float), atol=1e-6)


def overlaps(*boxes: torch.Tensor) -> np.ndarray:
    """IoUs [G, D] of objects and detections, which are (x, y, width, height)."""
    return box_iou(*(box_convert(each.reshape(-1, 4), "xywh", "xyxy") for each in boxes)).numpy()


def test_mistakes(tmp_path, trained):
    weights, data = trained
    yolo = YOLO(weights)
    bias = yolo.model.model[-1].cv3[0][-1].bias.clone()
    empty = tmp_path / "empty"
    without = write_data(empty, number=1)
    for label in (empty / "labels").glob("*/*.txt"):
        label.write_text("")
    three = tmp_path / "three.yaml"
    three.write_text(Path(data).read_text().replace("'green'", "'green', 'blue'"))
    for call, error, message in (
        (lambda: calibrate(yolo, data, conf=0.1), TypeError, r"settings: expected arguments of yolo.val.*'conf'"),
        (lambda: calibrate(yolo, data, nms=False), TypeError, r"settings: expected arguments of yolo.val.*'nms'"),
        (lambda: thresholds(yolo, data, conf=0.9), TypeError, r"settings: expected arguments of yolo.val.*'conf'"),
        (lambda: calibrate(yolo, data, iou=1.0, **ASKED), ValueError, r"iou: expected a number in \(0, 1\), got 1.0"),
        (lambda: calibrate(yolo, data, iou=None, **ASKED), TypeError, r"iou: expected a number .*, got NoneType"),
        (lambda: calibrate(yolo, data, max_detections=0), ValueError, "max_detections: expected at least 1, got 0"),
        (lambda: thresholds(yolo, data, max_detections=2.5), TypeError, "max_detections: expected an integer, got fl"),
        (lambda: thresholds(yolo, data, max_detections=True), TypeError, "max_detections: expected an integer, got bo"),
        (lambda: calibrate(yolo, data, min_per_class=0, **ASKED), ValueError, "min_per_class: expected an integer of"),
        (lambda: calibrate(yolo, three, **ASKED), ValueError, "data: expected the model's 2 classes, got 3"),
        (lambda: thresholds(yolo, without, **ASKED), ValueError, "data: expected an object in the validation images"),
        (lambda: calibrate(yolo.model, data), TypeError, "yolo: expected an ultralytics.YOLO .*, got DetectionModel"),
    ):
        with pytest.raises(error, match=message):
            call()
    assert torch.equal(yolo.model.model[-1].cv3[0][-1].bias, bias)
    assert math.isfinite(float(bias.sum()))
