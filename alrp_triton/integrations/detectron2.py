"""Ranking losses for Detectron2's RetinaNet: a meta-architecture that the config selects.

    from alrp_triton.integrations.detectron2 import add_alrp_config

    cfg = get_cfg()
    add_alrp_config(cfg)
    cfg.merge_from_file("retinanet_R_50_FPN_1x.yaml")
    cfg.MODEL.META_ARCHITECTURE = "ALRPRetinaNet"
    cfg.MODEL.ALRP.SELF_BALANCE_PERIOD = num_images // cfg.SOLVER.IMS_PER_BATCH  # iterations in an epoch

Importing this module registers :class:`ALRPRetinaNet`. Anchors, matcher, box coder and inference are those of
``RetinaNet``. As there, the logits of undecided anchors are ignored. All levels and images of a batch are one ranking;
the levels are not copied together.

The criterion is a submodule, so Detectron2's checkpoints have the state of its self-balancing, and a resumed run
continues with it. Written for the interfaces of Detectron2 0.6, which are also those of its main branch.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

try:
    from detectron2.config import CfgNode, configurable
    from detectron2.modeling import META_ARCH_REGISTRY, RetinaNet
    from detectron2.utils.events import get_event_storage
except ImportError as error:
    raise ImportError(
        "alrp_triton.integrations.detectron2 needs Detectron2, which is installed from its repository: "
        "https://detectron2.readthedocs.io/en/latest/tutorials/install.html"
    ) from error

from .. import ALRPLoss, APLoss, NDCGLoss, RankSortLoss, SelfBalance
from ._criteria import check_criterion, check_flag, image_of_each, losses_of

__all__ = ["ALRPRetinaNet", "add_alrp_config"]


def add_alrp_config(cfg: Any) -> None:
    """Add the keys of :class:`ALRPRetinaNet` to a config, in place, under ``cfg.MODEL.ALRP``:

    | key | default | what it is |
    | --- | --- | --- |
    | ``LOSS`` | ``"alrp"`` | ``"alrp"``, ``"rank_sort"``, ``"ap"`` or ``"ndcg"`` |
    | ``DELTA`` | ``None`` | half width of the ramp; ``None`` for the loss's own default |
    | ``TAU`` | 0.5 | aLRP: the IoU from which a box counts as localised |
    | ``BOX_ERROR`` | ``"giou"`` | aLRP, Rank & Sort: ``"iou"``, ``"giou"``, ``"diou"`` or ``"ciou"`` |
    | ``SELF_BALANCE_INIT`` | 50.0 | aLRP: weight of the boxes in the first period |
    | ``SELF_BALANCE_PERIOD`` | 7330 | aLRP: iterations in a period; the default is an epoch of COCO, 16 images each |
    | ``PER_IMAGE`` | ``False`` | one ranking for each image instead of one for the batch |
    | ``MONITOR`` | ``False`` | whether ``model.criterion.stats`` has statistics of the last ranking |
    """
    cfg.MODEL.ALRP = CfgNode()
    cfg.MODEL.ALRP.LOSS = "alrp"
    cfg.MODEL.ALRP.DELTA = None
    cfg.MODEL.ALRP.TAU = 0.5
    cfg.MODEL.ALRP.BOX_ERROR = "giou"
    cfg.MODEL.ALRP.SELF_BALANCE_INIT = 50.0
    cfg.MODEL.ALRP.SELF_BALANCE_PERIOD = 7330
    cfg.MODEL.ALRP.PER_IMAGE = False
    cfg.MODEL.ALRP.MONITOR = False


@META_ARCH_REGISTRY.register()  # type: ignore[misc,unused-ignore]
class ALRPRetinaNet(RetinaNet):  # type: ignore[misc,unused-ignore]
    """Detectron2's RetinaNet with a ranking loss: aLRP, Rank & Sort, AP, NDCG or your own.

    ``ALRPRetinaNet(cfg)`` reads ``cfg.MODEL.ALRP`` (see :func:`add_alrp_config`) and the keys of RetinaNet. With
    explicit arguments, as in a LazyConfig, it takes those of RetinaNet and

    Args:
        criterion: a module of one of two kinds. ``logits`` is a list of the levels [N, R_l, K], ``labels`` of integers
            [N, R_l] (0..K-1 positive, K background, -1 ignored). A ``SelfBalance`` in it should have a ``period`` in
            iterations, because Detectron2 has no epochs.

            - With ``criterion.takes_boxes = True``, as ``ALRPLoss`` and ``RankSortLoss``, it is called as
              ``criterion(logits, labels, pred_boxes, target_boxes)``, with the boxes [P, 4] of the P positives, level
              after level and image after image, as (x1, y1, x2, y2) in pixels. It returns an object with the scalars
              ``cls`` and ``loc``.
            - Otherwise, as ``APLoss``, it is called as ``criterion(logits, labels, num_positives=P)`` and returns a
              scalar.
        per_image: one ranking for each image instead of one for the batch; the criterion also gets ``groups=``, the
            image of each anchor, for each level.

    Raises:
        TypeError: ``criterion`` is not a module, or ``per_image`` not a bool.
        ValueError: an unknown ``cfg.MODEL.ALRP.LOSS``.
    """

    @configurable  # type: ignore[untyped-decorator,unused-ignore]
    def __init__(self, *, criterion: nn.Module, per_image: bool = False, **arguments: Any) -> None:
        check_criterion(criterion)
        check_flag("per_image", per_image)
        super().__init__(**arguments)
        self.criterion, self.per_image = criterion, per_image

    @classmethod
    def from_config(cls, cfg: Any) -> dict[str, Any]:
        """Arguments of the constructor for a config; Detectron2 calls this."""
        settings = cfg.MODEL.ALRP
        arguments: dict[str, Any] = super().from_config(cfg)
        return {**arguments, "criterion": _criterion(settings), "per_image": settings.PER_IMAGE}

    def losses(
        self,
        anchors: list[Any],
        pred_logits: list[Tensor],
        gt_labels: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        gt_boxes: list[Tensor],
    ) -> dict[str, Tensor]:
        """The two parts of the loss of a batch; arguments and names of the result as in ``RetinaNet.losses``.

        ``"loss_cls"`` is the criterion's ``cls`` or scalar, ``"loss_box_reg"`` its ``loc``, or RetinaNet's own loss of
        the boxes. The loss to minimise is their sum.
        """
        labels = torch.stack(gt_labels)  # [N, R], with this package's numbers for background and ignored
        sizes = [logits.shape[1] for logits in pred_logits]
        levels = list(labels.split(sizes, dim=1))
        image, anchor = torch.nonzero((labels >= 0) & (labels != self.num_classes), as_tuple=True)

        def boxes() -> tuple[Tensor, Tensor]:
            # Criteria expect positives level after level, and within a level image after image.
            ends = torch.tensor(list(accumulate(sizes)), device=anchor.device)
            order = torch.bucketize(anchor, ends, right=True).argsort(stable=True)
            at = image[order], anchor[order]
            deltas, all_anchors = torch.cat(pred_anchor_deltas, dim=1)[at], type(anchors[0]).cat(anchors).tensor
            return self.box2box_transform.apply_deltas(deltas, all_anchors[at[1]]), torch.stack(gt_boxes)[at]

        groups = [image_of_each(level) for level in levels] if self.per_image else None
        cls, loc = losses_of(self.criterion, pred_logits, levels, len(image), boxes, groups)
        if loc is None:
            # RetinaNet computes both parts at once; no graph of its classification loss is kept.
            scores = [logits.detach() for logits in pred_logits]
            loc = super().losses(anchors, scores, gt_labels, pred_anchor_deltas, gt_boxes)["loss_box_reg"]
        else:
            get_event_storage().put_scalar("num_pos_anchors", len(image) / len(labels))  # what RetinaNet logs
        return {"loss_cls": cls, "loss_box_reg": loc}


def _criterion(settings: Any) -> nn.Module:
    options = {"monitor": settings.MONITOR, **({} if settings.DELTA is None else {"delta": settings.DELTA})}
    if settings.LOSS == "alrp":
        balance = SelfBalance(settings.SELF_BALANCE_INIT, period=settings.SELF_BALANCE_PERIOD)
        return ALRPLoss(tau=settings.TAU, box_error=settings.BOX_ERROR, self_balance=balance, **options)
    if settings.LOSS == "rank_sort":
        return RankSortLoss(box_error=settings.BOX_ERROR, **options)
    on_scores: dict[str, type[APLoss | NDCGLoss]] = {"ap": APLoss, "ndcg": NDCGLoss}
    if settings.LOSS not in on_scores:
        raise ValueError(f"cfg.MODEL.ALRP.LOSS: expected {('alrp', 'rank_sort', *on_scores)}, got {settings.LOSS!r}")
    return on_scores[settings.LOSS](**options)
