"""Common code of the detectors: give a part of an existing model another loss, and take it away again."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection._utils import Matcher

from ...engine.devices import is_asynchronous
from ...engine.inputs import debug_checks
from .._criteria import image_of_each, losses_of

__all__ = ["DenseHead", "RankingPart", "Targets", "check_labels", "check_part", "first_objects", "mix_in", "mix_out"]

Targets = list[dict[str, Tensor]]


class RankingPart(nn.Module):
    """A part of a detector with a ranking criterion; :func:`mix_in` adds it to the class of one instance."""

    ranking_criterion: nn.Module
    ranking_per_image: bool

    def ranking_losses(
        self, logits: Tensor, labels: Tensor, num: int, boxes: Callable[[], tuple[Tensor, Tensor]], images: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """As :func:`losses_of`; ``images`` gives the image of each row of the labels."""
        groups = images if self.ranking_per_image else None
        return losses_of(self.ranking_criterion, logits, labels, num, boxes, groups)

    @property
    def ranking_ignored(self) -> int:
        return getattr(self.ranking_criterion, "ignore_index", -1)

    def set_stock_weights(self) -> None:
        """Set weights so that the stock forward gives the detections of this one; called by ``restore``."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # A checkpoint without any state of a criterion is one of a model without the loss: the criterion keeps its own.
        own = f"{prefix}ranking_criterion."
        if not any(key.startswith(own) for key in state_dict):
            state_dict.update(self.ranking_criterion.state_dict(prefix=own))
        super()._load_from_state_dict(state_dict, prefix, *rest)  # type: ignore[no-untyped-call]

    def __reduce__(self) -> tuple[Any, ...]:
        # pickle cannot import the combined class by name.
        return _empty, type(self).__bases__, self.__dict__


class DenseHead(RankingPart):
    """The head of a RetinaNet or FCOS: scores of all anchors, or points, of all levels and images in one ranking."""

    decode: Callable[[Tensor, Tensor], Tensor]
    """Boxes [P, 4] of the deltas and anchors [P, 4] of the positives."""
    kept_losses: Callable[..., dict[str, Tensor]]
    """The losses that remain the model's own, by name; the first argument says whether the criterion trains the
    boxes."""

    def compute_loss(
        self, targets: Targets, head_outputs: dict[str, Tensor], anchors: list[Tensor], matched_idxs: list[Tensor]
    ) -> dict[str, Tensor]:
        """The parts of the loss; arguments as in torchvision's heads."""
        logits, deltas = head_outputs["cls_logits"], head_outputs["bbox_regression"]  # [B, A, C], [B, A, 4]
        check_labels(targets, logits.shape[-1])
        gt_labels, gt_boxes = (torch.cat([target[key] for target in targets]) for key in ("labels", "boxes"))  # of G
        matched = torch.stack(matched_idxs)  # [B, A], an index into the image's own objects or a Matcher code
        positives = torch.nonzero(matched >= 0, as_tuple=True)  # row-major, the order that the losses expect
        objects = matched[positives] + first_objects(targets)[positives[0]]  # [P], of all G

        labels = torch.where(matched == Matcher.BETWEEN_THRESHOLDS, self.ranking_ignored, logits.shape[-1])
        labels[positives] = gt_labels[objects].to(labels.dtype)

        def boxes() -> tuple[Tensor, Tensor]:
            # Under autocast the deltas are half precision, which is too coarse for pixels: decode in the dtype of the
            # boxes.
            at_positives = deltas[positives].to(gt_boxes.dtype), torch.stack(anchors)[positives]
            return self.decode(*at_positives), gt_boxes[objects]

        cls, loc = self.ranking_losses(logits, labels, len(objects), boxes, image_of_each(matched))
        losses = {"classification": cls} if loc is None else {"classification": cls, "bbox_regression": loc}
        return {**losses, **self.kept_losses(loc is not None, targets, head_outputs, anchors, matched_idxs)}


def first_objects(targets: Targets) -> Tensor:
    """The index of the first object of each image among those of all images, [B]."""
    counts = torch.tensor([len(target["boxes"]) for target in targets], device=targets[0]["boxes"].device)
    return counts.cumsum(0) - counts


def check_labels(targets: Targets, end: int) -> None:
    """Labels of 0 to ``end - 1``. On a GPU the host would have to wait for them, so there ``ALRP_TRITON_DEBUG=1`` turns
    the check on.

    Raises:
        ValueError: a label is none of them; the message has the label and its image, counted from 0.
    """
    if is_asynchronous(targets[0]["labels"].device) and not debug_checks():
        return
    for image, target in enumerate(targets):
        labels = target["labels"]
        wrong = labels[(labels < 0) | (labels >= end)]
        if len(wrong):
            value = wrong[0].item()
            wanted = f"below {end}" if value >= end else "0 or above"
            raise ValueError(f"labels of image {image}: {value}, expected {wanted}")


def check_part(model: nn.Module, name: str, kind: type) -> None:
    part = getattr(model, name)
    if not isinstance(part, kind):
        raise TypeError(f"model.{name}: expected a torchvision {kind.__name__}, got {type(part).__name__}")


def mix_in(part: nn.Module, mixin: type[RankingPart], criterion: nn.Module, per_image: bool, **settings: Any) -> None:
    """Give ``part`` the methods of ``mixin``, and replace its criterion and settings, ``ranking_...``."""
    if not isinstance(part, mixin):
        # torchvision has no hook here, so the instance changes its class. This also works for copies and replicas.
        part.__class__ = _combined(mixin, type(part))  # type: ignore[arg-type]
    # A new criterion is on the CPU; the model may be on another device.
    settings |= {"criterion": criterion.to(next(part.parameters()).device), "per_image": per_image}
    for name, value in settings.items():
        setattr(part, f"ranking_{name}", value)


def mix_out(part: RankingPart) -> None:
    """The inverse of :func:`mix_in`: the part has its own class again, and neither criterion nor settings."""
    part.set_stock_weights()
    part.__class__ = type(part).__bases__[1]  # type: ignore[assignment]
    for name in [name for name in (*vars(part), *part._modules) if name.startswith("ranking_")]:
        delattr(part, name)


@cache
def _combined(mixin: type, base: type) -> type:
    """``base`` with ``mixin``; the same class for the same arguments."""
    return type(f"Ranking{base.__name__}", (mixin, base), {"__module__": __name__})


def _empty(mixin: type, base: type) -> nn.Module:
    """An empty part for ``pickle`` and ``copy`` to fill."""
    part: nn.Module = object.__new__(_combined(mixin, base))
    return part
