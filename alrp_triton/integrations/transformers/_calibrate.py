"""Scores that people can threshold: calibrate a model in place, and the best threshold of each class."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ...calibration import Affine, Calibration, fold
from ...calibration.report import CalibrationReport
from .._detections import Scene, calibrate_by, collected, evaluating, thresholds_of
from .outputs import family_of

__all__ = ["CalibrationReport", "calibrate", "collect", "thresholds"]

Batches = Iterable[Mapping[str, Any]]
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
    """Make a model's scores probabilities, by the weights of its last layer.

    Fits :func:`alrp_triton.calibration.fit` on the model's detections of validation data and folds it into the layer
    that gives the class logits of the last decoder layer. The threshold of ``post_process_object_detection`` then means
    a probability. With one map for all classes the order of detections does not change but for rounding, and so neither
    does AP. Call it after training: it changes the scale of the logits, and with it what delta means.

    Args:
        model: one of the models of :func:`use_loss`, with any loss or without one; changed in place. Modes of its
            modules remain.
        data: batches of a validation set as the model takes them in training, for example a data loader: mappings with
            ``"pixel_values"``, ``"labels"`` and what else the model takes; at least one object.
        per_class, min_per_class, iou, max_detections: as for :func:`alrp_triton.calibration.fit`.

    Raises:
        ImportError: pycocotools is not installed.
        TypeError: ``model`` is another one.
        ValueError: ``data`` is empty or has wrong labels, an argument is wrong, or ``per_class`` is true for a D-FINE,
            which adds one score of a box's quality to the logits of all classes.
    """
    name, _ = family_of(model)
    if per_class and name == _D_FINE:
        raise ValueError("per_class: expected False for D-FINE, whose classes share the score of a box's quality")
    how: dict[str, Any] = {"min_per_class": min_per_class, "iou": iou, "max_detections": max_detections}
    return calibrate_by(collect(model, data), lambda found: _fold(found, model, name), per_class=per_class, **how)


def thresholds(model: nn.Module, data: Batches, *, iou: float = 0.5, max_detections: int = 100) -> dict[int, float]:
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


def collect(model: nn.Module, data: Batches) -> tuple[Record, list[Record]]:
    """The objects of ``data`` and a model's detections, in COCO's format; category ids are the class indices.

    Of each image as many detections as the model has queries, without a threshold. So ``evaluate(*collect(model,
    data))`` of :mod:`alrp_triton.metrics` needs no other code.

    Args:
        model: as for :func:`calibrate`; on any device, not changed.
        data: as for :func:`calibrate`. ``"orig_size"`` and ``"iscrowd"`` of labels count if they are there.

    Returns:
        A COCO dataset and COCO results, as :func:`alrp_triton.metrics.evaluate` takes them.

    Raises:
        TypeError: ``model`` is none of these.
        ValueError: ``data`` has no image, or a label that the model does not have.
    """
    family_of(model)
    num_classes, num_queries = (int(getattr(model.config, name)) for name in ("num_labels", "num_queries"))
    with evaluating(model):
        return collected(_scenes(model, data), num_classes, num_queries)


def _scenes(model: nn.Module, data: Batches) -> Iterator[Scene]:
    device = next(model.parameters()).device
    for batch in data:
        if not isinstance(batch, Mapping) or "labels" not in batch:
            got = f"the keys {', '.join(batch)}" if isinstance(batch, Mapping) else type(batch).__name__
            wanted = "batches as the model takes them in training, mappings with 'pixel_values' and 'labels'"
            raise TypeError(f"data: expected {wanted}, got {got}")
        given = {name: value for name, value in batch.items() if name != "labels"}
        outputs = model(**{n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in given.items()})
        height, width = given["pixel_values"].shape[-2:]
        for objects, logits, boxes in zip(batch["labels"], outputs.logits, outputs.pred_boxes, strict=True):
            yield Scene(dict(objects), objects["class_labels"], (height, width), logits, boxes)


_D_FINE = "DFineForObjectDetection"
_LAST = {
    "ConditionalDetrForObjectDetection": lambda model: model.class_labels_classifier,
    "DeformableDetrForObjectDetection": lambda model: model.class_embed[model.config.decoder_layers - 1],
    "DabDetrForObjectDetection": lambda model: model.class_embed,
    "RTDetrForObjectDetection": lambda model: model.model.decoder.class_embed[-1],
    "RTDetrV2ForObjectDetection": lambda model: model.model.decoder.class_embed[-1],
    _D_FINE: lambda model: model.model.decoder.class_embed[model.model.decoder.eval_idx],
}
"""The layer of the class logits at inference."""


def _fold(calibration: Calibration, model: Any, name: str) -> None:
    num_classes = int(model.config.num_labels)
    fold(calibration, _LAST[name](model), num_classes, range(num_classes))
    if name == _D_FINE:
        decoder = model.model.decoder
        quality = decoder.lqe_layers[decoder.eval_idx].reg_conf.layers[-1]
        assert isinstance(calibration.common, Affine)
        with torch.no_grad():
            for each in quality.parameters():
                each.mul_(calibration.common.a)
