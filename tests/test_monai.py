"""MONAI's detector of boxes in volumes, trained with our losses as it is; nothing of ours knows of MONAI."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from alrp_triton import APLoss, NDCGLoss
from alrp_triton.boxes import box_error
from alrp_triton.calibration import Calibration, fit_matched, fold

pytest.importorskip("monai", reason="needs MONAI")

from monai.apps.detection.networks.retinanet_detector import RetinaNetDetector
from monai.apps.detection.utils.anchor_utils import AnchorGeneratorWithAnchorShape

CLASSES, SIDE = 2, 24


class Network(nn.Module):
    """What a detector asks of its network, with one map of a quarter of the sides and one anchor at each place."""

    spatial_dims, num_classes, num_anchors, size_divisible = 3, CLASSES, 1, 4
    cls_key, box_reg_key = "classification", "box_regression"

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv3d(1, 8, 3, 2, 1),
            nn.ReLU(),
            nn.Conv3d(8, 16, 3, 2, 1),
            nn.ReLU(),
            nn.Conv3d(16, 16, 3, 1, 1),
            nn.ReLU(),
        )
        self.scores, self.deltas = nn.Conv3d(16, CLASSES, 3, 1, 1), nn.Conv3d(16, 6, 3, 1, 1)
        nn.init.constant_(self.scores.bias, -4.6)

    def forward(self, images: Tensor) -> dict[str, list[Tensor]]:
        features = self.trunk(images)
        return {self.cls_key: [self.scores(features)], self.box_reg_key: [self.deltas(features)]}


class GIoU(nn.Module):
    """The loss of decoded boxes."""

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        return box_error(pred, target, "giou", 0.0).mean()


def detector_with(cls_loss: nn.Module) -> RetinaNetDetector:
    torch.manual_seed(0)
    anchors = AnchorGeneratorWithAnchorShape(feature_map_scales=(1,), base_anchor_shapes=((8, 8, 8),))
    detector = RetinaNetDetector(
        network=Network(), anchor_generator=anchors, spatial_dims=3, num_classes=CLASSES, size_divisible=4
    )
    detector.set_regular_matcher(fg_iou_thresh=0.25, bg_iou_thresh=0.2)
    detector.set_target_keys(box_key="box", label_key="label")
    detector.set_cls_loss(cls_loss)
    detector.set_box_regression_loss(GIoU(), encode_gt=False, decode_pred=True)
    detector.set_sliding_window_inferer(roi_size=(SIDE,) * 3, overlap=0.0)
    detector.set_box_selector_parameters(
        score_thresh=0.02, topk_candidates_per_level=50, nms_thresh=0.2, detections_per_img=4
    )
    return detector


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


@pytest.mark.parametrize("cls_loss", [APLoss(), NDCGLoss()], ids=["AP", "NDCG"])
def test_a_detector_of_cubes_learns(cls_loss: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    detector = detector_with(cls_loss).train()
    optimiser = torch.optim.AdamW(detector.parameters(), 0.01)
    for step in range(120):
        images, targets = drawn(4, generator, empty=step == 3)
        losses = detector(images, targets)
        assert set(losses) == {"classification", "box_regression"}
        total = sum(losses.values())
        optimiser.zero_grad()
        total.backward()
        if step == 3:  # patches without an object teach nothing
            assert float(losses["classification"]) == 0
        optimiser.step()
    assert float(losses["classification"]) < 0.2
    detector.eval()
    images, targets = drawn(8, generator)
    for of_image, target in zip(predict(detector, images), targets):
        best = of_image["label_scores"].argmax()
        assert of_image["label"][best] == target["label"][0]
        assert is_true(of_image, target)[best]
    # What a ranking loss leaves open: at which score detections are shown.
    fold(fitted(detector, *drawn(16, generator)), detector.network.scores, CLASSES)
    detector.set_box_selector_parameters(score_thresh=0.5, nms_thresh=0.2, detections_per_img=4)
    shown = predict(detector, images)
    hits = torch.cat([is_true(*pair) for pair in zip(shown, targets)])
    assert len(hits) >= 6
    assert hits.double().mean() > 0.7


def predict(detector: RetinaNetDetector, images: list[Tensor]) -> list[dict[str, Tensor]]:
    with torch.no_grad():
        found: list[dict[str, Tensor]] = detector([*images], use_inferer=True)
    return found


def is_true(found: dict[str, Tensor], target: dict[str, Tensor]) -> Tensor:
    """Whether the detections have the class of an image's one object, and half of its volume in common with it."""
    errors = box_error(found["box"], target["box"].expand_as(found["box"]), "iou", 0.0)
    return (errors < 0.5) & (found["label"] == target["label"])


def fitted(detector: RetinaNetDetector, images: list[Tensor], targets: list[dict[str, Tensor]]) -> Calibration:
    found = predict(detector, images)
    scores = torch.cat([of_image["label_scores"] for of_image in found])
    return fit_matched(scores, torch.cat([is_true(*pair) for pair in zip(found, targets)]))
