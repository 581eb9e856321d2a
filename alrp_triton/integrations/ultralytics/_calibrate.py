"""Scores that people can threshold: calibrate a detector in place, and the best threshold of each class."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from ultralytics import YOLO
from ultralytics.utils.metrics import batch_probiou, box_iou

from ...calibration import Calibration, fit_matched, fold
from ...calibration.fitting import Pooled, check_iou, match, pool
from ...calibration.report import CalibrationReport, best_thresholds, report_of
from ...metrics.evaluation import check_settings
from ._training import check_yolo

__all__ = ["CalibrationReport", "calibrate", "thresholds"]

Floats = NDArray[np.float64]


def calibrate(
    yolo: YOLO,
    data: str | Path,
    *,
    per_class: bool = False,
    min_per_class: int = 10,
    iou: float = 0.5,
    max_detections: int = 100,
    **settings: Any,
) -> CalibrationReport:
    """Make a detector's scores probabilities, by the weights of its last layers.

    Runs the framework's validation, fits :func:`alrp_triton.calibration.fit_matched` on the detections and folds it
    into the layers that give the class logits. ``conf`` keeps its default of 0.25, which then means a probability. Both
    branches of an end-to-end model get a map of their own. With one map for all classes the order of detections does
    not change but for rounding, and so neither does AP. Call it after training, then ``yolo.save`` or ``yolo.export``.

    Args:
        yolo: of the tasks detect, segment or obb, trained with any loss; changed in place.
        data: YAML file of a data set with at least one object in its validation images.
        per_class, min_per_class: as for :func:`alrp_triton.calibration.fit`.
        iou: the IoU of boxes from which a detection is true, in (0, 1); ProbIoU of oriented boxes.
        max_detections: number of detections of one class that count in one image.
        settings: further arguments of ``yolo.val``, such as ``imgsz``, ``split`` or ``device``; not ``conf``, ``nms``.

    Returns:
        The report on the branch that ``predict`` uses by default.

    Raises:
        TypeError: ``yolo`` is not such an object, or a setting is not open.
        ValueError: ``data`` has other classes or no object, or an argument is wrong.
    """
    _check(yolo, settings, "conf", "nms")
    calibrated = []
    for nms, layers in _branches(yolo.model.model[-1]):
        before = _matched(yolo, data, iou, max_detections, {**settings, "nms": nms})
        together = pool(before.values())
        classes = np.repeat(list(before), [len(one.scores) for one in before.values()]) if per_class else None
        calibration = fit_matched(together.scores, together.is_true_positive, classes, min_per_class=min_per_class)
        calibrated.append((calibration, layers, before))
    for calibration, layers, before in calibrated:
        for layer in layers:
            fold(calibration, layer, len(before), list(before))
    yolo.predictor = None  # it has a fused copy
    calibration, _, before = calibrated[0]
    return report_of(calibration, before, {k: _mapped(calibration, k, one) for k, one in before.items()}, iou)


def thresholds(
    yolo: YOLO, data: str | Path, *, iou: float = 0.5, max_detections: int = 100, **settings: Any
) -> dict[int, float]:
    """The score threshold of each class that has the lowest LRP, an error of boxes, false and missed objects together.

    Args:
        yolo, data, iou, max_detections: as for :func:`calibrate`; nothing is changed.
        settings: further arguments of ``yolo.val``, such as ``nms=False`` for the one-to-one branch; not ``conf``.

    Returns:
        By the index of the class. NaN for a class without true positives, whose best is to show nothing.

    Raises:
        TypeError, ValueError: as :func:`calibrate`.
    """
    _check(yolo, settings, "conf")
    return best_thresholds(_matched(yolo, data, iou, max_detections, settings), iou)


def _check(yolo: YOLO, settings: dict[str, Any], *fixed: str) -> None:
    check_yolo(yolo)
    if closed := {*fixed, "model", "mode"}.intersection(settings):
        wanted = f"arguments of yolo.val other than {' and '.join(fixed)}"
        raise TypeError(f"settings: expected {wanted}, got {sorted(closed)}")


def _branches(head: Any) -> list[tuple[bool | None, list[nn.Module]]]:
    """The argument ``nms`` that chooses each branch of a head, and its layers of class logits, one for each level."""
    named = ((None, "cv3"), (False, "one2one_cv3"))
    found = [(nms, getattr(head, name, None)) for nms, name in named]
    return [(nms, [level[-1] for level in levels]) for nms, levels in found if levels is not None]


class _Image(NamedTuple):
    scores: Floats
    """[D]"""
    classes: NDArray[np.int64]
    """[D]"""
    true: NDArray[np.int64]
    """[G], the classes of the objects."""
    ious: Floats
    """[G, D]"""


def _matched(
    yolo: YOLO, data: str | Path, iou: float, max_detections: int, settings: dict[str, Any]
) -> dict[int, Pooled]:
    """The detections of validation images without a score threshold, by class."""
    check_iou(iou)
    check_settings("bbox", max_detections)
    fixed = {"data": str(data), "mode": "val", "conf": 0.0, "plots": False, "save_json": False, "save_txt": False}
    with TemporaryDirectory() as folder:
        args = {**yolo.overrides, "rect": True, **settings, **fixed}
        validator = _recording(yolo.task_map[yolo.task]["validator"])(args=args, save_dir=Path(folder))
        validator.images = []
        validator(model=yolo.model)  # of which it makes a copy
    number = yolo.model.model[-1].nc
    if validator.data["nc"] != number and not validator.args.single_cls:
        raise ValueError(f"data: expected the model's {number} classes, got {validator.data['nc']}")
    if not any(len(image.true) for image in validator.images):
        raise ValueError("data: expected an object in the validation images, got none")
    return {k: pool(_of_class(image, k, iou, max_detections) for image in validator.images) for k in range(number)}


class _Recording:
    """Mixin for the framework's validators: keeps what they compare."""

    args: Any
    images: list[_Image]

    def _process_batch(self, preds: dict[str, Tensor], batch: dict[str, Tensor]) -> Any:
        """As in the framework, which calls it for each image."""
        overlaps = batch_probiou if self.args.task == "obb" else box_iou
        ious = overlaps(batch["bboxes"], preds["bboxes"]).double().cpu().numpy()
        found, true = (each["cls"].long().cpu().numpy() for each in (preds, batch))
        self.images.append(_Image(preds["conf"].double().cpu().numpy(), found, true, ious))
        return super()._process_batch(preds, batch)  # type: ignore[misc]


@cache
def _recording(base: type) -> Any:
    return type(f"Recording{base.__name__}", (_Recording, base), {"__module__": __name__})


def _of_class(image: _Image, k: int, iou: float, max_detections: int) -> Pooled:
    mine = image.classes == k
    return match(image.scores[mine], image.ious[image.true == k][:, mine], iou, max_detections)


def _mapped(calibration: Calibration, k: int, found: Pooled) -> Pooled:
    return found._replace(scores=calibration(found.scores, np.full(len(found.scores), k)))
