"""What evaluate takes, refuses and returns: files, objects, masks, results as a dict and as a table."""

from __future__ import annotations

import copy
import json
import math
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coco_scenes import found, scene, truth
from dialect.interpreters import start_python

from alrp_triton.metrics import evaluate

pytest.importorskip("pycocotools")
from pycocotools import mask
from pycocotools.coco import COCO

NAN = math.nan


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
            assert [metrics.olrp, metrics.olrp_loc, metrics.olrp_fp, metrics.olrp_fn] == pytest.approx([0.4, 0.2, 0, 0])
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
    data, detections = scene(4)
    metrics = evaluate(data, detections, score_threshold={1: 0.5})
    written = json.loads(json.dumps(metrics.to_dict(), allow_nan=False))
    assert written["olrp"] == metrics.olrp
    assert written["ap90"] == metrics.ap90 == written["ap_at"]["0.9"]
    assert written["per_class"]["1"]["olrp_threshold"] == metrics.per_class[1].olrp_threshold
    assert written["per_class"]["3"]["olrp"] is None
    assert written["by_area"]["medium"]["olrp"] == metrics.by_area["medium"].olrp
    assert written["score_threshold"] == {"1": 0.5}
    lines = metrics.table(per_class=True).splitlines()
    assert lines[0].split()[:4] == ["AP", "AP50", "AP75", "AP90"]
    assert [line.split()[0] for line in lines[1:]] == ["all", "small", "medium", "large", "class", "class", "class"]
    assert lines[0].split("  ")[-1].strip() == "threshold"
    names = ["ap", "ap50", "ap75", "ap90", "olrp", "olrp_loc", "olrp_fp", "olrp_fn", "rho"]
    names += ["lrp", "lrp_loc", "lrp_fp", "lrp_fn"]
    for line, scores, columns in (
        (lines[1].removeprefix("all"), metrics, names),
        (lines[5].removeprefix("class 1"), metrics.per_class[1], [*names, "olrp_threshold"]),
    ):
        values = [getattr(scores, name) for name in columns]
        assert line.split() == [f"{value:.4f}" for value in values]
        assert len(set(values)) == len(values)  # so that no column can stand for another
    assert "-" in lines[-1].split()
    assert str(metrics).splitlines()[1].split() == lines[1].split()
    assert "LRP FN" in lines[0]
    assert " LRP" not in str(evaluate(data, detections)).replace("oLRP Loc", "").replace("oLRP", "")
    assert pickle.loads(pickle.dumps(metrics)).to_dict() == metrics.to_dict()


BOX = found((0.5, [0, 0, 5, 5]))[0]
NOTHING: dict[str, Any] = {"images": [], "annotations": []}
WRONG_TYPES = [
    ([], [], "ground_truth: expected a COCO dataset, which is a dict, got list"),
    ({**NOTHING, "images": [3]}, [], "ground_truth['images'][0]: expected a dict, got int"),
    ({**NOTHING, "images": {}}, [], "ground_truth['images']: expected a list of dicts"),
    ({**NOTHING, "images": [{"id": 1}, {"id": "a"}]}, [], "integers or text as ids, got both"),
    ({**NOTHING, "images": [{"id": [1]}]}, [], "expected an integer or text"),
    ({**truth(), "categories": [{"id": "a"}]}, [], "['categories'][0]['id']: expected an integer"),
    (truth([0, 0, 5, 5], area=None), [], "['area']: expected a number, got None"),
    (truth(), None, "detections: expected a list of dicts, got NoneType"),
    (truth(), [{**BOX, "category_id": 1.5}], "detections[0]['category_id']: expected an integer"),
    (truth(), [{**BOX, "score": "0.5"}], "detections[0]['score']: expected a number, got '0.5'"),
    (truth(), [{**BOX, "bbox": "none"}], "detections[0]['bbox']: expected four numbers"),
]
WRONG_VALUES = [
    ({"images": []}, [], "ground_truth: expected the key 'annotations', got 'images'"),
    ({**NOTHING, "images": [{}]}, [], "ground_truth['images'][0]: expected the key 'id'"),
    (truth([0, 0, 5, 5], image_id=2), [], "['annotations'][0]['image_id']: expected the id of an image, got 2"),
    (truth([0, 0, 5, 5], iscrowd=2), [], "['iscrowd']: expected 0 or 1, got 2"),
    (truth([0, 0, -5, 5]), [], "['annotations'][0]['bbox']: expected finite x, y, width >= 0"),
    (truth(), {"boxes": []}, "detections: expected a list of results or the key 'annotations', got a dict"),
    (truth(), [BOX, {**BOX, "image_id": 5}], "detections[1]['image_id']: expected the id of an image, got 5"),
    (truth(), [{**BOX, "image_id": [1]}], "detections[0]['image_id']: expected the id of an image, got [1]"),
    (truth(), [{**BOX, "score": NAN}], "detections[0]['score']: expected a number, got NaN"),
    (truth(), [{**BOX, "bbox": [0, 0, 5]}], "detections[0]['bbox']: expected finite"),
    (truth(), [{**BOX, "bbox": [0, NAN, 5, 5]}], "detections[0]['bbox']: expected finite"),
    (truth(), [{"image_id": 1}], "detections[0]: expected the key 'category_id', got 'image_id'"),
]


@pytest.mark.parametrize(("error", "wrong"), [(TypeError, WRONG_TYPES), (ValueError, WRONG_VALUES)])
def test_wrong_data(error: type[Exception], wrong: list[tuple[Any, Any, str]]) -> None:
    for data, detections, said in wrong:
        with pytest.raises(error, match=re.escape(said)):
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
        ({"area_ranges": {"all": (0, 1)}}, ValueError, "area_ranges: expected names other than 'all'"),
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
        with pytest.raises(ValueError, match=r"detections: expected JSON, got .*broken\.json"):
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
    done = start_python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "pycocotools is not installed: pip install 'alrp-triton[metrics]'\n"
