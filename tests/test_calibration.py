"""Maps from scores to probabilities: what is fitted, what stays as it was, and how bad input is refused."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coco_scenes import Record, found, scene, truth
from dialect.interpreters import start_python
from hypothesis import given, settings
from hypothesis import strategies as st

from alrp_triton.calibration import Affine, Calibration, Isotonic, expected_calibration_error, fit, fit_matched
from alrp_triton.calibration.fitting import match
from alrp_triton.metrics import evaluate

pytest.importorskip("pycocotools")
BOX = [10.0, 10, 20, 20]
CURVE = Isotonic((-3.0, 0.0, 2.0), (0.1, 0.1, 0.7))
both_methods = pytest.mark.parametrize("method", ["affine", "isotonic"])


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def drawn(seed: int, maps: dict[int, Affine], *, num: int = 6000, mean: float = 0.0) -> tuple[Record, list[Record]]:
    """For each class, detections that are true with the probability that its map gives to their scores."""
    rng = np.random.default_rng(seed)
    objects, detections = [], []
    for label, one in maps.items():
        x = rng.normal(mean, 2, num)
        hits = rng.random(num) < sigmoid(one.a * x + one.b)
        for i, (score, hit) in enumerate(zip(sigmoid(x).tolist(), hits.tolist())):
            place = {"image_id": i // 50, "category_id": label, "bbox": [100 * (i % 50), 0, 50, 50]}
            detections.append({**place, "score": score})
            if hit:
                objects.append(place)
    images = [{"id": i} for i in range(-(-num // 50))]
    return {"images": images, "annotations": objects, "categories": [{"id": label} for label in maps]}, detections


def without_scores(metrics: Any) -> dict[str, Any]:
    """All numbers but those that are scores."""
    values = metrics.to_dict()
    for one in values["per_class"].values():
        del one["olrp_threshold"]
    return values


# What is fitted


@pytest.mark.parametrize(("a", "b", "mean"), [(0.5, 4.0, -8.0), (2.0, -9.0, 5.0), (1.0, 0.0, 0.0)])
def test_finds_the_map_that_truth_was_drawn_by(a: float, b: float, mean: float) -> None:
    data = drawn(0, {1: Affine(a, b)}, num=20000, mean=mean)
    one = fit(*data).common
    assert isinstance(one, Affine)
    # A few standard errors of the estimate.
    assert one.a == pytest.approx(a, rel=0.06)
    assert one.a * mean + one.b == pytest.approx(a * mean + b, abs=0.1)


def test_finds_the_maps_of_classes_and_leaves_rare_ones_to_the_common_map() -> None:
    maps = {1: Affine(0.5, 3.0), 7: Affine(1.5, -2.0)}
    data, detections = drawn(1, maps, num=10000)
    rare = [{**record, "category_id": 9} for record in detections[:9]]
    data["categories"] += [{"id": 9}, {"id": 11}]
    data["annotations"] += rare[:3]
    calibration = fit(data, detections + rare, per_class=True)
    assert set(calibration.per_class) == {1, 7}
    for label, expected in maps.items():
        one = calibration.per_class[label]
        assert (one.a, one.b) == (pytest.approx(expected.a, rel=0.1), pytest.approx(expected.b, abs=0.15))
    assert set(fit(data, detections + rare, per_class=True, min_per_class=3).per_class) == {1, 7, 9}
    assert calibration(0.3, 9) == calibration(0.3, 11) == Calibration(calibration.common)(0.3)
    assert fit(data, detections + rare) == Calibration(calibration.common)


def test_detections_that_the_caller_has_matched() -> None:
    """The maps of the same detections, whoever has matched them."""
    generator = np.random.default_rng(0)
    scores, classes = generator.uniform(0.05, 0.95, 600), generator.integers(1, 4, 600)
    hits = generator.uniform(size=600) < scores**classes
    truths, detections = [], []
    for k, (score, kind, hit) in enumerate(zip(scores.tolist(), classes.tolist(), hits.tolist())):
        truths.append({"image": k, "class": kind, "box": [0, 0, 10, 10]})
        detections.append({"image": k, "class": kind, "box": [0 if hit else 50, 0, 10, 10], "score": score})
    dataset = {
        "images": [{"id": k, "width": 100, "height": 100} for k in range(600)],
        "categories": [{"id": k, "name": str(k)} for k in (1, 2, 3)],
        "annotations": [
            {
                "id": k + 1,
                "image_id": one["image"],
                "category_id": one["class"],
                "bbox": one["box"],
                "area": 100,
                "iscrowd": 0,
            }
            for k, one in enumerate(truths)
        ],
    }
    results = [
        {"image_id": one["image"], "category_id": one["class"], "bbox": one["box"], "score": one["score"]}
        for one in detections
    ]
    for per_class in (False, True):
        expected = fit(dataset, results, per_class=per_class)
        assert bool(expected.per_class) == per_class
        order = generator.permutation(600)
        ours = fit_matched(scores[order], hits[order], classes[order] if per_class else None)
        assert ours.per_class.keys() == expected.per_class.keys()
        for one, other in zip([ours.common, *ours.per_class.values()], [expected.common, *expected.per_class.values()]):
            assert isinstance(one, Affine)
            assert isinstance(other, Affine)
            assert (one.a, one.b) == pytest.approx((other.a, other.b), rel=1e-9)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (([0.5, 1.5], [True, False]), "scores: expected"),
        (([[0.5]], [[True]]), "scores: expected"),
        (([0.5, 0.6], [1, 0]), "is_true_positive: expected bools"),
        (([0.5, 0.6], [True]), "is_true_positive: expected the shape"),
        (([0.5], [True], [1.0]), "categories: expected integers"),
        (([0.5], [True], [1, 2]), "categories: expected the shape"),
    ],
)
def test_wrong_arguments_of_what_the_caller_has_matched(arguments: tuple[Any, ...], said: str) -> None:
    with pytest.raises((TypeError, ValueError), match=said):
        fit_matched(*arguments)


@both_methods
def test_calibration_error_falls_on_other_images(method: str) -> None:
    pytest.importorskip("sklearn")
    maps = {1: Affine(0.6, 3.0), 2: Affine(1.2, 3.5)}
    known, new = drawn(2, maps, mean=-4.0), drawn(3, maps, mean=-4.0)
    before = expected_calibration_error(*new)
    common = expected_calibration_error(new[0], fit(*known, method=method).apply(new[1]))
    own = expected_calibration_error(new[0], fit(*known, method=method, per_class=True).apply(new[1]))
    assert before > 0.2
    assert common < 0.1 * before
    assert own < 0.1 * before


def test_truth_is_that_of_coco() -> None:
    # A second detection of an object is false, one on a crowd is neither; IoU 0.8 depends on the threshold.
    data = truth(BOX)
    data["annotations"].append({"image_id": 1, "category_id": 1, "bbox": [200, 200, 50, 50], "iscrowd": 1})
    detections = found((0.9, [10.0, 10, 20, 16]), (0.6, BOX), (0.5, [205, 205, 10, 10]))
    alone = detections[:2]
    assert fit(data, detections) == fit(data, alone)
    assert expected_calibration_error(data, detections) == pytest.approx((0.1 + 0.6) / 2)
    assert expected_calibration_error(data, detections, iou=0.9) == pytest.approx((0.9 + 0.4) / 2)
    assert expected_calibration_error(data, detections, max_detections=1) == pytest.approx(0.1)
    assert fit(data, alone, iou=0.9) != fit(data, alone)
    unlisted = [{**detections[0], "category_id": 5}]
    assert fit(data, alone + unlisted) == fit(data, alone)


def test_calibration_error_by_hand() -> None:
    data = truth(BOX)
    detections = found((0.2, BOX), (0.1, [50, 50, 9, 9]), (0.9, [90, 90, 9, 9]), (0.0, [70, 70, 9, 9]))
    # One bin: |1/4 - 1.2/4|. Ten: (0.1, 0.2] has 0.2 and a true one, [0, 0.1] has 0.1, (0.8, 0.9] has 0.9.
    assert expected_calibration_error(data, detections, bins=1) == pytest.approx(0.2 / 4)
    assert expected_calibration_error(data, detections, bins=10) == pytest.approx((0.8 + 0.1 + 0.9) / 4)
    # A score at the bound of two bins is in the lower one.
    assert expected_calibration_error(data, found((0.5, BOX), (0.3, [50, 50, 9, 9])), bins=2) == pytest.approx(0.2 / 2)
    assert math.isnan(expected_calibration_error(data, []))


def test_masks() -> None:
    square = [[10, 10, 30, 10, 30, 30, 10, 30]]
    data = truth([10, 10, 20, 20], segmentation=square)
    data["images"][0] |= {"width": 50, "height": 40}
    detections = [{**found((0.5, [0, 0, 1, 1]))[0], "segmentation": square}]
    assert fit(data, detections, iou_type="segm").common.b > 0 > fit(data, detections).common.b


# What stays


@pytest.mark.parametrize("per_class", [False, True])
@pytest.mark.parametrize("power", [1, 12])
def test_metrics_of_each_class_stay(per_class: bool, power: int) -> None:
    data, detections = scene(5, num_images=60, num_classes=4)
    for record in detections:
        record["score"] **= power
    calibration = fit(data, detections, per_class=per_class)
    assert len(calibration.per_class) == 3 * per_class
    calibrated = calibration.apply(detections)
    before, after = evaluate(data, detections), evaluate(data, calibrated)
    assert without_scores(before) == without_scores(after)
    for label, one in before.per_class.items():
        if one.num_ground_truth:
            assert after.per_class[label].olrp_threshold == calibration(one.olrp_threshold, label)


maps = st.builds(Affine, st.floats(0.1, 10), st.floats(-20, 20))


@given(maps, st.lists(st.floats(0, 1, width=32), min_size=2, unique=True))
def test_affine_maps_keep_float32_scores_apart(one: Affine, scores: list[float]) -> None:
    probabilities = Calibration(one)(sorted(scores))
    assert ((probabilities >= 0) & (probabilities <= 1)).all()
    assert (np.diff(probabilities) >= 0).all()
    # The least positive number and 0 have the same logit.
    inside = (probabilities < 1 - 1e-7) & (np.sort(scores) > 1e-44)
    assert (np.diff(probabilities[inside]) > 0).all()


def test_float32_holds_fewer_probabilities() -> None:
    scores = torch.tensor([0.5, 0.6, 0.7])
    high = Calibration(Affine(1.0, 18.0))
    assert high(scores).tolist() == [1.0, 1.0, 1.0]
    assert (high(scores.double()).diff() > 0).all()


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=40), st.integers(0, 99))
@settings(max_examples=50)
def test_isotonic_maps_are_monotone(scored: list[tuple[float, bool]], seed: int) -> None:
    pytest.importorskip("sklearn")
    one = of_scores("isotonic", scored)
    grid = Calibration(one)(np.sort(np.random.default_rng(seed).random(50) ** 8))
    assert (np.diff(grid) >= 0).all()
    assert ((grid >= 0) & (grid <= 1)).all()


def of_scores(method: str, scored: list[tuple[float, bool]]) -> Affine | Isotonic:
    """The map of detections of which each is true or false."""
    data = truth()
    data["images"] = [{"id": i} for i in range(len(scored))]
    detections = [{**found((score, BOX))[0], "image_id": i} for i, (score, _) in enumerate(scored)]
    data["annotations"] = [record for record, (_, hit) in zip(detections, scored) if hit]
    return fit(data, detections, method=method).common


# Data that say little


@given(st.lists(st.tuples(st.floats(0, 1) | st.sampled_from([0.0, 1.0, 1e-300]), st.booleans()), max_size=30))
@settings(max_examples=200)
def test_affine_maps_are_finite_whatever_the_data(scored: list[tuple[float, bool]]) -> None:
    one = of_scores("affine", scored)
    assert one.a > 0
    assert math.isfinite(one.a)
    assert math.isfinite(one.b)
    probabilities = Calibration(one)([0.0, 1e-300, 0.5, 1.0])
    assert np.isfinite(probabilities).all()


@pytest.mark.parametrize("hits", [(0, 1, 0, 1), (0, 0, 0, 0), (1, 0, 0, 0), (0, 0, 1, 1)])
def test_affine_maps_minimise_what_is_documented(hits: tuple[int, ...]) -> None:
    scores = np.array([0.01, 0.02, 0.03, 0.2])
    one = of_scores("affine", list(zip(scores.tolist(), map(bool, hits))))
    x = np.log(scores / (1 - scores))

    def error(a: float, b: float) -> float:
        p, half = sigmoid(a * x + b), sigmoid(a * x.mean() + b)
        likely = np.where(hits, p, 1 - p)
        return -np.log(likely).sum() - np.log(half * (1 - half)) / 2 + 0.01 * (a - math.log(a))

    assert isinstance(one, Affine)
    best, step = error(one.a, one.b), 1e-4 * one.a
    for da, db in (
        (step, 0.0),
        (-step, 0.0),
        (0.0, step),
        (0.0, -step),
        (step, -step * x.mean()),
        (-step, step * x.mean()),
    ):
        assert error(one.a + da, one.b + db) > best


def test_separable_data() -> None:
    one = of_scores("affine", [(0.1, False), (0.2, False), (0.8, True), (0.9, True)])
    assert 1 < one.a < 100
    low, high = Calibration(one)([0.2, 0.8])
    assert low < 0.02
    assert high > 0.98
    # The wrong way round the order is kept nevertheless.
    inverse = of_scores("affine", [(0.1, True), (0.2, True), (0.8, False), (0.9, False)])
    assert 0 < inverse.a < 0.01


@both_methods
@pytest.mark.parametrize("score", [1e-9, 0.3, 1 - 1e-9])
def test_detections_that_are_all_true_or_all_false(method: str, score: float) -> None:
    pytest.importorskip("sklearn")
    for hit in (False, True):
        calibration = Calibration(of_scores(method, [(score, hit)] * 30))
        assert calibration(score) == pytest.approx(float(hit), abs=0.02)
    half = Calibration(of_scores(method, [(score, True), (score, False)] * 30))
    assert half(score) == pytest.approx(0.5)
    assert method == "isotonic" or half.common.a == pytest.approx(1.0)


@both_methods
def test_no_detections(method: str) -> None:
    pytest.importorskip("sklearn")
    for data in (truth(BOX), {"images": [], "annotations": []}):
        for per_class in (False, True):
            calibration = fit(data, [], method=method, per_class=per_class)
            assert calibration == Calibration()
            assert calibration.apply([]) == []
    assert Calibration()([0.25, 0.5]) == pytest.approx([0.25, 0.5], rel=1e-15)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_matches_are_those_of_cocos_evaluation(dtype: type) -> None:
    """Each object once, by the best detection; the best object of several; others are false."""
    ious = np.array([[1.0, 0.9, 1.0, 0.0], [0.8, 0.8, 0.7, 0.0]], dtype)
    scores = np.array([0.5, 0.9, 0.8, 0.6])
    found = match(scores, ious, 0.7, 3)
    # 0.9 takes the first object, 0.8 the second, from exactly 0.7 on; 0.6 takes none; 0.5 is beyond the limit.
    assert found.scores.tolist() == [0.9, 0.8, 0.6]
    assert found.is_true_positive.tolist() == [True, True, False]
    assert found.ious.tolist() == pytest.approx([0.9, 0.7, 0.0])
    assert found.num_ground_truth == 2
    assert ious[0, 0] == 1  # the input has not changed
    for objects, number in ((0, 3), (2, 0)):
        none = match(scores[:number], ious[:objects, :number], 0.7, 3)
        assert (none.is_true_positive.tolist(), none.num_ground_truth) == ([False] * number, objects)


def test_scores_of_0_and_1() -> None:
    inner = [(0.2, False), (0.4, True), (0.6, False), (0.7, True)]
    outer = [(0.0, True), (1.0, False)] * 5
    assert of_scores("affine", inner + outer) == of_scores("affine", inner)
    assert of_scores("affine", outer) == Affine()
    assert of_scores("isotonic", inner + outer) != of_scores("isotonic", inner)
    for one in (Affine(3.0, -100.0), Affine(0.01, 100.0), CURVE):
        probabilities = Calibration(one)(np.array([0, 1e-300, 0.5, 1]))
        assert np.isfinite(probabilities).all()
        assert (np.diff(probabilities) >= 0).all()


# What a calibration takes and gives


def test_scores_of_every_kind() -> None:
    calibration = Calibration(Affine(0.5, 1.0), {3: Affine(2.0, -1.0), 4: CURVE})
    scores = np.array([[0.1, 0.6, 0.9], [0.2, 0.5, 0.3]])
    ids = np.array([[3, 1, 3], [4, 4, 2]])
    x = np.log(scores / (1 - scores))
    expected = np.where(ids == 3, sigmoid(2 * x - 1), sigmoid(0.5 * x + 1))
    expected[1, :2] = 0.1, 0.1
    assert calibration(scores, ids) == pytest.approx(expected, rel=1e-14)
    assert calibration(scores.tolist(), ids.tolist()) == pytest.approx(expected, rel=1e-14)
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        given = torch.from_numpy(scores).to(dtype).requires_grad_()
        result = calibration(given, torch.from_numpy(ids))
        assert (result.dtype, result.shape, result.requires_grad) == (dtype, given.shape, False)
        exact = calibration(given.detach().double().numpy(), ids)
        torch.testing.assert_close(result.double(), torch.from_numpy(exact).to(dtype).double(), rtol=0, atol=0)
    assert calibration(scores.astype(np.float32), ids).dtype == np.float32
    assert calibration(np.array([0, 1]), [1, 1]).dtype == calibration([], []).dtype == np.float64
    assert calibration(torch.tensor([0, 1]), torch.tensor([1, 1])).dtype == torch.float64
    assert float(calibration(0.1, 3)) == pytest.approx(expected[0, 0])
    assert calibration(0.1, 1) == Calibration(calibration.common)(0.1)


def test_inputs_do_not_change(tmp_path: Path) -> None:
    data, detections = scene(6, num_images=20)
    scores, tensor = np.array([0.2, 0.4]), torch.tensor([0.2, 0.4])
    copies = copy.deepcopy((data, detections, scores.tolist(), tensor.tolist()))
    calibration = fit(data, detections, per_class=True)
    calibrated = calibration.apply(detections)
    expected_calibration_error(data, detections)
    calibration(scores, [1, 2])
    calibration(tensor, [1, 2])
    assert (data, detections, scores.tolist(), tensor.tolist()) == copies
    changed = [{**new, "score": old["score"]} for new, old in zip(calibrated, detections)]
    assert changed == detections
    expected = calibration([d["score"] for d in detections], [d["category_id"] for d in detections])
    assert [d["score"] for d in calibrated] == expected.tolist()
    # All forms of detections that evaluate takes.
    (tmp_path / "found.json").write_text(json.dumps(detections), encoding="utf-8")
    for other in (tmp_path / "found.json", {"annotations": detections}):
        assert calibration.apply(other) == calibrated
        assert fit(data, other, per_class=True) == calibration


def test_json() -> None:
    calibration = Calibration(Affine(0.1, -3e-17), {3: CURVE, 12: Affine(2.0, 1.0)})
    assert Calibration.from_dict(json.loads(json.dumps(calibration.to_dict()))) == calibration
    assert str(calibration).splitlines() == [
        "other classes: sigmoid(0.1 logit(score) - 3e-17)",
        "class 3: isotonic, 3 points",
        "class 12: sigmoid(2 logit(score) + 1)",
    ]
    for broken in ({}, [], {"common": {"a": 1}, "per_class": {}}, {"common": {"a": 1, "b": 0}}):
        with pytest.raises(ValueError, match="values: expected a"):
            Calibration.from_dict(broken)  # type: ignore[arg-type]


# What is refused


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"method": "platt"}, ValueError, "method: expected 'affine' or 'isotonic', got 'platt'"),
        ({"iou": 1.0}, ValueError, r"iou: expected a number in \(0, 1\), got 1.0"),
        ({"iou": "0.5"}, TypeError, r"iou: expected a number in \(0, 1\), got str"),
        ({"min_per_class": 0}, ValueError, "min_per_class: expected an integer of at least 1, got 0"),
        ({"iou_type": "mask"}, ValueError, "iou_type: expected 'bbox' or 'segm'"),
        ({"max_detections": 0}, ValueError, "max_detections: expected at least 1"),
    ],
)
def test_wrong_settings_of_fit(change: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        fit(truth(BOX), found((0.5, BOX)), **change)


@pytest.mark.parametrize(
    ("score", "said"), [(math.nan, "expected a number, got NaN"), (1.5, r"expected a number in \[0, 1\], got 1.5")]
)
def test_wrong_scores_of_detections(score: float, said: str) -> None:
    detections = found((0.5, BOX), (score, BOX))
    calls = (fit, expected_calibration_error, lambda _, results: Calibration().apply(results))
    for call in calls:
        with pytest.raises(ValueError, match=rf"detections\[1\]\['score'\]: {said}"):
            call(truth(BOX), detections)


def test_wrong_arguments() -> None:
    own = Calibration(Affine(), {1: Affine(2.0)})
    for scores, said in (
        (math.nan, r"scores: expected numbers in \[0, 1\], got nan"),
        (torch.tensor([0.5, -1]), r"scores: expected numbers in \[0, 1\], got -1.0"),
        ([[0.5], [0.5, 0.5]], "scores: expected numbers of one shape"),
    ):
        with pytest.raises(ValueError, match=said):
            Calibration()(scores)
    with pytest.raises(TypeError, match="scores: expected real numbers"):
        Calibration()(["a"])
    with pytest.raises(ValueError, match="categories: expected the category ids of scores"):
        own([0.5])
    with pytest.raises(ValueError, match=r"categories: expected the shape of scores, \(1,\), got \(2,\)"):
        own([0.5], [1, 1])
    for values, said in (
        ((0.0, 1.0), "a: .* above 0"),
        ((-1.0, 0.0), "a: "),
        ((1.0, math.nan), "b: "),
        ((math.inf, 0), "a:"),
    ):
        with pytest.raises(ValueError, match=said):
            Affine(*values)
    with pytest.raises(TypeError, match="b: expected a number"):
        Affine(1.0, "1")  # type: ignore[arg-type]
    for logits, values, said in (
        ((), (), "values"),
        ((0.0,), (0.1, 0.2), "values"),
        ((1.0, 0.0), (0.1, 0.2), "logits"),
        ((0.0, 1.0), (0.2, 0.1), "values"),
        ((0.0, 1.0), (0.2, 1.1), "values"),
        ((0.0, math.nan), (0.2, 0.3), "logits"),
    ):
        with pytest.raises(ValueError, match=f"{said}: expected"):
            Isotonic(logits, values)
    with pytest.raises(ValueError, match="bins: expected an integer of at least 1, got 0"):
        expected_calibration_error(truth(), [], bins=0)


@pytest.mark.parametrize(
    ("package", "said"),
    [
        ("pycocotools", "pycocotools is not installed: pip install 'alrp-triton[metrics]'"),
        ("sklearn", "scikit-learn is not installed: pip install 'alrp-triton[calibration]'"),
    ],
)
def test_without_packages(package: str, said: str) -> None:
    code = f"""
import sys
sys.modules[{package!r}] = None
from alrp_triton.calibration import Affine, Calibration, fit
assert Calibration(Affine(1.0, 0.0))(0.5) == 0.5
try:
    fit({{"images": [], "annotations": []}}, [], method="isotonic")
except ImportError as error:
    print(error)
"""
    done = start_python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{said}\n"
