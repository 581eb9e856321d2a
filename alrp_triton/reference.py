"""The papers in float64, equation by equation: slow and simple. All other implementations are compared with it.

Everything here costs O(P M) time. Equation numbers are those of K. Oksuz, B. C. Cam, E. Akbas and S. Kalkan,
"A Ranking-based, Balanced Loss Function Unifying Classification and Localisation in Object Detection", NeurIPS 2020.
:func:`ranking_loss` is the general form; the others follow their own definitions and are compared with it. This module
imports nothing of the package, so it shares no error with other implementations.

``logits`` is ``[M]``; ``labels`` is ``[M]``, 1 positive, 0 negative, any other value ignored; ``delta`` is the half
width of the ramp. ``groups`` is None or ``[M]`` integers: the logits of each integer are a separate ranking, and the
result is the mean over the rankings that have a positive. Without a positive the result and the gradients are 0. A NaN
in a logit that is not ignored, or from a formula, makes everything NaN except the gradients of ignored logits, which
are 0. All results are float64. A ValueError names an argument without one number for each positive.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

PairFunction = Callable[[Tensor, float], Tensor]
"""f(x, delta) of differences x = s_j - s_i, any shape, into [0, 1]."""

# Pairs in one block of positives; limits the workspace to a few hundred megabytes.
_PAIRS_PER_BLOCK = 1 << 22


def difference(s_j: Tensor, s_i: Tensor) -> Tensor:
    """Difference transform x_ij = s_j - s_i for all pairs, ``[I, J]``; two equal infinities differ by 0."""
    s_i, s_j = s_i[:, None], s_j[None, :]
    return torch.where(s_i == s_j, 0.0, s_j - s_i)


def ramp(x: Tensor, delta: float) -> Tensor:
    """The smoothed step H(x): 0 below -delta, 1 above delta, linear between; for delta = 0, 1 where x >= 0."""
    if delta == 0:
        # The comparison would turn NaN into 0.
        return torch.where(x.isnan(), x, (x >= 0).to(x.dtype))
    return (x / (2 * delta) + 0.5).clamp(0, 1)


def algorithm_1(primary: Tensor, target: Tensor, normaliser: float) -> tuple[Tensor, Tensor]:
    """Error-driven gradient of L = (1/Z) sum_ij L_ij (Algorithm 1 of the paper).

    Args:
        primary: L_ij for positives i and negatives j, ``[P, N]``.
        target: L*_ij, the primary term if i is ranked correctly, ``[P, N]``.
        normaliser: Z.

    Returns:
        ``(dL/ds_i [P], dL/ds_j [N])``: with the update dx_ij = L*_ij - L_ij, positive i receives sum_j dx_ij / Z and
        negative j receives -sum_i dx_ij / Z.
    """
    update = target - primary
    return update.sum(dim=1) / normaliser, -update.sum(dim=0) / normaliser


class ReferenceRanking:
    """The statistics of one ranking for a formula: for its P > 0 positives, ``[P]``, all constants."""

    def __init__(self, pos: Tensor, neg: Tensor, delta: float, h: PairFunction) -> None:
        self._pos, self._delta, self._h = pos, delta, h
        self._ascending = pos.argsort(stable=True)
        #: P, once for each positive.
        self.num_positives = torch.full_like(pos, len(pos))
        #: N_FP(i) = sum_j H(n_j - p_i).
        self.num_false_positives = torch.cat([h_neg.sum(dim=1) for _, h_neg, _ in _pairs(pos, neg, delta, h)])
        #: rank+(i) = 1 + sum_{k != i} H(p_k - p_i).
        self.rank_positive = 1 + self.sums_above(torch.ones_like(pos))
        #: rank(i) = rank+(i) + N_FP(i).
        self.rank = self.rank_positive + self.num_false_positives

    def sums_above(self, values: Tensor) -> Tensor:
        """sum_{k != i} v_k H(p_k - p_i), ``[P]``."""
        pairs = _pairs(self._pos, self._pos[:0], self._delta, self._h)
        return torch.cat([h_pos @ values for _, _, h_pos in pairs])

    def sums_sorted(self, values: Tensor) -> Tensor:
        """Sum of v_k over k = i and the positives before it in a stable ascending sort, flipped, ``[P]``."""
        descending = self._ascending.flip(0)
        return values[descending].cumsum(0)[descending.argsort()]

    def running_max(self, values: Tensor) -> Tensor:
        """Largest v_k over k = i and the positives before it in a stable ascending sort, ``[P]``."""
        return values[self._ascending].cummax(0).values[self._ascending.argsort()]


class ReferenceLoss(NamedTuple):
    """The result of :func:`ranking_loss`."""

    value: Tensor  # scalar
    grad_logits: Tensor  # its error-driven gradient, [M]
    grad_extras: dict[str, Tensor]  # its derivatives, ranks being constants, [P] each
    rank: Tensor  # rank(i), [P]


def ranking_loss(
    logits: Tensor,
    labels: Tensor,
    error: Callable[..., Tensor],
    *,
    target: Callable[..., Tensor] | None = None,
    normaliser: Callable[[ReferenceRanking], Any] | None = None,
    extras: dict[str, Tensor] | None = None,
    delta: float = 1.0,
    eps: float = 0.0,
    smoothing: PairFunction | None = None,
    distribution: PairFunction | None = None,
    true_gradient: bool = False,
    groups: Tensor | None = None,
) -> ReferenceLoss:
    """L = (1/Z) sum_i l(i) (Definition 1 of the paper), with the gradient of Algorithm 1 for its primary terms
    L_ij = l(i) p(j|i) and their targets L*_ij = l*(i) p(j|i), where p(j|i) = q(x_ij) / sum_j' q(x_ij').

    Args:
        error: l, called as ``error(ranking, **extras)`` with a :class:`ReferenceRanking`; returns ``[P]``.
        target: l*, called in the same way; None for 0.
        normaliser: Z, a number or ``[P]``, as a function of the ranking; None for P.
        extras: by name, ``[P]`` values for the formulas, in the order of the positives.
        eps: a positive whose sum_j q(x_ij) is at most this sends no score gradient.
        smoothing: replaces the ramp H; clamped to [0, 1].
        distribution: q, clamped to [0, 1]; None for H.
        true_gradient: whether scores get the derivative of L instead, by automatic differentiation of the ramp.
    """

    def h(x: Tensor, delta: float) -> Tensor:
        return (smoothing or ramp)(x, delta).detach().double().clamp(0, 1)

    def q(x: Tensor, delta: float) -> Tensor:
        return (distribution or h)(x, delta).detach().double().clamp(0, 1)

    def one_ranking(pos: Tensor, neg: Tensor, values: dict[str, Tensor]) -> _Result:
        if len(pos) == 0:
            return [pos.sum()], pos, [torch.zeros_like(neg)], list(values.values())
        ranking = ReferenceRanking(pos, neg, delta, h)
        with torch.enable_grad():
            l_i = error(ranking, **{name: v.requires_grad_() for name, v in values.items()})
            z = ranking.num_positives if normaliser is None else normaliser(ranking)
            z = torch.as_tensor(z, dtype=pos.dtype, device=pos.device).detach()
            value = (l_i / z).sum()
        grad_extras = [torch.zeros_like(v) for v in values.values()]
        if value.requires_grad:
            inputs = list(values.values())
            grad_extras = list(torch.autograd.grad(value, inputs, allow_unused=True, materialize_grads=True))
        if true_gradient:
            share = 1 / z if z.shape else torch.full_like(pos, float(1 / z))
            grad_scores = _derivative(pos, neg, error, values, share, delta)
            return [value.detach()], ranking.rank, [grad_scores], grad_extras
        with torch.no_grad():
            l_target = torch.zeros_like(pos) if target is None else target(ranking, **values)
            grad_pos, grad_neg = torch.zeros_like(pos), torch.zeros_like(neg)
            for i, q_ij, _ in _pairs(pos, neg, delta, q):
                p_j_given_i = _shares(q_ij, eps)
                # If it is 0, i sends nothing for any formula.
                primary = torch.where(p_j_given_i == 0, 0.0, (l_i / z)[i, None] * p_j_given_i)
                primary_target = torch.where(p_j_given_i == 0, 0.0, (l_target / z)[i, None] * p_j_given_i)
                grad_pos[i], grad_j = algorithm_1(primary, primary_target, 1.0)
                grad_neg += grad_j
        return [value.detach()], ranking.rank, [torch.cat([grad_pos, grad_neg])], grad_extras

    result = _mean_over_groups(one_ranking, logits, labels, groups, extras or {})
    (value,), rank, (gradient,), grad_extras = result
    return ReferenceLoss(value, gradient, dict(zip(extras or {}, grad_extras)), rank)


class _SmoothRanking:
    """Statistics with a derivative with respect to scores."""

    def __init__(self, pos: Tensor, neg: Tensor, delta: float) -> None:
        others = 1 - torch.eye(len(pos), dtype=pos.dtype, device=pos.device)
        self.num_positives = torch.full_like(pos, len(pos)).detach()
        self.num_false_positives = ramp(neg[None] - pos[:, None], delta).sum(dim=1)
        self.rank_positive = 1 + (ramp(pos[None] - pos[:, None], delta) * others).sum(dim=1)
        self.rank = self.rank_positive + self.num_false_positives


def _derivative(
    pos: Tensor, neg: Tensor, error: Callable[..., Tensor], values: dict[str, Tensor], share: Tensor, delta: float
) -> Tensor:
    """The derivative of sum_i share_i l(i) with respect to the scores of positives and negatives, ``[P + N]``."""
    with torch.enable_grad():
        # Equal infinities differ by 0.
        scores = [x.detach().clamp(-1e300, 1e300).requires_grad_() for x in (pos, neg)]
        l_i = error(_SmoothRanking(scores[0], scores[1], delta), **{name: v.detach() for name, v in values.items()})
        value = (l_i * share).sum()
    if not value.requires_grad:
        return torch.zeros_like(torch.cat(scores)).detach()
    return torch.cat(torch.autograd.grad(value, scores, allow_unused=True, materialize_grads=True))


class ReferenceALRP(NamedTuple):
    """The result of :func:`alrp`."""

    cls: Tensor  # classification component, scalar
    loc: Tensor  # localisation component, scalar
    rank: Tensor  # rank(i), [P]
    grad_logits: Tensor  # error-driven gradient of cls, [M]
    grad_loc_errors: Tensor  # derivative of loc, [P]


def alrp(
    logits: Tensor,
    labels: Tensor,
    loc_errors: Tensor,
    *,
    delta: float = 1.0,
    eps: float = 1e-5,
    loc_ranking: str = "sorted",
    groups: Tensor | None = None,
) -> ReferenceALRP:
    """aLRP Loss with both gradients (equations 9 to 14).

    Args:
        loc_errors: ``[P]`` localisation errors E(i), in the order of the positives.
        eps: a positive with at most this many false positives sends no score gradient (0 for the paper's form).
        loc_ranking: ``"smooth"`` as in equation 11, or ``"sorted"``: the positives above i are those that precede it in
            a stable ascending sort, flipped, as in the authors' detector heads.
    """

    def one_ranking(pos: Tensor, neg: Tensor, values: dict[str, Tensor]) -> _Result:
        errors = values["loc_errors"]
        num_pos, place = len(pos), pos.argsort(stable=True).flip(0).argsort()  # places in descending order
        cls, loc, rank = pos.new_zeros(()), pos.new_zeros(()), torch.zeros_like(pos)
        grad_pos, grad_neg, grad_loc = torch.zeros_like(pos), torch.zeros_like(neg), torch.zeros_like(pos)
        for i, h_neg, h_pos in _pairs(pos, neg, delta):
            num_false_positives = h_neg.sum(dim=1)
            rank_positive = 1 + h_pos.sum(dim=1)
            rank[i] = rank_positive + num_false_positives

            # Equation 11, the two components of equation 9.
            cls += (num_false_positives / rank[i]).sum() / num_pos
            above = h_pos if loc_ranking == "smooth" else (place < place[i][:, None]).double()
            loc += ((errors[i] + above @ errors) / rank[i]).sum() / num_pos
            grad_loc[i] += 1 / rank[i] / num_pos
            grad_loc += 1 / rank[i] @ above / num_pos

            # Equation 10: LRP error at i; equation 13: its target, the error if i is ranked correctly.
            lrp = (num_false_positives + errors[i] + h_pos @ errors) / rank[i]
            lrp_target = errors[i] / rank[i]
            # Uniform p(j|i) over the false positives of i; equation 12: primary terms; equation 14: their update.
            p_j_given_i = _shares(h_neg, eps)
            grad_pos[i], grad_j = algorithm_1(lrp[:, None] * p_j_given_i, lrp_target[:, None] * p_j_given_i, num_pos)
            grad_neg += grad_j
        return [cls, loc], rank, [torch.cat([grad_pos, grad_neg])], [grad_loc]

    result = _mean_over_groups(one_ranking, logits, labels, groups, {"loc_errors": loc_errors})
    (cls, loc), rank, (gradient,), (grad_loc,) = result
    return ReferenceALRP(cls, loc, rank, gradient, grad_loc)


class ReferenceScore(NamedTuple):
    """The result of :func:`ap` and :func:`ndcg`."""

    value: Tensor  # scalar
    rank: Tensor  # rank(i), [P]
    grad_logits: Tensor  # its error-driven gradient, [M]


def ap(
    logits: Tensor, labels: Tensor, *, delta: float = 1.0, interpolated: bool = True, groups: Tensor | None = None
) -> ReferenceScore:
    """AP Loss: one minus the mean precision (K. Chen et al., "Towards Accurate One-Stage Object Detection with
    AP-Loss", CVPR 2019). If interpolated, no precision is below that of a lower positive (in a stable ascending
    sort)."""

    def one_ranking(pos: Tensor, neg: Tensor, values: dict[str, Tensor]) -> _Result:
        false, true = torch.zeros_like(pos), torch.ones_like(pos)
        for i, h_neg, h_pos in _pairs(pos, neg, delta):
            false[i] += h_neg.sum(dim=1)
            true[i] += h_pos.sum(dim=1)
        precision = true / (true + false)
        if interpolated:
            ascending = pos.argsort(stable=True)
            precision[ascending] = precision[ascending].cummax(0).values
        # The error at i is distributed over its false positives; without one the precision is 1.
        share, grad_neg = (1 - precision) / max(len(pos), 1), torch.zeros_like(neg)
        for i, h_neg, _ in _pairs(pos, neg, delta):
            grad_neg += share[i] @ _shares(h_neg)
        return [share.sum()], true + false, [torch.cat([-share, grad_neg])], []

    (value,), rank, (gradient,), _ = _mean_over_groups(one_ranking, logits, labels, groups, {})
    return ReferenceScore(value, rank, gradient)


def ndcg(logits: Tensor, labels: Tensor, *, delta: float = 1.0, groups: Tensor | None = None) -> ReferenceScore:
    """One minus the normalised discounted cumulative gain, 1 - DCG / G_max, of binary relevance (K. Jarvelin and
    J. Kekalainen, "Cumulated Gain-based Evaluation of IR Techniques", ACM TOIS 2002): DCG is the sum of the gains
    1 / log2(1 + rank(i)), each with the target 1 / log2(1 + rank+(i)); G_max is the DCG of the best ranking."""

    def one_ranking(pos: Tensor, neg: Tensor, values: dict[str, Tensor]) -> _Result:
        gain_max = (1 / torch.log2(torch.arange(len(pos)).to(pos) + 2)).sum()
        dcg, rank = pos.new_zeros(()), torch.zeros_like(pos)
        grad_pos, grad_neg = torch.zeros_like(pos), torch.zeros_like(neg)
        for i, h_neg, h_pos in _pairs(pos, neg, delta):
            false, rank_positive = h_neg.sum(dim=1), 1 + h_pos.sum(dim=1)
            rank[i] = rank_positive + false
            gain, gain_target = 1 / torch.log2(1 + rank[i]), 1 / torch.log2(1 + rank_positive)
            dcg += gain.sum()
            # Without false positives the gain is its target.
            missing = (gain_target - gain) / gain_max
            grad_pos[i] = -missing
            grad_neg += missing @ _shares(h_neg)
        return [1 - dcg / gain_max if len(pos) else dcg], rank, [torch.cat([grad_pos, grad_neg])], []

    (value,), rank, (gradient,), _ = _mean_over_groups(one_ranking, logits, labels, groups, {})
    return ReferenceScore(value, rank, gradient)


class ReferenceRankSort(NamedTuple):
    """The result of :func:`rank_sort`."""

    ranking: Tensor  # positives above negatives, scalar
    sorting: Tensor  # positives in the order of their IoUs, scalar
    grad_ranking: Tensor  # error-driven gradient of ranking, [M]
    grad_sorting: Tensor  # error-driven gradient of sorting, [M]


def rank_sort(
    logits: Tensor,
    labels: Tensor,
    ious: Tensor,
    *,
    delta: float = 0.5,
    eps: float = 1e-10,
    groups: Tensor | None = None,
) -> ReferenceRankSort:
    """Rank & Sort Loss (K. Oksuz, B. C. Cam, E. Akbas, S. Kalkan, "Rank & Sort Loss for Object Detection and Instance
    Segmentation", ICCV 2021). Here a positive counts above itself by H(0), as in the code of its authors.

    Args:
        ious: ``[P]`` IoU of each positive with its ground truth, in the order of the positives.
        eps: a positive sends no ranking gradient if it has at most this many false positives, and no sorting gradient
            if it has at most this many missorted positives above it.
    """

    def one_ranking(pos: Tensor, neg: Tensor, values: dict[str, Tensor]) -> _Result:
        ious = values["ious"]
        ranking, sorting, rank = pos.new_zeros(()), pos.new_zeros(()), torch.zeros_like(pos)
        rank_pos, rank_neg, sort_pos = torch.zeros_like(pos), torch.zeros_like(neg), torch.zeros_like(pos)
        for i, h_neg, h_pos in _pairs(pos, neg, delta, own=1.0 if delta == 0 else 0.5):
            false, rank_positive = h_neg.sum(dim=1), h_pos.sum(dim=1)
            rank[i] = rank_positive + false
            # Only positives should be above i; its ranking error is distributed over the false positives.
            share = false / rank[i] / len(pos)
            ranking += share.sum()
            rank_pos[i] -= torch.where(false > eps, share, 0.0)
            rank_neg += share @ _shares(h_neg, eps)

            # Only positives of at least its IoU should be above i; its sorting error is distributed over the others.
            above, missorted = h_pos * (ious >= ious[i][:, None]), h_pos * (ious < ious[i][:, None])
            current, target = h_pos @ (1 - ious) / rank_positive, above @ (1 - ious) / above.sum(dim=1)
            share = (current - target) / len(pos)
            sorting += share.sum()
            sort_pos[i] -= torch.where(missorted.sum(dim=1) > eps, share, 0.0)
            sort_pos += share @ _shares(missorted, eps)
        gradients = [torch.cat([rank_pos, rank_neg]), torch.cat([sort_pos, torch.zeros_like(neg)])]
        return [ranking, sorting], rank, gradients, []

    values, _, gradients, _ = _mean_over_groups(one_ranking, logits, labels, groups, {"ious": ious})
    return ReferenceRankSort(values[0], values[1], gradients[0], gradients[1])


def ape(
    logits: Tensor,
    labels: Tensor,
    ious: Tensor,
    *,
    delta: float = 0.5,
    eps: float = 1e-10,
    groups: Tensor | None = None,
) -> ReferenceRankSort:
    """APE Loss (D. Xu, J. Deng, W. Li, "Revisiting AP Loss for Dense Object Detection: Adaptive Ranking Pair
    Selection", CVPR 2022), with H as the distance. A positive counts above itself by H(0), as in its authors' code.

    Args:
        ious: ``[P]`` IoU of each positive with its ground truth, in the order of the positives.
        eps: a positive whose H over the negatives, or over the positives of lower IoU, add up to at most this sends no
            gradient to these.
    """

    def one_ranking(pos: Tensor, neg: Tensor, values: dict[str, Tensor]) -> _Result:
        ious = values["ious"]
        ranking, sorting, rank = pos.new_zeros(()), pos.new_zeros(()), torch.zeros_like(pos)
        rank_pos, rank_neg, sort_pos = torch.zeros_like(pos), torch.zeros_like(neg), torch.zeros_like(pos)
        for i, h_neg, h_pos in _pairs(pos, neg, delta, own=1.0 if delta == 0 else 0.5):
            rank[i] = h_pos.sum(dim=1) + h_neg.sum(dim=1)
            # The pairs of i are the negatives and the positives of lower IoU; each has the error IoU(i) H / rank(i).
            each = (ious[i] / rank[i] / len(pos))[:, None]
            false, missorted = h_neg, h_pos * (ious < ious[i][:, None])
            ranking += (each * false).sum()
            sorting += (each * missorted).sum()
            for pairs, own, others in ((false, rank_pos, rank_neg), (missorted, sort_pos, sort_pos)):
                sent = torch.where(pairs.sum(dim=1, keepdim=True) > eps, each * pairs, 0.0)
                own[i] -= sent.sum(dim=1)
                others += sent.sum(dim=0)
        gradients = [torch.cat([rank_pos, rank_neg]), torch.cat([sort_pos, torch.zeros_like(neg)])]
        return [ranking, sorting], rank, gradients, []

    values, _, gradients, _ = _mean_over_groups(one_ranking, logits, labels, groups, {"ious": ious})
    return ReferenceRankSort(values[0], values[1], gradients[0], gradients[1])


# For one ranking: scalars; rank [P]; gradients of scores [P + N], positives first ([M] for several); of values [P].
_Result = tuple[list[Tensor], Tensor, list[Tensor], list[Tensor]]


def _pairs(
    pos: Tensor, neg: Tensor, delta: float, f: PairFunction = ramp, own: float = 0.0
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """For blocks of positives: their indices i ``[I]``, f(x_ij) for negatives j ``[I, N]``, and f(x_ik) for positives k
    ``[I, P]``, with ``own`` for k = i."""
    size = max(1, _PAIRS_PER_BLOCK // max(1, len(pos) + len(neg)))
    for start in range(0, len(pos), size):
        i = torch.arange(start, min(start + size, len(pos)), device=pos.device)
        f_pos = f(difference(pos, pos[i]), delta)
        f_pos[i - start, i] = own
        yield i, f(difference(neg, pos[i]), delta), f_pos


def _shares(pairs: Tensor, eps: float = 0.0) -> Tensor:
    """Each row divided by its sum; 0 if the sum is at most ``eps``."""
    total = pairs.sum(dim=1, keepdim=True)
    # Not "if the sum is larger", which would hide a NaN.
    return torch.where(total <= eps, 0.0, pairs / total)


def _mean_over_groups(
    one_ranking: Callable[[Tensor, Tensor, dict[str, Tensor]], _Result],
    logits: Tensor,
    labels: Tensor,
    groups: Tensor | None,
    values: dict[str, Tensor],
) -> _Result:
    """The mean of ``one_ranking(pos, neg, values)`` over the groups with a positive."""
    logits, values = logits.detach().double(), {name: v.detach().double() for name, v in values.items()}
    pos_index, neg_index = (labels == 1).nonzero()[:, 0], (labels == 0).nonzero()[:, 0]
    for name, v in values.items():
        if len(v) != len(pos_index):
            raise ValueError(f"{name}: expected one for each of the {len(pos_index)} positives, got {len(v)}")
    ids = torch.zeros_like(labels) if groups is None else groups
    # Without a positive any one group is enough: it gives zeros.
    distinct = ids[pos_index].unique().tolist() or [0]
    members = [((ids[pos_index] == g).nonzero()[:, 0], neg_index[ids[neg_index] == g]) for g in distinct]
    results = [one_ranking(logits[pos_index[k]], logits[j], {n: v[k] for n, v in values.items()}) for k, j in members]

    # A zero factor may have removed a NaN; this term restores it everywhere.
    taking_part = torch.cat([pos_index, neg_index])
    seen = [logits[taking_part], *values.values(), *(x.flatten() for result in results for x in result[0] + result[2])]
    poison = torch.where(torch.cat(seen).isnan().any(), torch.nan, 0.0).to(logits)

    def placed(places: list[Tensor], everywhere: Tensor, size: int, parts: tuple[Tensor, ...]) -> Tensor:
        whole = logits.new_zeros(size)
        for place, part in zip(places, parts):
            whole[place] = part
        whole[everywhere] += poison
        return whole

    on_positives = [k for k, _ in members], torch.arange(len(pos_index)), len(pos_index)
    on_logits = [torch.cat([pos_index[k], j]) for k, j in members], taking_part, len(logits)
    scalars, ranks, gradients, grad_values = zip(*results)
    return (
        [torch.stack(parts).mean() + poison for parts in zip(*scalars)],
        placed(*on_positives, ranks),
        [placed(*on_logits, parts) / len(results) for parts in zip(*gradients)],
        [placed(*on_positives, parts) / len(results) for parts in zip(*grad_values)],
    )
