"""Ranking losses for Ultralytics YOLO: one call, and ``train`` ranks scores.

    yolo = use_rank_sort(YOLO("yolo11n.pt"))
    yolo.train(data="coco8.yaml", epochs=100)
    print(calibrate(yolo, data="coco8.yaml"))

The ranking replaces binary cross entropy, in YOLOv8, v9, v10, 11, 12 and 26, in both branches of end-to-end models, for
detection, segmentation and oriented boxes. Losses of boxes and masks remain. The anchors that the framework's assigner
gives to objects are the positives, each at its object's class; all other logits are negatives. All anchors of all
levels and images are one ranking.

The calls add callbacks to the given object; nothing is patched. Checkpoints have the framework's own classes and load
anywhere. Resumed without the loss, they raise.

:func:`calibrate` makes scores probabilities, so that the default confidence of 0.25 shows detections.
"""

from __future__ import annotations

from typing import Any

from torch import nn

try:
    from ultralytics import YOLO, __version__
except ImportError as error:
    raise ImportError("needs Ultralytics: pip install 'alrp-triton[ultralytics]'") from error

from ... import APLoss, NDCGLoss, RankSortLoss
from .._criteria import check_criterion, check_flag, check_weight
from ._calibrate import CalibrationReport, calibrate, thresholds
from ._training import RankedOBBTrainer, RankedSegmentationTrainer, RankedTrainer, Ranking, check_yolo, no_tune

__all__ = [
    "CalibrationReport",
    "RankedOBBTrainer",
    "RankedSegmentationTrainer",
    "RankedTrainer",
    "calibrate",
    "restore",
    "thresholds",
    "use_ap",
    "use_loss",
    "use_ndcg",
    "use_rank_sort",
]

if tuple(map(int, __version__.split(".")[:3])) < (8, 4, 150):  # older ones lose callbacks where they start processes
    raise ImportError(f"ultralytics: expected 8.4.150 or later, got {__version__}")


def use_loss(yolo: YOLO, criterion: nn.Module, *, cls: float = 2.0, per_image: bool = False) -> YOLO:
    """Let ``yolo.train`` rank scores.

    Args:
        yolo: of the tasks detect, segment or obb; changed in place.
        criterion: a module without state, of one of two kinds, with ``logits`` [B, A, C] and integer ``labels`` [B, A]
            (0..C-1 positive, C background).

            - With ``criterion.takes_boxes = True``, as ``RankSortLoss``, it is called as ``criterion(logits, labels,
              pred_boxes, target_boxes)``, with the boxes [P, 4] of the P positives as (x1, y1, x2, y2) in pixels. For
              oriented boxes these are upright ones whose IoU is the framework's ProbIoU. It returns an object with the
              scalar ``cls``; its ``loc`` is not used.
            - Otherwise, as ``APLoss``, it is called as ``criterion(logits, labels, num_positives=P)`` and returns a
              scalar.
        cls: the weight of the ranking, >= 0: the argument ``cls`` of ``train``, whose default of 0.5 is for another
            loss. ``train(cls=...)`` itself raises an error.
        per_image: one ranking for each image instead of one for the batch; the criterion also gets ``groups=``, the
            image of each anchor [B, A].

    Returns:
        ``yolo`` itself. A second call of any ``use_...`` replaces the loss.

    Raises:
        TypeError: an argument has the wrong type, or the criterion has state, such as self-balancing, which the
            framework's checkpoints do not save.
        ValueError: another task, or ``cls`` is negative or infinite.
    """
    check_yolo(yolo)
    check_criterion(criterion)
    if criterion.state_dict():
        wanted = "one without state, which checkpoints of the framework would lose (of ALRPLoss: self_balance=None)"
        raise TypeError(f"criterion: expected {wanted}, got {', '.join(criterion.state_dict())}")
    check_weight("cls", cls)
    check_flag("per_image", per_image)
    restore(yolo)
    for event, callback in Ranking(criterion, float(cls), per_image).callbacks.items():
        yolo.add_callback(event, callback)
    yolo.tune = no_tune
    return yolo


def use_rank_sort(yolo: YOLO, **options: Any) -> YOLO:
    """:func:`use_loss` with a new ``RankSortLoss()``: positives with better boxes above the others."""
    return use_loss(yolo, RankSortLoss(), **options)


def use_ap(yolo: YOLO, **options: Any) -> YOLO:
    """:func:`use_loss` with a new ``APLoss()``."""
    return use_loss(yolo, APLoss(), **options)


def use_ndcg(yolo: YOLO, **options: Any) -> YOLO:
    """:func:`use_loss` with a new ``NDCGLoss()``."""
    return use_loss(yolo, NDCGLoss(), **options)


def restore(yolo: YOLO) -> YOLO:
    """Let ``yolo.train`` use the framework's own loss again. Weights remain; without the loss nothing changes."""
    for callbacks in yolo.callbacks.values():
        callbacks[:] = [one for one in callbacks if not isinstance(getattr(one, "__self__", None), Ranking)]
    vars(yolo).pop("tune", None)
    return yolo
