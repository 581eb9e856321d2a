"""The losses for ``loss_cls`` of a head, built by MMDetection from a configuration file.

loss_cls=dict(type="ALRPLoss", tau=0.7, self_balance=dict(init=50.0), loss_weight=0.2)
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from mmdet.registry import MODELS
from torch import Tensor, nn

from ... import ALRPLoss as _ALRPLoss
from ... import APLoss as _APLoss
from ... import NDCGLoss as _NDCGLoss
from ... import RankSortLoss as _RankSortLoss
from ... import SelfBalance
from .._criteria import check_flag, check_weight

__all__ = ["ALRPLoss", "APLoss", "NDCGLoss", "RankSortLoss", "RankingCriterion"]


class RankingCriterion(nn.Module):
    """The interface of ``loss_cls`` for the heads of this package; mix it in before a loss.

    For your own loss:

        @MODELS.register_module()
        class LogRankLoss(RankingCriterion, RankingLoss):
            def __init__(self, **settings):
                super().__init__(lambda ranking: (ranking.rank / ranking.rank_positive).log(), **settings)

    With ``takes_boxes = True`` it is called like :class:`alrp_triton.ALRPLoss` and also trains the boxes. Otherwise it
    is called like :class:`alrp_triton.APLoss`, and the head's ``loss_bbox`` trains the boxes.

    Args:
        loss_weight: factor of the results, finite and >= 0; it does not affect self-balancing.
        per_image: one ranking for each image instead of one for the batch.
        use_sigmoid: always True, because ranking losses have no background class; dense heads pass it.
        settings: arguments of the loss itself.

    Raises:
        TypeError, ValueError: naming the argument.
    """

    ignore_index: int

    def __init__(
        self,
        *args: Any,
        loss_weight: float = 1.0,
        per_image: bool = False,
        use_sigmoid: bool = True,
        **settings: Any,
    ) -> None:
        check_weight("loss_weight", loss_weight)
        check_flag("per_image", per_image)
        if use_sigmoid is not True:
            raise ValueError(f"use_sigmoid: expected True for a ranking, got {use_sigmoid!r}")
        super().__init__(*args, **settings)
        self.loss_weight, self.per_image = loss_weight, per_image

    def forward(self, *args: Any, **options: Any) -> Any:
        """The loss itself; see there."""
        if "avg_factor" in options:
            wanted = "a head that ranks, such as RankingRetinaHead instead of RetinaHead"
            raise TypeError(f"loss_cls: expected {wanted}, got one that asks for the loss of each level")
        return super().forward(*args, **options)

    def get_cls_channels(self, num_classes: int) -> int:
        """The number of scores of a second stage, without one for the background."""
        return num_classes

    def get_activation(self, cls_score: Tensor) -> Tensor:
        """Scores of a second stage's logits ``[N, C]``: their sigmoid, and 0 for the background, ``[N, C + 1]``."""
        # In half precision the best scores would be equal.
        scores = cls_score.to(torch.promote_types(cls_score.dtype, torch.float32)).sigmoid()
        return torch.cat([scores, scores.new_zeros(len(scores), 1)], dim=1)

    def extra_repr(self) -> str:
        """The arguments, as ``repr`` shows them."""
        own = f"loss_weight={self.loss_weight!r}, per_image={self.per_image!r}"
        return ", ".join(filter(None, [super().extra_repr(), own]))


@MODELS.register_module()
class ALRPLoss(RankingCriterion, _ALRPLoss):
    """aLRP Loss, see :class:`alrp_triton.ALRPLoss` and :class:`RankingCriterion` for the arguments.

    Args:
        self_balance: also a dict of the arguments of :class:`alrp_triton.SelfBalance`, whose periods
            ``SelfBalanceHook`` ends; by default an empty one.
    """

    def __init__(
        self, *, self_balance: SelfBalance | Mapping[str, Any] | float | None = MappingProxyType({}), **settings: Any
    ) -> None:
        if isinstance(self_balance, Mapping):
            self_balance = SelfBalance(**self_balance)
        super().__init__(self_balance=self_balance, **settings)


@MODELS.register_module()
class RankSortLoss(RankingCriterion, _RankSortLoss):
    """Rank & Sort Loss, see :class:`alrp_triton.RankSortLoss` and :class:`RankingCriterion` for the arguments."""


@MODELS.register_module()
class APLoss(RankingCriterion, _APLoss):
    """AP Loss, see :class:`alrp_triton.APLoss` and :class:`RankingCriterion` for the arguments."""


@MODELS.register_module()
class NDCGLoss(RankingCriterion, _NDCGLoss):
    """NDCG Loss, see :class:`alrp_triton.NDCGLoss` and :class:`RankingCriterion` for the arguments."""
