"""Scores that people can threshold: calibrate an RF-DETR in place, and the best threshold of each class."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from rfdetr import RFDETR
from rfdetr.models.lwdetr import LWDETR
from torch import Tensor

from ...calibration import fold
from ...calibration.report import CalibrationReport
from .._detections import Scene, calibrate_by, collected, evaluating, thresholds_of

__all__ = ["CalibrationReport", "calibrate", "collect", "thresholds"]

Batches = Iterable[tuple[Any, Iterable[dict[str, Tensor]]]]
Record = dict[str, Any]


def calibrate(
    model: Any,
    data: Batches,
    *,
    per_class: bool = False,
    min_per_class: int = 10,
    iou: float = 0.5,
    max_detections: int = 100,
) -> CalibrationReport:
    """Make a model's scores probabilities, by the weights of its last layer.

    Fits :func:`alrp_triton.calibration.fit` on the model's detections of validation data and folds it into the layer of
    the class logits, which the decoder layers share; the encoder, which chooses proposals, has layers of its own. The
    threshold of ``predict`` then means a probability. With one map for all classes the order of detections does not
    change but for rounding, and so neither does AP. Call it after training: it changes the scale of the logits.

    Args:
        model: an ``RFDETR``, an ``RFDETRModelModule`` or its ``model``, with any loss or without one; changed in place.
            Modes of its modules remain. An optimised copy for inference is removed.
        data: batches of a validation set, of images and targets as ``RFDETRDataModule.val_dataloader()`` has them; at
            least one object.
        per_class, min_per_class, iou, max_detections: as for :func:`alrp_triton.calibration.fit`.

    Raises:
        ImportError: pycocotools is not installed.
        TypeError: ``model`` is none of these.
        ValueError: ``data`` is empty or has wrong labels, or an argument is wrong.
    """
    detector = _detector_of(model)
    if isinstance(model, RFDETR):
        model.remove_optimized_model()
    layer, num_classes = detector.class_embed, detector.class_embed.out_features
    return calibrate_by(
        collect(model, data),
        lambda found: fold(found, layer, num_classes, range(num_classes)),
        per_class=per_class,
        min_per_class=min_per_class,
        iou=iou,
        max_detections=max_detections,
    )


def thresholds(model: Any, data: Batches, *, iou: float = 0.5, max_detections: int = 100) -> dict[int, float]:
    """The score threshold of each class that has the lowest LRP, an error of boxes, false and missed objects together.

    Args:
        model, data: as for :func:`calibrate`; the model does not change.
        iou, max_detections: as for :func:`alrp_triton.calibration.fit`.

    Returns:
        By class index. NaN for a class without true positives, whose best is to show nothing.

    Raises:
        ImportError: pycocotools is not installed.
        TypeError, ValueError: ``model``, ``data`` or an argument is wrong.
    """
    return thresholds_of(collect(model, data), iou, max_detections)


def collect(model: Any, data: Batches) -> tuple[Record, list[Record]]:
    """The objects of ``data`` and a model's detections, in COCO's format; category ids are the class indices.

    Of each image as many detections as the model has queries, without a threshold. So ``evaluate(*collect(model,
    data))`` of :mod:`alrp_triton.metrics` needs no other code.

    Args:
        model: as for :func:`calibrate`; on any device, not changed.
        data: as for :func:`calibrate`.

    Returns:
        A COCO dataset and COCO results, as :func:`alrp_triton.metrics.evaluate` takes them.

    Raises:
        TypeError: ``model`` is none of these.
        ValueError: ``data`` has no image, or a label that the model does not have.
    """
    detector = _detector_of(model)
    with evaluating(detector):
        return collected(_scenes(detector, data), detector.class_embed.out_features, detector.num_queries)


def _scenes(detector: Any, data: Batches) -> Iterator[Scene]:
    device = next(detector.parameters()).device
    for samples, targets in data:
        outputs = detector(samples.to(device))
        height, width = samples.tensors.shape[-2:]
        for objects, logits, boxes in zip(targets, outputs["pred_logits"], outputs["pred_boxes"], strict=True):
            yield Scene(objects, objects["labels"], (height, width), logits, boxes)


def _detector_of(model: Any) -> Any:
    inner = model.model.model if isinstance(model, RFDETR) else model
    detector = inner if isinstance(inner, LWDETR) else getattr(inner, "model", None)
    if not isinstance(detector, LWDETR):
        raise TypeError(f"model: expected an RFDETR or an RFDETRModelModule, got {type(model).__name__}")
    return detector
