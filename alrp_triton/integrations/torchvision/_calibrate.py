"""Scores that people can threshold: calibrate a detector in place, and the best threshold of each class."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN

from ...calibration import Calibration, fold
from ...calibration.report import CalibrationReport
from .._detections import batches_of, calibrate_by, evaluating, thresholds_of
from ._parts import Targets, check_labels
from ._restore import check_model
from .faster_rcnn import RankingRoIHeads, class_layer

__all__ = ["CalibrationReport", "calibrate", "collect", "thresholds"]

Batches = Iterable[tuple[Sequence[Tensor], Targets]]
Record = dict[str, Any]


def calibrate(
    model: nn.Module,
    data: Batches,
    *,
    per_class: bool = False,
    min_per_class: int = 10,
    iou: float = 0.5,
    max_detections: int = 100,
) -> CalibrationReport:
    """Make a detector's scores probabilities, by the weights of its last layer.

    Fits :func:`alrp_triton.calibration.fit` on the model's detections of validation data and folds it into the layer
    that gives the class logits. The model's own ``score_thresh`` keeps its value, which then means a probability. With
    one map for all classes the order of detections does not change but for rounding, and so neither does AP. Call it
    after training: it changes the scale of the logits, and with it what delta means.

    Args:
        model: a RetinaNet, with any loss or without one, or a Faster R-CNN with the loss; changed in place. Modes of
            its modules remain.
        data: batches of images and targets of a validation set, as the model takes them in training, for example a
            data loader; at least one object.
        per_class, min_per_class, iou, max_detections: as for :func:`alrp_triton.calibration.fit`.

    Raises:
        ImportError: pycocotools is not installed.
        TypeError: ``model`` is another one. The score of an FCOS is a root that no weights of its last layer calibrate,
            and that of a Faster R-CNN without the loss is a softmax; choose :func:`thresholds` there, or apply ``fit``
            of what :func:`collect` returns to the scores.
        ValueError: ``data`` is empty or has wrong labels, or an argument is wrong.
    """
    check_model(model)
    if isinstance(model, FCOS) or (isinstance(model, FasterRCNN) and not isinstance(model.roi_heads, RankingRoIHeads)):
        wanted = "scores by sigmoid, as of a RetinaNet or of a FasterRCNN with the loss"
        raise TypeError(f"model: expected {wanted}, got {type(model).__name__}")
    how: dict[str, Any] = {"min_per_class": min_per_class, "iou": iou, "max_detections": max_detections}
    return calibrate_by(collect(model, data), lambda found: _fold(found, model), per_class=per_class, **how)


def thresholds(model: nn.Module, data: Batches, *, iou: float = 0.5, max_detections: int = 100) -> dict[int, float]:
    """The score threshold of each label that has the lowest LRP, an error of boxes, false and missed objects together.

    Args:
        model: any RetinaNet, FCOS or Faster R-CNN, with the loss or without; not changed.
        data: as for :func:`calibrate`.
        iou, max_detections: as for :func:`alrp_triton.calibration.fit`.

    Returns:
        By label. NaN for a label without true positives, whose best is to show nothing.

    Raises:
        ImportError: pycocotools is not installed.
        TypeError, ValueError: ``model``, ``data`` or an argument is wrong.
    """
    return thresholds_of(collect(model, data), iou, max_detections)


def collect(model: nn.Module, data: Batches) -> tuple[Record, list[Record]]:
    """The objects of ``data`` and a detector's detections, in COCO's format; category ids are the labels.

    The model's score threshold does not apply; its other limits do. So ``evaluate(*collect(model, data))`` of
    :mod:`alrp_triton.metrics` needs no other code.

    Args:
        model: any RetinaNet, FCOS or Faster R-CNN, with the loss or without; on any device, not changed.
        data: batches of images, each [3, H, W], and of targets with ``boxes`` [G, 4] and ``labels`` [G], in pixels, and
            ``iscrowd`` [G] if there are crowds.

    Returns:
        A COCO dataset and COCO results, as :func:`alrp_triton.metrics.evaluate` takes them.

    Raises:
        TypeError: ``model`` is none of these, or ``data`` has no batches.
        ValueError: ``data`` has no image, or a label that the model does not have.
    """
    check_model(model)
    labels, device = _labels(model), next(model.parameters()).device
    truth: dict[str, list[Record]] = {"images": [], "annotations": [], "categories": [{"id": each} for each in labels]}
    found: list[Record] = []
    with evaluating(model, model.roi_heads if isinstance(model, FasterRCNN) else model, score_thresh=0.0):
        for images, targets in batches_of(data):
            own = [{key: value.cpu() for key, value in target.items() if key in _KEYS} for target in targets]
            check_labels(own, labels.stop)
            for image, target, detected in zip(images, own, model([image.to(device) for image in images])):
                place = {"image_id": len(truth["images"])}
                height, width = image.shape[-2:]
                truth["images"].append({"id": place["image_id"], "height": height, "width": width})
                truth["annotations"] += [{**place, **one} for one in _records(target, iscrowd="iscrowd")]
                found += [{**place, **one} for one in _records(detected, score="scores")]
    return truth, found


_KEYS = ("boxes", "labels", "iscrowd")


def _records(objects: dict[str, Tensor], **further: str) -> Iterator[Record]:
    corners = objects["boxes"].double()
    boxes = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1).tolist()
    values = {name: objects[key].tolist() for name, key in further.items() if key in objects}
    for i, (box, label) in enumerate(zip(boxes, objects["labels"].tolist())):
        yield {"bbox": box, "category_id": int(label), **{name: each[i] for name, each in values.items()}}


def _fold(calibration: Calibration, model: nn.Module) -> None:
    labels = _labels(model)
    if isinstance(model, FasterRCNN):
        fold(calibration, class_layer(model.roi_heads), 1 + len(labels), [None, *labels])
    else:
        fold(calibration, _class_head(model).cls_logits, len(labels), labels)


def _labels(model: nn.Module) -> range:
    """Those that a detector gives; a Faster R-CNN has the background before them."""
    if isinstance(model, FasterRCNN):
        return range(1, class_layer(model.roi_heads).out_features)
    return range(_class_head(model).num_classes)


def _class_head(model: nn.Module) -> Any:
    return model.get_submodule("head.classification_head")
