"""All that the suite times, behind one signature: a function of :class:`~.workloads.Inputs` that returns a scalar.

What other ways there are to have the loss and its gradient: the published loop (``baselines.per_positive_loop``), all
pairs at once (:func:`vectorised`), and buckets of negatives (:func:`bucketed_by_means`). What else trains a detector:
focal loss with GIoU loss. And the backends of this package.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alrp_triton import alrp_loss
from alrp_triton.boxes import box_error, giou
from alrp_triton.engine.backends import BACKENDS, why_unavailable

from .baselines import focal_loss, per_positive_loop, ramp, with_gradient, within_reach
from .workloads import Case, Inputs

PAIRS_AT_ONCE = 1 << 26
"""What bounds the memory of the forms by pairs: 256 MB for a float32 matrix, of which a few live at once."""


class _Pairs(NamedTuple):
    cls: Tensor
    excess: Tensor
    """``[P]``: what each positive loses, times P."""
    share: Tensor
    """``[N]``: what a single negative of each column receives, times P."""


def _all_pairs(pos: Tensor, neg: Tensor, sizes: Tensor | None, errors: Tensor, delta: float, eps: float) -> _Pairs:
    """aLRP by matrices of positives against columns; ``sizes`` says how many negatives a column stands for."""
    cls, excess, share = pos.new_zeros(()), torch.empty_like(pos), torch.zeros_like(neg)
    step = max(1, PAIRS_AT_ONCE // max(1, len(pos), len(neg)))
    for begin in range(0, len(pos), step):
        rows = slice(begin, begin + step)
        above = ramp(pos - pos[rows, None], delta)
        above.diagonal(begin).zero_()
        false = ramp(neg - pos[rows, None], delta)
        num_false_positives = false.sum(1) if sizes is None else false @ sizes
        rank = 1 + above.sum(1) + num_false_positives
        cls += (num_false_positives / rank).sum()
        active = num_false_positives > eps
        excess[rows] = torch.where(active, (above @ errors + num_false_positives) / rank, 0)
        share += torch.where(active, excess[rows] / num_false_positives, 0) @ false
    return _Pairs(cls / len(pos), excess, share)


def vectorised(logits: Tensor, labels: Tensor, loc_errors: Tensor, delta: float = 1.0, eps: float = 1e-5) -> Tensor:
    """aLRP's classification component and its gradient by all P x M pairs, O(P M) time, without a loop where they fit.

    Positives are taken in chunks of :data:`PAIRS_AT_ONCE` pairs, which bounds the memory and costs nothing beside the
    work of so many. Negatives that no ramp reaches are left out, as in the published loop. Arguments: see
    :func:`~.baselines.per_positive_loop`; at least one positive.
    """
    scores, gradient, is_pos = logits.detach(), torch.zeros_like(logits), labels == 1
    pos = scores[is_pos]
    is_neg, neg = within_reach(scores, labels, pos, delta)
    pairs = _all_pairs(pos, neg, None, loc_errors.detach(), delta, eps)
    gradient[is_pos], gradient[is_neg] = -pairs.excess / len(pos), pairs.share / len(pos)
    return with_gradient(logits, pairs.cls, gradient)


def bucketed_by_means(
    logits: Tensor, labels: Tensor, loc_errors: Tensor, delta: float = 1.0, eps: float = 1e-5
) -> Tensor:
    """aLRP's classification component with negatives in buckets, O(M log M + P^2) time; an approximation.

    From the description by F. Yavuz et al., "Bucketed Ranking-based Losses for Efficient Training of Object Detectors",
    ECCV 2024: all scores are sorted, the negatives between two neighbouring positives become a bucket that stands at
    the mean of their scores, positives are compared with buckets, and the members of a bucket share its gradient
    equally. Exact for the step (``delta`` = 0), and where no bucket holds two different scores; otherwise the ramp at
    the mean stands for the mean of the ramps. Arguments: see :func:`~.baselines.per_positive_loop`; at least one
    positive.
    """
    scores, gradient, is_pos = logits.detach(), torch.zeros_like(logits), (labels == 1).nonzero(as_tuple=True)
    pos, ascending = scores[is_pos].sort()
    errors = loc_errors.detach()[ascending]
    is_neg, neg = within_reach(scores, labels, pos, delta)
    # Stable, positives first: a negative that equals a positive counts as above it and belongs to the bucket above.
    in_order, places = torch.cat([pos, neg]).sort(stable=True)
    negatives = places >= len(pos)
    is_first = (~negatives).nonzero().squeeze(1)
    limits = torch.cat([is_first.new_tensor([-1]), is_first, is_first.new_tensor([len(in_order)])])
    sizes = limits.diff() - 1
    members = in_order[negatives]
    means = _means(members, sizes)
    pairs = _all_pairs(pos, means, sizes.to(pos.dtype), errors, delta, eps)
    received = torch.empty_like(neg)
    received[places[negatives] - len(pos)] = pairs.share.repeat_interleave(sizes, output_size=len(neg))
    pos_gradient = torch.empty_like(pos)
    pos_gradient[ascending] = -pairs.excess
    gradient[is_pos], gradient[is_neg] = pos_gradient / len(pos), received / len(pos)
    return with_gradient(logits, pairs.cls, gradient)


def _means(members: Tensor, sizes: Tensor) -> Tensor:
    """The mean of each run of ``sizes`` sorted members; 0 for an empty one."""
    if len(members) == 0:
        return torch.zeros(len(sizes), dtype=members.dtype, device=members.device)
    # In float64: over millions of members float32 sums would be off by more than the ramps are wide.
    sums = torch.cat([members.new_zeros(1, dtype=torch.float64), members.cumsum(0, dtype=torch.float64)])
    ends = sizes.cumsum(0)
    means = ((sums[ends] - sums[ends - sizes]) / sizes.clamp(min=1)).to(members.dtype)
    # Rounding may not carry a mean past the bucket's own positive.
    last = len(members) - 1
    means = means.maximum(members[(ends - sizes).clamp(max=last)]).minimum(members[(ends - 1).clamp(min=0)])
    return torch.where(sizes > 0, means, 0)


class Contender(NamedTuple):
    """Something to be timed."""

    name: str
    loss: Callable[[Inputs], Tensor]
    exact: bool | None
    """Whether its score gradient is claimed to be aLRP's own; None where it is another loss."""
    work: Callable[[Case], int] = lambda case: case.logits
    """What its time grows with, at least."""
    largest_work: tuple[float, float] = (float("inf"), float("inf"))
    """What of that is still timed on a (CPU, GPU)."""
    by_positive: bool = False
    """One positive after the other: a part of them tells how long all would take."""
    waits: bool = False
    """Whether the host waits for the device, which no CUDA graph can record."""
    compiled: bool = False
    with_boxes: bool = False
    """Whether localisation errors come from the boxes."""


def _single(logits: Tensor) -> Tensor:
    """What the published forms compute in: float32 where scores are half as wide, as under autocast."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _published(function: Callable[..., Any]) -> Callable[[Inputs], Tensor]:
    def loss(inputs: Inputs) -> Tensor:
        result = function(_single(inputs.flat()), inputs.logit_labels, inputs.loc_errors)
        value: Tensor = result[0] if isinstance(result, tuple) else result
        return value

    return loss


def _ours(backend: str) -> Callable[[Inputs], Tensor]:
    def loss(inputs: Inputs) -> Tensor:
        one = len(inputs.levels) == 1
        logits, labels = (t[0] if one else t for t in (inputs.levels, inputs.class_labels))
        out = alrp_loss(logits, labels, inputs.loc_errors, backend=backend)
        return out.cls + out.loc

    return loss


def errors_of_boxes(pred: Tensor, target: Tensor) -> Tensor:
    """Localisation errors by GIoU, as :class:`alrp_triton.ALRPLoss` has them."""
    return box_error(pred, target, "giou", 0.5)


def _alrp_giou(levels: list[Tensor], labels: list[Tensor], pred: Tensor, target: Tensor) -> Tensor:
    out = alrp_loss(levels, labels, errors_of_boxes(pred, target))
    return out.cls + out.loc


def focal_giou(inputs: Inputs) -> Tensor:
    """Focal loss on targets made beforehand, and GIoU loss."""
    focal = focal_loss(_single(inputs.flat()), _single(inputs.targets))
    return focal / inputs.case.positives + (1 - giou(inputs.pred_boxes, inputs.target_boxes)).mean()


def _focal_giou(levels: list[Tensor], labels: list[Tensor], pred: Tensor, target: Tensor) -> Tensor:
    """The same with targets from class labels: what a compiler fuses, so that no targets are read from memory."""
    focal = torch.zeros((), device=pred.device)
    for level, classes in zip(levels, labels):
        targets = classes[..., None] == torch.arange(level.shape[-1], device=level.device)
        focal = focal + focal_loss(_single(level), targets.to(torch.float32))
    return focal / len(pred) + (1 - giou(pred, target)).mean()


def _on_tensors(function: Callable[..., Tensor], compiled: bool) -> Callable[[Inputs], Tensor]:
    """A contender of a function of tensors alone; compiled for static shapes at the first call."""

    @cache
    def call() -> Callable[..., Tensor]:
        # Not before it is needed: loading the compiler takes seconds.
        return torch.compile(function, dynamic=False) if compiled else function

    def loss(inputs: Inputs) -> Tensor:
        return call()(inputs.levels, inputs.class_labels, inputs.pred_boxes, inputs.target_boxes)

    return loss


def _pairs(case: Case) -> int:
    return case.positives * case.logits


LOOP, BUCKETED, FOCAL, FOCAL_COMPILED = "published loop", "bucketed by means", "focal + GIoU", "focal + GIoU, compiled"
OURS_BOXES, OURS_COMPILED = "ours + GIoU", "ours + GIoU, compiled"


def ours(backend: str) -> str:
    """The name of a backend of this package."""
    return f"ours, {backend}"


def contenders(device: torch.device) -> dict[str, Contender]:
    """All that can be timed on a device, by name."""
    found = [
        Contender(LOOP, _published(per_positive_loop), True, _pairs, (4e8, 3.2e9), by_positive=True, waits=True),
        Contender("vectorised", _published(vectorised), True, _pairs, (1e9, 4e10), waits=True),
        Contender(
            BUCKETED, _published(bucketed_by_means), False, lambda case: case.positives**2, (1e9, 1e10), waits=True
        ),
    ]
    limits = {"pairwise": (1e9, 1e12), "reference": (1e8, 5e9)}
    for backend in BACKENDS:
        # In Triton's interpreter, the CPU also takes the kernels: a test of them, and nothing to time.
        if why_unavailable(backend, device) or (device.type == "cpu" and backend in ("triton", "pairwise")):
            continue
        mine = Contender(ours(backend), _ours(backend), True, waits=backend == "reference")
        if backend in limits:
            mine = mine._replace(work=_pairs, largest_work=limits[backend])
        found.append(mine)
    found += [
        Contender(OURS_BOXES, _on_tensors(_alrp_giou, compiled=False), True, with_boxes=True),
        Contender(OURS_COMPILED, _on_tensors(_alrp_giou, compiled=True), True, with_boxes=True, compiled=True),
        Contender(FOCAL, focal_giou, None),
        Contender(FOCAL_COMPILED, _on_tensors(_focal_giou, compiled=True), None, compiled=True),
    ]
    return {contender.name: contender for contender in found}
