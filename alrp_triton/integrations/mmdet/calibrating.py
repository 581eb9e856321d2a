"""Scores that people can threshold: calibrate a detector in place, and the best threshold of each class."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from mmdet.models.detectors import BaseDetector
from mmdet.structures.bbox import get_box_tensor
from mmengine.config import ConfigDict
from torch import nn

from ...calibration import fold
from ...calibration.report import CalibrationReport
from .._detections import calibrate_by, evaluating, thresholds_of
from .bbox import RankingBBoxMixin

__all__ = ["CalibrationReport", "calibrate", "collect", "thresholds"]

Batches = Iterable[dict[str, Any]]
Record = dict[str, Any]

# The layer that gives the class logits: of RetinaNet, FoveaBox, ATSS and second stages.
_LAYERS = ("retina_cls", "conv_cls", "atss_cls", "fc_cls")


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
    that gives the class logits. ``score_thr`` of ``test_cfg`` keeps its value, which then means a probability. With one
    map for all classes the order of detections does not change but for rounding, and so neither does AP. Call it after
    training: it changes the scale of the logits, and with it what delta means.

    Args:
        model: a detector of MMDetection, not wrapped; changed in place. Modes of its modules remain. Its head is a
            RetinaNet's or FoveaBox's, with any loss, a ``RankingATSSHead`` without centre-ness, or a second stage of
            this package.
        data: batches of a validation set, as its ``val_dataloader`` gives them, with annotations.
        per_class, min_per_class, iou, max_detections: as for :func:`alrp_triton.calibration.fit`.

    Raises:
        ImportError: pycocotools is not installed.
        TypeError: ``model`` has another head, or its scores are not sigmoids of one logit: a softmax, or a product with
            the centre-ness. Choose :func:`thresholds` there.
        ValueError: ``data`` is empty or has no annotations, or an argument is wrong.
    """
    head = _head(model)
    layer = next((getattr(head, name) for name in _LAYERS if hasattr(head, name)), None)
    is_sigmoid = isinstance(head, RankingBBoxMixin) or getattr(head, "use_sigmoid_cls", False)
    if layer is None or not is_sigmoid or getattr(head, "loss_centerness", None) is not None:
        wanted = f"a head whose scores are sigmoids of {', '.join(_LAYERS[:-1])} or {_LAYERS[-1]}, without centre-ness"
        raise TypeError(f"model: expected {wanted}, got {type(head).__name__}")
    return calibrate_by(
        collect(model, data),
        lambda found: fold(found, layer, head.num_classes, range(head.num_classes)),
        per_class=per_class,
        min_per_class=min_per_class,
        iou=iou,
        max_detections=max_detections,
    )


def thresholds(model: nn.Module, data: Batches, *, iou: float = 0.5, max_detections: int = 100) -> dict[int, float]:
    """The score threshold of each class that has the lowest LRP, an error of boxes, false and missed objects together.

    Args:
        model: any detector of MMDetection that gives boxes, not wrapped; not changed.
        data, iou, max_detections: as for :func:`calibrate`.

    Returns:
        By the index of the class. NaN for a class without true positives, whose best is to show nothing.

    Raises:
        ImportError, TypeError, ValueError: as :func:`calibrate`.
    """
    return thresholds_of(collect(model, data), iou, max_detections)


def collect(model: nn.Module, data: Batches) -> tuple[Record, list[Record]]:
    """The objects of ``data`` and a detector's detections, in COCO's format; category ids are the classes' indices.

    ``score_thr`` does not apply; other limits of ``test_cfg`` do. Ignored instances are crowds.

    Args:
        model, data: as for :func:`thresholds`.

    Returns:
        A COCO dataset and COCO results, as :func:`alrp_triton.metrics.evaluate` takes them.

    Raises:
        TypeError: ``model`` is no detector of MMDetection.
        ValueError: ``data`` is empty or has no annotations.
    """
    num_classes = _head(model).num_classes
    truth: Record = {"images": [], "annotations": [], "categories": [{"id": label} for label in range(num_classes)]}
    found: list[Record] = []
    stage = _stage(model)
    # Without a threshold, as in DETR, it changes nothing.
    with evaluating(model, stage, test_cfg=ConfigDict({**stage.test_cfg, "score_thr": 0.0})):
        for batch in data:
            for sample in model.test_step(batch):  # type: ignore[operator]
                if "gt_instances" not in sample:
                    raise ValueError("data: expected annotations, by LoadAnnotations in the pipeline, got none")
                height, width = sample.ori_shape
                image_id = len(truth["images"])
                truth["images"].append({"id": image_id, "height": height, "width": width})
                truth["annotations"] += _records(image_id, sample.gt_instances)
                truth["annotations"] += _records(image_id, sample.get("ignored_instances", ()), iscrowd=1)
                found += _records(image_id, sample.pred_instances)
    if not truth["images"]:
        raise ValueError("data: expected batches of a validation set, got none (an iterator is empty the second time)")
    return truth, found


def _records(image_id: int, instances: Any, **further: Any) -> list[Record]:
    if not len(instances):
        return []
    corners = get_box_tensor(instances.bboxes).double()
    boxes = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1).tolist()
    records = [
        {"image_id": image_id, "bbox": box, "category_id": label, **further}
        for box, label in zip(boxes, instances.labels.tolist())
    ]
    if "scores" in instances:
        records = [{**record, "score": score} for record, score in zip(records, instances.scores.tolist())]
    return records


def _stage(model: nn.Module) -> Any:
    """What has the head of the classes and its ``test_cfg``: a dense head itself, or the second stage."""
    stage = getattr(model, "roi_head", None) or getattr(model, "bbox_head", None)
    if not isinstance(model, BaseDetector) or stage is None:
        raise TypeError(f"model: expected a detector of MMDetection, not wrapped, got {type(model).__name__}")
    return stage


def _head(model: nn.Module) -> Any:
    stage = _stage(model)
    head = getattr(stage, "bbox_head", stage)
    return head[-1] if isinstance(head, nn.ModuleList) else head  # cascades have several
