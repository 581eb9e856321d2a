"""What integrations do on validation data: detections in COCO's format, and models calibrated by detections."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..calibration import Calibration, fit
from ..calibration.fitting import matches_by_class
from ..calibration.report import CalibrationReport, before_and_after, best_thresholds, check_matches, report_of

__all__ = ["Scene", "batches_of", "calibrate_by", "collected", "evaluating", "thresholds_of"]

Record = dict[str, Any]
Collected = tuple[Record, list[Record]]


class Scene(NamedTuple):
    """An image's objects, and what a model with a sigmoid for each class gives for it. Boxes are centre, width and
    height in units of the image."""

    objects: dict[str, Tensor]
    """``"boxes"`` [G, 4], and ``"iscrowd"`` [G] and ``"orig_size"`` [2] (height, width) if they are known."""
    classes: Tensor
    """[G]"""
    size: tuple[int, int]
    """Height and width in pixels where ``"orig_size"`` is not known."""
    logits: Tensor
    """[Q, C]"""
    boxes: Tensor
    """[Q, 4]"""


def collected(scenes: Iterable[Scene], num_classes: int, most: int) -> Collected:
    """A COCO dataset and COCO results: of each image the ``most`` best of all pairs of a query and a class.

    Raises:
        ValueError: there is no image, or a class that the model does not have.
    """
    truth: Record = {"images": [], "annotations": [], "categories": [{"id": each} for each in range(num_classes)]}
    found: list[Record] = []
    for scene in scenes:
        number = len(truth["images"])
        classes = scene.classes.tolist()
        wrong = [each for each in classes if not 0 <= each < num_classes]
        if wrong:
            raise ValueError(f"labels of image {number}: {wrong[0]}, expected below {num_classes}")
        known = scene.objects.get("orig_size")
        height, width = scene.size if known is None else known.tolist()
        truth["images"].append({"id": number, "height": height, "width": width})
        crowds = scene.objects["iscrowd"].tolist() if "iscrowd" in scene.objects else [0] * len(classes)
        for box, label, crowd in zip(_in_coco(scene.objects["boxes"], height, width), classes, crowds):
            truth["annotations"].append({"image_id": number, "bbox": box, "category_id": label, "iscrowd": int(crowd)})
        scores, index = scene.logits.float().sigmoid().flatten().topk(min(most, scene.logits.numel()))
        boxes = _in_coco(scene.boxes[index // num_classes], height, width)
        for box, label, score in zip(boxes, (index % num_classes).tolist(), scores.tolist()):
            found.append({"image_id": number, "bbox": box, "category_id": label, "score": score})
    if not truth["images"]:
        raise ValueError("data: expected batches of images and labels, got none (an iterator is empty the second time)")
    return truth, found


def batches_of(data: Iterable[Any]) -> Iterator[tuple[Sequence[Tensor], list[dict[str, Tensor]]]]:
    """Images and targets of each batch, where a model takes a list of each.

    Raises:
        TypeError: a batch is something else.
        ValueError: there are not as many targets as images, or no images at all.
    """
    num_images = 0
    for batch in data:
        targets = batch[1] if isinstance(batch, (tuple, list)) and len(batch) == 2 else None
        if not isinstance(targets, (tuple, list)) or not all(isinstance(each, Mapping) for each in targets):
            wanted = "batches (images, targets), lists of tensors and of dicts, as the model takes them in training"
            how = "DataLoader(dataset, batch_size, collate_fn=lambda batch: tuple(zip(*batch)))"
            raise TypeError(f"data: expected {wanted}, got {type(batch).__name__}; of a dataset: {how}")
        images = batch[0]
        if len(images) != len(targets):
            raise ValueError(f"data: expected a target for each of {len(images)} images, got {len(targets)}")
        num_images += len(images)
        yield images, list(targets)
    if not num_images:
        raise ValueError(
            "data: expected batches of images and targets, got none (an iterator is empty the second time)"
        )


def calibrate_by(
    collected: Collected,
    fold: Callable[[Calibration], None],
    *,
    per_class: bool,
    min_per_class: int,
    iou: float,
    max_detections: int,
) -> CalibrationReport:
    """Fits a map on detections, gives it to ``fold`` and reports what it changes."""
    matching: dict[str, Any] = {"iou": iou, "iou_type": "bbox", "max_detections": max_detections}
    calibration = fit(*collected, per_class=per_class, min_per_class=min_per_class, **matching)
    before, after = before_and_after(*collected, calibration, **matching)
    check_matches(before, iou)
    fold(calibration)
    return report_of(calibration, before, after, iou)


def thresholds_of(collected: Collected, iou: float, max_detections: int) -> dict[int, float]:
    """The score threshold of each class with the lowest LRP; NaN without true positives."""
    return best_thresholds(matches_by_class(*collected, iou=iou, iou_type="bbox", max_detections=max_detections), iou)


@contextmanager
def evaluating(model: nn.Module, holder: Any = None, **settings: Any) -> Iterator[None]:
    """Within, the model is in evaluation mode, nothing has a gradient and ``holder`` has these settings; then each
    module is in its own mode again, and so are the settings."""
    modes = [(part, part.training) for part in model.modules()]
    own = {name: getattr(holder, name) for name in settings}
    try:
        with torch.no_grad():
            model.eval()
            for name, value in settings.items():
                setattr(holder, name, value)
            yield
    finally:
        for name, value in own.items():
            setattr(holder, name, value)
        for part, mode in modes:
            part.training = mode


def _in_coco(boxes: Tensor, height: int, width: int) -> list[list[float]]:
    """Corner, width and height in pixels of boxes [N, 4] given as (centre x, centre y, width, height)."""
    exact = boxes.detach().double().cpu()
    size = torch.tensor([width, height, width, height], dtype=torch.float64)
    found: list[list[float]] = (torch.cat([exact[:, :2] - exact[:, 2:] / 2, exact[:, 2:]], 1) * size).tolist()
    return found
