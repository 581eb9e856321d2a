"""The RetinaNet integration: torchvision's conventions, and a model that stays an ordinary one."""

import copy
import io
import pickle

import pytest
import torch
from interpreters import start_python
from torch import nn

pytest.importorskip("torchvision")

from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import box_convert, generalized_box_iou

import alrp_triton
from alrp_triton.integrations.torchvision import use_alrp

NUM_CLASSES = 4


class Backbone(nn.Sequential):
    """Two pyramid levels, so that the order of anchors over levels is part of every test."""

    out_channels = 8

    def __init__(self):
        super().__init__(nn.Conv2d(3, 8, 3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1))

    def forward(self, images):
        fine = self[1](self[0](images))
        return {"fine": fine, "coarse": self[2](fine)}


class RenamedHead(RetinaNetHead):
    """A user's own head: what it overrides must survive."""

    def forward(self, x):
        return {name: 2 * value for name, value in super().forward(x).items()}


def build(seed=0, **kwargs):
    torch.manual_seed(seed)
    anchors = AnchorGenerator(((16, 24), (32, 48)), ((1.0,), (1.0,)))
    return RetinaNet(
        Backbone(), NUM_CLASSES, min_size=64, max_size=64, anchor_generator=anchors, score_thresh=0.0, **kwargs
    )


def batch(boxes_per_image=(3, 2), seed=1):
    generator = torch.Generator().manual_seed(seed)
    images = [torch.rand(3, 64, 64, generator=generator) for _ in boxes_per_image]
    targets = []
    for n in boxes_per_image:
        centre = 16 + 32 * torch.rand(n, 2, generator=generator)
        size = 14 + 16 * torch.rand(n, 2, generator=generator)
        boxes = box_convert(torch.cat([centre, size], 1), "cxcywh", "xyxy")
        targets.append({"boxes": boxes, "labels": torch.randint(NUM_CLASSES, (n,), generator=generator)})
    return images, targets


def head_inputs(model, images, targets):
    """The arguments that torchvision hands to ``head.compute_loss``, recorded in a training step of ``model``."""
    recorded = {}

    class Recorder(type(model.head)):
        def compute_loss(self, *arguments):
            recorded["arguments"] = arguments
            return {}

    original = model.head.__class__
    model.head.__class__ = Recorder
    try:
        model(images, targets)
    finally:
        model.head.__class__ = original
    return recorded["arguments"]


def losses_by_hand(head, targets, outputs, anchors, matched_idxs):
    """aLRP from the tensors a plain reading of the conventions gives: image by image, one-hot, flattened."""
    one_hot, errors = [], []
    for image, matched in enumerate(matched_idxs):
        for anchor, index in enumerate(matched.tolist()):
            row = torch.full((NUM_CLASSES,), -1 if index == -2 else 0)
            if index >= 0:
                row[targets[image]["labels"][index]] = 1
                dx, dy, dw, dh = outputs["bbox_regression"][image, anchor]
                x, y, w, h = box_convert(anchors[image][anchor], "xyxy", "cxcywh")
                box = torch.stack([x + dx * w, y + dy * h, w * dw.exp(), h * dh.exp()])
                box = box_convert(box[None], "cxcywh", "xyxy")
                errors.append(1 - generalized_box_iou(box, targets[image]["boxes"][index : index + 1])[0, 0])
            one_hot.append(row)
    errors = torch.stack(errors)  # (1 - GIoU) / 2 / (1 - tau) with tau = 0.5
    return alrp_triton.alrp_loss(outputs["cls_logits"].flatten(), torch.cat(one_hot), errors)


def gradients(loss, model):
    return torch.autograd.grad(loss, list(model.parameters()), retain_graph=True, allow_unused=True)


def spread(model):
    """Larger last-layer weights: scores that differ by more than the ramp, boxes that differ from their anchors."""
    with torch.no_grad():
        model.head.classification_head.cls_logits.weight.normal_(0, 4)
        model.head.regression_head.bbox_reg.weight.normal_(0, 2)
    return model


@pytest.mark.parametrize("boxes_per_image", [(3, 2), (0, 4), (2, 0, 3)])
def test_losses_equal_those_computed_by_hand(boxes_per_image):
    model = use_alrp(spread(build()), alrp_triton.ALRPLoss(self_balance=3.0))
    images, targets = batch(boxes_per_image)
    targets, outputs, anchors, matched = head_inputs(model, images, targets)
    assert {-2, -1, 0} <= set(torch.cat(matched).tolist())  # all three conventions take part

    losses = model.head.compute_loss(targets, outputs, anchors, matched)
    expected = losses_by_hand(model.head, targets, outputs, anchors, matched)

    assert list(losses) == ["classification", "bbox_regression"]
    assert losses["classification"].shape == losses["bbox_regression"].shape == ()
    torch.testing.assert_close(losses["classification"], expected.cls)
    torch.testing.assert_close(losses["bbox_regression"], 3.0 * expected.loc)
    inputs = [outputs["cls_logits"], outputs["bbox_regression"]]
    for got, want in zip(
        torch.autograd.grad(sum(losses.values()), inputs, retain_graph=True),
        torch.autograd.grad(expected.cls + 3.0 * expected.loc, inputs),
    ):
        assert want.abs().sum() > 0
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-7)


def test_criterion_receives_torchvisions_assignment():
    """A hand-written assignment: classes, background, ignored, and boxes in the order of the positives."""

    class Recorder(nn.Module):
        def forward(self, *arguments):
            self.arguments = arguments
            return alrp_triton.ALRPLossOutput(arguments[0].sum(), arguments[2].sum(), torch.zeros(3))

    head = use_alrp(build(), Recorder()).head
    boxes = torch.tensor([[0.0, 0, 8, 8], [8, 8, 24, 24], [2, 2, 10, 30]])
    targets = [
        {"boxes": boxes[:2], "labels": torch.tensor([3, 1])},
        {"boxes": boxes[2:], "labels": torch.tensor([0])},
    ]
    outputs = {"cls_logits": torch.zeros(2, 5, NUM_CLASSES), "bbox_regression": torch.zeros(2, 5, 4)}
    anchors = [10 * torch.rand(5, 4) for _ in range(2)]
    matched = [torch.tensor([1, -1, -2, 0, -1]), torch.tensor([-2, -1, 0, -1, -2])]
    head.compute_loss(targets, outputs, anchors, matched)

    logits, labels, pred_boxes, target_boxes = head.ranking_criterion.arguments
    assert logits is outputs["cls_logits"]  # neither flattened nor copied
    assert labels.tolist() == [[1, 4, -1, 3, 4], [-1, 4, 0, 4, -1]]
    torch.testing.assert_close(pred_boxes, torch.stack([anchors[0][0], anchors[0][3], anchors[1][2]]))
    assert target_boxes.tolist() == boxes[[1, 0, 2]].tolist()


def test_half_precision_deltas_are_decoded_in_the_precision_of_the_boxes():
    model = use_alrp(spread(build()))
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(*batch())
    assert losses["bbox_regression"].dtype == torch.float32
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())

    recorded = []
    model.head.ranking_criterion.register_forward_pre_hook(lambda _, arguments: recorded.append(arguments))
    with torch.autocast("cpu", torch.bfloat16):
        model(*batch())
    logits, _, pred_boxes, _ = recorded[0]
    assert logits.dtype == torch.bfloat16
    assert pred_boxes.dtype == torch.float32


def test_only_the_given_instance_changes():
    images, targets = batch()
    untouched = build()
    focal = untouched(images, targets)
    compute_loss = RetinaNetHead.compute_loss
    model = use_alrp(build())
    alrp = model(images, targets)

    assert RetinaNetHead.compute_loss is compute_loss
    assert type(untouched.head) is RetinaNetHead
    assert isinstance(model.head, RetinaNetHead)
    assert build()(images, targets) == focal
    assert untouched(images, targets) == focal
    assert abs(alrp["classification"] - focal["classification"]) > 1e-3


def test_inference_is_unchanged():
    images, _ = batch()
    plain, model = spread(build()).eval(), use_alrp(spread(build())).eval()
    for expected, got in zip(plain(images), model(images)):
        assert len(expected["boxes"]) > 0
        for key in ("boxes", "scores", "labels"):
            assert torch.equal(expected[key], got[key])


def test_training_steps_lower_the_loss():
    model = use_alrp(build(), alrp_triton.ALRPLoss(self_balance=None))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    values = []
    for _ in range(30):
        loss = sum(model(*batch()).values())
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < 0.9 * values[0]


@pytest.mark.parametrize("labels_dtype", [torch.int64, torch.float32])  # torch.zeros(0) is a common empty target
def test_batch_without_objects(labels_dtype):
    model = use_alrp(build())
    images, _ = batch((1, 1))
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=labels_dtype)}
    losses = model(images, [empty, empty])
    assert losses["classification"] == losses["bbox_regression"] == 0
    sum(losses.values()).backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle, through_torch_save])
@pytest.mark.parametrize("head", [None, RenamedHead])
def test_copies_use_their_own_criterion(duplicate, head):
    head = head and head(Backbone.out_channels, 2, NUM_CLASSES)
    model = use_alrp(spread(build(head=head)), alrp_triton.ALRPLoss(self_balance=alrp_triton.SelfBalance(10.0)))
    images, targets = batch()
    model(images, targets)
    twin = duplicate(model)

    assert type(twin.head) is type(model.head)
    assert isinstance(twin.head, RenamedHead if head else RetinaNetHead)
    assert twin.head.ranking_criterion is not model.head.ranking_criterion
    assert twin(images, targets) == model(images, targets)

    weighted = model(images, targets)["bbox_regression"]
    twin.head.ranking_criterion.self_balance.step_epoch()
    assert twin(images, targets)["bbox_regression"] != weighted
    assert model(images, targets)["bbox_regression"] == weighted


def test_state_dict_carries_the_self_balancing_weight():
    images, targets = batch()
    model = use_alrp(build())
    model(images, targets)
    model.head.ranking_criterion.self_balance.step_epoch()
    restored = use_alrp(build(seed=5))
    assert restored(images, targets)["bbox_regression"] != model(images, targets)["bbox_regression"]
    restored.load_state_dict(model.state_dict(), strict=True)
    assert restored(images, targets) == model(images, targets)

    added = set(model.state_dict()) - set(build().state_dict())
    assert added
    assert all(name.startswith("head.ranking_criterion.") for name in added)


def test_second_call_replaces_the_criterion():
    images, targets = batch()
    model = use_alrp(build(), alrp_triton.ALRPLoss(self_balance=1.0))
    once = model(images, targets)
    head_class = type(model.head)
    assert use_alrp(model, alrp_triton.ALRPLoss(self_balance=2.0)) is model
    twice = model(images, targets)
    assert type(model.head) is head_class
    torch.testing.assert_close(twice["bbox_regression"], 2 * once["bbox_regression"])


def test_distributed_data_parallel(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        images, targets = batch()
        expected = use_alrp(build())(images, targets)
        parallel = nn.parallel.DistributedDataParallel(use_alrp(build()))
        losses = parallel(images, targets)
        assert losses == expected
        sum(losses.values()).backward()
        assert all(p.grad.isfinite().all() for p in parallel.parameters())
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("model", "criterion", "message"),
    [
        (nn.Linear(1, 1), None, "RetinaNet.*Linear"),
        (nn.DataParallel(build()), None, "DataParallel"),
        (build(head=nn.Identity()), None, "model.head.*Identity"),
        (build(), 0.5, "criterion.*float"),
        (build(), alrp_triton.ALRPLoss, "criterion.*type"),
    ],
)
def test_wrong_arguments_are_named(model, criterion, message):
    with pytest.raises(TypeError, match=message):
        use_alrp(model, criterion)


def test_the_package_itself_does_not_import_torchvision():
    code = "import sys, alrp_triton; sys.exit('torchvision' in sys.modules)"
    assert start_python(code).returncode == 0
