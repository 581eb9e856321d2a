"""The TorchMetrics metric: the numbers of the COCO-format path, and what TorchMetrics does with metrics."""

from __future__ import annotations

import copy
import io
import math
import pickle
import re
from typing import Any

import numpy as np
import pytest
import torch
from coco_scenes import Images, scene, tensors
from dialect.interpreters import start_python
from dialect.processes import SIZE, Pool

from alrp_triton.metrics import evaluate

pytest.importorskip("pycocotools")
pytest.importorskip("torchmetrics")
import torchmetrics
from torchmetrics.detection import MeanAveragePrecision

from alrp_triton.metrics.torchmetrics import LocalisationRecallPrecision

# The warning that nothing has been added yet.
pytestmark = pytest.mark.filterwarnings("ignore:The ``compute`` method")
NAMES = ("ap", "ap50", "ap75", "ap90", "olrp", "olrp_loc", "olrp_fp", "olrp_fn", "rho")


def assert_same(numbers: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert set(numbers) == set(other)
    for name, value in numbers.items():
        torch.testing.assert_close(value, other[name], rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize("batch", [1, 4, 100])
def test_numbers_are_those_of_the_coco_path(batch: int) -> None:
    data, detections = scene(5, num_images=9, decimals=2)
    preds, target = tensors(data, detections)
    settings = {
        "tau": 0.6, "max_detections": 5, "score_threshold": 0.4, "iou_thresholds": [0.625, *np.linspace(0.5, 0.95, 10)],
    }  # fmt: skip
    metric = LocalisationRecallPrecision("xywh", class_metrics=True, **settings)
    for start in range(0, len(preds), batch):
        metric.update(preds[start : start + batch], target[start : start + batch])
    metrics = evaluate(data, detections, **settings)
    numbers = metric.compute()
    assert all(value.dtype == torch.float64 for name, value in numbers.items() if name != "classes")
    for name in (*NAMES, "lrp", "lrp_loc", "lrp_fp", "lrp_fn"):
        assert numbers[name].item() == pytest.approx(getattr(metrics, name), abs=1e-12, nan_ok=True), name
    for area, scores in metrics.by_area.items():
        assert numbers[f"ap_{area}"].item() == pytest.approx(scores.ap, abs=1e-12, nan_ok=True)
        assert numbers[f"olrp_{area}"].item() == pytest.approx(scores.olrp, abs=1e-12, nan_ok=True)
    assert numbers["ap_at_0.625"].item() == metrics.ap_at[0.625]
    assert numbers["ap_at_0.9"].item() == metrics.ap90
    assert numbers["classes"].tolist() == [1, 2, 3]  # the last has detections alone
    for name in ("ap", "olrp", "olrp_threshold", "rho"):
        expected = [getattr(one, name) for one in metrics.per_class.values()]
        assert numbers[f"{name}_per_class"].tolist() == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_box_formats() -> None:
    preds, target = tensors(*scene(6))
    expected = LocalisationRecallPrecision("xywh")(preds, target)
    for box_format in ("xyxy", "cxcywh"):
        images: tuple[Images, Images] = copy.deepcopy((preds, target))
        for entry in (*images[0], *images[1]):
            corner, sides = entry["boxes"].split(2, dim=1)
            entry["boxes"] = torch.cat(
                [corner, corner + sides] if box_format == "xyxy" else [corner + sides / 2, sides], 1
            )
        numbers = LocalisationRecallPrecision(box_format)(*images)
        for name in NAMES:
            assert numbers[name].item() == pytest.approx(expected[name].item(), abs=1e-9, nan_ok=True)


def test_single_and_half_precision() -> None:
    preds, target = tensors(*scene(6), dtype=torch.float32)
    doubled = [
        [{k: v.double() if v.is_floating_point() else v for k, v in one.items()} for one in side]
        for side in (preds, target)
    ]
    assert_same(LocalisationRecallPrecision("xywh")(preds, target), LocalisationRecallPrecision("xywh")(*doubled))
    halved = [
        [{k: v.half() if k != "labels" else v.int() for k, v in one.items()} for one in side]
        for side in (preds, target)
    ]
    numbers = LocalisationRecallPrecision("xywh")(*halved)
    assert numbers["olrp"].item() == pytest.approx(
        LocalisationRecallPrecision("xywh")(preds, target)["olrp"].item(), abs=0.05
    )


def test_optional_entries() -> None:
    box = torch.tensor([[0.0, 0, 10, 10]])
    pred = {"boxes": box, "scores": torch.tensor([0.5]), "labels": torch.tensor([0])}
    truth = {"boxes": box, "labels": torch.tensor([0])}
    assert LocalisationRecallPrecision()([pred], [truth])["olrp_small"] == 0
    numbers = LocalisationRecallPrecision()([pred], [{**truth, "area": torch.tensor([5000.0])}])
    assert math.isnan(numbers["olrp_small"])
    assert numbers["olrp_medium"] == 0
    assert math.isnan(LocalisationRecallPrecision()([pred], [{**truth, "iscrowd": torch.tensor([1])}])["olrp"])


def test_nothing_yet_and_empty_images() -> None:
    metric = LocalisationRecallPrecision(class_metrics=True)
    assert math.isnan(metric.compute()["olrp"])
    metric.update([], [])
    assert math.isnan(metric.compute()["olrp"])
    assert metric.compute()["classes"].shape == metric.compute()["olrp_per_class"].shape == (0,)
    labels = torch.zeros(0, dtype=torch.int64)
    for boxes in (torch.zeros(0, 4), torch.zeros(0)):
        metric.update(
            [{"boxes": boxes, "scores": torch.zeros(0), "labels": labels}], [{"boxes": boxes, "labels": labels}]
        )
        assert math.isnan(metric.compute()["olrp"])
    missed = {"boxes": torch.tensor([[0.0, 0, 5, 5]]), "labels": torch.tensor([4])}
    metric.update([{"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": labels}], [missed])
    numbers = metric.compute()
    # Of what has one element TorchMetrics makes a scalar.
    assert (numbers["olrp"], numbers["ap"], numbers["classes"].tolist()) == (1, 0, 4)
    assert math.isnan(numbers["olrp_loc"])


def test_forward_reset_pickle_and_checkpoint() -> None:
    preds, target = tensors(*scene(7, num_images=8))
    whole = LocalisationRecallPrecision("xywh", class_metrics=True)
    whole.update(preds, target)
    expected = whole.compute()
    metric = LocalisationRecallPrecision("xywh", class_metrics=True)
    first = LocalisationRecallPrecision("xywh", class_metrics=True)
    first.update(preds[:3], target[:3])
    # forward gives the numbers of the batch, and adds it.
    assert_same(metric(preds[:3], target[:3]), first.compute())
    metric = pickle.loads(pickle.dumps(copy.deepcopy(metric)))
    metric(preds[3:], target[3:])
    assert_same(metric.compute(), expected)
    metric.persistent(True)
    file = io.BytesIO()
    torch.save(metric.state_dict(), file)
    file.seek(0)
    restored = LocalisationRecallPrecision("xywh", class_metrics=True)
    restored.persistent(True)
    restored.load_state_dict(torch.load(file))
    assert_same(restored.compute(), expected)
    metric.reset()
    assert math.isnan(metric.compute()["olrp"])
    metric.update(preds, target)
    assert_same(metric.compute(), expected)


def test_inputs_are_kept_and_do_not_change() -> None:
    preds, target = tensors(*scene(8))
    for entry in preds:
        entry["boxes"].requires_grad_()
    copies = copy.deepcopy((preds, target))
    metric = LocalisationRecallPrecision("xywh")
    metric.update(preds, target)
    for kept, given in zip((*copies[0], *copies[1]), (*preds, *target)):
        assert all(torch.equal(kept[name], given[name]) for name in kept)
    expected = metric.compute()
    for entry in (*preds, *target):
        for value in entry.values():
            value.detach().zero_()
    again = copy.deepcopy(metric)
    again._computed = None
    assert_same(again.compute(), expected)


@pytest.mark.parametrize("backend", ["pycocotools", "faster_coco_eval"])
def test_beside_mean_average_precision(backend: str) -> None:
    if backend == "faster_coco_eval":
        pytest.importorskip("faster_coco_eval")
    preds, target = tensors(*scene(9, num_images=12, decimals=2))
    # In single precision, as is TorchMetrics' default, recall thresholds miss some recalls that they should reach.
    theirs = MeanAveragePrecision("xywh", rec_thresholds=np.linspace(0, 1, 101).tolist(), backend=backend)
    collection = torchmetrics.MetricCollection([LocalisationRecallPrecision("xywh"), theirs])
    for start in (0, 5):
        collection.update(preds[start : start + 5], target[start : start + 5])
    collection(preds[10:], target[10:])
    numbers = pickle.loads(pickle.dumps(collection)).compute()
    pairs = {"ap": "map", "ap50": "map_50", "ap75": "map_75"}
    for name, other in {**pairs, **{f"ap_{area}": f"map_{area}" for area in ("small", "medium", "large")}}.items():
        assert numbers[name].item() == pytest.approx(numbers[other].item(), abs=1e-6), name
    assert 0.3 < numbers["olrp"] < 1
    # With keys that both have, TorchMetrics tells them apart by the metric's name.
    both = torchmetrics.MetricCollection([LocalisationRecallPrecision("xywh", class_metrics=True), theirs])
    assert {"LocalisationRecallPrecision_classes", "MeanAveragePrecision_classes"} <= set(both(preds, target))


def gathered(rank: int, shares: list[list[int]]) -> list[Any]:
    """In one of several processes: the numbers of a metric, with the images shared out in each of these ways."""
    preds, target = tensors(*scene(10, num_images=7))
    numbers = []
    for ends in shares:
        metric = LocalisationRecallPrecision("xywh", class_metrics=True)
        for i in range(ends[rank], ends[rank + 1]):
            metric.update(preds[i : i + 1], target[i : i + 1])
        numbers.append(metric.compute())
        # Each process goes on with its own images.
        assert sum(len(counts) for counts in metric.counts) == ends[rank + 1] - ends[rank]
        metric.reset()
        metric.update(preds[rank::SIZE], target[rank::SIZE])
        metric.compute()
    return numbers


@pytest.mark.nightly
@pytest.mark.xdist_group("processes")
@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_processes_gather_what_each_has_seen(pool: Pool) -> None:
    """Some of the images, all or none."""
    whole = LocalisationRecallPrecision("xywh", class_metrics=True)
    whole.update(*tensors(*scene(10, num_images=7)))
    found = pool.run(gathered, [[0, 3, 5, 6, 7], [0, 7, 7, 7, 7], [0, 0, 0, 4, 7]])
    assert [len(of_process) for of_process in found] == [3] * SIZE
    for numbers in (numbers for of_process in found for numbers in of_process):
        assert_same(numbers, whole.compute())


PRED = {"boxes": torch.zeros(2, 4), "scores": torch.zeros(2), "labels": torch.zeros(2, dtype=torch.int64)}
TRUTH = {"boxes": torch.zeros(1, 4), "labels": torch.zeros(1, dtype=torch.int64)}


WRONG_TYPES = [
    ("preds", [], "preds: expected a list of dicts, got str"),
    ([], None, "target: expected a list of dicts, got NoneType"),
    ([3], [TRUTH], "preds[0]: expected a dict, got int"),
    ([{**PRED, "scores": [0.5, 0.5]}], [TRUTH], "preds[0]['scores']: expected a tensor, got list"),
    ([{**PRED, "labels": torch.zeros(2)}], [TRUTH], "['labels']: expected integers, got torch.float32"),
]
WRONG_VALUES = [
    ([PRED], [], "target: expected as many images as preds, 1, got 0"),
    ([TRUTH], [TRUTH], "preds[0]: expected the key 'scores', got 'boxes', 'labels'"),
    ([PRED], [{"boxes": TRUTH["boxes"]}], "target[0]: expected the key 'labels', got 'boxes'"),
    ([{**PRED, "scores": torch.zeros(3)}], [TRUTH], "['scores']: expected shape [2], got [3]"),
    ([{**PRED, "boxes": torch.zeros(2, 5)}], [TRUTH], "['boxes']: expected shape [2, 4], got [2, 5]"),
    ([{**PRED, "boxes": torch.zeros(0)}], [TRUTH], "['boxes']: expected shape [2, 4], got [0]"),
    ([{**PRED, "labels": torch.zeros(2, 1).int()}], [TRUTH], "['labels']: expected shape [N]"),
    ([PRED], [{**TRUTH, "iscrowd": torch.zeros(2)}], "target[0]['iscrowd']: expected shape [1]"),
]


@pytest.mark.parametrize(("error", "wrong"), [(TypeError, WRONG_TYPES), (ValueError, WRONG_VALUES)])
def test_wrong_updates(error: type[Exception], wrong: list[tuple[Any, Any, str]]) -> None:
    metric = LocalisationRecallPrecision()
    for preds, target, said in wrong:
        with pytest.raises(error, match=re.escape(said)):
            metric.update(preds, target)
        # Nothing of it is kept.
        assert math.isnan(metric.compute()["olrp"])


def test_wrong_values_and_settings() -> None:
    metric = LocalisationRecallPrecision()
    metric.update([{**PRED, "scores": torch.tensor([0.5, math.nan])}], [TRUTH])
    with pytest.raises(ValueError, match=r"detections\[1\]\['score'\]: expected a number, got NaN"):
        metric.compute()
    for settings, said in (
        ({"box_format": "yxyx"}, "box_format: expected 'xyxy', 'xywh' or 'cxcywh', got 'yxyx'"),
        ({"tau": 1}, "tau: expected a number"),
        ({"max_detections": 0}, "max_detections: expected at least 1"),
    ):
        with pytest.raises(ValueError, match=said):
            LocalisationRecallPrecision(**settings)
    with pytest.raises(TypeError, match="class_metrics: expected a bool, got int"):
        LocalisationRecallPrecision(class_metrics=1)


def test_without_torchmetrics() -> None:
    code = """
import sys
sys.modules["torchmetrics"] = None
try:
    import alrp_triton.metrics.torchmetrics
except ImportError as error:
    print(error)
"""
    done = start_python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "LocalisationRecallPrecision needs torchmetrics: pip install torchmetrics\n"
