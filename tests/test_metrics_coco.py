"""AP, optimal LRP and rank correlation from COCO-format data: matching, ties, crowds, classes, area ranges."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
from coco_scenes import found, match, olrp_by_definition, scene, truth
from test_figure1 import ORDERS, RANKS

from alrp_triton.metrics import Scores, average_precision, evaluate, lrp, rank_correlation

pytest.importorskip("pycocotools")
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

NAN = math.nan
OLRP = ("olrp", "olrp_loc", "olrp_fp", "olrp_fn")


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
    printed, coco = {
        "positively correlated": ([0.51, 0.43, 0.33, 0.20, 0.37], [0.52, 0.44, 0.34, 0.21, 0.38]),
        "uncorrelated": ([0.51, 0.39, 0.24, 0.02, 0.29], [0.52, 0.40, 0.25, 0.02, 0.30]),
        "negatively correlated": ([0.51, 0.19, 0.08, 0.02, 0.20], [0.52, 0.19, 0.08, 0.02, 0.20]),
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
    assert [round(area, 2) for area in (*areas, sum(areas) / 4)] == printed
    # COCO's samples that curve at 101 recalls, of which 21 and not 20 lie in its first fifth: up to 0.01 more.
    sampled = [average_precision(scores, hits[t], 5, recall_points=101) for t in thresholds]
    assert [metrics.ap_at[t] for t in thresholds] == pytest.approx(sampled, abs=1e-12)
    assert [round(ap, 2) for ap in (*sampled, sum(sampled) / 4)] == coco
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


def test_boxes_without_extent_match_nothing() -> None:
    point = [5.0, 5.0, 0.0, 0.0]
    metrics = evaluate(truth(OBJECTS[0], point, OBJECTS[1]), found((0.9, point), (0.8, OBJECTS[0])), tau=0.01)
    # The point is false and stays missed: (1 + 2)/4.
    assert numbers(metrics) == pytest.approx([0.75, 0, 0.5, 2 / 3])


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


def test_ap_takes_equal_scores_in_the_order_of_image_ids() -> None:
    """As COCO does; LRP keeps both or none."""
    # A set of these numbers comes out as 16, 9.
    for true, false, ap in ((9, 16, 1), (16, 9, 0.5)):
        data = truth(OBJECTS[0], image_id=true) | {"images": [{"id": 16}, {"id": 9}]}
        detections = [{**found((0.5, OBJECTS[0]))[0], "image_id": image} for image in (false, true)]
        metrics = evaluate(data, detections)
        assert metrics.ap50 == pytest.approx(ap)
        assert metrics.olrp == pytest.approx(0.5)


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
    nothing_of_one = evaluate(data, detections, score_threshold={1: NAN, 3: 0.4})
    assert nothing_of_one.lrp == pytest.approx(0.5)
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
