"""Ranking losses for criteria of the DETR family: RF-DETR, D-FINE, DEIM and others that descend from ``SetCriterion``.

    use_rank_sort(criterion)  # the framework's, which matches queries and adds up the terms

Such a criterion matches each output (of a decoder layer, or of the encoder) with the objects, and then asks its method
``get_loss`` for each term. With the loss it keeps the matches where it asks for the classification loss, and after the
last output it ranks all outputs in one call, each as a group of its own. Its matcher, its box terms and their weights
remain. Nothing is patched globally: the instance gets a class that is derived from its own.

This module needs no framework. :mod:`~.rfdetr` and :mod:`~.transformers` have what is special to theirs.
"""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

from .. import ALRPLoss, APLoss, NDCGLoss, RankSortLoss
from ._criteria import check_criterion, check_flag, end_periods
from ._ranked_outputs import RankedOutputs, ranked_class

__all__ = ["restore", "use_alrp", "use_ap", "use_loss", "use_ndcg", "use_rank_sort"]

Module = TypeVar("Module", bound=nn.Module)


def use_loss(criterion: Module, ranking: nn.Module, *, per_image: bool = False) -> Module:
    """Make a criterion of the DETR family rank.

    Args:
        criterion: the framework's: an ``nn.Module`` that is called as ``criterion(outputs, targets)`` and has
            ``get_loss(name, outputs, targets, indices, ...)`` and ``weight_dict``; changed in place. ``outputs`` have
            ``"pred_logits"`` [B, Q, C] of one sigmoid a class and ``"pred_boxes"`` [B, Q, 4], centre, width and height;
            ``targets`` have ``"labels"`` [G] and ``"boxes"`` [G, 4] for each image. Outputs under names that begin with
            ``dn_``, also deeper, are denoising queries, which keep the framework's loss.
        ranking: a module of one of two kinds, with ``logits`` [N, C] and integer ``labels`` [N] (0..C-1 for matched
            queries, C background) of the N queries of all images and outputs. If there is more than one ranking it also
            gets ``groups=``, the ranking of each query [N], and returns the mean over the groups with a positive.

            - With ``ranking.takes_boxes = True``, as ``ALRPLoss`` and ``RankSortLoss``, it is called as
              ``ranking(logits, labels, pred_boxes, target_boxes)``, with the boxes [P, 4] of the P matched queries in
              this order, as (x1, y1, x2, y2) in the units of ``"pred_boxes"``. It returns an object with the scalars
              ``cls`` and ``loc``, and replaces the GIoU loss too.
            - Otherwise, as ``APLoss``, ``NDCGLoss`` or a ``RankingLoss`` whose formula needs no extras, it is called as
              ``ranking(logits, labels, num_positives=P)``, P being an int, and returns a scalar.

            It becomes ``criterion.ranking_criterion``. After each epoch call ``criterion.step_epoch()``, of several
            processes in each.
        per_image: one ranking for each image instead of one for the batch.

    Returns:
        ``criterion`` itself. Its terms have ``loss_cls`` and, with boxes, ``loss_loc``, sums over all outputs with the
        weight 1, in place of those of the classification and of GIoU.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: in the first batch, there is no such output, or outputs differ in C.
    """
    if not isinstance(criterion, nn.Module) or not all(
        hasattr(criterion, name) for name in ("get_loss", "weight_dict")
    ):
        wanted = "a criterion of the DETR family, with get_loss and weight_dict"
        raise TypeError(f"criterion: expected {wanted}, got {type(criterion).__name__}")
    check_criterion(ranking)
    check_flag("per_image", per_image)
    restore(criterion)
    ranked: Any = criterion
    stock: Any = type(criterion)
    ranked.__class__ = ranked_class(_SetCriterion, stock)
    ranked.ranking_stock_weights, ranked.ranking_per_image = ranked.weight_dict, per_image
    # For frameworks that multiply outside of the criterion, and drop terms without a weight.
    ranked.weight_dict = {**ranked.ranking_stock_weights, "loss_cls": 1.0, "loss_loc": 1.0}
    # A new criterion is on the CPU.
    device = next((each.device for each in criterion.state_dict().values()), None)
    ranked.ranking_criterion = ranking.train(criterion.training).to(device)
    return criterion


def restore(criterion: Module) -> Module:
    """Take the loss away again: class, terms, weights and ``state_dict()`` are the framework's own.

    Args:
        criterion: any; changed in place. One without the loss remains as it is.

    Returns:
        ``criterion`` itself.
    """
    if isinstance(criterion, _SetCriterion):
        ranked: Any = criterion
        ranked.weight_dict = ranked.ranking_stock_weights
        del ranked.ranking_criterion, ranked.ranking_per_image, ranked.ranking_stock_weights
        ranked.__class__ = _stock_class(criterion)
    return criterion


def use_alrp(criterion: Module, **options: Any) -> Module:
    """:func:`use_loss` with a new ``ALRPLoss()`` (Oksuz et al., NeurIPS 2020)."""
    return use_loss(criterion, ALRPLoss(), **options)


def use_rank_sort(criterion: Module, **options: Any) -> Module:
    """:func:`use_loss` with a new ``RankSortLoss()`` (Oksuz et al., ICCV 2021)."""
    return use_loss(criterion, RankSortLoss(), **options)


def use_ap(criterion: Module, **options: Any) -> Module:
    """:func:`use_loss` with a new ``APLoss()`` (Chen et al., CVPR 2019)."""
    return use_loss(criterion, APLoss(), **options)


def use_ndcg(criterion: Module, **options: Any) -> Module:
    """:func:`use_loss` with a new ``NDCGLoss()``."""
    return use_loss(criterion, NDCGLoss(), **options)


class _SetCriterion(RankedOutputs):
    """Of a criterion that lives as long as the training."""

    def step_epoch(self) -> None:
        """End the self-balancing period of the ranking loss, if it has one and does not end it itself; of several
        processes in each, which continue with one weight."""
        end_periods(self.ranking_criterion)

    def __reduce__(self) -> tuple[Any, ...]:
        return _empty, (_stock_class(self),), self.__dict__


def _stock_class(criterion: Any) -> type:
    """The framework's class of a criterion with the loss."""
    stock: type = type(criterion).__bases__[1]
    return stock


def _empty(stock: type) -> Any:
    """An empty criterion for ``pickle`` and ``copy`` to fill."""
    return object.__new__(ranked_class(_SetCriterion, stock))
