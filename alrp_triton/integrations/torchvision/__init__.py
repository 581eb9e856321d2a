"""Ranking losses for torchvision's RetinaNet, FCOS and Faster R-CNN: one call on an existing model.

    model = use_alrp(retinanet_resnet50_fpn(num_classes=91))
    losses = model(images, targets)  # {"classification": ..., "bbox_regression": ...}
    sum(losses.values()).backward()

:func:`use_loss` takes any criterion; :func:`use_alrp` and the other functions make a new one. A criterion that takes
boxes replaces both parts of the loss. A criterion on scores alone replaces the classification part; the regression part
stays the model's own, and Faster R-CNN refuses it. The modules :mod:`~.retinanet`, :mod:`~.fcos` and
:mod:`~.faster_rcnn` describe each detector and its options.

In training mode ``model(images, targets)`` still returns the same scalars by the same names; their sum is the loss to
minimise. Nothing is patched globally: the instance's head (``rpn`` and ``roi_heads`` of a Faster R-CNN) gets a class
that is derived from its own. The models run eagerly. TorchScript does not take that class, because it reads a model's
source; :func:`restore` gives the model its own class back, after training.

The criterion becomes the submodule ``model.head.ranking_criterion`` (``model.rpn.ranking_criterion`` and
``model.roi_heads.ranking_criterion``): it moves with the model, and its state is part of ``state_dict()``. A model with
the loss loads checkpoints with and without it; without it the criterion keeps the state that it has.
:func:`stock_state_dict` makes one for a model without the loss. A second call of any of the functions ``use_...``
replaces the criterion and all options. Deep copies and pickles of the model keep the loss, each with its own criterion.

:func:`calibrate` makes scores probabilities, so that score thresholds work again, and :func:`thresholds` gives the best
score threshold of each class. Both ask the model about validation data by :func:`collect`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

try:
    from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
except ImportError as error:
    raise ImportError("needs torchvision: pip install 'alrp-triton[torchvision]'") from error

from ... import ALRPLoss, APLoss, NDCGLoss, RankSortLoss
from .._criteria import check_criterion, check_flag
from . import faster_rcnn, fcos, retinanet
from ._calibrate import CalibrationReport, calibrate, collect, thresholds
from ._restore import check_model, restore, stock_state_dict
from .retinanet import Assigner

__all__ = [
    "CalibrationReport",
    "calibrate",
    "collect",
    "restore",
    "stock_state_dict",
    "thresholds",
    "use_alrp",
    "use_ap",
    "use_loss",
    "use_ndcg",
    "use_rank_sort",
]

Model = TypeVar("Model", bound=nn.Module)

_DETECTORS: dict[type[nn.Module], Callable[..., None]] = {
    RetinaNet: retinanet.use_criterion,
    FCOS: fcos.use_criterion,
    FasterRCNN: faster_rcnn.use_criterion,
}
_TAKERS = {"assigner": RetinaNet, "centerness": FCOS, "rpn_criterion": FasterRCNN, "rpn_weight": FasterRCNN}


def use_loss(
    model: Model,
    criterion: nn.Module,
    *,
    per_image: bool = False,
    assigner: Assigner | None = None,
    centerness: str | None = None,
    rpn_criterion: nn.Module | None = None,
    rpn_weight: float | None = None,
) -> Model:
    """Make an existing detector train with a ranking loss.

    Args:
        model: a torchvision ``RetinaNet``, ``FCOS`` or ``FasterRCNN`` (without masks and keypoints); changed in place.
            Wrap it for distributed training after this call.
        criterion: a module of one of two kinds, with ``logits`` [B, A, C] and integer ``labels`` [B, A] (0..C-1
            positive, C background, ``criterion.ignore_index`` or else -1 ignored).

            - With ``criterion.takes_boxes = True``, as ``ALRPLoss`` and ``RankSortLoss``, it is called as
              ``criterion(logits, labels, pred_boxes, target_boxes)``, with the boxes [P, 4] of the P positives in
              row-major order, as (x1, y1, x2, y2) in pixels of the resized images. It returns an object with the
              scalars ``cls`` and ``loc``.
            - Otherwise, as ``APLoss``, ``NDCGLoss`` or a ``RankingLoss`` whose formula needs no extras, it is called as
              ``criterion(logits, labels, num_positives=P)``, P being an int, and returns a scalar.
              ``"bbox_regression"`` remains the model's own, of the anchors that ``assigner`` matches.

            The second stage of Faster R-CNN passes [N, C] and [N] for the N proposals of all images, and class 0 is
            torchvision's label 1. After each epoch call ``step_epoch()`` of an ``ALRPLoss``'s ``self_balance``.
        per_image: one ranking for each image instead of one for the batch; the criterion also gets ``groups=``, the
            image of each anchor [B, A], a view of B numbers (or of each proposal [N]).
        assigner: RetinaNet only: replaces its matcher, for example :class:`alrp_triton.assigners.ATSS`. It is called
            for each image with the anchors of each level, a list of [A_l, 4], and the image's boxes [G, 4]. It returns
            the object of each anchor [A], -1 for background and -2 for ignored. ``None`` for the matcher.
        centerness: FCOS only: ``"keep"`` (the default) trains the centre-ness branch as before and uses it in the
            score; ``"drop"`` does neither and freezes the branch; see :mod:`~.fcos`.
        rpn_criterion: required by Faster R-CNN only: another ``criterion`` for the proposal network, which has one
            class, for example ``ALRPLoss(tau=0.7)``.
        rpn_weight: Faster R-CNN only: factor of both parts of the proposal network's loss, >= 0; ``None`` means 0.20,
            as published.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: ``model`` or its head is not torchvision's, an option does not apply to it, a criterion does not suit
            it, or an option has the wrong type.
        ValueError: an option has the wrong value, or both stages get the same criterion.
    """
    check_model(model)
    kind = next(kind for kind in _DETECTORS if isinstance(model, kind))
    options = {"assigner": assigner, "centerness": centerness, "rpn_criterion": rpn_criterion, "rpn_weight": rpn_weight}
    for name, value in options.items():
        if value is not None and _TAKERS[name] is not kind:
            wanted = f"None for a {kind.__name__}, since it applies to {_TAKERS[name].__name__}"
            raise TypeError(f"{name}: expected {wanted}, got {value!r}")
    check_criterion(criterion)
    check_flag("per_image", per_image)
    own = {name: value for name, value in options.items() if _TAKERS[name] is kind}
    _DETECTORS[kind](model, criterion, per_image, **own)
    return model


def use_alrp(model: Model, **options: Any) -> Model:
    """:func:`use_loss` with a new ``ALRPLoss()``, and ``ALRPLoss(tau=0.7)`` for a proposal network."""
    rpn = {"rpn_criterion": ALRPLoss(tau=0.7)} if isinstance(model, FasterRCNN) else {}
    return use_loss(model, ALRPLoss(), **{**rpn, **options})


def use_rank_sort(model: Model, **options: Any) -> Model:
    """:func:`use_loss` with a new ``RankSortLoss()``, and another for a proposal network."""
    rpn = {"rpn_criterion": RankSortLoss()} if isinstance(model, FasterRCNN) else {}
    return use_loss(model, RankSortLoss(), **{**rpn, **options})


def use_ap(model: Model, **options: Any) -> Model:
    """:func:`use_loss` with a new ``APLoss()``, for a RetinaNet or an FCOS."""
    return use_loss(model, APLoss(), **options)


def use_ndcg(model: Model, **options: Any) -> Model:
    """:func:`use_loss` with a new ``NDCGLoss()``, for a RetinaNet or an FCOS."""
    return use_loss(model, NDCGLoss(), **options)
