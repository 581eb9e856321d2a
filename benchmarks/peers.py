"""All that is timed, behind one signature: a function of :class:`~.workloads.Inputs` that returns a scalar.

The backends and losses of this package; other ways to compute aLRP Loss and its gradient; and focal loss with GIoU
loss, which trains detectors without ranking.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alrp_triton import alrp_loss, ap_loss, ndcg_loss, rank_sort_loss, reference
from alrp_triton.boxes import box_error, giou
from alrp_triton.engine.passes import BACKENDS, choose, why_unavailable
from alrp_triton.framework import ranking_loss

from .baselines import ap_loop, bucketed_by_means, focal_loss, per_positive_loop, rank_sort_loop, vectorised
from .workloads import Case, Inputs

Loss = Callable[[Inputs], Tensor]


class Contender(NamedTuple):
    """Something to be timed."""

    name: str
    loss: Loss
    of: str | None = "aLRP"  # the loss whose score gradient this has (`exact_gradient`); None for another loss
    approximate: bool = False  # whether the gradient need not be exact to be timed
    work: Callable[[Case], int] = lambda case: case.logits  # what its time grows with, at least
    largest_work: tuple[float, float] = (float("inf"), float("inf"))  # how much work is still timed on a (CPU, GPU)
    waits: bool = False  # the host waits for the device, which no CUDA graph can record

    @property
    def exact(self) -> bool | None:
        """Whether the gradient is claimed to be exact; None for another loss."""
        return None if self.of is None else not self.approximate


def _own_error(ranking: Any) -> Any:
    """The formula of a loss of one's own."""
    return (ranking.num_false_positives / ranking.rank).sqrt()


def exact_gradient(of: str, inputs: Inputs) -> Tensor:
    """The score gradient of a loss in float64, of all levels in a row."""
    scores = inputs.flat().detach().double(), inputs.logit_labels
    errors, boxes = inputs.loc_errors.detach(), (inputs.pred_boxes.detach(), inputs.target_boxes)
    if of == "Rank & Sort":
        found = reference.rank_sort(*scores, errors)
        return found.grad_ranking + found.grad_sorting
    if of == "aLRP by image":
        images = torch.cat([rows.reshape(-1) for rows in inputs.images]).repeat_interleave(inputs.case.classes)
        return reference.alrp(*scores, errors, groups=images).grad_logits
    losses: dict[str, Callable[[], Any]] = {
        "aLRP": lambda: reference.alrp(*scores, errors),
        "aLRP of boxes": lambda: reference.alrp(*scores, box_error(*boxes, "giou", 0.5)),
        "AP": lambda: reference.ap(*scores),
        "AP, plain": lambda: reference.ap(*scores, interpolated=False),
        "NDCG": lambda: reference.ndcg(*scores),
        "your own": lambda: reference.ranking_loss(*scores, _own_error),
    }
    gradient: Tensor = losses[of]().grad_logits
    return gradient


def _single(logits: Tensor) -> Tensor:
    """What the published forms compute in: float32 in place of half precision, as under autocast."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _published(function: Callable[..., Any]) -> Loss:
    def loss(inputs: Inputs) -> Tensor:
        result = function(_single(inputs.flat()), inputs.logit_labels, inputs.loc_errors.detach())
        value: Tensor = result[0] if isinstance(result, tuple) else result
        return value

    return loss


def _scores(inputs: Inputs) -> tuple[Any, Any]:
    """Logits and class labels, as lists only if there are several levels."""
    one = len(inputs.levels) == 1
    return (inputs.levels[0], inputs.class_labels[0]) if one else (inputs.levels, inputs.class_labels)


def our_backend(device: torch.device) -> str:
    """The backend of what is called ours: what ``auto`` takes, but torch on a CPU. Numba has a row of its own."""
    return "triton" if choose("auto", device) == "triton" else "torch"


def _call(loss: Callable[..., Any], inputs: Inputs, *values: Tensor, **settings: Any) -> Any:
    return loss(*_scores(inputs), *values, **{"backend": our_backend(inputs.levels[0].device), **settings})


def _alrp(inputs: Inputs, **settings: Any) -> Tensor:
    out = _call(alrp_loss, inputs, inputs.loc_errors, **settings)
    loss: Tensor = out.cls + out.loc
    return loss


def _of_logit_labels(inputs: Inputs) -> Tensor:
    logits = inputs.flat()
    out = alrp_loss(logits, inputs.logit_labels, inputs.loc_errors, backend=our_backend(logits.device))
    return out.cls + out.loc


def _call_for_each_image(inputs: Inputs) -> Tensor:
    """Of a flat case."""
    rows, labels = (one[0].chunk(inputs.case.batch) for one in (inputs.levels, inputs.class_labels))
    errors = inputs.loc_errors.split([int((part < inputs.case.classes).sum()) for part in labels])
    backend = our_backend(rows[0].device)
    found = [alrp_loss(*call, backend=backend) for call in zip(rows, labels, errors)]
    return torch.stack([out.cls + out.loc for out in found]).mean()


def _rank_sort(inputs: Inputs) -> Tensor:
    out = _call(rank_sort_loss, inputs, inputs.loc_errors)
    loss: Tensor = out.ranking + out.sorting
    return loss


def _focal(inputs: Inputs) -> Tensor:
    """On targets made beforehand."""
    return focal_loss(_single(inputs.flat()), _single(inputs.targets)) / inputs.case.positives


def _focal_giou(inputs: Inputs) -> Tensor:
    return _focal(inputs) + (1 - giou(inputs.pred_boxes, inputs.target_boxes)).mean()


def _focal_of_classes(levels: list[Tensor], labels: list[Tensor], pred: Tensor, target: Tensor) -> Tensor:
    """The same from class labels, which a compiler fuses: it reads no targets from memory."""
    focal = torch.zeros((), device=pred.device)
    for level, classes in zip(levels, labels):
        targets = classes[..., None] == torch.arange(level.shape[-1], device=level.device)
        focal = focal + focal_loss(_single(level), targets.to(torch.float32))
    return focal / len(pred) + (1 - giou(pred, target)).mean()


def _alrp_giou(levels: list[Tensor], labels: list[Tensor], pred: Tensor, target: Tensor) -> Tensor:
    out = alrp_loss(levels, labels, box_error(pred, target, "giou", 0.5), backend=our_backend(pred.device))
    return out.cls + out.loc


def _on_tensors(function: Callable[..., Tensor], compiled: bool) -> Loss:
    @cache
    def call() -> Callable[..., Tensor]:
        # On first use, because loading the compiler takes seconds.
        return torch.compile(function, dynamic=False) if compiled else function

    return lambda inputs: call()(inputs.levels, inputs.class_labels, inputs.pred_boxes, inputs.target_boxes)


def _pairs(case: Case) -> int:
    return case.positives * case.logits


def ours(backend: str) -> str:
    """The name of a backend of this package."""
    return f"ours, {backend}"


LOOP, BUCKETED, FOCAL, FOCAL_COMPILED = "published loop", "bucketed by means", "focal + GIoU", "focal + GIoU, compiled"
OURS_BOXES, OURS_COMPILED, LOGIT_LABELS = "ours + GIoU", "ours + GIoU, compiled", "ours, labels of logits"
ONE_CALL, CALLS = "ours, images in one call", "ours, a call for each image"
COMPILED = (OURS_COMPILED, FOCAL_COMPILED)
LOOPS = {"aLRP": LOOP, "AP": "AP loop", "Rank & Sort": "Rank & Sort loop"}
MEMBERS: dict[str, Loss] = {
    "AP": partial(_call, ap_loss),
    "AP, plain": partial(_call, ap_loss, interpolated=False),
    "Rank & Sort": _rank_sort,
    "NDCG": partial(_call, ndcg_loss),
    "your own": lambda inputs: _call(partial(ranking_loss, error=_own_error), inputs),
}
"""The losses of the family besides aLRP."""


def contenders(device: torch.device) -> dict[str, Contender]:
    """All that can be timed on a device, by name."""
    limits = {"pairwise": (1e9, 1e12), "reference": (1e8, 5e9)}
    loop = {"work": _pairs, "largest_work": (5e9, 1e11), "waits": True}
    found = [
        Contender(LOOP, _published(per_positive_loop), **loop),  # type: ignore[arg-type]
        Contender("vectorised", _published(vectorised), work=_pairs, largest_work=(1e9, 4e10), waits=True),
        Contender(
            BUCKETED, _published(bucketed_by_means), "aLRP", True, lambda c: c.positives**2, (1e9, 1e10), waits=True
        ),
    ]
    for backend in BACKENDS:
        # Triton's interpreter also takes tensors on the CPU, for tests; there is nothing to time.
        if why_unavailable(backend, device) or (device.type == "cpu" and backend in ("triton", "pairwise")):
            continue
        mine = Contender(ours(backend), partial(_alrp, backend=backend), waits=backend == "reference")
        found.append(mine._replace(work=_pairs, largest_work=limits[backend]) if backend in limits else mine)
    return {
        contender.name: contender
        for contender in (
            *found,
            Contender(OURS_BOXES, _on_tensors(_alrp_giou, compiled=False), "aLRP of boxes"),
            Contender(OURS_COMPILED, _on_tensors(_alrp_giou, compiled=True), "aLRP of boxes"),
            Contender(LOGIT_LABELS, _of_logit_labels),
            Contender("focal", _focal, None),
            Contender(FOCAL, _focal_giou, None),
            Contender(FOCAL_COMPILED, _on_tensors(_focal_of_classes, compiled=True), None),
            *(Contender(f"ours, {name}", loss, name) for name, loss in MEMBERS.items()),
            Contender(LOOPS["AP"], _published(lambda x, y, _: ap_loop(x, y)), "AP", **loop),  # type: ignore[arg-type]
            Contender(LOOPS["Rank & Sort"], _published(rank_sort_loop), "Rank & Sort", **loop),  # type: ignore[arg-type]
            Contender(
                ONE_CALL, lambda i: _alrp(i, groups=i.images[0] if len(i.images) == 1 else i.images), "aLRP by image"
            ),
            Contender(CALLS, _call_for_each_image, "aLRP by image", waits=True),
        )
    }


def of_set(name: str, device: torch.device) -> list[str]:
    """A choice of contenders by name, those that the device lacks included."""
    mine = ours(our_backend(device))
    compared = [LOOP, "vectorised", BUCKETED, *map(ours, BACKENDS), OURS_BOXES, LOGIT_LABELS, "focal", FOCAL]
    return {
        "all": [*compared, *COMPILED],
        # Each new shape would be compiled anew.
        "eager": compared,
        "large": [mine, ours("numba")],
        "family": [mine, *(f"ours, {name}" for name in MEMBERS), *LOOPS.values(), ONE_CALL, CALLS],
        "memory": [mine, LOGIT_LABELS],
        "step": [mine, ours("numba"), LOOP],
    }[name]
