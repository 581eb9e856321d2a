"""A detector without the loss again: its classes, keys and detections, its checkpoints, and labels that it has not."""

import copy
import pickle

import pytest
import torch

pytest.importorskip("torchvision")

from adapters import balances
from detectors import BUILDERS, CASES, batch_for, every_case, every_detector, same, spread
from torch import nn

from alrp_triton.engine import devices
from alrp_triton.integrations.torchvision import restore, stock_state_dict, use_alrp, use_rank_sort
from alrp_triton.integrations.torchvision._parts import check_labels

BACKGROUND = [f"roi_heads.box_predictor.cls_score.{name}" for name in ("weight", "bias")]
CENTERNESS = [f"head.regression_head.bbox_ctrness.{name}" for name in ("weight", "bias")]


def stepped(case):
    """A model after a step of training, so that its weights are not those that it began with."""
    model = case.use(spread(BUILDERS[case.name]()))
    images, targets = batch_for(case.name)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    sum(model(images, targets).values()).backward()
    optimizer.step()
    optimizer.zero_grad()
    return model


def changed_weights(case):
    if case.name == "faster_rcnn":
        return BACKGROUND
    return CENTERNESS if "centerness" in case.options else []


@every_case
def test_the_model_is_torchvisions_own_again(case):
    plain, model = BUILDERS[case.name](), stepped(case)
    trained = copy.deepcopy(model).state_dict()
    assert restore(model) is model
    assert [type(part) for part in model.modules()] == [type(part) for part in plain.modules()]
    assert [vars(part).keys() for part in model.modules()] == [vars(part).keys() for part in plain.modules()]
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in plain.parameters()]
    assert model.state_dict().keys() == plain.state_dict().keys()
    for key, value in model.state_dict().items():
        if key not in changed_weights(case):
            assert torch.equal(value, trained[key])
        elif key in BACKGROUND:
            assert torch.equal(value[1:], trained[key][1:])
            assert not value[0].any()
    plain.load_state_dict(model.state_dict())
    batch = batch_for(case.name)
    for each in (plain, model):
        each.zero_grad()
    torch.manual_seed(5)  # for what Faster R-CNN samples
    losses = plain(*batch)
    torch.manual_seed(5)
    assert model(*batch) == losses


@pytest.mark.parametrize("case", [case for case in CASES.values() if case.name != "faster_rcnn"])
def test_detections_stay(case):
    model = stepped(case)
    images, _ = batch_for(case.name)
    before = model.eval()(images)
    assert same(restore(model)(images), before)


@pytest.mark.parametrize("num_classes", [1, 4])
def test_scores_of_faster_rcnn_are_the_softmax_with_a_background_of_0(num_classes):
    images, _ = batch_for("faster_rcnn")
    model = use_alrp(spread(BUILDERS["faster_rcnn"](num_classes=num_classes))).eval()
    model.roi_heads.nms_thresh = 1.0  # which boxes stay depends on the scores of all
    model.roi_heads.detections_per_img = 10**6
    logits = []
    handle = model.roi_heads.box_predictor.register_forward_hook(lambda _, __, found: logits.append(found[0]))
    before = model(images)
    handle.remove()
    after = restore(model)(images)
    powers = logits[0][:, 1:].double().exp()
    expected = powers / (1 + powers.sum(1, keepdim=True))
    scores = torch.cat([found["scores"] for found in after]).double()
    torch.testing.assert_close(scores.sort().values, expected.flatten().sort().values, rtol=1e-4, atol=1e-6)
    if num_classes == 1:
        for one, other in zip(before, after):
            torch.testing.assert_close(one["scores"], other["scores"], rtol=1e-5, atol=1e-7)


@every_detector
def test_a_model_without_the_loss_remains_as_it_is(name):
    model = BUILDERS[name]()
    before = copy.deepcopy(model.state_dict())
    assert restore(model) is model
    assert restore(restore(use_alrp(copy.deepcopy(model)))).state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_models_that_cannot_be_restored_are_named_and_stay():
    for wrong in (nn.Linear(1, 1), nn.DataParallel(use_alrp(BUILDERS["fcos"]()))):
        with pytest.raises(TypeError, match=f"model: expected a torchvision .* got {type(wrong).__name__}"):
            restore(wrong)
    model = use_alrp(BUILDERS["faster_rcnn"]())
    model.roi_heads.box_predictor = nn.Identity()
    before = [type(part) for part in model.modules()]
    with pytest.raises(TypeError, match=r"box_predictor: expected a predictor with an nn.Linear cls_score, got Ident"):
        restore(model)
    assert [type(part) for part in model.modules()] == before


@every_detector
def test_pickles_do_not_name_the_package(name):
    model = use_alrp(BUILDERS[name]())
    assert b"alrp_triton" in pickle.dumps(model)
    assert b"alrp_triton" not in pickle.dumps(restore(model))


@every_case
def test_torchscript_has_the_same_detections(case):
    model = restore(stepped(case)).eval()
    images, _ = batch_for(case.name)
    with torch.no_grad():
        _, found = torch.jit.script(model)(images)
        assert same(found, model(images))


@every_detector
def test_onnx_has_the_detections_of_torchvisions_own_model(name, tmp_path):
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    model, plain = restore(use_alrp(spread(BUILDERS[name]()))).eval(), BUILDERS[name]().eval()
    plain.load_state_dict(model.state_dict())
    images, found = batch_for(name, (2,))[0], []
    for each in (model, plain):
        path = tmp_path / "model.onnx"
        torch.onnx.export(each, (images,), path, dynamo=False, opset_version=17, input_names=["image"])
        session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
        found.append([torch.from_numpy(value) for value in session.run(None, {"image": images[0].numpy()})])
    assert len(found[0][0]) > 0
    assert all(torch.equal(one, other) for one, other in zip(*found))


@every_detector
def test_a_checkpoint_with_the_loss_fits_a_model_without_it(name):
    model = use_alrp(spread(BUILDERS[name]()))
    images, _ = batch_for(name)
    saved = model.state_dict()
    keys = set(saved)
    for given, wrap in ((saved, nn.Identity), (nn.DataParallel(model).state_dict(), nn.DataParallel)):
        plain = BUILDERS[name](seed=3)
        holder = wrap(plain) if wrap is nn.DataParallel else plain
        holder.load_state_dict(stock_state_dict(given), strict=True)
        assert same(plain.eval()(images), restore(copy.deepcopy(model)).eval()(images))
    assert set(saved) == keys
    assert all(
        saved[key] is model.state_dict()[key] or torch.equal(saved[key], model.state_dict()[key]) for key in keys
    )


def test_a_checkpoint_of_which_nothing_says_that_it_had_the_loss():
    dense = use_rank_sort(BUILDERS["retinanet"]()).state_dict()
    assert stock_state_dict(dense).keys() == dense.keys()
    for model in (use_rank_sort(BUILDERS["faster_rcnn"]()), BUILDERS["faster_rcnn"]()):
        with pytest.raises(ValueError, match=r"state_dict: expected state of a criterion; .* restore"):
            stock_state_dict(model.state_dict())


@every_case
def test_a_checkpoint_without_the_loss_fits_a_model_with_it(case):
    plain, model = BUILDERS[case.name](seed=3), case.build()
    for balance in balances(model):
        balance.weight.fill_(7.0)
    given = plain.state_dict()
    keys = list(given)
    result = model.load_state_dict(given, strict=True)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert list(given) == keys
    assert all(torch.equal(model.state_dict()[key], value) for key, value in given.items())
    assert all(balance.weight == 7 for balance in balances(model))


@every_detector
def test_a_checkpoint_that_lacks_a_part_of_a_criterion_is_an_error(name):
    model = use_alrp(BUILDERS[name]())
    given = {key: value for key, value in model.state_dict().items() if not key.endswith("self_balance.sums")}
    with pytest.raises(RuntimeError, match=r"Missing key.*self_balance\.sums"):
        model.load_state_dict(given)


@every_detector
@pytest.mark.parametrize("wrong", [-1, 1000, None])
def test_labels_that_the_detector_does_not_have(name, wrong):
    images, targets = batch_for(name, (2, 2))
    end = 4 + (name == "faster_rcnn")
    wrong = end if wrong is None else wrong
    targets[1]["labels"][1] = wrong
    model = use_alrp(BUILDERS[name]())
    expected = "0 or above" if wrong < 0 else f"below {end}"
    with pytest.raises(ValueError, match=f"^labels of image 1: {wrong}, expected {expected}$"):
        model(images, targets)
    targets[1]["labels"][1] = end - 1
    model(images, targets)


def test_the_host_waits_for_labels_of_a_gpu_only_if_told(monkeypatch):
    monkeypatch.setattr(devices, "GPUS", {"cpu"})
    targets = [{"labels": torch.tensor([4])}]
    check_labels(targets, 4)
    monkeypatch.setenv("ALRP_TRITON_DEBUG", "1")
    with pytest.raises(ValueError, match="labels of image 0: 4, expected below 4"):
        check_labels(targets, 4)


@every_detector
def test_a_restored_model_takes_the_loss_again(name):
    model = use_alrp(restore(use_alrp(BUILDERS[name]())))
    assert [type(part) for part in model.modules()] == [type(part) for part in use_alrp(BUILDERS[name]()).modules()]
    assert all(loss.isfinite() and loss > 0 for loss in model(*batch_for(name)).values())
