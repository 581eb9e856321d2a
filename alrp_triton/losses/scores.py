"""What losses that need nothing but scores and labels have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..engine import Ranking, check_inputs
from ..engine.fused import can_fuse, fused_loss
from ..engine.inputs import compute_dtype
from ..engine.processes import among_processes
from ..engine.sums import total
from ..reference import ReferenceScore
from . import exact

if TYPE_CHECKING:  # not everywhere there
    from torch.distributed import ProcessGroup

Formula = Callable[[Ranking], tuple[Tensor, Tensor, Tensor]]
"""Of a ranking: l(i), l(i) - l*(i), and what makes a sum of these the loss, ``[P]`` each."""


@among_processes
def score_loss(
    logits: Tensor | Sequence[Tensor],
    labels: Tensor | Sequence[Tensor],
    formula: Formula,
    from_reference: Callable[..., ReferenceScore],
    in_kernels: str,
    *,
    delta: float,
    num_positives: int | None,
    groups: Tensor | Sequence[Tensor] | None,
    ignore_index: int,
    backend: str,
    group: ProcessGroup | bool | None,
) -> Tensor:
    """The loss of a formula, a scalar; ``from_reference`` is called with flat logits and labels, delta and groups, and
    ``in_kernels`` is the formula's name there."""
    levels = check_inputs(
        logits,
        labels,
        delta=delta,
        ignore_index=ignore_index,
        groups=groups,
        num_positives=num_positives,
        group=group,
    )
    backend = levels.choose_backend(backend)
    if backend == "reference":
        flat = exact.flatten(levels, ignore_index, num_positives, "num_positives")
        result = from_reference(*flat[:2], delta=delta, groups=flat[2])
        return exact.attach(result.value, levels, result.grad_logits).to(compute_dtype(levels.logits[0].dtype))
    if num_positives is not None and can_fuse(levels, num_positives, backend):
        return fused_loss(in_kernels, levels, num_positives, delta=delta, ignore_index=ignore_index)[0]
    ranking = Ranking(levels, num_positives, delta=delta, ignore_index=ignore_index, backend=backend)
    with torch.no_grad():
        error, excess, share = formula(ranking)
        value = total(error * share) + ranking.poison
    return ranking.error_driven(value, excess, share).to(compute_dtype(levels.logits[0].dtype))


class ScoreLoss(nn.Module):
    """A loss of scores and labels as a module; what is to be set by ``settings`` are the function's arguments."""

    function: Callable[..., Tensor]

    def __init__(self, **settings: float | int | str | ProcessGroup | None) -> None:
        super().__init__()
        self._names = tuple(settings)
        for name, value in settings.items():
            setattr(self, name, value)

    def forward(
        self,
        logits: Tensor | Sequence[Tensor],
        labels: Tensor | Sequence[Tensor],
        num_positives: int | None = None,
        groups: Tensor | Sequence[Tensor] | None = None,
    ) -> Tensor:
        """The loss of one batch, a scalar; arguments as the function takes them."""
        settings = {name: getattr(self, name) for name in self._names}
        return type(self).function(logits, labels, num_positives=num_positives, groups=groups, **settings)

    def extra_repr(self) -> str:
        """The arguments, as ``repr`` shows them."""
        values = {name: getattr(self, name) for name in self._names}
        return ", ".join(f"{name}={value!r}" for name, value in values.items() if name != "group" or value is not None)
