"""Ranking losses for MONAI's ``RetinaNetDetector``, of images and of volumes: one call on an existing detector.

    detector = use_rank_sort(retinanet_resnet50_fpn_detector(num_classes=3, anchor_generator=anchors))
    losses = detector(volumes, targets)  # {"classification": ..., "box_regression": ...}
    sum(losses.values()).backward()

Network, anchors, matcher, box coder and inference are MONAI's. All anchors of all levels and patches of a batch are one
ranking; anchors between the matcher's thresholds are ignored. The detector's sampler is not used, because a ranking
needs none.

The criterion becomes the submodule ``detector.ranking_criterion``; its state is in ``detector.state_dict()``, but not
in ``detector.network.state_dict()``. Deep copies and pickles of the detector keep the loss. :func:`restore` gives
MONAI's own loss back, :func:`calibrate` makes scores probabilities, and :func:`thresholds` gives the best score
threshold of each class.
"""

from __future__ import annotations

from typing import Any

from torch import nn

try:
    import monai.apps.detection.networks.retinanet_detector  # noqa: F401
except ImportError as error:
    raise ImportError("alrp_triton.integrations.monai needs MONAI: pip install 'alrp-triton[monai]'") from error

from ... import ALRPLoss, APLoss, NDCGLoss, RankSortLoss
from .._criteria import check_criterion, check_flag
from ..torchvision._parts import mix_in, mix_out
from ._calibrate import CalibrationReport, calibrate, thresholds
from ._detector import RankingDetector, check_detector

__all__ = [
    "CalibrationReport",
    "calibrate",
    "restore",
    "thresholds",
    "use_alrp",
    "use_ap",
    "use_loss",
    "use_ndcg",
    "use_rank_sort",
]


def use_loss(detector: Any, criterion: nn.Module, *, per_image: bool = False) -> Any:
    """Make an existing detector train with a ranking loss.

    Args:
        detector: a ``RetinaNetDetector``, changed in place.
        criterion: a module of one of two kinds, with ``logits`` [B, A, C] and integer ``labels`` [B, A] (0..C-1
            positive, C background, ``criterion.ignore_index`` or else -1 ignored).

            - With ``criterion.takes_boxes = True``, as ``ALRPLoss`` and ``RankSortLoss``, it is called as
              ``criterion(logits, labels, pred_boxes, target_boxes)``, with the boxes [P, 4] or [P, 6] of the P
              positives in row-major order, in voxels. It returns an object with the scalars ``cls`` and ``loc``.
            - Otherwise, as ``APLoss`` and ``NDCGLoss``, it is called as ``criterion(logits, labels, num_positives=P)``
              and returns a scalar. ``"box_regression"`` is the detector's own, of ``set_box_regression_loss``.
        per_image: one ranking for each image or patch instead of one for the batch; the criterion also gets
            ``groups=``, the image of each anchor [B, A], a view of B numbers.

    Returns:
        ``detector`` itself. After each epoch call ``step_epoch()`` of an ``ALRPLoss``'s ``self_balance``.

    Raises:
        TypeError: ``detector`` is no ``RetinaNetDetector``, ``criterion`` no module, or ``per_image`` no bool.
    """
    check_detector(detector)
    check_criterion(criterion)
    check_flag("per_image", per_image)
    mix_in(detector, RankingDetector, criterion, per_image)
    return detector


def use_alrp(detector: Any, **options: Any) -> Any:
    """:func:`use_loss` with a new ``ALRPLoss()``."""
    return use_loss(detector, ALRPLoss(), **options)


def use_rank_sort(detector: Any, **options: Any) -> Any:
    """:func:`use_loss` with a new ``RankSortLoss()``."""
    return use_loss(detector, RankSortLoss(), **options)


def use_ap(detector: Any, **options: Any) -> Any:
    """:func:`use_loss` with a new ``APLoss()``."""
    return use_loss(detector, APLoss(), **options)


def use_ndcg(detector: Any, **options: Any) -> Any:
    """:func:`use_loss` with a new ``NDCGLoss()``."""
    return use_loss(detector, NDCGLoss(), **options)


def restore(detector: Any) -> Any:
    """Give a detector MONAI's own losses back, in place, with its trained weights; detections do not change.

    Raises:
        TypeError: ``detector`` is no ``RetinaNetDetector``.
    """
    check_detector(detector)
    if isinstance(detector, RankingDetector):
        mix_out(detector)
    return detector
