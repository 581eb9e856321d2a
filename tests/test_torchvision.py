"""What holds for RetinaNet, FCOS and Faster R-CNN alike: the losses train, and the detectors stay ordinary ones."""

import pytest
import torch
from dialect.interpreters import start_python
from torch import nn

pytest.importorskip("torchvision")

from adapters import (
    Recorder,
    assert_nothing_to_learn,
    assert_trained,
    balances,
    by_batch_or_image,
    every_copy,
    heard,
    monitored,
    one_process,
    weigh,
)
from detectors import (
    BOX_LOSS,
    BUILDERS,
    CASES,
    LOSSES,
    SIZE,
    WITH_BOXES,
    batch_for,
    criteria,
    every_case,
    every_detector,
    same,
    spread,
)
from torchvision.models.detection import KeypointRCNN, MaskRCNN

from alrp_triton import ALRPLoss, APLoss, RankSortLoss
from alrp_triton.assigners import ATSS
from alrp_triton.integrations.torchvision import use_alrp, use_ap, use_loss


@every_case
def test_the_losses_are_those_that_the_detector_had(case):
    model = case.build()
    losses = model(*batch_for(case.name))
    dropped = {"bbox_ctrness"} if "centerness" in case.options else set()
    assert set(losses) == set(LOSSES[case.name]) - dropped
    assert set(LOSSES[case.name]) == set(BUILDERS[case.name]()(*batch_for(case.name)))
    assert all(loss.shape == () and loss > 0 for loss in losses.values())
    sum(losses.values()).backward()
    assert_trained(model)


@by_batch_or_image
@every_case
def test_batch_without_objects(case, per_image):
    model = case.build(per_image=per_image)
    images, _ = batch_for(case.name)
    # torch.zeros(0) is a common empty target.
    dtype = torch.int64 if case.name == "faster_rcnn" or per_image else torch.float32
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=dtype)}
    assert_nothing_to_learn(model, model(images, [empty, empty]))


@every_detector
@by_batch_or_image
def test_images_of_several_sizes_one_without_objects(name, per_image):
    model = use_alrp(BUILDERS[name](), per_image=per_image)
    images, targets = batch_for(name, (2, 0, 1), sizes=[(64, 64), (48, 80), (75, 51)])
    losses = model(images, targets)
    assert all(loss > 0 for loss in losses.values())
    sum(losses.values()).backward()
    assert_trained(model)
    for image, detected in zip(images, model.eval()(images)):
        assert len(detected["boxes"]) > 0
        assert (detected["boxes"][:, 2] <= image.shape[2]).all()
        assert (detected["boxes"][:, 3] <= image.shape[1]).all()


@every_detector
def test_one_class(name):
    model = use_alrp(BUILDERS[name](num_classes=1))
    images, targets = batch_for(name)
    for target in targets:
        target["labels"].fill_(int(name == "faster_rcnn"))
    sum(model(images, targets).values()).backward()
    assert_trained(model)
    labels = torch.cat([detected["labels"] for detected in model.eval()(images)])
    assert set(labels.tolist()) == {int(name == "faster_rcnn")}


@every_case
def test_under_autocast(case):
    """Scores are ranked as they are; boxes are given in the precision of the targets."""
    model = case.build(per_image=True)
    calls = [heard(criterion) for criterion in criteria(model).values()]
    images, targets = batch_for(case.name, seed=3)
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(images, targets)
        sum(losses.values()).backward()
        detections = model.eval()(images)
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    assert_trained(model)
    for detected in detections:
        assert len(detected["scores"]) > 0
        assert ((detected["scores"] >= 0) & (detected["scores"] <= 1)).all()
    given = {tuple(box) for target in targets for box in target["boxes"].tolist()}
    for ((logits, _, *boxes),) in calls:
        assert logits.dtype == torch.bfloat16
        assert all(each.dtype == torch.float32 for each in boxes)
        assert {tuple(box) for each in boxes[1:] for box in each.tolist()} <= given


@every_case
@pytest.mark.parametrize("boxes_per_image", [(2, 1), (0, 2), (0, 0)])
def test_per_image_is_the_mean_over_the_images_with_objects(case, boxes_per_image):
    # Spread, since the order of nearly equal scores, which weighs boxes, is not that of convolutions for one image.
    build = BUILDERS[case.name]
    whole, model = (weigh(case.use(spread(build()), per_image=per_image), 2.0) for per_image in (False, True))
    images, targets = batch_for(case.name, boxes_per_image)
    losses, together = model(images, targets), whole(images, targets)
    single = [whole([image], [target]) for image, target in zip(images, targets) if len(target["boxes"])]
    for part, value in losses.items():
        expected = sum((each[part] for each in single), start=torch.zeros(())) / max(1, len(single))
        if part == "bbox_ctrness" or (part == "bbox_regression" and case.member not in WITH_BOXES):
            assert value == together[part]
        else:
            torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-6)
            assert len(single) < 2 or abs(expected - together[part]) > 1e-5  # the images do not just add up


@pytest.mark.thinned(2)
@every_copy
@every_case
def test_copies_use_their_own_criteria(case, duplicate):
    model = case.build(per_image=True)
    images, targets = batch_for(case.name)
    model(images, targets)
    twin = duplicate(model)
    assert [type(part) for part in twin.modules()] == [type(part) for part in model.modules()]
    assert {*map(id, criteria(twin).values())}.isdisjoint(map(id, criteria(model).values()))
    losses = model(images, targets)
    assert twin(images, targets) == losses
    for balance in balances(twin):
        balance.step_epoch()
    changed = twin(images, targets)[BOX_LOSS[case.name]] != losses[BOX_LOSS[case.name]]
    assert changed == (case.member == "alrp")
    assert model(images, targets) == losses
    assert same(model.eval()(images), twin.eval()(images))


@every_detector
def test_only_the_given_instance_changes(name):
    images, targets = batch_for(name)
    untouched = BUILDERS[name]()
    torch.manual_seed(5)  # for what Faster R-CNN samples
    before = untouched(images, targets)
    use_alrp(BUILDERS[name]())(images, targets)
    for model in (untouched, BUILDERS[name]()):
        torch.manual_seed(5)
        assert model(images, targets) == before


@pytest.mark.parametrize("case", [case for case in CASES.values() if case.name != "faster_rcnn"])
def test_inference_is_unchanged(case):
    images, _ = batch_for(case.name)
    plain, model = (spread(BUILDERS[case.name]()).eval() for _ in range(2))
    assert same(case.use(model)(images), plain(images)) == ("centerness" not in case.options)


@every_detector
def test_statistics_of_every_stage_are_found(name):
    (numbers_of,) = monitored("numbers_of")
    model = use_alrp(BUILDERS[name]())
    stages = ("rpn", "roi_heads") if name == "faster_rcnn" else ("head",)
    for stage in stages:
        model.get_submodule(stage).ranking_criterion.monitor = True
    assert numbers_of(model) == {}
    model(*batch_for(name))
    numbers = numbers_of(model)
    for stage in stages:
        assert numbers[f"{stage}.ranking_criterion/num_positives"] > 0
        assert numbers[f"{stage}.ranking_criterion/weight"] == 50
    assert len(numbers) == 10 * len(stages)


@every_detector
def test_each_call_replaces_what_the_one_before_did(name):
    images, targets = batch_for(name)
    model = use_alrp(BUILDERS[name](), per_image=True)
    types = [type(part) for part in model.modules()]
    for case in [case for case in CASES.values() if case.name == name]:
        expected = case.build()
        assert case.use(model) is model
        assert model(images, targets) == expected(images, targets)
        assert model.state_dict().keys() == expected.state_dict().keys()
        assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in expected.parameters()]
    assert [type(part) for part in use_alrp(model).modules()] == types


@pytest.mark.parametrize("case", [case for case in CASES.values() if case.member == "alrp"])
def test_distributed_data_parallel(case, tmp_path):
    """A parameter without a gradient would raise in the second step."""
    with one_process(tmp_path):
        images, targets = batch_for(case.name)
        parallel = nn.parallel.DistributedDataParallel(case.build())
        assert parallel(images, targets) == case.build()(images, targets)
        empty = [{key: value[:0] for key, value in target.items()} for target in targets]
        for given in (targets, empty, targets):
            sum(parallel(images, given).values()).backward()
        assert len(assert_trained(parallel)) == len(list(parallel.parameters())) - 2 * ("centerness" in case.options)


def test_the_criterion_moves_with_the_model():
    model = use_loss(BUILDERS["retinanet"](), Recorder()).double()
    assert model.head.ranking_criterion.scale.dtype == torch.float64
    meta = use_loss(BUILDERS["retinanet"]().to("meta"), Recorder())
    assert meta.head.ranking_criterion.scale.device.type == "meta"


def with_identity(name, part):
    model = BUILDERS[name]()
    setattr(model, part, nn.Identity())
    return model


def with_masks(kind):
    return kind(BUILDERS["retinanet"]().backbone, 3, min_size=SIZE, max_size=SIZE)


ALRP, AP, RPN = ALRPLoss(), APLoss(), {"rpn_criterion": RankSortLoss()}
TYPE_ERRORS = [
    (nn.Linear(1, 1), ALRP, {}, "model: expected a torchvision RetinaNet, FCOS or FasterRCNN.*Linear"),
    (nn.DataParallel(BUILDERS["fcos"]()), ALRP, {}, "model: expected .* not yet wrapped, got DataParallel"),
    (with_masks(MaskRCNN), ALRP, RPN, "model: expected neither masks nor keypoints.*MaskRCNN"),
    (with_masks(KeypointRCNN), ALRP, RPN, "model: expected neither masks nor keypoints.*KeypointRCNN"),
    (with_identity("retinanet", "head"), ALRP, {}, r"model\.head: expected a torchvision RetinaNetHead, got Identity"),
    (with_identity("fcos", "head"), ALRP, {}, r"model\.head: expected a torchvision FCOSHead, got Identity"),
    (with_identity("faster_rcnn", "rpn"), ALRP, {}, r"model\.rpn: expected a torchvision RegionPro.*, got Identity"),
    (with_identity("faster_rcnn", "roi_heads"), ALRP, {}, r"model\.roi_heads: expected .* RoIHeads, got Identity"),
    ("retinanet", None, {}, "criterion: expected a torch.nn.Module, got NoneType"),
    ("fcos", ALRPLoss, {}, "criterion: expected a torch.nn.Module, got the class ALRPLoss; write ALRPLoss\\(\\)"),
    ("retinanet", ALRP, {"per_image": 1}, "per_image: expected a bool, got int"),
    ("retinanet", ALRP, {"centerness": "keep"}, "centerness: expected None for a RetinaNet.* to FCOS, got 'keep'"),
    ("retinanet", ALRP, {"rpn_weight": 0.2}, "rpn_weight: expected None .* applies to FasterRCNN, got 0.2"),
    ("retinanet", ALRP, {"assigner": 9}, "assigner: expected a callable .*int"),
    ("fcos", ALRP, {"assigner": ATSS()}, "assigner: expected None for a FCOS.* to RetinaNet, got ATSS"),
    ("faster_rcnn", ALRP, {}, "rpn_criterion: expected a module that takes boxes.*NoneType"),
    ("faster_rcnn", ALRP, {"rpn_criterion": AP}, "rpn_criterion: expected a module that takes boxes.*APLoss"),
    ("faster_rcnn", AP, RPN, "^criterion: expected a module that takes boxes.*FasterRCNN, got APLoss"),
    ("faster_rcnn", ALRP, {**RPN, "rpn_weight": "0.2"}, "rpn_weight: expected .* >= 0, got str"),
]
VALUE_ERRORS = [
    ("fcos", ALRP, {"centerness": "half"}, "centerness: expected one of .*'keep', 'drop'.*'half'"),
    ("faster_rcnn", ALRP, {"rpn_criterion": ALRP}, "rpn_criterion: expected another module than criterion, got the"),
    ("faster_rcnn", ALRP, {**RPN, "rpn_weight": -1}, "rpn_weight: expected .* >= 0, got -1"),
    ("faster_rcnn", ALRP, {**RPN, "rpn_weight": float("nan")}, "rpn_weight: expected .* >= 0, got nan"),
]


@pytest.mark.parametrize(("model", "criterion", "options", "message"), TYPE_ERRORS + VALUE_ERRORS)
def test_wrong_arguments_are_named_and_change_nothing(model, criterion, options, message):
    model = BUILDERS[model]() if isinstance(model, str) else model
    before = [type(part) for part in model.modules()]
    error = TypeError if any(message == each[-1] for each in TYPE_ERRORS) else ValueError
    with pytest.raises(error, match=message):
        use_loss(model, criterion, **options)
    assert [type(part) for part in model.modules()] == before


def test_faster_rcnn_refuses_losses_on_scores_alone():
    with pytest.raises(TypeError, match="takes boxes"):
        use_ap(BUILDERS["faster_rcnn"]())


def test_without_torchvision_the_extra_is_named():
    code = "import sys; sys.modules['torchvision'] = None; import alrp_triton.integrations.torchvision"
    assert "ImportError: needs torchvision: pip install 'alrp-triton[torchvision]'" in start_python(code).stderr
