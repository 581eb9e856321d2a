"""What the adapters of several frameworks ask of a criterion."""

from __future__ import annotations

from torch import nn

from .. import ALRPLoss, APLoss, NDCGLoss, RankSortLoss
from ..framework import RankingLoss

__all__ = ["check_criterion"]


def check_criterion(criterion: object, *, boxes: bool, name: str = "criterion") -> nn.Module:
    """``criterion``, or TypeError unless it is a module that takes boxes, or none, as far as one can tell."""
    if not isinstance(criterion, nn.Module):
        raise TypeError(f"{name} must be a torch.nn.Module; got {type(criterion).__qualname__}")
    unsuitable = (APLoss, NDCGLoss, RankingLoss) if boxes else (ALRPLoss, RankSortLoss)
    if type(criterion).forward in [loss.forward for loss in unsuitable]:  # one of your own may derive from them
        wanted = "boxes: pass it to use_classification_loss" if boxes else "scores alone: pass it to use_alrp"
        raise TypeError(f"{name} must be a loss on {wanted}; got {type(criterion).__qualname__}")
    return criterion
