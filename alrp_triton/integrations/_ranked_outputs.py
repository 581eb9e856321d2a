"""What the integrations of DETR-like detectors share: a mixin by which one call ranks all supervised outputs of a
batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..engine.devices import is_asynchronous
from ..engine.inputs import debug_checks
from ._criteria import losses_of, of_this_process, takes_boxes

__all__ = ["Matched", "RankedOutputs", "ranked_class"]

Objects = Sequence[dict[str, Tensor]]
Indices = Sequence[tuple[Tensor, Tensor]]

_CLASSIFICATION = frozenset({"labels", "focal", "bce", "vfl", "mal"})
"""What criteria of the family call the loss that is replaced."""
# Sides in units of the image are not as long, even if boxes reach beyond it.
_MOST = 4.0


class Matched(NamedTuple):
    """One supervised output, with P of its B * Q queries matched to objects, in ascending order."""

    logits: Tensor
    """[B, Q, C]"""
    boxes: Tensor
    """[B, Q, 4]: centre, width and height."""
    rows: Tensor
    """[P] int64: the matched queries among B * Q."""
    classes: Tensor
    """[P], of the objects."""
    true_boxes: Tensor
    """[P, 4], of the objects."""


class RankedOutputs:
    """Mixed into a criterion of the family: its matching and box terms remain, and a ranking loss replaces the terms of
    the classification, and GIoU if the ranking loss takes boxes.

    Outputs under names that begin with ``dn_``, at any depth, keep all their terms: their queries are made from the
    objects, and would rank above the others. ``loss_cls`` and ``loss_loc`` are the sums over the other outputs of what
    a call for each of them would return, but for the weight of the boxes: that of Rank & Sort Loss is a ratio of the
    whole call, so the gradients of the boxes differ from those of separate calls. They are not weighted further. Names
    begin with ``ranking_``, to be none of the framework's.
    """

    ranking_criterion: nn.Module
    ranking_per_image: bool
    ranking_keys = ("pred_logits", "labels")
    """The framework's names of logits and classes."""

    def forward(self, outputs: dict[str, Any], targets: Objects, *more: Any, **options: Any) -> dict[str, Tensor]:
        """The terms by name, from the framework's arguments."""
        # By identity, because the framework passes the same objects to get_loss.
        self.ranking_noisy = {
            id(each) for name, value in outputs.items() if name.startswith("dn_") for each in _dicts_of(value)
        }
        self.ranking_found: list[Matched] = []
        try:
            terms: dict[str, Tensor] = super().forward(outputs, targets, *more, **options)  # type: ignore[misc]
            return {**terms, **self.ranking_terms(self.ranking_found)}
        finally:
            del self.ranking_found, self.ranking_noisy  # and the graph

    def get_loss(
        self, loss: str, outputs: dict[str, Any], targets: Objects, indices: Indices, *more: Any, **options: Any
    ) -> dict[str, Tensor]:
        """The terms of one output for ``loss`` of the framework; the arguments are the framework's."""
        ranked = id(outputs) not in self.ranking_noisy
        if ranked and loss in _CLASSIFICATION:
            self.ranking_found.append(_matched(outputs, targets, indices, *self.ranking_keys))
            return {}
        terms: dict[str, Tensor] = super().get_loss(loss, outputs, targets, indices, *more, **options)  # type: ignore[misc]
        if ranked and takes_boxes(self.ranking_criterion):
            terms.pop("loss_giou", None)
        return terms

    def ranking_terms(self, outputs: Sequence[Matched]) -> dict[str, Tensor]:
        """``loss_cls`` and, if the criterion takes boxes, ``loss_loc``, in one call for all outputs.

        Raises:
            ValueError: there are none, or outputs differ in the number of classes.
        """
        if not outputs:
            wanted = f"one that asks get_loss for one of {sorted(_CLASSIFICATION)} of an output"
            raise ValueError(f"criterion: expected {wanted}, got none")
        numbers = {each.logits.shape[2] for each in outputs}
        if len(numbers) > 1:
            raise ValueError(f"outputs: expected logits of one number of classes, got {sorted(numbers)}")
        for each in outputs:
            _check_objects(each, self.ranking_keys[1])
        logits = torch.cat([each.logits.flatten(0, 1) for each in outputs])
        first_rows = accumulate((each.logits.shape[:2].numel() for each in outputs), initial=0)
        rows = torch.cat([each.rows + first for first, each in zip(first_rows, outputs)])
        labels = torch.full(logits.shape[:1], logits.shape[1], device=logits.device)
        labels[rows] = torch.cat([each.classes for each in outputs]).to(labels.dtype)

        def boxes() -> tuple[Tensor, Tensor]:
            predicted = torch.cat([each.boxes.flatten(0, 1) for each in outputs])[rows]
            return _corners(predicted), _corners(torch.cat([each.true_boxes for each in outputs]))

        # In training the queries of RF-DETR have equal parts, each matched alone.
        parts = getattr(self, "group_detr", 1) if getattr(self, "training", False) else 1
        groups = _groups(outputs, parts, self.ranking_per_image)
        cls, loc = losses_of(self.ranking_criterion, logits, labels, len(rows), boxes, groups)
        terms = {"loss_cls": cls} if loc is None else {"loss_cls": cls, "loss_loc": loc}
        # All outputs have as many groups with objects, so that this sums the means of the outputs.
        factor = len(outputs) * (parts if getattr(self, "sum_group_losses", False) else 1)
        return {name: value * factor for name, value in terms.items()}


def _dicts_of(value: Any) -> Iterator[dict[str, Any]]:
    """The dicts in nested dicts and lists, with the outermost."""
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from _dicts_of(each)


def _matched(outputs: dict[str, Any], targets: Objects, indices: Indices, logits_key: str, classes_key: str) -> Matched:
    """One output; ``indices`` are the matched queries and their objects of each image.

    Raises:
        ValueError: objects are padded to a common number.
    """
    if any("valid" in target for target in targets):
        raise ValueError("targets: expected objects alone, got padded ones; leave pad_targets_to at None")
    logits, boxes = outputs[logits_key], outputs["pred_boxes"]
    rows = torch.cat([queries + i * logits.shape[1] for i, (queries, _) in enumerate(indices)])
    before = accumulate((len(target["boxes"]) for target in targets), initial=0)
    objects = torch.cat([objects + n for n, (_, objects) in zip(before, indices)])
    rows, order = rows.sort()  # the losses take positives in this order
    classes, true_boxes = (torch.cat([each[key] for each in targets]) for key in (classes_key, "boxes"))
    objects = objects[order].to(true_boxes.device)
    return Matched(logits, boxes, rows.to(logits.device), classes[objects], true_boxes[objects])


def _check_objects(output: Matched, name: str) -> None:
    """Raise for wrong classes, by this name, and boxes. On a GPU the host would wait, so there
    ``ALRP_TRITON_DEBUG=1`` turns the check on."""
    classes, boxes, num_classes = output.classes, output.true_boxes, output.logits.shape[2]
    if not classes.numel() or (is_asynchronous(classes.device) and not debug_checks()):
        return
    lowest, highest = (int(end) for end in classes.aminmax())
    if lowest < 0 or highest >= num_classes:
        got = lowest if lowest < 0 else highest
        raise ValueError(f"{name}: expected classes from 0 to {num_classes - 1}, got {got}")
    if boxes.max() > _MOST:
        wanted = "(centre x, centre y, width, height) in units of the image, in [0, 1]"
        raise ValueError(
            f"boxes: expected {wanted}, got up to {float(boxes.max()):g}; divide pixels by the image's size"
        )


def _groups(outputs: Sequence[Matched], parts: int, per_image: bool) -> Tensor | None:
    """The ranking of each row, of the output, the part of the queries and, with ``per_image``, the image; None if there
    is one ranking."""
    groups, begin = [], 0
    for each in outputs:
        num_images, num_queries = each.logits.shape[:2]
        num_apart = num_images if per_image else 1
        end = begin + num_apart * parts
        ranking = torch.arange(begin, end, device=each.logits.device).view(num_apart, parts, 1)
        groups.append(ranking.expand(num_images, parts, num_queries // parts).flatten())
        begin = end
    if begin == 1:
        return None
    return of_this_process(torch.cat(groups)) if per_image else torch.cat(groups)


def _corners(boxes: Tensor) -> Tensor:
    """(x1, y1, x2, y2) of boxes [P, 4] given as (centre x, centre y, width, height); at least float32."""
    boxes = boxes.to(torch.promote_types(boxes.dtype, torch.float32))
    centre, half = boxes[:, :2], boxes[:, 2:] / 2
    return torch.cat([centre - half, centre + half], dim=1)


@cache
def ranked_class(mixin: type, base: type) -> type:
    """``base`` with ``mixin``, a :class:`RankedOutputs`, before it; the same class for the same arguments."""
    return type(f"Ranked{base.__name__}", (mixin, base), {"__module__": mixin.__module__})
