"""AP, optimal LRP and rank correlation from COCO-format data: matching, means, area ranges, and what may be passed."""

from __future__ import annotations

import copy
import json
import math
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coco_scenes import match, olrp_by_definition, scene
from test_figure1 import ORDERS, RANKS

from alrp_triton.metrics import Scores, average_precision, evaluate, lrp, rank_correlation

pytest.importorskip("pycocotools")
from pycocotools import mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

NAN = math.nan
OLRP = ("olrp", "olrp_loc", "olrp_fp", "olrp_fn")


def truth(*boxes: list[float], label: int = 1, **more: Any) -> dict[str, Any]:
    objects = [{"image_id": 1, "category_id": label, "bbox": box, **more} for box in boxes]
    return {"images": [{"id": 1}], "annotations": objects, "categories": [{"id": 1, "name": "one"}]}


def found(*scored: tuple[float, list[float]], label: int = 1) -> list[dict[str, Any]]:
    return [{"image_id": 1, "category_id": label, "score": score, "bbox": box} for score, box in scored]


def numbers(scores: Scores, names: tuple[str, ...] = OLRP) -> list[float]:
    return [getattr(scores, name) for name in names]


# Objects apart from one another, and boxes that cover a share of one: the share is the IoU.
OBJECTS = [[100.0 * i, 0.0, 10.0, 10.0] for i in range(5)]


def share(i: int, iou: float) -> list[float]:
    return [100.0 * i, 0.0, 10.0 * iou, 10.0]


NOWHERE = [0.0, 500.0, 10.0, 10.0]


def test_by_hand() -> None:
    detections = found((0.9, share(0, 0.9)), (0.8, NOWHERE), (0.7, share(1, 0.7)), (0.2, NOWHERE))
    metrics = evaluate(truth(*OBJECTS[:3]), detections)
    # At 0.7: ((0.1 + 0.3)/0.5 + 1 false + 1 missed)/4 = 2.8/4; at 0.9 (0.2 + 2)/3; at 0.8 3.2/4; at 0.2 3.8/5.
    assert numbers(metrics) == pytest.approx([0.7, 0.2, 1 / 3, 1 / 3])
    assert metrics.per_class[1].olrp_threshold == 0.7
    assert metrics.rho == 1
    # Precision 1 up to recall 1/3, then 2/3 up to 2/3: of 101 recalls 34 and 33; from IoU 0.75 on only the first part.
    high, both = 34 / 101, (34 + 33 * 2 / 3) / 101
    assert numbers(metrics, ("ap", "ap50", "ap75", "ap90")) == pytest.approx(
        [0.5 * both + 0.4 * high, both, high, high]
    )
    assert metrics.ap_at[0.7] == pytest.approx(both)
    assert metrics.ap_at[0.95] == 0


@pytest.mark.parametrize("order", ORDERS)
def test_figure_1_of_the_alrp_paper(order: str) -> None:
    """AP50, AP65, AP80, AP95 and their mean, as printed. There are five objects, of which one has no anchor."""
    printed = {
        "positively correlated": ([0.51, 0.43, 0.33, 0.20], 0.37),
        "uncorrelated": ([0.51, 0.39, 0.24, 0.02], 0.29),
        "negatively correlated": ([0.51, 0.19, 0.08, 0.02], 0.20),
    }[order]
    ious = dict(zip((RANKS - 1).tolist(), ORDERS[order][0]))
    scores = [1 - i / 10 for i in range(10)]
    place = {anchor: i for i, anchor in enumerate(ious)}
    boxes = [share(place[i], ious[i]) if i in ious else NOWHERE for i in range(10)]
    thresholds = (0.5, 0.65, 0.8, 0.95)
    metrics = evaluate(truth(*OBJECTS), found(*zip(scores, boxes)))
    hits = {t: [i in ious and ious[i] >= t for i in range(10)] for t in thresholds}
    # The figure's is the area under the curve of interpolated precision.
    areas = [average_precision(scores, hits[t], 5) for t in thresholds]
    assert [round(area, 2) for area in areas] == printed[0]
    assert round(sum(areas) / 4, 2) == printed[1]
    # COCO's samples that curve at 101 recalls, of which 21 and not 20 lie in its first fifth: up to 0.01 more.
    sampled = [average_precision(scores, hits[t], 5, recall_points=101) for t in thresholds]
    assert [metrics.ap_at[t] for t in thresholds] == pytest.approx(sampled, abs=1e-12)
    assert all(0 < one - other <= 1 / 101 for one, other in zip(sampled, areas))
    # The classifier is the same, and so is AP50; rho tells the three apart, as the loss does.
    expected_rho = {"positively correlated": 1, "uncorrelated": -0.2, "negatively correlated": -1}
    assert metrics.rho == pytest.approx(expected_rho[order])
    assert metrics.per_class[1].num_ground_truth == 5


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("tau", [0.5, 0.7])
def test_against_the_definition(seed: int, tau: float) -> None:
    data, detections = scene(seed, num_images=3, decimals=1 if seed % 2 else None)
    metrics = evaluate(data, detections, tau=tau, score_threshold=0.4)
    for label, one in metrics.per_class.items():
        expected = olrp_by_definition(data, detections, label, tau)
        assert one.olrp == pytest.approx(expected, abs=1e-12, nan_ok=True)
        ious, num_false, num_objects = match(data, detections, label, tau)
        assert (one.num_ground_truth, one.num_detections) == (num_objects, len(ious) + num_false)
        for threshold, names in ((one.olrp_threshold, OLRP), (0.4, ("lrp", "lrp_loc", "lrp_fp", "lrp_fn"))):
            if math.isnan(threshold) or not num_objects:
                continue
            ious, num_false, _ = match(data, [d for d in detections if d["score"] >= threshold], label, tau)
            values = [True] * len(ious) + [False] * num_false
            by_hand = lrp([1.0] * len(values), values, [*ious, *[0.0] * num_false], num_objects, tau=tau)
            assert numbers(one, names) == pytest.approx(by_hand[:4], abs=1e-12, nan_ok=True)
    defined = [one for one in metrics.per_class.values() if one.num_ground_truth]
    for name in (*OLRP, "ap50", "rho", "lrp_fp"):
        values = [getattr(one, name) for one in defined if not math.isnan(getattr(one, name))]
        assert getattr(metrics, name) == pytest.approx(np.mean(values) if values else NAN, nan_ok=True)


@pytest.mark.parametrize("max_detections", [100, 3])
def test_ap_is_pycocotools(max_detections: int, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in range(5):
        data, detections = scene(seed, num_images=8, max_objects=12, decimals=2)
        metrics = evaluate(data, detections, max_detections=max_detections)
        assert capsys.readouterr().out == ""
        coco = COCO()
        coco.dataset = copy.deepcopy(data)
        for i, item in enumerate(coco.dataset["annotations"], start=1):
            item["id"] = i
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(copy.deepcopy(detections)), "bbox")
        evaluation.params.maxDets = [1, 2, max_detections]
        evaluation.evaluate()
        evaluation.accumulate()
        capsys.readouterr()
        precision = evaluation.eval["precision"][..., -1]
        for a, area in enumerate((metrics, *(metrics.by_area[name] for name in ("small", "medium", "large")))):
            for t, threshold in enumerate((0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)):
                part = precision[t, :, :, a]
                expected = part[part > -1].mean() if (part > -1).any() else NAN
                assert area.ap_at[threshold] == pytest.approx(expected, abs=1e-12, nan_ok=True)
            part = precision[..., a]
            expected = part[part > -1].mean() if (part > -1).any() else NAN
            assert area.ap == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_rho_is_that_of_the_true_positives_of_each_class() -> None:
    data, detections = scene(3, num_images=10, max_objects=10, crowds=0)
    metrics = evaluate(data, detections)
    for label, one in metrics.per_class.items():
        pairs = []
        for detection in detections:
            # What a detection adds to the matches of all better ones is its own.
            better = [d for d in detections if d["score"] > detection["score"]]
            before, after = (match(data, some, label, 0.5)[0] for some in (better, [*better, detection]))
            if len(after) > len(before):
                pairs.append((detection["score"], next(iou for iou in after if iou not in before)))
        assert len(pairs) >= 5 or not one.num_ground_truth
        expected = rank_correlation(*zip(*pairs)) if one.num_ground_truth else NAN
        assert one.rho == pytest.approx(expected, nan_ok=True)


def test_extremes() -> None:
    perfect = evaluate(truth(*OBJECTS), found(*((0.5 + i / 10, box) for i, box in enumerate(OBJECTS))))
    assert numbers(perfect, ("ap", "ap90", *OLRP)) == pytest.approx([1, 1, 0, 0, 0, 0])
    assert math.isnan(perfect.rho)  # all IoUs are equal
    for detections in ([], found((0.9, NOWHERE), (0.3, NOWHERE))):
        nothing = evaluate(truth(*OBJECTS), detections)
        assert numbers(nothing, ("ap", *OLRP, "rho")) == pytest.approx([0, 1, NAN, NAN, 1, NAN], nan_ok=True)
        assert math.isnan(nothing.per_class[1].olrp_threshold)
    for detections in ([], found((0.9, NOWHERE))):
        undefined = evaluate(truth(), detections, score_threshold=0.5)
        assert all(map(math.isnan, numbers(undefined, ("ap", "ap50", *OLRP, "rho", "lrp", "lrp_fp"))))
        assert all(map(math.isnan, numbers(undefined.per_class[1], ("ap", *OLRP, "lrp", "lrp_fp"))))
        assert undefined.per_class[1].num_detections == len(detections)
    empty = evaluate({"images": [], "annotations": []}, [])
    assert math.isnan(empty.olrp)
    assert empty.per_class == {}


def test_duplicates_are_false() -> None:
    detections = found((0.9, share(0, 0.8)), (0.8, share(0, 1.0)))
    metrics = evaluate(truth(OBJECTS[0]), detections)
    # The first takes the object, though the second fits better: alone it is (0.2/0.5)/1 = 0.4, with both 1.4/2.
    assert numbers(metrics) == pytest.approx([0.4, 0.2, 0, 0])
    assert metrics.per_class[1].olrp_threshold == 0.9
    assert evaluate(truth(OBJECTS[0]), detections, score_threshold=0.5).lrp == pytest.approx(0.7)


def test_crowds_are_ignored() -> None:
    data = truth(OBJECTS[0])
    data["annotations"] += truth([200.0, 200.0, 100.0, 100.0], iscrowd=1)["annotations"]
    inside = [210.0, 210.0, 10.0, 10.0]
    detections = found((0.9, share(0, 0.9)), (0.95, inside), (0.5, inside))
    metrics = evaluate(data, detections, score_threshold=0.0)
    assert numbers(metrics) == pytest.approx([0.2, 0.1, 0, 0])
    assert metrics.lrp == pytest.approx(0.2)
    assert (metrics.per_class[1].num_ground_truth, metrics.per_class[1].num_detections) == (1, 1)
    # A class of crowds alone has no object.
    assert math.isnan(evaluate(truth(OBJECTS[0], iscrowd=1), detections).olrp)


def test_ties_of_score_are_kept_or_dropped_together() -> None:
    detections = found((0.5, share(0, 1.0)), (0.5, NOWHERE))
    for some in (detections, detections[::-1]):
        assert numbers(evaluate(truth(OBJECTS[0]), some)) == pytest.approx([0.5, 0, 0.5, 0])


def test_classes() -> None:
    data = truth(OBJECTS[0], OBJECTS[1])
    data["annotations"] += truth(OBJECTS[2], label=3)["annotations"]
    data["categories"] = [{"id": 7, "name": "seven"}, {"id": 3, "name": "three"}, {"id": 1}]
    detections = found((0.9, OBJECTS[0])) + found((0.4, OBJECTS[2]), label=3) + found((0.8, NOWHERE), label=7)
    # One that the dataset does not list.
    detections += found((0.99, OBJECTS[0]), label=99)
    metrics = evaluate(data, detections, score_threshold={1: 0.5, 3: 0.5})
    assert list(metrics.per_class) == [1, 3, 7]
    assert [one.name for one in metrics.per_class.values()] == ["1", "three", "seven"]
    # One of two found, and one of one; the class without objects does not count.
    assert metrics.per_class[1].olrp == pytest.approx(0.5)
    assert metrics.per_class[3].olrp == 0
    assert math.isnan(metrics.per_class[7].olrp)
    assert metrics.olrp == pytest.approx(0.25)
    assert metrics.ap == pytest.approx((51 / 101 + 1) / 2)
    # At 0.5 nothing is left of the class 3, whose share of false detections is not defined.
    assert numbers(metrics, ("lrp", "lrp_fp", "lrp_fn")) == pytest.approx([0.75, 0, 0.75])
    assert math.isnan(metrics.per_class[7].lrp)
    only_one = evaluate(data, detections, score_threshold={1: 0.5})
    assert only_one.lrp == pytest.approx(0.5)
    del data["categories"]
    assert list(evaluate(data, detections).per_class) == [1, 3]


def test_area_ranges() -> None:
    small, large = [0.0, 0.0, 10.0, 10.0], [100.0, 100.0, 200.0, 100.0]
    half = [100.0, 100.0, 200.0, 60.0]
    data = truth(small, large)
    detections = found((0.9, small), (0.8, half), (0.7, NOWHERE))
    metrics = evaluate(data, detections)
    # Small: found, with a false one beside it that its threshold leaves out. Large: an IoU of 0.6, and nothing false.
    assert numbers(metrics.by_area["small"]) == pytest.approx([0, 0, 0, 0])
    assert numbers(metrics.by_area["large"]) == pytest.approx([0.8, 0.4, 0, 0])
    assert numbers(metrics.by_area["medium"]) == pytest.approx([NAN] * 4, nan_ok=True)
    # The area that a file gives counts, not that of the box; both bounds belong to a range.
    data["annotations"][0]["area"] = 32.0**2
    metrics = evaluate(data, detections, score_threshold=0.0)
    assert [metrics.by_area[name].ap50 for name in ("small", "medium")] == pytest.approx([1, 1])
    assert metrics.by_area["small"].lrp == pytest.approx(0.5)  # the false detection is as small
    own = evaluate(data, detections, area_ranges={"tiny": (0, 50), "rest": (50, 1e6)})
    assert list(own.by_area) == ["tiny", "rest"]
    assert math.isnan(own.by_area["tiny"].olrp)
    assert own.by_area["rest"].olrp == own.olrp
    assert evaluate(data, detections, area_ranges={}).by_area == {}


def test_iou_thresholds() -> None:
    detections = found((0.9, share(0, 0.9)))
    metrics = evaluate(
        truth(OBJECTS[0]), detections, tau=0.3, iou_thresholds=(0.9, 0.92, 1.0, *np.linspace(0.5, 0.95, 10))
    )
    assert sorted(metrics.ap_at) == [0.3, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.92, 0.95, 1.0]
    assert [t for t, ap in metrics.ap_at.items() if ap == 0] == [0.95, 0.92, 1.0]
    assert metrics.ap == pytest.approx(0.9)
    assert metrics.tau == 0.3
    assert metrics.olrp == pytest.approx(0.1 / 0.7)


def rle(box: list[float]) -> dict[str, Any]:
    pixels = np.zeros((50, 60), dtype=np.uint8, order="F")
    x, y, width, height = map(int, box)
    pixels[y : y + height, x : x + width] = 1
    return mask.encode(pixels)


def test_masks() -> None:
    x, y, width, height = box = [10, 5, 20, 20]
    polygon = [[x, y, x + width, y, x + width, y + height, x, y + height]]
    uncompressed = {"size": [50, 60], "counts": [x * 50 + y, *[height, 50 - height] * (width - 1), height, 1525]}
    part = rle([10, 5, 20, 16])
    as_text = {**part, "counts": part["counts"].decode()}
    for segmentation in (polygon, rle(box), uncompressed):
        data = truth([0, 0, 1, 1], segmentation=segmentation)
        data["images"][0] |= {"width": 60, "height": 50}
        before = copy.deepcopy(data)
        for detected in (part, as_text):
            # Boxes that say otherwise do not count, for the area neither.
            detections = [{**found((0.5, [0, 0, 50, 50]))[0], "segmentation": detected}]
            metrics = evaluate(data, detections, iou_type="segm")
            assert numbers(metrics) == pytest.approx([0.4, 0.2, 0, 0])
            assert metrics.by_area["small"].olrp == pytest.approx(0.4)
            del detections[0]["bbox"]
            assert evaluate(data, detections, iou_type="segm").to_dict() == metrics.to_dict()
        assert data == before
    for broken in ([], "none", {"size": [50, 60], "counts": [5, 5]}, {"size": [50, 60]}, [[1, 2]], None, 5):
        with pytest.raises(ValueError, match=r"detections\[0\]\['segmentation'\]: expected polygons or RLE"):
            evaluate(data, [{**detections[0], "segmentation": broken}], iou_type="segm")
    del data["images"][0]["height"]
    with pytest.raises(ValueError, match=r"ground_truth\['annotations'\]\[0\]\['segmentation'\].*height"):
        evaluate(data, detections, iou_type="segm")


def test_files_dicts_and_coco_objects_alike(tmp_path: Path) -> None:
    data, detections = scene(1)
    copies = copy.deepcopy((data, detections))
    # As dicts, in which NaN is None and so equal to itself.
    expected = evaluate(data, detections).to_dict()
    assert (data, detections) == copies
    names = tmp_path / "truth.json", tmp_path / "found.json"
    for name, content in zip(names, (data, detections)):
        name.write_text(json.dumps(content))
    coco = COCO(str(names[0]))
    results = coco.loadRes(str(names[1]))
    kept = copy.deepcopy((coco.dataset, results.dataset))
    for inputs in (names, map(str, names), (coco, results), (coco, detections), (data, {"annotations": detections})):
        assert evaluate(*inputs).to_dict() == expected
    assert kept == (coco.dataset, results.dataset)
    # Without the ids of annotations, with text as those of images, and with the numbers of numpy.
    for item in (*data["images"], *data["annotations"], *detections):
        key = "image_id" if "image_id" in item else "id"
        item[key] = f"image {item[key]}"
        if "bbox" in item:
            item.pop("id", None)
            item["bbox"] = np.array(item["bbox"])
            item["category_id"] = np.int64(item["category_id"])
        if "score" in item:
            item["score"] = np.float64(item["score"])
    assert evaluate(data, detections).to_dict() == expected


def test_results_as_dict_and_table() -> None:
    data, detections = scene(2)
    metrics = evaluate(data, detections, score_threshold={1: 0.5})
    written = json.loads(json.dumps(metrics.to_dict(), allow_nan=False))
    assert written["olrp"] == metrics.olrp
    assert written["ap90"] == metrics.ap90 == written["ap_at"]["0.9"]
    assert written["per_class"]["1"]["olrp_threshold"] == metrics.per_class[1].olrp_threshold
    assert written["per_class"]["3"]["olrp"] is None
    assert written["by_area"]["large"]["olrp_fp"] == metrics.by_area["large"].olrp_fp
    assert written["score_threshold"] == {"1": 0.5}
    lines = metrics.table(per_class=True).splitlines()
    assert lines[0].split()[:4] == ["AP", "AP50", "AP75", "AP90"]
    assert [line.split()[0] for line in lines[1:]] == ["all", "small", "medium", "large", "class", "class", "class"]
    assert f"{metrics.olrp:.4f}" in lines[1]
    assert "-" in lines[-1].split()
    assert str(metrics).splitlines()[1].split() == lines[1].split()
    assert "LRP FN" in lines[0]
    assert " LRP" not in str(evaluate(data, detections)).replace("oLRP Loc", "").replace("oLRP", "")
    assert pickle.loads(pickle.dumps(metrics)).to_dict() == metrics.to_dict()


BOX = found((0.5, [0, 0, 5, 5]))[0]


@pytest.mark.parametrize(
    ("data", "detections", "error", "said"),
    [
        ([], [], TypeError, "ground_truth: expected a COCO dataset, which is a dict, got list"),
        ({"images": []}, [], ValueError, "ground_truth: expected the key 'annotations', got 'images'"),
        ({"images": [{}], "annotations": []}, [], ValueError, r"ground_truth\['images'\]\[0\]: expected the key 'id'"),
        ({"images": [3], "annotations": []}, [], TypeError, r"ground_truth\['images'\]\[0\]: expected a dict, got int"),
        ({"images": {}, "annotations": []}, [], TypeError, r"ground_truth\['images'\]: expected a list of dicts"),
        ({"images": [{"id": 1}, {"id": "a"}], "annotations": []}, [], TypeError, "integers or text as ids, got both"),
        ({"images": [{"id": [1]}], "annotations": []}, [], TypeError, "expected an integer or text"),
        (
            {**truth(), "categories": [{"id": "a"}]},
            [],
            TypeError,
            r"\['categories'\]\[0\]\['id'\]: expected an integer",
        ),
        (truth([0, 0, 5, 5], image_id=2), [], ValueError, r"\['annotations'\]\[0\]\['image_id'\]: 2 is not among"),
        (truth([0, 0, 5, 5], iscrowd=2), [], ValueError, r"\['iscrowd'\]: expected 0 or 1, got 2"),
        (truth([0, 0, 5, 5], area=None), [], TypeError, r"\['area'\]: expected a number, got None"),
        (truth([0, 0, -5, 5]), [], ValueError, r"\['annotations'\]\[0\]\['bbox'\]: expected finite x, y, width >= 0"),
        (truth(), None, TypeError, "detections: expected a list of dicts, got NoneType"),
        (truth(), {"boxes": []}, ValueError, "detections: expected a list of results, or a dict with the key"),
        (
            truth(),
            [BOX, {**BOX, "image_id": 5}],
            ValueError,
            r"detections\[1\]\['image_id'\]: 5 is not among the images",
        ),
        (truth(), [{**BOX, "image_id": [1]}], ValueError, r"detections\[0\]\['image_id'\]: \[1\] is not among"),
        (truth(), [{**BOX, "category_id": 1.5}], TypeError, r"detections\[0\]\['category_id'\]: expected an integer"),
        (truth(), [{**BOX, "score": NAN}], ValueError, r"detections\[0\]\['score'\]: expected a number, got NaN"),
        (truth(), [{**BOX, "score": "0.5"}], TypeError, r"detections\[0\]\['score'\]: expected a number, got '0.5'"),
        (truth(), [{**BOX, "bbox": [0, 0, 5]}], ValueError, r"detections\[0\]\['bbox'\]: expected finite"),
        (truth(), [{**BOX, "bbox": [0, NAN, 5, 5]}], ValueError, r"detections\[0\]\['bbox'\]: expected finite"),
        (truth(), [{**BOX, "bbox": "none"}], TypeError, r"detections\[0\]\['bbox'\]: expected four numbers"),
        (truth(), [{"image_id": 1}], ValueError, r"detections\[0\]: expected the key 'category_id', got 'image_id'"),
    ],
)
def test_wrong_data(data: Any, detections: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        evaluate(data, detections)


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"tau": 0}, ValueError, r"tau: expected a number in \(0, 1\), got 0"),
        ({"tau": 1.0}, ValueError, "tau"),
        ({"tau": True}, TypeError, "tau: expected a number"),
        ({"iou_type": "keypoints"}, ValueError, "iou_type: expected 'bbox' or 'segm', got 'keypoints'"),
        ({"max_detections": 0}, ValueError, "max_detections: expected at least 1, got 0"),
        ({"max_detections": 2.5}, TypeError, "max_detections: expected an integer, got float"),
        ({"iou_thresholds": [1.5]}, ValueError, r"iou_thresholds: expected numbers in \(0, 1\], got 1.5"),
        ({"iou_thresholds": "0.5"}, TypeError, "iou_thresholds: expected numbers"),
        ({"iou_thresholds": [None]}, TypeError, "iou_thresholds: expected numbers"),
        ({"score_threshold": "0.5"}, TypeError, "score_threshold: expected a number"),
        ({"score_threshold": {1: None}}, TypeError, "score_threshold: expected a number"),
        ({"score_threshold": NAN}, ValueError, "score_threshold: expected a number, got NaN"),
        ({"area_ranges": [1]}, TypeError, "area_ranges: expected a dict"),
        ({"area_ranges": {"all": (0, 1)}}, ValueError, "area_ranges: 'all' stands for every object"),
        ({"area_ranges": {"odd": (2, 1)}}, ValueError, r"area_ranges\['odd'\]: expected 0 <= lowest <= highest"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        evaluate(truth(), [], **settings)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        evaluate(tmp_path / "missing.json", [])
    for content in (b"{", b"", b"\xff\xfe\x00"):
        (tmp_path / "broken.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"detections: .*broken\.json is not JSON"):
            evaluate(truth(), tmp_path / "broken.json")


def test_without_pycocotools() -> None:
    code = """
import sys
sys.modules["pycocotools"] = None
from alrp_triton.metrics import evaluate, optimal_lrp
assert optimal_lrp([0.5], [True], [1.0], 1).lrp == 0
try:
    evaluate({"images": [], "annotations": []}, [])
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "evaluate needs pycocotools: pip install 'alrp-triton[metrics]'\n"
