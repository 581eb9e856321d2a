"""The paper in float64, equation by equation: slow, plain, and the judge of every other implementation.

Everything here costs O(P M) time. Equation numbers are those of K. Oksuz, B. C. Cam, E. Akbas and S. Kalkan,
"A Ranking-based, Balanced Loss Function Unifying Classification and Localisation in Object Detection", NeurIPS 2020.
This module imports nothing of the package, so that no error can be shared with what it judges.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["ReferenceALRP", "algorithm_1", "alrp", "difference", "ramp"]

# Pairs held at once; bounds the workspace of one block of positives to a few hundred megabytes.
_PAIRS_PER_BLOCK = 1 << 22


def difference(s_j: Tensor, s_i: Tensor) -> Tensor:
    """Difference transform x_ij = s_j - s_i for all pairs, ``[I, J]``; two equal infinities differ by 0."""
    s_i, s_j = s_i[:, None], s_j[None, :]
    return torch.where(s_i == s_j, 0.0, s_j - s_i)


def ramp(x: Tensor, delta: float) -> Tensor:
    """The smoothed step H(x): 0 below -delta, 1 above delta, linear between; for delta = 0, 1 where x >= 0."""
    if delta == 0:
        # The comparison would turn NaN into 0 and so hide it.
        return torch.where(x.isnan(), x, (x >= 0).to(x.dtype))
    return (x / (2 * delta) + 0.5).clamp(0, 1)


def algorithm_1(primary: Tensor, target: Tensor, normaliser: float) -> tuple[Tensor, Tensor]:
    """Error-driven gradient of L = (1/Z) sum_ij L_ij (Algorithm 1 of the paper).

    Args:
        primary: L_ij for positives i and negatives j, ``[P, N]``.
        target: L*_ij, what the primary term would be if i were ranked properly, ``[P, N]``.
        normaliser: Z.

    Returns:
        ``(dL/ds_i [P], dL/ds_j [N])``: with the update dx_ij = L*_ij - L_ij, positive i receives sum_j dx_ij / Z and
        negative j receives -sum_i dx_ij / Z.
    """
    update = target - primary
    return update.sum(dim=1) / normaliser, -update.sum(dim=0) / normaliser


class ReferenceALRP(NamedTuple):
    """What :func:`alrp` returns; float64 throughout."""

    cls: Tensor
    """Classification component, scalar."""
    loc: Tensor
    """Localisation component, scalar."""
    rank: Tensor
    """rank(i), ``[P]``."""
    grad_logits: Tensor
    """Error-driven gradient of ``cls``, ``[M]``."""
    grad_loc_errors: Tensor
    """Gradient of ``loc`` with respect to the localisation errors, ``[P]``."""


def alrp(
    logits: Tensor,
    labels: Tensor,
    loc_errors: Tensor,
    *,
    delta: float = 1.0,
    eps: float = 1e-5,
    loc_ranking: str = "sorted",
) -> ReferenceALRP:
    """aLRP Loss with both gradients (equations 9 to 14).

    Args:
        logits: ``[M]`` scores.
        labels: ``[M]``; 1 positive, 0 negative, anything else takes part in nothing.
        loc_errors: ``[P]`` localisation errors E(i), in the order of the positives.
        delta: half width of the ramp.
        eps: a positive with at most this many false positives sends no score gradient (0 for the paper's form).
        loc_ranking: ``"smooth"`` as in equation 11, or ``"sorted"``: the positives at or above i are those that precede
            it in a stable ascending sort, flipped, as in the authors' detector heads.
    """
    logits, loc_errors = logits.detach().double(), loc_errors.detach().double()
    is_pos, is_neg = labels == 1, labels == 0
    pos, neg = logits[is_pos], logits[is_neg]
    num_pos = len(pos)
    if len(loc_errors) != num_pos:
        raise ValueError(f"loc_errors: expected one for each of the {num_pos} positives, got {len(loc_errors)}")
    # NaN may meet a zero below and vanish; this term brings it back everywhere.
    poison = torch.where(torch.cat([pos, neg, loc_errors]).isnan().any(), torch.nan, 0.0).to(logits)
    grad_logits = torch.zeros_like(logits)
    if num_pos == 0:
        grad_logits[is_neg] = poison
        return ReferenceALRP(poison, poison.clone(), pos, grad_logits, loc_errors)

    # Place of each positive in descending order, for loc_ranking="sorted".
    place = torch.empty(num_pos, dtype=torch.long, device=pos.device)
    place[pos.argsort(stable=True).flip(0)] = torch.arange(num_pos, device=pos.device)

    cls, loc = poison.clone(), poison.clone()
    rank, grad_pos = torch.zeros_like(pos), torch.zeros_like(pos)
    grad_neg, grad_loc = torch.zeros_like(neg), torch.zeros_like(pos)
    block = max(1, _PAIRS_PER_BLOCK // max(1, len(logits)))
    for i in torch.arange(num_pos, device=pos.device).split(block):
        rows = torch.arange(len(i), device=pos.device)
        h_neg = ramp(difference(neg, pos[i]), delta)  # H(x_ij), j in N
        h_pos = ramp(difference(pos, pos[i]), delta)  # H(x_ik), k in P
        h_pos[rows, i] = 0  # sums over k != i
        num_false_positives = h_neg.sum(dim=1)
        rank_positive = 1 + h_pos.sum(dim=1)
        rank[i] = rank_positive + num_false_positives

        # Equation 11, the two components of equation 9.
        cls += (num_false_positives / rank[i]).sum() / num_pos
        at_or_above = h_pos.clone() if loc_ranking == "smooth" else (place <= place[i][:, None]).double()
        at_or_above[rows, i] = 1
        loc += (at_or_above @ loc_errors / rank[i]).sum() / num_pos
        grad_loc += (at_or_above / rank[i][:, None]).sum(dim=0) / num_pos

        # Equation 10: LRP error at i; equation 13: its target, when nothing is ranked above i but what should be.
        lrp = (num_false_positives + loc_errors[i] + h_pos @ loc_errors) / rank[i]
        lrp_target = loc_errors[i] / rank[i]
        # Uniform p(j|i) over the false positives of i; equation 12: primary terms; equation 14: their update.
        gate = num_false_positives > eps
        p_j_given_i = torch.where(gate[:, None], h_neg / num_false_positives[:, None], 0.0)
        grad_i, grad_j = algorithm_1(lrp[:, None] * p_j_given_i, lrp_target[:, None] * p_j_given_i, num_pos)
        grad_pos[i] = grad_i
        grad_neg += grad_j

    grad_logits[is_pos], grad_logits[is_neg] = grad_pos + poison, grad_neg + poison
    return ReferenceALRP(cls, loc, rank + poison, grad_logits, grad_loc + poison)
