"""What the models of the DETR family hand to their loss, in the form in which the framework's criteria take it.

A criterion of the framework is called as ``criterion(outputs, labels)``. ``outputs`` has the last decoder layer's
``"logits"`` [B, Q, C] and ``"pred_boxes"`` [B, Q, 4] (centre, width and height, in units of the image); with
``config.auxiliary_loss`` also ``"auxiliary_outputs"``, such a dictionary for each layer before it and, where the model
has them, for the encoder's proposals; and ``"dn_auxiliary_outputs"`` for the denoising queries of each layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["FAMILIES", "Family", "Outputs"]

Outputs = dict[str, Any]


class Family(NamedTuple):
    """Models that share a loss of the framework."""

    criterion: Callable[[Any], Any]
    """Makes the framework's criterion for a config, with the weights of its terms as ``weight_dict``."""
    outputs: Callable[..., Outputs]
    """``outputs(logits, pred_boxes, config, outputs_class, outputs_coord, **others)``, what the criterion is given."""
    has_proposals: bool
    """Whether the encoder's proposals are supervised, too."""

    def supervised_outputs(self, config: Any) -> int:
        """How many outputs get a loss of their own where ``config.auxiliary_loss`` is on."""
        return int(config.decoder_layers) + self.has_proposals


def _deformable_criterion(config: Any) -> Any:
    from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher, DeformableDetrImageLoss

    matcher = DeformableDetrHungarianMatcher(config.class_cost, config.bbox_cost, config.giou_cost)
    make: Any = DeformableDetrImageLoss
    criterion = make(matcher, config.num_labels, config.focal_alpha, ["labels", "boxes"])
    criterion.weight_dict = {
        "loss_ce": 1.0,
        "loss_bbox": config.bbox_loss_coefficient,
        "loss_giou": config.giou_loss_coefficient,
    }
    return criterion


def _deformable_outputs(
    logits: Tensor,
    pred_boxes: Tensor,
    config: Any,
    outputs_class: Tensor | None = None,
    outputs_coord: Tensor | None = None,
    **others: Any,
) -> Outputs:
    """Layers come first in ``outputs_class`` [L, B, Q, C] and ``outputs_coord`` [L, B, Q, 4]."""
    outputs: Outputs = {"logits": logits, "pred_boxes": _precise(pred_boxes)}
    if config.auxiliary_loss:
        outputs["auxiliary_outputs"] = _layers({"logits": outputs_class, "pred_boxes": outputs_coord}, dim=0)[:-1]
    return outputs


def _rt_detr_criterion(config: Any) -> Any:
    from transformers.loss.loss_rt_detr import RTDetrLoss

    make: Any = RTDetrLoss
    return make(config)


def _rt_detr_outputs(
    logits: Tensor,
    pred_boxes: Tensor,
    config: Any,
    outputs_class: Tensor | None = None,
    outputs_coord: Tensor | None = None,
    enc_topk_logits: Tensor | None = None,
    enc_topk_bboxes: Tensor | None = None,
    denoising_meta_values: dict[str, Any] | None = None,
    **further: Any,
) -> Outputs:
    """Layers come second in ``outputs_class`` [B, L, N + Q, C] and ``outputs_coord`` [B, L, N + Q, 4].

    In training N denoising queries precede the Q others, everywhere but in the encoder's proposals.
    """
    outputs: Outputs = {"logits": logits, "pred_boxes": _precise(pred_boxes)}
    stacked: dict[str, Any] = {"logits": outputs_class, "pred_boxes": outputs_coord, **_corners(**further)}
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


def _d_fine_criterion(config: Any) -> Any:
    from transformers.loss.loss_d_fine import DFineLoss

    make: Any = DFineLoss
    return make(config)


def _d_fine_outputs(
    logits: Tensor,
    pred_boxes: Tensor,
    config: Any,
    outputs_class: Tensor | None = None,
    outputs_coord: Tensor | None = None,
    enc_topk_logits: Tensor | None = None,
    enc_topk_bboxes: Tensor | None = None,
    **others: Any,
) -> Outputs:
    """As RT-DETR's, with boxes clipped to the image."""
    coord, proposals = (None if boxes is None else boxes.clamp(0, 1) for boxes in (outputs_coord, enc_topk_bboxes))
    return _rt_detr_outputs(
        logits, pred_boxes.clamp(0, 1), config, outputs_class, coord, enc_topk_logits, proposals, **others
    )


def _corners(
    predicted_corners: Tensor | None = None, initial_reference_points: Tensor | None = None, **others: Any
) -> dict[str, Tensor]:
    """The distributions that D-FINE's boxes come from, and what they are relative to; of other models nothing."""
    if predicted_corners is None or initial_reference_points is None:
        return {}
    return {"pred_corners": predicted_corners, "ref_points": initial_reference_points}


def _layers(stacked: dict[str, Any], dim: int) -> list[dict[str, Tensor]]:
    """The outputs of each layer, from tensors that have the layers along ``dim``."""
    unbound = {name: value.unbind(dim) for name, value in stacked.items()}
    unbound["pred_boxes"] = [_precise(boxes) for boxes in unbound["pred_boxes"]]
    layers = [dict(zip(unbound, values)) for values in zip(*unbound.values())]
    if "pred_corners" in stacked:  # layers of D-FINE learn from the last of them
        teacher = {"teacher_corners": layers[-1]["pred_corners"], "teacher_logits": layers[-1]["logits"]}
        layers = [{**layer, **teacher} for layer in layers]
    return layers


def _precise(boxes: Any) -> Tensor:
    """In float32 at least: half precision leaves a box some hundred places in an image."""
    precise: Tensor = boxes.to(torch.promote_types(boxes.dtype, torch.float32))
    return precise


_DEFORMABLE = Family(_deformable_criterion, _deformable_outputs, has_proposals=False)
_RT_DETR = Family(_rt_detr_criterion, _rt_detr_outputs, has_proposals=True)
_D_FINE = Family(_d_fine_criterion, _d_fine_outputs, has_proposals=True)

FAMILIES = {
    "ConditionalDetrForObjectDetection": _DEFORMABLE,
    "DeformableDetrForObjectDetection": _DEFORMABLE,
    "DabDetrForObjectDetection": _DEFORMABLE,
    "RTDetrForObjectDetection": _RT_DETR,
    "RTDetrV2ForObjectDetection": _RT_DETR,
    "DFineForObjectDetection": _D_FINE,
}
"""By the names of the model classes, so that none need be imported, nor exist in an older version."""
