"""Ranking losses for torchvision's RetinaNet, FCOS and Faster R-CNN: one call on an existing model.

    model = use_alrp(retinanet_resnet50_fpn(num_classes=91))
    losses = model(images, targets)  # {"classification": ..., "bbox_regression": ...}
    sum(losses.values()).backward()

:func:`use_alrp` and :func:`use_rank_sort` replace both parts of the loss; :func:`use_ap`, :func:`use_ndcg` and
:func:`use_classification_loss` the classification part alone, and the regression part stays the model's own; Faster
R-CNN takes the first two only. What else each detector does, and what its own options mean, is said in its module:
:mod:`~.retinanet`, :mod:`~.fcos`, :mod:`~.faster_rcnn`.

In training mode ``model(images, targets)`` goes on returning the scalars that it returned, by the same names; their sum
is the loss to minimise. Nothing is patched globally: the instance's head (of Faster R-CNN the instance's ``rpn`` and
``roi_heads``) becomes one of a class derived from its own. The models run eagerly; TorchScript, which has to read a
model's source, is not supported after the call.

The criterion becomes the submodule ``model.head.ranking_criterion`` (``model.rpn.ranking_criterion`` and
``model.roi_heads.ranking_criterion``): it moves with the model, and what state it has is part of ``state_dict()``. So
load pretrained weights before the call, and a checkpoint of a training with the loss after it. A second call, of the
same function or another, replaces the criterion and all options. Deep copies and pickles of the model keep the loss,
each with a criterion of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from torch import nn

try:
    from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
except ImportError as error:
    raise ImportError("needs torchvision: pip install 'alrp-triton[torchvision]'") from error

from ... import ALRPLoss, APLoss, NDCGLoss, RankSortLoss
from .._criteria import check_criterion
from . import faster_rcnn, fcos, retinanet
from .retinanet import Assigner

__all__ = ["use_alrp", "use_ap", "use_classification_loss", "use_ndcg", "use_rank_sort"]

Model = TypeVar("Model", bound=nn.Module)


def use_alrp(
    model: Model,
    criterion: nn.Module | None = None,
    *,
    per_image: bool = False,
    assigner: Assigner | None = None,
    centerness: str | None = None,
    rpn_criterion: nn.Module | None = None,
    rpn_weight: float | None = None,
) -> Model:
    """Make an existing detector train with aLRP Loss (Oksuz et al., NeurIPS 2020), or another that takes boxes.

    Args:
        model: a torchvision ``RetinaNet``, ``FCOS`` or ``FasterRCNN`` (without masks and keypoints); changed in place.
            Wrap it for distributed training after this call.
        criterion: a module called as ``criterion(logits, labels, pred_boxes, target_boxes)``, with ``logits``
            [B, A, C], integer ``labels`` [B, A] (0..C-1 positive, C background, ``criterion.ignore_index`` or else -1
            ignored) and, for the P positives in row-major order, boxes [P, 4] as (x1, y1, x2, y2) in pixels of the
            resized images; it returns an object with the scalars ``cls`` and ``loc``. ``None`` means ``ALRPLoss()``,
            whose ``self_balance.step_epoch()`` is to be called after each epoch. The second stage of Faster R-CNN gives
            it [N, C] and [N], of the N proposals of all images, and class 0 is torchvision's label 1.
        per_image: one ranking for each image instead of one for the batch: the criterion is also given
            ``groups=``, the image of each anchor [B, A], a view of B numbers (or of each proposal [N]).
        assigner: RetinaNet only: what takes the place of its matcher, such as
            :class:`alrp_triton.assigners.ATSS`; called for each image with the anchors of each level, a list of
            [A_l, 4], and the image's boxes [G, 4], it returns the object of each anchor [A], -1 for background and -2
            for ignored. ``None`` for the matcher.
        centerness: FCOS only: ``"keep"`` (the default) trains the centre-ness branch as before and leaves it in the
            score, ``"drop"`` does neither and freezes the branch; see :mod:`~.fcos`.
        rpn_criterion: Faster R-CNN only: ``criterion`` for the proposal network, which has one class; ``None`` means
            ``ALRPLoss(tau=0.7)``.
        rpn_weight: Faster R-CNN only: what both parts of the proposal network's loss are multiplied by, >= 0;
            ``None`` means 0.20, as published.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: ``model``, or its head, is none of torchvision's, an option does not apply to it, ``criterion`` is
            not a module or one of this package on scores alone, or an option has the wrong type.
        ValueError: an option has the wrong value, or both stages are given the same criterion.
    """
    chosen = ALRPLoss() if criterion is None else criterion
    options = {"assigner": assigner, "centerness": centerness, "rpn_criterion": rpn_criterion, "rpn_weight": rpn_weight}
    return _use(model, chosen, per_image, options, default_rpn=partial(ALRPLoss, tau=0.7))


def use_rank_sort(
    model: Model,
    criterion: nn.Module | None = None,
    *,
    per_image: bool = False,
    assigner: Assigner | None = None,
    centerness: str | None = None,
    rpn_criterion: nn.Module | None = None,
    rpn_weight: float | None = None,
) -> Model:
    """Make an existing detector train with Rank & Sort Loss (Oksuz et al., ICCV 2021).

    The classification part is the sum of its ranking and its sorting error.

    Args:
        model: see :func:`use_alrp`.
        criterion: see :func:`use_alrp`; ``None`` means ``RankSortLoss()``.
        per_image: see :func:`use_alrp`. The box part remains a mean over the positives of the batch.
        assigner, centerness, rpn_weight: see :func:`use_alrp`.
        rpn_criterion: see :func:`use_alrp`; ``None`` means another ``RankSortLoss()``.

    Returns:
        ``model`` itself.

    Raises:
        TypeError, ValueError: as in :func:`use_alrp`.
    """
    chosen = RankSortLoss() if criterion is None else criterion
    options = {"assigner": assigner, "centerness": centerness, "rpn_criterion": rpn_criterion, "rpn_weight": rpn_weight}
    return _use(model, chosen, per_image, options, default_rpn=RankSortLoss)


def use_ap(
    model: Model,
    criterion: nn.Module | None = None,
    *,
    per_image: bool = False,
    assigner: Assigner | None = None,
    centerness: str | None = None,
) -> Model:
    """Make the classification of an existing RetinaNet or FCOS train with AP Loss (Chen et al., CVPR 2019).

    Args:
        model: a torchvision ``RetinaNet`` or ``FCOS``; see :func:`use_alrp`.
        criterion: see :func:`use_classification_loss`; ``None`` means ``APLoss()``.
        per_image, assigner, centerness: see :func:`use_alrp`.

    Returns:
        ``model`` itself.

    Raises:
        TypeError, ValueError: as in :func:`use_classification_loss`.
    """
    chosen = APLoss() if criterion is None else criterion
    return _use(model, chosen, per_image, {"assigner": assigner, "centerness": centerness})


def use_ndcg(
    model: Model,
    criterion: nn.Module | None = None,
    *,
    per_image: bool = False,
    assigner: Assigner | None = None,
    centerness: str | None = None,
) -> Model:
    """Make the classification of an existing RetinaNet or FCOS train with NDCG Loss.

    Args:
        model: a torchvision ``RetinaNet`` or ``FCOS``; see :func:`use_alrp`.
        criterion: see :func:`use_classification_loss`; ``None`` means ``NDCGLoss()``.
        per_image, assigner, centerness: see :func:`use_alrp`.

    Returns:
        ``model`` itself.

    Raises:
        TypeError, ValueError: as in :func:`use_classification_loss`.
    """
    chosen = NDCGLoss() if criterion is None else criterion
    return _use(model, chosen, per_image, {"assigner": assigner, "centerness": centerness})


def use_classification_loss(
    model: Model,
    criterion: nn.Module,
    *,
    per_image: bool = False,
    assigner: Assigner | None = None,
    centerness: str | None = None,
) -> Model:
    """Make the classification of an existing RetinaNet or FCOS train with a loss on scores, such as one of your own.

    ``"bbox_regression"`` remains the model's own, in value and gradient, of the anchors that ``assigner`` matches.

    Args:
        model: a torchvision ``RetinaNet`` or ``FCOS``; see :func:`use_alrp`.
        criterion: a module called as ``criterion(logits, labels, num_positives=P)``, which returns a scalar, such as
            ``framework.RankingLoss(error)`` where the formula needs no extras; ``logits`` and ``labels`` as in
            :func:`use_alrp`. P is an int, so that the criterion need not wait for the device to count.
        per_image, assigner, centerness: see :func:`use_alrp`.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: ``model``, or its head, is none of torchvision's, an option does not apply to it, ``criterion`` is
            not a module or one of this package that takes boxes, or an option has the wrong type.
        ValueError: an option has the wrong value.
    """
    return _use(model, criterion, per_image, {"assigner": assigner, "centerness": centerness})


_DETECTORS: dict[type, tuple[Callable[..., None], list[str]]] = {
    RetinaNet: (retinanet.use_criterion, ["assigner"]),
    FCOS: (fcos.use_criterion, ["centerness"]),
    FasterRCNN: (faster_rcnn.use_criterion, ["rpn_criterion", "rpn_weight"]),
}
"""What gives a detector its criterion, and which options it takes."""


def _use(
    model: Model,
    criterion: nn.Module,
    per_image: bool,
    options: dict[str, Any],
    default_rpn: Callable[[], nn.Module] | None = None,
) -> Model:
    """Check what all detectors share, then leave it to the model's own; a loss on boxes has a ``default_rpn``."""
    kind = next((kind for kind in _DETECTORS if isinstance(model, kind)), None)
    if kind is None:
        raise TypeError(
            "model must be a torchvision RetinaNet, FCOS or FasterRCNN, not yet wrapped; "
            f"got {type(model).__qualname__}"
        )
    use_criterion, names = _DETECTORS[kind]
    for name, value in options.items():
        if value is not None and name not in names:
            takers = ", ".join(each.__name__ for each, (_, known) in _DETECTORS.items() if name in known)
            raise TypeError(f"{name} must be None for a {kind.__name__}: it applies to {takers}")
    check_criterion(criterion, boxes=default_rpn is not None)
    if not isinstance(per_image, bool):
        raise TypeError(f"per_image must be a bool; got {type(per_image).__qualname__}")
    given = {name: options[name] for name in names if name in options}
    if default_rpn is not None and "rpn_criterion" in given and given["rpn_criterion"] is None:
        given["rpn_criterion"] = default_rpn()
    use_criterion(model, criterion, per_image, boxes=default_rpn is not None, **given)
    return model
