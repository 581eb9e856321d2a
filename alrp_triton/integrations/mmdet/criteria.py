"""The losses as MMDetection builds them: ``loss_cls`` of a head, from the numbers and strings of a configuration file.

loss_cls=dict(type="ALRPLoss", tau=0.7, self_balance=dict(init=50.0), loss_weight=0.2)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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

__all__ = ["ALRPLoss", "APLoss", "NDCGLoss", "RankSortLoss", "RankingCriterion"]


class RankingCriterion(nn.Module):
    """What a head of this package asks of its ``loss_cls``; to be mixed into a loss, in front of it.

    A loss of your own becomes one so::

        @MODELS.register_module()
        class LogRankLoss(RankingCriterion, RankingLoss):
            def __init__(self, **settings):
                super().__init__(lambda ranking: (ranking.rank / ranking.rank_positive).log(), **settings)

    Args:
        loss_weight: what the head multiplies the results by, finite and >= 0; self-balancing does not see it.
        per_image: one ranking for each image instead of one for the batch.
        use_sigmoid: always True, since ranking losses have no background class; dense heads pass it.
        settings: what the loss itself takes.

    Raises:
        TypeError, ValueError: naming the argument.
    """

    ignore_index: int
    takes_boxes: bool = False
    """Whether the loss is called as ``(logits, labels, pred_boxes, target_boxes)`` and returns ``cls`` and ``loc``, as
    :class:`alrp_triton.ALRPLoss`; or as ``(logits, labels, num_positives=P)`` and returns a scalar, as
    :class:`alrp_triton.APLoss`, so that the head's ``loss_bbox`` goes on training the boxes."""

    def __init__(
        self,
        *args: Any,
        loss_weight: float = 1.0,
        per_image: bool = False,
        use_sigmoid: bool = True,
        **settings: Any,
    ) -> None:
        if isinstance(loss_weight, bool) or not isinstance(loss_weight, (int, float)):
            raise TypeError(f"loss_weight: expected a finite number >= 0, got {type(loss_weight).__name__}")
        if not 0 <= loss_weight < math.inf:
            raise ValueError(f"loss_weight: expected a finite number >= 0, got {loss_weight}")
        if not isinstance(per_image, bool):
            raise TypeError(f"per_image: expected a bool, got {type(per_image).__name__}")
        if use_sigmoid is not True:
            raise ValueError(
                f"use_sigmoid: expected True, since a ranking has no background class, got {use_sigmoid!r}"
            )
        super().__init__(*args, **settings)
        self.loss_weight, self.per_image = loss_weight, per_image

    def head_losses(
        self,
        logits: Tensor | Sequence[Tensor],
        labels: Tensor | Sequence[Tensor],
        images: Tensor | Sequence[Tensor],
        num_positives: int,
        boxes: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor | None]:
        """Both parts of the loss of a batch, multiplied by ``loss_weight``.

        Args:
            logits: ``[..., C]``, or the levels' in a list.
            labels: class indices ``[...]``, C for background, ``ignore_index`` ignored.
            images: which image each row belongs to, ``[...]``.
            num_positives: P.
            boxes: predicted and true ones of the positives, ``[P, 4]`` each; of no concern without ``takes_boxes``.

        Returns:
            The classification part, and the localisation part: None without ``takes_boxes``.
        """
        options: dict[str, Any] = {"groups": images} if self.per_image else {}
        if not self.takes_boxes:
            return self.loss_weight * self(logits, labels, num_positives=num_positives, **options), None
        loss = self(logits, labels, *boxes, **options)
        return self.loss_weight * loss.cls, self.loss_weight * loss.loc

    def get_cls_channels(self, num_classes: int) -> int:
        """How many scores a second stage has: none for the background."""
        return num_classes

    def get_activation(self, cls_score: Tensor) -> Tensor:
        """Scores of a second stage's logits ``[N, C]``: their sigmoid, and 0 for the background, ``[N, C + 1]``."""
        # In half precision the best scores could not be told from one another.
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

    takes_boxes = True

    def __init__(
        self, *, self_balance: SelfBalance | Mapping[str, Any] | float | None = MappingProxyType({}), **settings: Any
    ) -> None:
        if isinstance(self_balance, Mapping):
            self_balance = SelfBalance(**self_balance)
        super().__init__(self_balance=self_balance, **settings)


@MODELS.register_module()
class RankSortLoss(RankingCriterion, _RankSortLoss):
    """Rank & Sort Loss, see :class:`alrp_triton.RankSortLoss` and :class:`RankingCriterion` for the arguments."""

    takes_boxes = True


@MODELS.register_module()
class APLoss(RankingCriterion, _APLoss):
    """AP Loss, see :class:`alrp_triton.APLoss` and :class:`RankingCriterion` for the arguments."""


@MODELS.register_module()
class NDCGLoss(RankingCriterion, _NDCGLoss):
    """NDCG Loss, see :class:`alrp_triton.NDCGLoss` and :class:`RankingCriterion` for the arguments."""
