"""The DETR family of transformers: scores that mean something at the framework's threshold, and the best of a class."""

import math

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("scipy")
pytest.importorskip("pycocotools")

from detr import DETR, FAMILY, NUM_CLASSES, NUM_QUERIES, batch, build, every_model, run
from torchvision.ops import box_convert, box_iou
from transformers import DeformableDetrImageProcessor

from alrp_triton.integrations.transformers import calibrate, collect, restore, thresholds, use_rank_sort
from alrp_triton.metrics import evaluate

OBJECTS = (2, 1, 2, 1)


def images_of(inputs):
    return {"pixel_values": inputs["pixel_values"]}


def noisy(name):
    """A model at random whose last layers, D-FINE's score of quality among them, have no zeros."""
    model = build(name)
    for part in model.modules():
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=0.3)
    return model


def shown(model, inputs):
    """The detections at the framework's default threshold, and how many objects they find."""
    outputs = run(model, images_of(inputs))
    found = DeformableDetrImageProcessor().post_process_object_detection(outputs, target_sizes=[(1, 1)] * len(OBJECTS))
    hits = 0
    for one, target in zip(found, inputs["labels"]):
        overlap = box_iou(box_convert(target["boxes"], "cxcywh", "xyxy"), one["boxes"]) > 0.5
        hits += int((overlap & (target["class_labels"][:, None] == one["labels"])).any(1).sum())
    return sum(len(one["scores"]) for one in found), hits


def test_a_calibrated_detector_shows_what_it_finds():
    model, inputs = use_rank_sort(build("DeformableDetr")), batch(OBJECTS, seed=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(80):
        optimizer.zero_grad()
        run(model, inputs).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()
    before, number = evaluate(*collect(model, [inputs])), shown(model, inputs)
    report = calibrate(model, [inputs])
    after, at_default = evaluate(*collect(model, [inputs])), shown(model, inputs)
    assert before.ap == after.ap > 0.5
    assert at_default == (6, 6)  # every object, and nothing else
    assert number[0] - number[1] > 10  # before, most of what it showed was wrong
    assert report.overall[1][1][3] == "6"
    best = thresholds(model, [inputs])
    assert best == pytest.approx(report.thresholds, rel=1e-4)
    assert best.keys() == {0, 1, 2}
    # The framework's own model keeps it.
    assert shown(restore(model), inputs) == at_default


@pytest.mark.thinned(2)
@every_model
def test_scores_are_the_calibrated_ones(name, tmp_path):
    model, inputs = noisy(name).eval(), batch((2, 1), seed=4)
    images = images_of(inputs)
    for per_class in [False, True] if name in DETR else [False]:
        start = {key: value.clone() for key, value in model.state_dict().items()}
        before = run(model, images).logits.detach().double().sigmoid()
        calibration = calibrate(model, [inputs], per_class=per_class, min_per_class=1, iou=0.01).calibration
        assert bool(calibration.per_class) == per_class
        after = run(model, images).logits.detach()
        expected = calibration(before, torch.arange(NUM_CLASSES).expand_as(before))
        torch.testing.assert_close(after.sigmoid(), expected.float(), rtol=1e-3, atol=1e-6)
        if not per_class:
            model.save_pretrained(tmp_path)
            loaded = type(model).from_pretrained(tmp_path).eval()
            torch.testing.assert_close(run(loaded, images).logits, after)
        model.load_state_dict(start)


def test_collecting_changes_nothing_and_takes_what_processors_give():
    model, inputs = build("RTDetr").train(), batch((2, 0), seed=5)
    model.model.encoder.eval()
    modes, start = [part.training for part in model.modules()], model.state_dict()
    labels = [
        {**each, "orig_size": torch.tensor([480, 640]), "iscrowd": torch.tensor([0, 1])[: len(each["boxes"])]}
        for each in inputs["labels"]
    ]
    truth, found = collect(model, [{**inputs, "labels": labels}])
    assert [part.training for part in model.modules()] == modes
    assert all(torch.equal(value, start[key]) for key, value in model.state_dict().items())
    assert truth["images"][0] == {"id": 0, "height": 480, "width": 640}
    assert [one["iscrowd"] for one in truth["annotations"]] == [0, 1]
    assert len(found) == 2 * NUM_QUERIES
    box = box_convert(inputs["labels"][0]["boxes"][0], "cxcywh", "xywh") * torch.tensor([640, 480, 640, 480])
    assert truth["annotations"][0]["bbox"] == pytest.approx(box.tolist())
    assert {math.isnan(each) for each in thresholds(model, [inputs], iou=0.99).values()} == {True}


def test_wrong_models_and_data_are_named():
    model, inputs = build(), batch((1,))
    with pytest.raises(TypeError, match=r"model: expected one of Cond.*, got Linear"):
        calibrate(nn.Linear(1, 1), [inputs])
    with pytest.raises(ValueError, match="data: expected batches of images and labels, got none"):
        collect(model, [])
    inputs["labels"][0]["class_labels"] += NUM_CLASSES
    model.train()
    with pytest.raises(ValueError, match=f"labels of image 0: [345], expected below {NUM_CLASSES}") as kept:
        thresholds(model, [inputs])
    # Also while the error lives, as in a notebook.
    assert torch.is_grad_enabled()
    assert model.training
    assert kept.traceback
    if "DFine" in FAMILY:
        with pytest.raises(ValueError, match="per_class: expected False for D-FINE"):
            calibrate(build("DFine"), [batch((1,))], per_class=True)
