"""Mistakes of people who are new, with detectors and data; see ``test_mistakes.py``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dialect.mistakes import Mistake, says
from torch import nn

pytest.importorskip("torchvision", reason="needs torchvision: pip install '.[torchvision]'")
pytest.importorskip("pycocotools", reason="needs pycocotools: pip install '.[metrics]'")

from detectors import build_retinanet

from alrp_triton import ALRPLoss, alrp_loss
from alrp_triton.assigners import ATSS
from alrp_triton.integrations.torchvision import calibrate, use_alrp, use_loss
from alrp_triton.metrics import evaluate

IMAGES = [torch.rand(3, 64, 64)] * 2
OBJECT = {"boxes": torch.tensor([[4.0, 4.0, 40.0, 40.0]]), "labels": torch.tensor([1])}
NOTHING = {"boxes": torch.empty(0, 4), "labels": torch.empty(0, dtype=torch.int64)}
BATCHES = ("data: expected batches (images, targets)", "DataLoader(dataset, batch_size, collate_fn=")
TRUTH: dict[str, Any] = {
    "images": [{"id": 1}],
    "annotations": [{"image_id": 1, "category_id": 1, "bbox": [0, 0, 9, 9]}],
    "categories": [{"id": 1}],
}
FOUND = [{"image_id": 1, "category_id": 0, "bbox": [0, 0, 9, 9], "score": 0.5}]

MISTAKES: dict[str, Mistake] = {
    "the class of a loss": (
        lambda model: use_loss(model, ALRPLoss),
        TypeError,
        ("criterion: expected a torch.nn.Module, got the class ALRPLoss", "write ALRPLoss()"),
    ),
    "a loss as a function": (
        lambda model: use_loss(model, alrp_loss),
        TypeError,
        ("criterion: expected a torch.nn.Module, got function", "write ALRPLoss()"),
    ),
    "another loss": (
        lambda model: use_loss(model, nn.BCEWithLogitsLoss()),
        TypeError,
        ("criterion: expected a ranking loss, such as ALRPLoss()", "got BCEWithLogitsLoss"),
    ),
    "the function that builds a model": (
        lambda model: use_alrp(build_retinanet),
        TypeError,
        ("model: expected a torchvision RetinaNet, FCOS or FasterRCNN", "got function"),
    ),
    "a wrapped model": (
        lambda model: use_alrp(nn.DataParallel(model)),
        TypeError,
        ("model: expected a torchvision RetinaNet, FCOS or FasterRCNN, not yet wrapped, got DataParallel",),
    ),
    "an assigner's class": (
        lambda model: use_alrp(model, assigner=ATSS),
        TypeError,
        ("assigner: expected a callable such as ATSS(), got the class ATSS",),
    ),
    "classes from 1": (
        lambda model: model.train()(IMAGES, [OBJECT, {**OBJECT, "labels": torch.tensor([4])}]),
        ValueError,
        ("labels of image 1: 4, expected below 4",),
    ),
    "calibration by a dataset": (lambda model: calibrate(model, [(IMAGES[0], OBJECT)]), TypeError, BATCHES),
    "calibration by images": (lambda model: calibrate(model, [IMAGES]), TypeError, (*BATCHES, "got list")),
    "calibration by nothing": (
        lambda model: calibrate(model, []),
        ValueError,
        ("data: expected batches", "got none (an iterator is empty the second time)"),
    ),
    "calibration without objects": (
        lambda model: calibrate(model, [(IMAGES, [NOTHING, NOTHING])]),
        ValueError,
        ("data: expected at least one object, got none",),
    ),
    "calibration before training": (
        lambda model: calibrate(model, [(IMAGES, [OBJECT, OBJECT])], iou=0.99),
        UserWarning,
        ("data: expected detections of its objects, got none of IoU 0.99 or more", "is the model trained"),
    ),
    "ground truth in the second place": (
        lambda model: evaluate(FOUND, TRUTH),
        TypeError,
        ("ground_truth: expected a COCO dataset, which is a dict, got list", "detections come second"),
    ),
    "other category ids": (
        lambda model: evaluate(TRUTH, FOUND),
        UserWarning,
        ("detections: expected some of the category ids of ground_truth, 1, got 0",),
    ),
}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return use_alrp(build_retinanet())


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_of_detectors(mistake: Mistake, model: nn.Module) -> None:
    says(mistake, model)
