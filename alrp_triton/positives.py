"""The values of the positives, from values for all anchors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .engine import check_inputs, operators, passes
from .engine.inputs import check_tensors
from .engine.passes.find import local_indices, place_of

__all__ = ["at_positives"]


def at_positives(
    logits: Tensor | Sequence[Tensor],
    labels: Tensor | Sequence[Tensor],
    values: Tensor | Sequence[Tensor],
    *,
    ignore_index: int = -1,
    num_positives: int | None = None,
) -> Tensor:
    """The values of the positives, in the order in which the losses take them, from values beside all labels:

        pred = at_positives(logits, labels, pred_boxes)  # [B, A, 4] -> [P, 4]
        target = at_positives(logits, labels, target_boxes, num_positives=len(pred))
        loss = criterion(logits, labels, pred, target)

    Args:
        logits, labels, ignore_index: as the loss takes them, see :func:`alrp_triton.alrp_loss`.
        values: tensor(s) of any dtype, one beside each of ``labels``: its shape, or its shape and further axes, such as
            4 for boxes. With class labels ``[..., 4]`` are the boxes of the rows. With a label for each logit, boxes of
            the rows are ``boxes[..., None, :].expand(*labels.shape, 4)``, which copies nothing.
        num_positives: P, if the caller knows it. Otherwise the positives are counted; the host waits for a GPU, and
            ``torch.compile(fullgraph=True)`` and ``torch.export`` raise. A wrong number raises on the CPU; on a GPU it
            makes the loss NaN, as there.

    Returns:
        ``[P]``, or ``[P, ...]`` with the further axes; differentiable with respect to ``values``.

    Raises:
        TypeError, ValueError, RuntimeError: for a wrong argument, naming it; see :func:`alrp_triton.alrp_loss`.
    """
    levels = check_inputs(logits, labels, delta=1.0, ignore_index=ignore_index, num_positives=num_positives)
    beside = check_tensors("values", values)
    if len(beside) != len(levels.labels):
        raise ValueError(f"values: expected one tensor for each of the {len(levels.labels)} labels, got {len(beside)}")
    first, axes = beside[0], beside[0].shape[levels.labels[0].dim() :]
    for i, (value, label) in enumerate(zip(beside, levels.labels)):
        at = f"[{i}]" if len(beside) > 1 else ""
        if value.shape != label.shape + axes:
            raise ValueError(
                f"values{at}: expected the shape of the labels, {list(label.shape)}, and further axes, of every level "
                f"the same, got {list(value.shape)}"
            )
        if value.dtype != first.dtype:
            raise TypeError(f"values{at}: expected the dtype of the first level, {first.dtype}, got {value.dtype}")
        if value.device != label.device:
            raise ValueError(f"values{at}: expected device {label.device}, as the labels, got {value.device}")
    if num_positives is None and torch.compiler.is_compiling():
        raise RuntimeError("num_positives: expected an int where a whole graph is compiled or exported, got None")
    detached, backend = [level.detach() for level in levels.logits], passes.choose("auto", levels.logits[0].device)
    found = operators.find(detached, levels.labels, [], ignore_index, num_positives, True, "num_positives", backend)
    picked = first.new_zeros(found[0].shape + axes)
    filled = [(value, label.dim()) for x, label, value in zip(levels.logits, levels.labels, beside) if x.numel()]
    for (value, dim), (x, local, inside) in zip(filled, local_indices(levels.logits, found[0])):
        inside = inside.view(-1, *[1] * len(axes))
        picked = torch.where(inside, value[place_of(local, x.shape)[:dim]], picked)
    return picked
