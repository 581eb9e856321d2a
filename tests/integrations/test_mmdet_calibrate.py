"""Calibration and thresholds of MMDetection's detectors, and what ``score_thr`` means afterwards."""

from __future__ import annotations

import json
import re

import pytest
import torch

pytest.importorskip("mmdet", reason="needs MMDetection: pip install '.[frameworks]'")
pytest.importorskip("torchvision", reason="needs torchvision: pip install '.[frameworks]'")
pytest.importorskip("pycocotools", reason="needs pycocotools: pip install '.[frameworks]'")

from mmdet.registry import MODELS
from mmdet_setup import CLASSES, EXAMPLES, NUM_IMAGES, drawn_batch, small_config, write_coco
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner
from torch import nn

from alrp_triton.integrations.mmdet import calibrate, collect, thresholds
from alrp_triton.metrics import evaluate

RETINA = "alrp_retinanet_r50_fpn_100e_coco500"
SIGMOIDS = {
    RETINA: "bbox_head.retina_cls",
    "alrp_atss_r50_fpn_100e_coco500": "bbox_head.atss_cls",
    "alrp_fovea_r50_fpn_100e_coco500": "bbox_head.conv_cls",
    "alrp_faster_rcnn_r50_fpn_100e_coco500": "roi_head.bbox_head.fc_cls",
}
NAMES, FOCAL = list(SIGMOIDS), {"type": "FocalLoss", "use_sigmoid": True}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coco")
    write_coco(folder)
    return folder


def build(name, data, **changes):
    config = small_config(name, data, data, epochs=1)
    config.merge_from_dict(changes)
    torch.manual_seed(0)
    model = MODELS.build(config.model)
    model.init_weights()
    return model.eval(), config


def stage_of(model):
    return model.roi_head if hasattr(model, "roi_head") else model.bbox_head


def test_a_trained_detector_shows_what_it_found(data):
    """Rank & Sort Loss leaves all scores below 0.5; calibrated, ``score_thr`` of 0.5 shows the objects."""
    criterion = {"type": "RankSortLoss", "_delete_": True}
    model, _ = build(RETINA, data, **{"model.bbox_head.loss_cls": criterion, "model.test_cfg.score_thr": 0.5})
    optimizer = OptimWrapper(torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 3e-3))
    model.train()
    for _ in range(40):
        model.train_step(drawn_batch(), optimizer)
    model.eval()
    validation = [drawn_batch()]
    objects = sum(len(sample.gt_instances) for sample in validation[0]["data_samples"])

    before, (truth, found) = shown(model), collect(model, validation)
    best = thresholds(model, validation)
    report = calibrate(model.train(), validation)
    assert model.bbox_head.test_cfg.score_thr == 0.5
    assert model.training
    model.eval()
    assert before == 0
    assert objects <= shown(model) <= 2 * objects
    calibrated = collect(model, validation)
    assert evaluate(*calibrated).ap == pytest.approx(evaluate(truth, found).ap, abs=1e-6)
    assert evaluate(*calibrated).ap > 0.3
    assert thresholds(model, validation) == pytest.approx(report.thresholds, abs=1e-5, nan_ok=True)
    assert set(best) == set(range(len(CLASSES)))
    assert str(report).startswith("all classes: sigmoid(")


def shown(model):
    with torch.no_grad():
        return sum(len(sample.pred_instances) for sample in model.test_step(drawn_batch()))


@pytest.mark.thinned(2)
@pytest.mark.parametrize("name", SIGMOIDS)
def test_scores_are_the_calibrated_ones(name, data):
    """Of a data loader of MMEngine, with a crowd and an image without objects."""
    model, config = build(name, data)
    layer = model.get_submodule(SIGMOIDS[name])
    nn.init.normal_(layer.weight, std=0.1)
    loader = Runner.build_dataloader(config.val_dataloader)
    truth, found = collect(model, loader)
    assert len(truth["images"]) == NUM_IMAGES
    assert [one["id"] for one in truth["categories"]] == [0, 1, 2]
    assert len(truth["annotations"]) == 2 * (NUM_IMAGES - 1)
    assert sum(one.get("iscrowd", 0) for one in truth["annotations"]) == 1
    weight = layer.weight.detach().clone()
    calibration = calibrate(model, loader).calibration
    assert not torch.equal(layer.weight, weight)
    again = collect(model, loader)
    assert again[0] == truth
    assert len(again[1]) == len(found) > 0
    scores, expected = ([one["score"] for one in each] for each in (again[1], calibration.apply(found)))
    assert sorted(scores) == pytest.approx(sorted(expected), rel=1e-4, abs=1e-7)
    assert stage_of(model).test_cfg.score_thr == 0.05


@pytest.mark.parametrize(("name", "stock"), [(RETINA, "RetinaHead"), (NAMES[2], "FoveaHead")])
def test_mmdetections_own_heads_give_the_same_detections(name, stock, data):
    """A checkpoint needs nothing of this package, and one of MMDetection's is trained further."""
    model, config = build(name, data)
    config.model.bbox_head.type = stock
    config.model.bbox_head.loss_cls, config.model.bbox_head.loss_bbox = FOCAL, {"type": "L1Loss"}
    plain = MODELS.build(config.model).eval()
    missing, unexpected = plain.load_state_dict(model.state_dict(), strict=False)
    assert not missing
    assert all("loss_cls.self_balance" in key for key in unexpected)
    assert collect(plain, [drawn_batch()]) == collect(model, [drawn_batch()])
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert all("loss_cls.self_balance" in key for key in missing)
    assert not unexpected


def test_what_the_documentation_shows(data, tmp_path, monkeypatch, capsys):
    page = (EXAMPLES.parents[1] / "docs" / "integrations" / "mmdetection.md").read_text(encoding="utf-8")
    (block,) = [each for each in re.findall(r"^```py\n(.*?)^```", page, re.M | re.S) if "init_detector" in each]
    model, config = build(RETINA, data)
    (tmp_path / "work_dirs" / "config").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    config.dump("config.py")
    meta = {"dataset_meta": {"classes": CLASSES}}
    torch.save({"state_dict": model.state_dict(), "meta": meta}, "work_dirs/config/epoch_100.pth")
    names = {}
    exec(block.replace("cuda:0", "cpu"), names)
    assert "threshold before" in capsys.readouterr().out
    assert names["best"] == pytest.approx(names["report"].thresholds, abs=1e-6, nan_ok=True)
    saved = torch.load("calibrated.pth", weights_only=False)
    assert tuple(saved["meta"]["dataset_meta"]["classes"]) == CLASSES
    assert not torch.equal(saved["state_dict"]["bbox_head.retina_cls.bias"], model.bbox_head.retina_cls.bias)


def test_boxes_are_those_of_the_annotations(data):
    """In pixels of the original images, although the pipeline resizes them."""
    model, config = build(RETINA, data)
    truth, _ = collect(model, Runner.build_dataloader(config.val_dataloader))
    expected = json.loads((data / "annotations.json").read_text(encoding="utf-8"))
    for key in ("height", "width"):
        assert sorted(one[key] for one in truth["images"]) == sorted(one[key] for one in expected["images"])
    boxes, found = (sorted(one["bbox"] for one in each["annotations"]) for each in (expected, truth))
    torch.testing.assert_close(torch.tensor(found), torch.tensor(boxes, dtype=torch.float32))


def test_mistakes_are_named(data):
    model, config = build(RETINA, data)
    with pytest.raises(TypeError, match="model: expected a detector of MMDetection, not wrapped, got Sequential"):
        calibrate(nn.Sequential(model), [])
    with pytest.raises(ValueError, match="data: expected batches of a validation set, got none"):
        calibrate(model, [])
    bare = drawn_batch()
    for sample in bare["data_samples"]:
        del sample.gt_instances
    with pytest.raises(ValueError, match="data: expected annotations, by LoadAnnotations"):
        thresholds(model, [bare])
    assert model.bbox_head.test_cfg.score_thr == 0.05

    centred = {"model.bbox_head.loss_centerness": {"type": "CrossEntropyLoss", "use_sigmoid": True, "_delete_": True}}
    model, _ = build("alrp_atss_r50_fpn_100e_coco500", data, **centred)
    with pytest.raises(TypeError, match="without centre-ness, got RankingATSSHead"):
        calibrate(model, [drawn_batch()])
    assert set(thresholds(model, [drawn_batch()])) == {0, 1, 2}
    second = {"type": "Shared2FCBBoxHead", "in_channels": 16, "fc_out_channels": 32, "num_classes": 3, "_delete_": True}
    second |= {"bbox_coder": config.model.bbox_head.bbox_coder}
    model, _ = build("alrp_faster_rcnn_r50_fpn_100e_coco500", data, **{"model.roi_head.bbox_head": second})
    with pytest.raises(TypeError, match=r"a head whose scores are sigmoids.*got Shared2FCBBoxHead"):
        calibrate(model, [drawn_batch()])
