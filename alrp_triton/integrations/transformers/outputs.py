"""The outputs of the models of the DETR family, in the form that the framework's criteria take.

The framework calls ``criterion(outputs, labels)``. ``outputs`` has ``"logits"`` [B, Q, C] and ``"pred_boxes"`` [B, Q,
4] (centre, width and height, in units of the image) of the last decoder layer. With ``config.auxiliary_loss`` it also
has ``"auxiliary_outputs"``, such a dictionary for each earlier layer and for the encoder's proposals, if the model has
them, and ``"dn_auxiliary_outputs"`` for the denoising queries of each layer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

__all__ = ["FAMILIES", "Family", "family_of"]

Outputs = dict[str, Any]


class Family(NamedTuple):
    """Models that share a loss of the framework."""

    criterion: Callable[[Any], Any]
    """Makes the framework's criterion for a config; its ``weight_dict`` has the weights of the terms."""
    outputs: Callable[..., Outputs]
    """``outputs(logits, pred_boxes, config, outputs_class, outputs_coord, **others)`` makes the criterion's
    argument."""


def _deformable_criterion(config: Any) -> Any:
    from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher, DeformableDetrImageLoss

    matcher = DeformableDetrHungarianMatcher(config.class_cost, config.bbox_cost, config.giou_cost)
    make: Any = DeformableDetrImageLoss
    criterion = make(matcher, config.num_labels, config.focal_alpha, ["labels", "boxes"])
    boxes = {"loss_bbox": config.bbox_loss_coefficient, "loss_giou": config.giou_loss_coefficient}
    criterion.weight_dict = {"loss_ce": 1.0, **boxes}
    return criterion


def _criterion(module: str, name: str, config: Any) -> Any:
    """Imported when needed, because older versions of the framework do not have all of them."""
    return getattr(import_module(f"transformers.loss.{module}"), name)(config)


def _deformable_outputs(
    logits: Tensor, pred_boxes: Tensor, config: Any, outputs_class: Any = None, outputs_coord: Any = None, **others: Any
) -> Outputs:
    """Layers are the first axis of ``outputs_class`` [L, B, Q, C] and ``outputs_coord`` [L, B, Q, 4]."""
    outputs: Outputs = {"logits": logits, "pred_boxes": _precise(pred_boxes)}
    if config.auxiliary_loss:
        outputs["auxiliary_outputs"] = _layers({"logits": outputs_class, "pred_boxes": outputs_coord}, dim=0)[:-1]
    return outputs


def _rt_detr_outputs(
    logits: Tensor,
    pred_boxes: Tensor,
    config: Any,
    outputs_class: Tensor | None = None,
    outputs_coord: Tensor | None = None,
    enc_topk_logits: Tensor | None = None,
    enc_topk_bboxes: Tensor | None = None,
    denoising_meta_values: dict[str, Any] | None = None,
    predicted_corners: Tensor | None = None,
    initial_reference_points: Tensor | None = None,
    clip: bool = False,
    **further: Any,
) -> Outputs:
    """Layers are the second axis of ``outputs_class`` [B, L, N + Q, C] and ``outputs_coord`` [B, L, N + Q, 4].

    In training N denoising queries precede the Q others, except in the encoder's proposals. D-FINE also has the
    distributions of its boxes and their reference points; it clips boxes to the image.
    """
    if clip:
        boxes = (outputs_coord, enc_topk_bboxes)
        outputs_coord, enc_topk_bboxes = (None if each is None else each.clamp(0, 1) for each in boxes)
    outputs: Outputs = {"logits": logits, "pred_boxes": _precise(pred_boxes.clamp(0, 1) if clip else pred_boxes)}
    stacked: dict[str, Any] = {"logits": outputs_class, "pred_boxes": outputs_coord}
    if predicted_corners is not None:
        stacked |= {"pred_corners": predicted_corners, "ref_points": initial_reference_points}
    if denoising_meta_values is not None:
        split = denoising_meta_values["dn_num_split"]
        outputs = {name: value.split(split, dim=1)[1] for name, value in outputs.items()}
    if not config.auxiliary_loss:
        return outputs
    if denoising_meta_values is not None:
        noisy, stacked = ({name: value.split(split, dim=2)[i] for name, value in stacked.items()} for i in (0, 1))
        outputs["dn_auxiliary_outputs"] = _layers(noisy, dim=1)
        outputs["denoising_meta_values"] = denoising_meta_values
    proposals = {"logits": enc_topk_logits, "pred_boxes": _precise(enc_topk_bboxes)}
    outputs["auxiliary_outputs"] = [*_layers(stacked, dim=1)[:-1], proposals]
    return outputs


def _layers(stacked: dict[str, Any], dim: int) -> list[dict[str, Tensor]]:
    """The outputs of each layer, from tensors that have the layers along ``dim``."""
    unbound = {name: value.unbind(dim) for name, value in stacked.items()}
    unbound["pred_boxes"] = [_precise(boxes) for boxes in unbound["pred_boxes"]]
    layers = [dict(zip(unbound, values)) for values in zip(*unbound.values())]
    if "pred_corners" in stacked:  # layers of D-FINE learn from the last layer
        teacher = {"teacher_corners": layers[-1]["pred_corners"], "teacher_logits": layers[-1]["logits"]}
        layers = [{**layer, **teacher} for layer in layers]
    return layers


def _precise(boxes: Any) -> Tensor:
    """At least float32: in half precision a box has only some hundred positions in an image."""
    precise: Tensor = boxes.to(torch.promote_types(boxes.dtype, torch.float32))
    return precise


_DEFORMABLE = Family(_deformable_criterion, _deformable_outputs)
_RT_DETR = Family(partial(_criterion, "loss_rt_detr", "RTDetrLoss"), _rt_detr_outputs)
_D_FINE = Family(partial(_criterion, "loss_d_fine", "DFineLoss"), partial(_rt_detr_outputs, clip=True))

FAMILIES = {
    "ConditionalDetrForObjectDetection": _DEFORMABLE,
    "DeformableDetrForObjectDetection": _DEFORMABLE,
    "DabDetrForObjectDetection": _DEFORMABLE,
    "RTDetrForObjectDetection": _RT_DETR,
    "RTDetrV2ForObjectDetection": _RT_DETR,
    "DFineForObjectDetection": _D_FINE,
}
"""By the names of the model classes, so that none must be imported, or exist in an older version."""


def family_of(model: object) -> tuple[str, Family]:
    """The name of the framework's class that a model is of, and its family.

    Raises:
        TypeError: it is none of these models, or it is wrapped.
    """
    names = [base.__name__ for base in type(model).__mro__ if base.__name__ in FAMILIES]
    if not isinstance(model, PreTrainedModel) or not names:
        raise TypeError(f"model: expected one of {', '.join(FAMILIES)}, not yet wrapped, got {type(model).__name__}")
    return names[0], FAMILIES[names[0]]
