"""MONAI's detector of boxes in volumes: with ``use_...``, and with a loss of scores as it is."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from adapters import (
    Recorder,
    assert_nothing_to_learn,
    assert_same_gradients,
    assert_trained,
    by_batch_or_image,
    every_copy,
    of_either_kind,
)
from torch import Tensor, nn

from alrp_triton import ALRPLoss, APLoss, NDCGLoss, RankSortLoss, SelfBalance
from alrp_triton.boxes import box_error

pytest.importorskip("monai", reason="needs MONAI: pip install '.[frameworks]'")

from monai.apps.detection.networks.retinanet_detector import RetinaNetDetector
from monai.apps.detection.utils.anchor_utils import AnchorGeneratorWithAnchorShape
from monai.data import MetaTensor

from alrp_triton.integrations import monai as integration
from alrp_triton.integrations.monai import calibrate, restore, thresholds, use_alrp, use_loss, use_rank_sort

CLASSES, SIDE = 2, 24
LOSSES = {"alrp": ALRPLoss, "rank_sort": RankSortLoss, "ap": APLoss, "ndcg": NDCGLoss}
every_loss = pytest.mark.parametrize("name", LOSSES)
PARTS = {"classification", "box_regression"}


class Network(nn.Module):
    """What a detector asks of its network, with one map of a quarter of the sides and one anchor at each place."""

    spatial_dims, num_classes, num_anchors, size_divisible = 3, CLASSES, 1, 4
    cls_key, box_reg_key = "classification", "box_regression"

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Conv3d(1, 8, 3, 2, 1), nn.ReLU(), nn.Conv3d(8, 16, 3, 2, 1), nn.ReLU()]
        self.trunk = nn.Sequential(*layers, nn.Conv3d(16, 16, 3, 1, 1), nn.ReLU())
        self.classification_head = nn.Module()
        self.classification_head.cls_logits = nn.Conv3d(16, CLASSES, 3, 1, 1)
        self.deltas = nn.Conv3d(16, 6, 3, 1, 1)
        nn.init.constant_(self.classification_head.cls_logits.bias, -4.6)

    def forward(self, images: Tensor) -> dict[str, list[Tensor]]:
        features = self.trunk(images)
        scores = self.classification_head.cls_logits(features)
        return {self.cls_key: [scores], self.box_reg_key: [self.deltas(features)]}


class GIoU(nn.Module):
    """The loss of decoded boxes."""

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        return box_error(pred, target, "giou", 0.0).mean()


def build() -> RetinaNetDetector:
    torch.manual_seed(0)
    anchors = AnchorGeneratorWithAnchorShape(feature_map_scales=(1,), base_anchor_shapes=((8, 8, 8),))
    detector = RetinaNetDetector(
        network=Network(), anchor_generator=anchors, spatial_dims=3, num_classes=CLASSES, size_divisible=4
    )
    detector.set_regular_matcher(fg_iou_thresh=0.25, bg_iou_thresh=0.2)
    detector.set_target_keys(box_key="box", label_key="label")
    detector.set_box_regression_loss(GIoU(), encode_gt=False, decode_pred=True)
    detector.set_sliding_window_inferer(roi_size=(SIDE,) * 3, overlap=0.0)
    detector.set_box_selector_parameters(
        score_thresh=0.5, topk_candidates_per_level=50, nms_thresh=0.2, detections_per_img=4
    )
    return detector.train()


def drawn(number: int, generator: torch.Generator, empty: bool = False) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Volumes, each with a bright cube or none; its class is how bright it is."""
    images, targets = [], []
    for _ in range(number):
        image = 0.1 * torch.rand(1, SIDE, SIDE, SIDE, generator=generator)
        low = torch.randint(1, SIDE - 9, (3,), generator=generator)
        label = torch.randint(CLASSES, (1,), generator=generator)
        boxes = torch.cat([low, low + 8]).float()[None]
        if empty:
            boxes, label = boxes[:0], label[:0]
        else:
            x, y, z = low.tolist()
            image[0, x : x + 8, y : y + 8, z : z + 8] += 0.5 + 0.5 * float(label)
        images.append(image)
        targets.append({"box": boxes, "label": label})
    return images, targets


def batch(number: int = 2, seed: int = 0, empty: bool = False):
    return drawn(number, torch.Generator().manual_seed(seed), empty)


def trained(detector: RetinaNetDetector, steps: int, generator: torch.Generator) -> RetinaNetDetector:
    optimiser = torch.optim.AdamW(detector.parameters())
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = 0.01 if step < 110 else 0.002
        losses = detector(*drawn(4, generator, empty=step == 3))
        assert set(losses) == PARTS
        optimiser.zero_grad()
        sum(losses.values()).backward()
        optimiser.step()
        if step % 10 == 9:
            for balance in [part for part in detector.modules() if isinstance(part, SelfBalance)]:
                balance.step_epoch()
    assert losses["classification"] < 0.4
    return detector


def test_a_detector_of_cubes_learns() -> None:
    trained(use_alrp(build()), 80, torch.Generator().manual_seed(0))


def test_a_detector_of_cubes_is_calibrated() -> None:
    generator = torch.Generator().manual_seed(0)
    detector = trained(use_rank_sort(build()), 150, generator)
    validation, (images, targets) = [drawn(8, generator) for _ in range(3)], drawn(8, generator)

    best = thresholds(detector, validation)
    shown, before = predict(detector, images), ranked(detector, images)
    report = calibrate(detector, validation)
    assert detector.training
    assert detector.box_selector.score_thresh == 0.5
    # The order is the same, and a threshold of 0.5 shows the objects and little else.
    for (old_boxes, old, _), (boxes, scores, _) in zip(before, ranked(detector, images)):
        torch.testing.assert_close(old_boxes, boxes)
        expected = torch.from_numpy(report.calibration(old.double().numpy())).float()
        torch.testing.assert_close(expected, scores, rtol=1e-4, atol=1e-6)
    hits = [is_true(*pair) for pair in zip(predict(detector, images), targets)]
    assert sum(bool(each.any()) for each in hits) >= 7
    assert torch.cat(hits).double().mean() > 0.7
    assert not any(len(found["box"]) for found in shown)  # all scores were below it
    # What the report says of the calibrated model is what the calibrated model says.
    after = thresholds(detector, validation)
    assert after == pytest.approx(report.thresholds, abs=1e-4)
    for label, value in best.items():
        assert report.calibration(torch.tensor(value)).item() == pytest.approx(after[label], abs=1e-4)
    assert str(report).startswith("all classes: sigmoid(")


def predict(detector: RetinaNetDetector, images: list[Tensor]) -> list[dict[str, Tensor]]:
    training = detector.training
    with torch.no_grad():
        found: list[dict[str, Tensor]] = detector.eval()([*images], use_inferer=True)
    detector.train(training)
    return found


def ranked(detector: RetinaNetDetector, images: list[Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Boxes, scores and labels of all detections."""
    selector = detector.box_selector
    threshold, selector.score_thresh = selector.score_thresh, 0.0
    found = predict(detector, images)
    selector.score_thresh = threshold
    return [(each["box"], each["label_scores"], each["label"]) for each in found]


def is_true(found: dict[str, Tensor], target: dict[str, Tensor]) -> Tensor:
    """Whether the detections have the class of an image's one object, and half of its volume in common with it."""
    errors = box_error(found["box"], target["box"].expand_as(found["box"]), "iou", 0.0)
    return (errors < 0.5) & (found["label"] == target["label"])


@by_batch_or_image
@every_loss
def test_losses_equal_a_direct_call(name: str, per_image: bool, monkeypatch) -> None:
    detector = getattr(integration, f"use_{name}")(build(), per_image=per_image)
    assert type(detector.ranking_criterion) is LOSSES[name]
    (images, targets), given = batch(3), {}
    compute = type(detector).compute_loss

    def keep(self, outputs, *others):
        given["outputs"], given["others"] = outputs, others
        return compute(self, outputs, *others)

    monkeypatch.setattr(type(detector), "compute_loss", keep)
    losses = detector(images, targets)
    logits, deltas = (given["outputs"][key] for key in (detector.cls_key, detector.box_reg_key))
    _, anchors, sizes = given["others"]
    matched = detector.compute_anchor_matched_idxs(anchors, targets, sizes)
    labels, pred, true = [], [], []
    for i, target in enumerate(targets):
        for a, of in enumerate(matched[i].tolist()):
            labels.append({-1: CLASSES, -2: -1}.get(of, 0))
            if of >= 0:
                labels[-1] = int(target["label"][of])
                pred.append(detector.box_coder.decode_single(deltas[i, a][None], anchors[i][a][None]))
                true.append(target["box"][of][None])
    assert {-1, CLASSES} < set(labels)
    labels = torch.tensor(labels).view(3, -1)
    groups = torch.arange(3)[:, None].expand_as(labels) if per_image else None
    boxes = torch.cat(pred), torch.cat(true)
    expected = LOSSES[name]()(logits, labels, *(boxes if LOSSES[name].takes_boxes else ()), groups=groups)
    cls, loc = (expected.cls, expected.loc) if LOSSES[name].takes_boxes else (expected, GIoU()(*boxes))
    torch.testing.assert_close(losses, {"classification": cls, "box_regression": loc})
    assert_same_gradients(sum(losses.values()), cls + loc, [logits, deltas])


def test_a_loss_of_scores_works_as_it_is() -> None:
    detector = build()
    detector.set_cls_loss(APLoss())
    images, targets = batch()
    torch.testing.assert_close(detector(images, targets), use_loss(build(), APLoss())(images, targets))


@every_loss
def test_patches_without_objects(name: str) -> None:
    detector = getattr(integration, f"use_{name}")(build())
    assert_nothing_to_learn(detector, detector(*batch(empty=True)))
    (images, targets), (_, none) = batch(), batch(empty=True)
    sum(detector(images, [targets[0], none[1]]).values()).backward()
    assert any(p.grad.any() for p in assert_trained(detector))


@of_either_kind
def test_volumes_with_metadata(takes_boxes: bool) -> None:
    """MONAI's transforms give MetaTensors."""
    detector = use_loss(build(), ALRPLoss() if takes_boxes else APLoss())
    images, targets = batch()
    expected = detector(images, targets)
    images = [MetaTensor(image) for image in images]
    targets = [{key: MetaTensor(value) for key, value in target.items()} for target in targets]
    losses = detector(images, targets)
    assert {key: float(value) for key, value in losses.items()} == {key: float(v) for key, v in expected.items()}
    sum(losses.values()).backward()
    assert_trained(detector)
    report = calibrate(detector, [(images, targets)])
    assert set(report.thresholds) == set(range(CLASSES))


@by_batch_or_image
@of_either_kind
def test_what_a_criterion_is_given(takes_boxes: bool, per_image: bool) -> None:
    detector = use_loss(build(), Recorder(takes_boxes), per_image=per_image)
    detector(*batch())
    logits, labels, *boxes = detector.ranking_criterion.arguments
    assert logits.shape == (*labels.shape, CLASSES) == (2, 6**3, CLASSES)
    assert detector.ranking_criterion.ignore_index in labels
    positives = int(((labels >= 0) & (labels < CLASSES)).sum())
    assert [each.shape for each in boxes] == [(positives, 6)] * (2 if takes_boxes else 0)
    groups = [[[i] * 6**3 for i in range(2)]] if per_image else None
    detector.ranking_criterion.assert_told(positives, groups)


def test_resumed_within_a_period() -> None:
    def train(detector, seeds):
        optimiser = torch.optim.SGD(detector.parameters(), 0.01)
        history = []
        for seed in seeds:
            losses = detector(*batch(seed=seed))
            optimiser.zero_grad()
            sum(losses.values()).backward()
            optimiser.step()
            history.append({key: float(value) for key, value in losses.items()})
        detector.ranking_criterion.self_balance.step_epoch()
        return history

    detector, resumed = use_alrp(build()), use_alrp(build())
    train(detector, range(2))
    detector(*batch(seed=9))
    resumed.load_state_dict(copy.deepcopy(detector.state_dict()))
    assert resumed.ranking_criterion.self_balance.count == 1
    for seeds in (range(2, 4), range(4, 6)):
        assert train(detector, seeds) == train(resumed, seeds)
    stock = build()
    stock.network.load_state_dict(detector.network.state_dict())  # as MONAI's examples save it
    detector.load_state_dict(stock.state_dict())  # a checkpoint without the loss


@every_copy
def test_copies_have_a_criterion_of_their_own(duplicate) -> None:
    detector = use_alrp(build())
    twin = duplicate(detector)
    assert twin.ranking_criterion is not detector.ranking_criterion
    assert {k: float(v) for k, v in twin(*batch()).items()} == {k: float(v) for k, v in detector(*batch()).items()}


def test_restored() -> None:
    stock, detector = build(), restore(use_rank_sort(build()))
    assert type(detector) is RetinaNetDetector
    assert restore(stock) is stock
    assert {k: float(v) for k, v in detector(*batch()).items()} == {k: float(v) for k, v in stock(*batch()).items()}
    assert b"alrp_triton" not in pickle.dumps(detector.network)
    assert list(detector.state_dict()) == list(stock.state_dict())


def test_mistakes_are_named() -> None:
    detector = use_alrp(build())
    images, targets = batch()
    with pytest.raises(TypeError, match="detector: expected MONAI's RetinaNetDetector, got Network"):
        use_alrp(Network())
    with pytest.raises(TypeError, match=r"criterion: expected a torch\.nn.Module, got str"):
        use_loss(detector, "ap")
    with pytest.raises(TypeError, match="per_image: expected a bool, got int"):
        use_alrp(detector, per_image=1)
    with pytest.raises(ValueError, match="labels of image 1: 2, expected below 2"):
        detector(images, [targets[0], {**targets[1], "label": torch.tensor([2])}])
    with pytest.raises(ValueError, match="labels of image 0: -1, expected 0 or above"):
        calibrate(detector, [(images, [{**targets[0], "label": torch.tensor([-1])}, targets[1]])])
    with pytest.raises(ValueError, match="data: expected a target for each of 2 images, got 1"):
        thresholds(detector, [(images, targets[:1])])
    with pytest.raises(ValueError, match="data: expected batches of images and targets, got none"):
        calibrate(detector, [])
    with pytest.raises(ValueError, match=r"iou: expected a number in \(0, 1\), got 50"):
        calibrate(detector, [(images, targets)], iou=50)
    with pytest.raises(ValueError, match="max_detections: expected at least 1, got -1"):
        calibrate(detector, [(images, targets)], max_detections=-1)
    with pytest.raises(TypeError, match="max_detections: expected an integer, got float"):
        thresholds(detector, [(images, targets)], max_detections=2.5)
    del detector.network.classification_head
    with pytest.raises(TypeError, match=r"detector.network: expected classification_head.cls_logits.*got Network"):
        calibrate(detector, [(images, targets)])


def test_tensors_with_metadata_are_tensors():
    """MONAI passes them on to whatever is computed of them; the results are those of the plain ones, and plain."""
    given = torch.randn(2, 5, 3), torch.tensor([[0, 3, 1, 3, 3], [3, 2, 3, 3, 0]])
    target = torch.rand(4, 2).repeat(1, 2) + torch.tensor([0.0, 0.0, 1.0, 1.0])
    for criterion in (ALRPLoss(), RankSortLoss(), APLoss()):
        results = []
        for kind in (MetaTensor, torch.Tensor.clone):
            logits, pred = kind(given[0].clone()).requires_grad_(), kind(target + 0.1).requires_grad_()
            more = (pred, kind(target)) if criterion.takes_boxes else (4,)
            loss = criterion(logits, kind(given[1]), *more)
            total = loss.total if criterion.takes_boxes else loss
            assert type(total) is torch.Tensor
            total.backward()
            results.append([total, torch.as_tensor(logits.grad)])
        torch.testing.assert_close(*results, rtol=0, atol=0)
