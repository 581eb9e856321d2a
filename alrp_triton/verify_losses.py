"""The losses of the family in one form, from a backend and from the reference, so that the same checks apply to all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import reference
from .losses import alrp_loss, ap_loss, ndcg_loss, rank_sort_loss

LOSSES = ("aLRP", "AP", "Rank & Sort", "NDCG")

Levels = list[Tensor]


def compute(
    loss: str, logits: Levels, labels: Levels, values: Tensor, **arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Classification and localisation part of a loss, and ranks ``[P]``, or ``[0]`` if it does not return them.

    Args:
        loss: one of :data:`LOSSES`.
        logits, labels: the levels.
        values: ``[P]`` localisation errors, or IoUs.
        arguments: further arguments of the loss.
    """
    if loss == "aLRP":
        return alrp_loss(logits, labels, values, **arguments)
    none = values.new_zeros(0)
    if loss == "AP":
        return ap_loss(logits, labels, num_positives=len(values), **arguments), 0 * values.sum(), none
    if loss == "NDCG":
        return ndcg_loss(logits, labels, num_positives=len(values), **arguments), 0 * values.sum(), none
    ranking, sorting = rank_sort_loss(logits, labels, values, **arguments)
    return ranking + sorting, 0 * values.sum(), none


def exact(loss: str, logits: Tensor, labels: Tensor, values: Tensor, **arguments: Any) -> reference.ReferenceALRP:
    """The same and its gradients in float64, for flat logits and labels ``[M]``."""
    if loss == "aLRP":
        return reference.alrp(logits, labels, values, **arguments)
    if loss == "Rank & Sort":
        sorted_ = reference.rank_sort(logits, labels, values, **arguments)
        value, gradient = sorted_.ranking + sorted_.sorting, sorted_.grad_ranking + sorted_.grad_sorting
    else:
        found = (reference.ap if loss == "AP" else reference.ndcg)(logits, labels, **arguments)
        value, gradient = found.value, found.grad_logits
    zero = torch.zeros((), dtype=torch.float64)
    return reference.ReferenceALRP(value, zero, zero.expand(0), gradient, zero.expand(len(values)))
