"""What holds for RetinaNet, FCOS and Faster R-CNN alike: that they train, resume, copy, and stay ordinary models."""

import copy
import io

import pytest
import torch
from interpreters import start_python
from torch import nn

pytest.importorskip("torchvision")

from detectors import BOX_LOSS, BUILDERS, LOSSES, SIZE, USES, batch_for, criteria
from test_torchvision import through_pickle, through_torch_save
from torchvision.models.detection import KeypointRCNN, MaskRCNN
from torchvision.ops import box_iou

import alrp_triton
from alrp_triton import ALRPLoss, SelfBalance
from alrp_triton.assigners import ATSS
from alrp_triton.integrations import torchvision as integration
from alrp_triton.integrations.torchvision import use_alrp

every_detector = pytest.mark.parametrize("name", BUILDERS)
every_use = pytest.mark.parametrize("use", USES)


def step(model, optimizer, images, targets):
    losses = model(images, targets)
    optimizer.zero_grad()
    sum(losses.values()).backward()
    optimizer.step()
    return {name: loss.item() for name, loss in losses.items()}


@every_detector
@every_use
def test_the_losses_are_those_that_the_detector_had(name, use):
    model = USES[use](BUILDERS[name]())
    losses = model(*batch_for(name))
    assert sorted(losses) == sorted(LOSSES[name]) == sorted(BUILDERS[name]()(*batch_for(name)))
    assert all(loss.shape == () and loss > 0 for loss in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def overfit(model, name, steps, learning_rate=1e-3):
    """The losses of training on two images, and the share of objects that are then found with the right class."""
    images, targets = batch_for(name, (2, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    history = [step(model, optimizer, images, targets) for _ in range(steps)]
    found = []
    for detected, target in zip(model.eval()(images), targets):
        assert ((detected["scores"] >= 0) & (detected["scores"] <= 1)).all()
        best = detected["scores"].argsort(descending=True)[: len(target["boxes"])]
        overlaps = box_iou(target["boxes"], detected["boxes"][best])
        right = target["labels"][:, None] == detected["labels"][best]
        found += ((overlaps > 0.5) & right).any(1).tolist()
    return [sum(losses.values()) for losses in history], sum(found) / len(found)


@pytest.mark.thinned(2)
@every_detector
@every_use
def test_two_images_are_learned(name, use):
    """At a learning rate and a weight of boxes at which rounding, from which trainings part, does not decide."""
    balanced = {"alrp": lambda **options: ALRPLoss(self_balance=1.0, **options), "rank_sort": alrp_triton.RankSortLoss}
    options = {}
    if name == "faster_rcnn" and use == "alrp":
        options["rpn_criterion"] = balanced[use](tau=0.7)
    model = USES[use](BUILDERS[name](), balanced[use](), **options)
    values, found = overfit(model, name, 60)
    assert found == 1
    assert sum(values[-5:]) / 5 < 0.5 * values[0]


@every_detector
@pytest.mark.parametrize("per_image", [False, True])
@every_use
def test_batch_without_objects(name, use, per_image):
    model = USES[use](BUILDERS[name](), per_image=per_image)
    images, _ = batch_for(name)
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    losses = model(images, [empty, empty])
    assert all(loss == 0 for loss in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@every_detector
@pytest.mark.parametrize("per_image", [False, True])
def test_images_of_several_sizes_one_without_objects(name, per_image):
    model = use_alrp(BUILDERS[name](), per_image=per_image)
    images, targets = batch_for(name, (2, 0, 1), sizes=[(64, 64), (48, 80), (75, 51)])
    losses = model(images, targets)
    assert all(loss > 0 for loss in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    detections = model.eval()(images)
    for image, detected in zip(images, detections):
        assert len(detected["boxes"]) > 0
        assert (detected["boxes"][:, 2] <= image.shape[2]).all()
        assert (detected["boxes"][:, 3] <= image.shape[1]).all()


@every_detector
def test_one_class(name):
    model = use_alrp(BUILDERS[name](num_classes=1))
    images, targets = batch_for(name)
    for target in targets:
        target["labels"].fill_(int(name == "faster_rcnn"))
    losses = model(images, targets)
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    labels = torch.cat([detected["labels"] for detected in model.eval()(images)])
    assert set(labels.tolist()) == {int(name == "faster_rcnn")}


@every_detector
@every_use
def test_under_autocast(name, use):
    model = USES[use](BUILDERS[name]())
    images, targets = batch_for(name)
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(images, targets)
        sum(losses.values()).backward()
        detections = model.eval()(images)
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    assert all(p.grad.isfinite().all() for p in model.parameters())
    for detected in detections:
        assert len(detected["scores"]) > 0
        assert ((detected["scores"] >= 0) & (detected["scores"] <= 1)).all()


@every_detector
def test_a_criterion_is_given_boxes_in_the_precision_of_the_targets_under_autocast(name):
    model = use_alrp(BUILDERS[name]())
    recorded = []
    for criterion in criteria(model).values():
        criterion.register_forward_pre_hook(lambda _, arguments: recorded.append(arguments))
    images, targets = batch_for(name, seed=3)
    with torch.autocast("cpu", torch.bfloat16):
        model(images, targets)
    given = torch.cat([target["boxes"] for target in targets])
    for logits, _, pred_boxes, target_boxes in recorded:
        assert logits.dtype == torch.bfloat16
        assert pred_boxes.dtype == target_boxes.dtype == torch.float32
        assert {tuple(box) for box in target_boxes.tolist()} <= {tuple(box) for box in given.tolist()}
    assert len(recorded) == len(criteria(model))


def resumable(name, seed=0):
    """Periods of 4 iterations, so that step 6 lies within the second."""
    rpn = {"rpn_criterion": ALRPLoss(tau=0.7, self_balance=SelfBalance(20.0, period=4))}
    model = use_alrp(
        BUILDERS[name](seed),
        ALRPLoss(self_balance=SelfBalance(20.0, period=4)),
        **(rpn if name == "faster_rcnn" else {}),
    )
    return model, torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)


@every_detector
def test_a_resumed_training_goes_on_with_the_same_bits(name):
    batches = [batch_for(name, (2, 1), seed=seed) for seed in range(10)]
    model, optimizer = resumable(name)
    expected = []
    for number, one in enumerate(batches):
        if number == 6:
            file = io.BytesIO()
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
        expected.append(step(model, optimizer, *one))

    resumed, continued = resumable(name, seed=9)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed.load_state_dict(saved["model"], strict=True)
    continued.load_state_dict(saved["optimizer"])
    assert [step(resumed, continued, *one) for one in batches[6:]] == expected[6:]
    weights = {}
    for where, criterion in criteria(model).items():
        balance, twin = criterion.self_balance, criteria(resumed)[where].self_balance
        weights[where] = balance.weight.item()
        assert all(torch.equal(a, b) for a, b in zip(balance.buffers(), twin.buffers()))
        assert balance.weight not in (20.0, saved["model"][f"{where}.self_balance.weight"])
    assert len(weights) == (2 if name == "faster_rcnn" else 1)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), resumed.state_dict().values()))


@every_detector
def test_the_state_of_all_criteria_is_in_the_state_dict(name):
    model = use_alrp(BUILDERS[name]())
    added = set(model.state_dict()) - set(BUILDERS[name]().state_dict())
    where = ["rpn", "roi_heads"] if name == "faster_rcnn" else ["head"]
    parts = [f"{part}.ranking_criterion.self_balance.{key}" for part in where for key in ("weight", "sums", "count")]
    assert added == set(parts)
    # What a detector had before the call still fits.
    model.load_state_dict(BUILDERS[name](seed=3).state_dict(), strict=False)


@every_detector
@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle, through_torch_save])
def test_copies_use_their_own_criteria(name, duplicate):
    model = use_alrp(BUILDERS[name](), ALRPLoss(self_balance=SelfBalance(10.0)))
    images, targets = batch_for(name)
    model(images, targets)
    twin = duplicate(model)
    assert [type(part) for part in twin.modules()] == [type(part) for part in model.modules()]
    assert twin(images, targets) == model(images, targets)

    box_loss = model(images, targets)[BOX_LOSS[name]]
    for criterion in criteria(twin).values():
        criterion.self_balance.step_epoch()
    assert twin(images, targets)[BOX_LOSS[name]] != box_loss
    assert model(images, targets)[BOX_LOSS[name]] == box_loss
    for a, b in zip(model.eval()(images), twin.train(False)(images)):
        assert all(torch.equal(a[key], b[key]) for key in a)


@every_detector
def test_only_the_given_instance_changes(name):
    images, targets = batch_for(name)
    untouched = BUILDERS[name]()
    torch.manual_seed(5)  # for what Faster R-CNN samples
    before = untouched(images, targets)
    use_alrp(BUILDERS[name]())(images, targets)
    torch.manual_seed(5)
    assert untouched(images, targets) == before
    torch.manual_seed(5)
    assert BUILDERS[name]()(images, targets) == before


@every_detector
def test_each_call_replaces_what_the_one_before_did(name):
    images, targets = batch_for(name)
    model = use_alrp(BUILDERS[name](), per_image=True)
    types = [type(part) for part in model.modules()]
    for use in ("rank_sort", "alrp"):
        expected = USES[use](BUILDERS[name]())
        assert USES[use](model) is model
        assert model(images, targets) == expected(images, targets)
        assert model.state_dict().keys() == expected.state_dict().keys()
    assert [type(part) for part in model.modules()] == types


@every_detector
@pytest.mark.parametrize("boxes_per_image", [(2, 1), (0, 2), (0, 0)])
def test_per_image_is_the_mean_over_the_images_with_objects(name, boxes_per_image):
    rpn = {"rpn_criterion": ALRPLoss(tau=0.7, self_balance=2.0)} if name == "faster_rcnn" else {}
    model = use_alrp(BUILDERS[name](), ALRPLoss(self_balance=2.0), per_image=True, **rpn)
    with torch.no_grad():
        for p in model.parameters():
            # The order of nearly equal scores, which weighs boxes, is not that of other convolutions for one image.
            p.mul_(3)
    images, targets = batch_for(name, boxes_per_image)
    losses = model(images, targets)
    losses.pop("bbox_ctrness", None)
    single = [model([image], [target]) for image, target in zip(images, targets) if len(target["boxes"])]
    for part, value in losses.items():
        expected = sum((each[part] for each in single), start=torch.zeros(())) / max(1, len(single))
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("name", "centerness"), [*((name, None) for name in BUILDERS), ("fcos", "drop")])
def test_distributed_data_parallel(name, centerness, tmp_path):
    """By itself, which suffices to see whether a parameter is left without a gradient: the second step would raise."""
    options = {"centerness": centerness} if name == "fcos" else {}
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        images, targets = batch_for(name)
        expected = use_alrp(BUILDERS[name](), **options)(images, targets)
        parallel = nn.parallel.DistributedDataParallel(use_alrp(BUILDERS[name](), **options))
        assert parallel(images, targets) == expected
        empty = [{key: value[:0] for key, value in target.items()} for target in targets]
        for given in (targets, empty, targets):
            sum(parallel(images, given).values()).backward()
        trained = [p for p in parallel.parameters() if p.requires_grad]
        assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
        assert len(trained) == len(list(parallel.parameters())) - 2 * (centerness == "drop")
    finally:
        torch.distributed.destroy_process_group()


def masked(kind, **options):
    backbone = BUILDERS["retinanet"]().backbone
    return kind(backbone, 3, min_size=SIZE, max_size=SIZE, **options)


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("retinanet", {"centerness": "keep"}, TypeError, "centerness.*RetinaNet: it applies to FCOS$"),
        ("retinanet", {"rpn_weight": 0.2}, TypeError, "rpn_weight.*RetinaNet: it applies to FasterRCNN$"),
        ("retinanet", {"assigner": 9}, TypeError, "assigner must be callable.*int"),
        ("fcos", {"assigner": ATSS()}, TypeError, "assigner.*FCOS: it applies to RetinaNet$"),
        ("fcos", {"rpn_criterion": ALRPLoss()}, TypeError, "rpn_criterion.*FCOS: it applies to FasterRCNN$"),
        ("fcos", {"centerness": "half"}, ValueError, "centerness.*'keep', 'drop'.*'half'"),
        ("fcos", {"centerness": True}, ValueError, "centerness.*True"),
        ("faster_rcnn", {"assigner": ATSS()}, TypeError, "assigner.*FasterRCNN: it applies to RetinaNet$"),
        ("faster_rcnn", {"centerness": "drop"}, TypeError, "centerness.*FasterRCNN: it applies to FCOS$"),
        ("faster_rcnn", {"rpn_criterion": 1.0}, TypeError, "rpn_criterion.*float"),
        ("faster_rcnn", {"rpn_criterion": alrp_triton.APLoss()}, TypeError, "rpn_criterion.*boxes.*APLoss"),
        ("faster_rcnn", {"rpn_weight": "0.2"}, TypeError, "rpn_weight.*str"),
        ("faster_rcnn", {"rpn_weight": -1}, ValueError, "rpn_weight.*-1"),
        ("faster_rcnn", {"rpn_weight": float("nan")}, ValueError, "rpn_weight.*nan"),
        ("faster_rcnn", {"per_image": 1}, TypeError, "per_image.*int"),
        ("fcos", {"criterion": alrp_triton.APLoss()}, TypeError, "criterion.*boxes.*APLoss"),
    ],
)
def test_wrong_arguments_are_named_and_change_nothing(name, options, error, message):
    model = BUILDERS[name]()
    before = [type(part) for part in model.modules()]
    for use in USES.values():
        with pytest.raises(error, match=message):
            use(model, **options)
    assert [type(part) for part in model.modules()] == before


def test_without_torchvision_the_extra_is_named():
    code = "import sys; sys.modules['torchvision'] = None; import alrp_triton.integrations.torchvision"
    done = start_python(code)
    assert "ImportError: needs torchvision: pip install 'alrp-triton[torchvision]'" in done.stderr


def test_models_that_are_refused():
    shared = ALRPLoss()
    with pytest.raises(ValueError, match="rpn_criterion must be another module"):
        use_alrp(BUILDERS["faster_rcnn"](), shared, rpn_criterion=shared)
    for use in (integration.use_ap, integration.use_ndcg):
        with pytest.raises(TypeError, match="RetinaNet or an FCOS for a loss on scores alone; got a FasterRCNN"):
            use(BUILDERS["faster_rcnn"]())
    for kind in (MaskRCNN, KeypointRCNN):
        with pytest.raises(TypeError, match=f"neither masks nor keypoints; got {kind.__name__}"):
            use_alrp(masked(kind))
    for name, part in (("retinanet", "head"), ("fcos", "head"), ("faster_rcnn", "rpn"), ("faster_rcnn", "roi_heads")):
        model = BUILDERS[name]()
        setattr(model, part, nn.Identity())
        with pytest.raises(TypeError, match=rf"model\.{part} must be.*Identity"):
            use_alrp(model)
    with pytest.raises(TypeError, match=r"RetinaNet, FCOS or FasterRCNN.*Sequential"):
        use_alrp(nn.Sequential())
