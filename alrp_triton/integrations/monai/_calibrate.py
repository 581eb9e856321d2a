"""Scores that people can threshold: calibrate a detector in place, and the best threshold of each class."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from monai.data.box_utils import box_iou
from torch import Tensor

from ...calibration import fit_matched, fold
from ...calibration.fitting import Pooled, check_iou, match, pool
from ...calibration.report import CalibrationReport, best_thresholds, check_matches, report_of
from ...metrics.evaluation import check_settings
from .._detections import batches_of, evaluating
from ..torchvision._parts import Targets, check_labels
from ._detector import check_detector, plain, plain_targets

__all__ = ["CalibrationReport", "calibrate", "thresholds"]

Batches = Iterable[tuple[Sequence[Tensor], Targets]]


def calibrate(
    detector: Any,
    data: Batches,
    *,
    per_class: bool = False,
    min_per_class: int = 10,
    iou: float = 0.5,
    max_detections: int = 100,
) -> CalibrationReport:
    """Make a detector's scores probabilities, by the weights of its last layer; with any loss.

    Fits :func:`alrp_triton.calibration.fit_matched` on detections of validation volumes and folds it into
    ``detector.network.classification_head.cls_logits``. ``score_thresh`` keeps its value, which then means a
    probability. With one map for all classes the order of detections does not change but for rounding. Call it after
    training: it changes the scale of the logits.

    Args:
        detector: changed in place; modes of its modules remain. With ``set_sliding_window_inferer`` it infers so.
        data: batches of images and targets, as the detector takes them in training; targets may be on any device.
        per_class: also a map for every class with at least ``min_per_class`` true and as many false positives.
        iou: the IoU from which a detection is a true positive, in (0, 1). For small lesions 0.1 is usual.
        max_detections: number of detections of one class that count in one volume.

    Raises:
        TypeError: ``detector`` is no ``RetinaNetDetector``, or has no such layer.
        ValueError: ``data`` is empty or has wrong labels, or an argument is wrong.
    """
    check_detector(detector)
    layer = getattr(getattr(detector.network, "classification_head", None), "cls_logits", None)
    if layer is None:
        raise TypeError(
            "detector.network: expected classification_head.cls_logits, as MONAI's RetinaNet has it, got "
            f"{type(detector.network).__name__}; alrp_triton.calibration has fit_matched and fold for other layers"
        )
    before = _matches(detector, data, iou, max_detections)
    check_matches(before, iou)
    together = pool(before.values())
    categories = np.repeat(list(before), [len(one.scores) for one in before.values()]) if per_class else None
    calibration = fit_matched(together.scores, together.is_true_positive, categories, min_per_class=min_per_class)
    fold(calibration, layer, len(before), list(before))
    # A map keeps the order within a class, and so the matches.
    after = {k: one._replace(scores=calibration(one.scores, np.full(len(one.scores), k))) for k, one in before.items()}
    return report_of(calibration, before, after, iou)


def thresholds(detector: Any, data: Batches, *, iou: float = 0.5, max_detections: int = 100) -> dict[int, float]:
    """The score threshold of each label that has the lowest LRP; the detector is not changed.

    Args and errors: see :func:`calibrate`. NaN for a label without true positives, whose best is to show nothing.
    """
    check_detector(detector)
    return best_thresholds(_matches(detector, data, iou, max_detections), iou)


def _matches(detector: Any, data: Batches, iou: float, max_detections: int) -> dict[int, Pooled]:
    """Scores, truth and IoUs of the detections, by label, matched as in COCO's evaluation."""
    check_iou(iou)
    check_settings("bbox", max_detections)
    device, found = next(detector.parameters()).device, defaultdict[int, list[Pooled]](list)
    with evaluating(detector, detector.box_selector, score_thresh=0.0):
        for images, targets in batches_of(data):
            own = plain_targets(detector, targets, "cpu")
            check_labels(own, detector.num_classes)
            detections = detector([image.to(device) for image in images], use_inferer=detector.inferer is not None)
            for detected, target in zip(detections, own):
                boxes, scores, labels = (
                    plain(detected[key]).cpu()
                    for key in (detector.target_box_key, detector.pred_score_key, detector.target_label_key)
                )
                for label in range(detector.num_classes):
                    mine, true = labels == label, target["boxes"][target["labels"] == label]
                    ious = box_iou(true.float(), boxes[mine].float()).numpy()
                    found[label].append(match(scores[mine].double().numpy(), ious, iou, max_detections))
    return {label: pool(of_images) for label, of_images in found.items()}
