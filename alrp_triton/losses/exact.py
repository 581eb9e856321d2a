"""``backend="reference"``: what :mod:`alrp_triton.reference` computes on flat tensors, given back to the levels."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..engine import Levels
from ..engine.labels import flatten_levels
from ..engine.operators import attach_computed
from ..engine.positives import raise_on_mistakes


def flatten(
    levels: Levels, ignore_index: int, num_positives: int | None, name: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Logits, labels (1, 0, or -1) and groups, ``[M]`` each.

    Raises:
        ValueError: for a label out of range, or another number of positives than the argument ``name`` says.
    """
    logits, labels, groups = flatten_levels(levels, ignore_index)
    found = int((labels == 1).sum())
    raise_on_mistakes(found, bool((labels == -2).any()), found if num_positives is None else num_positives, name)
    return logits, labels, groups


def attach(
    values: Tensor, levels: Levels, grad_logits: Tensor, further: Sequence[tuple[Tensor, Tensor]] = ()
) -> Tensor:
    """``values``, a scalar or ``[K]``, with a derivative with respect to the levels' logits, given flat ``[M]`` or
    ``[K, M]``, and to further tensors, each given beside the tensor. However many are differentiated together, what the
    logits get is rounded once."""
    if values.dim() == 0:
        return attach(values[None], levels, grad_logits[None], [(x, gradient[None]) for x, gradient in further])[0]
    sizes = [level.numel() for level in levels.logits]
    parts = grad_logits.split(sizes, dim=1)
    gradients = [part.view(len(values), *x.shape) for part, x in zip(parts, levels.logits)]
    tensors, derivatives = [tensor for tensor, _ in further], [derivative for _, derivative in further]
    attached: Tensor = attach_computed(values, [*levels.logits, *tensors], [*gradients, *derivatives])
    return attached
