"""The demo: its scenes are what they claim to be, and the script does what it says."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("pycocotools")
pytest.importorskip("rich")
sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "digits"))

import losses
import own_loss
import report
import scenes
import train
from detector import build_detector
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

from alrp_triton.framework import RankingLoss

SCENES = scenes.DigitScenes("train", 60)


def test_a_scene_follows_from_split_seed_and_index():
    image, target = SCENES[7]
    again, target_again = scenes.DigitScenes("train", 8)[7]
    assert torch.equal(image, again)
    assert all(torch.equal(target[key], target_again[key]) for key in ("boxes", "labels"))
    for other in (SCENES[8], scenes.DigitScenes("train", 8, seed=1)[7], scenes.DigitScenes("test", 8)[7]):
        assert not torch.equal(image, other[0])
    assert len(list(SCENES)) == 60  # iteration ends


def test_targets_have_torchvisions_form():
    counts, classes = set(), set()
    for image, target in SCENES:
        assert image.dtype == torch.float32
        assert image.shape == (1, scenes.SIZE, scenes.SIZE)
        assert 0 <= image.min() < image.max() <= 1
        boxes, labels = target["boxes"], target["labels"]
        assert (boxes.dtype, labels.dtype) == (torch.float32, torch.int64)
        assert boxes.shape == (len(labels), 4)
        assert (boxes >= 0).all()
        assert (boxes <= scenes.SIZE).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        counts.add(len(labels))
        classes |= set(labels.tolist())
    assert {0, 1, scenes.MAX_DIGITS - 1} <= counts <= set(range(scenes.MAX_DIGITS + 1))
    assert classes == set(range(10))


def test_boxes_are_tight_around_the_ink(monkeypatch):
    """Without background, clutter and noise, what differs from the grey is ink."""
    monkeypatch.setattr(scenes, "_background", lambda rng: np.full((scenes.SIZE, scenes.SIZE), 0.5, np.float32))
    monkeypatch.setattr(scenes, "_clutter", lambda *_: None)
    monkeypatch.setattr(scenes, "NOISE", 0.0)
    for image, target in SCENES:
        ink = image[0] != 0.5
        for x1, y1, x2, y2 in target["boxes"].int().tolist():
            inside = ink[y1:y2, x1:x2]
            assert inside[0].any()
            assert inside[-1].any()
            assert inside[:, 0].any()
            assert inside[:, -1].any()
            ink[y1:y2, x1:x2] = False
        assert not ink.any()


def test_no_scan_is_shared_between_the_splits(monkeypatch):
    scans = {split: {scan.tobytes() for scan in scenes.glyphs(split)[0]} for split in ("train", "test")}
    assert not scans["train"] & scans["test"]
    assert len(scenes.glyphs("train")[0]) + len(scenes.glyphs("test")[0]) == 1797
    assert all(set(scenes.glyphs(split)[1].tolist()) == set(range(10)) for split in scans)

    asked = []
    glyphs = scenes.glyphs
    monkeypatch.setattr(scenes, "glyphs", lambda split: asked.append(split) or glyphs(split))
    scenes.DigitScenes("test", 1)[0]
    assert set(asked) == {"test"}


def test_anchors_fit_the_digits():
    """Nearly every digit has an anchor that the matcher counts as positive by its overlap."""
    model = build_detector(scenes.NUM_CLASSES, scenes.SIZE).eval()
    images = torch.zeros(1, 1, scenes.SIZE, scenes.SIZE)
    levels = list(model.backbone(images).values())
    (anchors,) = model.anchor_generator(ImageList(images, [(scenes.SIZE, scenes.SIZE)]), levels)
    boxes = torch.cat([target["boxes"] for _, target in SCENES])
    assert (box_iou(boxes, anchors).amax(1) >= 0.5).float().mean() > 0.9


def test_metrics_of_known_detections():
    """The ground truth itself scores 1; boxes with an IoU of 0.62 count at 0.50, 0.55 and 0.60; no boxes score 0."""
    perfect = [{**target, "scores": torch.ones(len(target["labels"]))} for _, target in SCENES]
    assert report.measure(perfect, SCENES) == pytest.approx({"AP": 1, "AP50": 1, "AP75": 1, "oLRP": 0})
    narrow = [{**found, "boxes": found["boxes"].clone()} for found in perfect]
    for found in narrow:
        found["boxes"][:, 2] -= 0.38 * (found["boxes"][:, 2] - found["boxes"][:, 0])
    assert report.measure(narrow, SCENES) == pytest.approx({"AP": 0.3, "AP50": 1, "AP75": 0, "oLRP": 0.76}, abs=1e-5)
    none = [{key: value[:0] for key, value in found.items()} for found in perfect]
    assert report.measure(none, SCENES) == {"AP": 0, "AP50": 0, "AP75": 0, "oLRP": 1}


def test_the_script_trains_reports_and_fails_below_the_required_precision(tmp_path, capsys):
    logits = tmp_path / "logits.npz"
    arguments = ["--iterations", "8", "--batch-size", "2", "--test-scenes", "4", "--workers", "0", "--device", "cpu"]
    arguments += ["--output", str(tmp_path / "out"), "--save-logits", str(logits), "--checkpoint"]
    assert train.main([*arguments, "--require-ap50", "1.0"]) == 1
    assert "below the required" in capsys.readouterr().out
    assert train.main([*arguments, "--require-ap50", "0.0"]) == 0

    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert {"AP", "AP50", "AP75", "training_seconds", "iterations"} <= metrics.keys()
    for name in ("cls", "loc", "share_solved", "precision", "weight"):
        assert len(metrics["history"][name]) == 8
        assert np.isfinite(metrics["history"][name]).all()
    assert (tmp_path / "out" / "detections.png").stat().st_size > 10_000
    checkpoint = torch.load(tmp_path / "out" / "detector.pt")
    assert "head.ranking_criterion.self_balance.weight" in checkpoint

    with pytest.raises(SystemExit):
        train.main([*arguments, "--loss", "own"])  # has no localisation errors to save

    with np.load(logits) as arrays:
        late = arrays["late_logits"]
        assert late.shape == arrays["early_logits"].shape == (2, 960, 10)
        assert late.dtype == np.float16
        assert not np.array_equal(late, arrays["early_logits"])
        labels = arrays["middle_labels"]
        assert labels.shape == (2, 960)
        assert set(np.unique(labels)) <= set(range(-1, 11))
        positives = ((labels >= 0) & (labels < 10)).sum()
        assert arrays["middle_loc_errors"].shape == (positives,)
        assert positives > 0


@pytest.mark.thinned(2)
@pytest.mark.parametrize("loss", [name for name in losses.LOSSES if name != "alrp"])
def test_every_loss_trains(loss, tmp_path):
    arguments = ["--iterations", "6", "--batch-size", "2", "--test-scenes", "4", "--workers", "0", "--device", "cpu"]
    assert train.main([*arguments, "--loss", loss, "--output", str(tmp_path)]) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["loss"] == loss
    history = metrics["history"]
    assert set(history) == {"cls", "loc", "share_solved", "precision", *(["weight"] if loss == "rank-sort" else [])}
    for name, values in history.items():
        assert np.isfinite(values).all()
        assert np.all(np.array(values) > (-1 if name == "share_solved" else 0))
    assert np.all(np.array(history["precision"]) < 1)
    assert (tmp_path / "detections.png").stat().st_size > 10_000


def test_the_loss_of_ones_own_counts_bits():
    """One positive below three negatives: two bits to point at it among four; the update balances."""
    logits = torch.tensor([0.0, 5.0, 5.0, 5.0, -5.0], requires_grad=True)
    loss = RankingLoss(own_loss.search_cost)(logits, torch.tensor([1, 0, 0, 0, 0]))
    assert loss.item() == pytest.approx(2)
    loss.backward()
    assert logits.grad.tolist() == pytest.approx([-2, 2 / 3, 2 / 3, 2 / 3, 0])
    assert len(Path(own_loss.__file__).read_text().splitlines()) < 30
