"""From a formula to a loss. All losses of the package use this module."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..engine import Counted, Evaluated, Levels, PairFunction, Ranking, attach_whole, check_inputs, doubts, passes
from ..engine.devices import is_asynchronous
from ..engine.inputs import plain
from ..engine.labels import flatten_levels
from ..engine.passes.find import raise_on_mistakes
from ..engine.processes import among_processes, outside_graphs
from .monitor import Ranked, ranked, ranked_exactly, statistics

if TYPE_CHECKING:  # not everywhere there
    from torch.distributed import ProcessGroup


class Exact(NamedTuple):
    """A loss from :mod:`alrp_triton.reference`, computed from flat float64 tensors."""

    scalars: Sequence[Tensor]
    of_logits: Sequence[Tensor]
    """``[M]``, the derivative of each scalar."""
    of_values: Mapping[str, Tensor] = {}
    """``[P]`` by name, the derivatives of the last scalar."""
    rank: Tensor | None = None
    """``[P]``"""


class Definition(NamedTuple):
    """The definition of a loss."""

    evaluate: Callable[..., Evaluated]
    """Called with a :class:`Ranking` and the values, ``[P]`` float64."""
    reference: Callable[..., Exact]
    """Called with flat logits, labels, the values by name, delta and groups."""
    eps: float = 0.0
    """A positive with at most this many false positives sends nothing."""
    in_kernels: str = ""
    """The name of the formula in ``kernels.formulas``, if it is there."""
    smoothing: PairFunction | None = None
    distribution: PairFunction | None = None
    descends: bool = False
    """Whether scores get the true derivative of the loss; see ``Evaluated.slopes``."""


class Loss(NamedTuple):
    """A loss, and the positives that it ranked."""

    scalars: tuple[Tensor, Tensor]
    """In the compute dtype, with their derivatives; a single scalar twice."""
    rank: Tensor
    """``[P]`` of this process, in the compute dtype and detached."""
    indices: Tensor
    """``[P]`` int64: flat indices of this process's positives."""
    gather: Callable[..., Sequence[Tensor]]
    """Gathers ``[P]`` numbers of all processes from those of this one."""
    ranked: Callable[[], Ranked]
    """Makes what a monitor shows of the ranking."""
    levels: Levels
    """The checked arguments."""
    groups: Tensor | None = None
    """``[P]`` int64, the groups of the positives of all processes; None for one ranking of all."""


def evaluate(
    definition: Definition,
    levels: Levels,
    values: Mapping[str, Tensor],
    num_positives: int | None,
    *,
    delta: float,
    backend: str,
    name: str = "",
) -> Loss:
    """The loss of a definition.

    Args:
        definition: of the loss.
        levels: as ``check_inputs`` returns them.
        values: arguments of the formula by name, ``[P]`` each.
        num_positives: P, known on the host if there are values; None to count the positives.
        delta, backend: see :func:`alrp_triton.alrp_loss`.
        name: the caller's name for the values, by which errors call them.
    """
    if doubts.asked():
        doubts.warn_of_scores(levels)
        if "loc_errors" in values:
            doubts.warn_of_errors(values["loc_errors"])
    values = {key: plain(given) for key, given in values.items()}
    by_pairs = definition.smoothing is not None or definition.distribution is not None
    choose = passes.choose_for_pairs if by_pairs else passes.choose
    backend = choose(backend, levels.logits[0].device, levels.processes is None)
    if definition.descends and passes.looks_at_pairs(backend):
        raise ValueError(f"backend: expected one that has tables with gradient='true', got {backend!r}")
    name = name or next(iter(values), "num_positives")
    if not passes.has_passes(backend):
        return _exactly(definition, levels, values, num_positives, name, delta)
    counted = Counted(
        levels,
        num_positives,
        delta=delta,
        backend=backend,
        values=tuple(values.values()),
        name=name,
        smoothing=definition.smoothing,
        distribution=definition.distribution,
        descends=definition.descends,
    )
    known = counted.lose(definition.in_kernels, definition.eps)
    if known is not None:
        monitored = lambda: ranked(Ranking(counted))  # noqa: E731
        return Loss(*known, counted.indices, counted.gather, monitored, levels, counted.placed.groups)
    ranking = Ranking(counted)
    evaluated = definition.evaluate(ranking, *(value.double() for value in counted.values))
    scalars = counted.send(ranking.ranks, evaluated, definition.eps, doubtful=not definition.in_kernels)
    rank = ranking.rank[counted.own].to(levels.compute_dtype())
    monitored = partial(ranked, ranking)
    return Loss(scalars, rank, counted.indices, counted.gather, monitored, levels, counted.placed.groups)


def _exactly(
    definition: Definition,
    levels: Levels,
    values: Mapping[str, Tensor],
    num_positives: int | None,
    name: str,
    delta: float,
) -> Loss:
    """The loss of :mod:`alrp_triton.reference`, attached to the levels."""
    logits, labels, groups = flatten_levels(levels)
    index = (labels == 1).nonzero().squeeze(1)
    expected = len(index) if num_positives is None else num_positives
    raise_on_mistakes(levels, len(index), bool((labels == -2).any()), expected, name)
    detached = {key: value.detach() for key, value in values.items()}
    exact = definition.reference(logits, labels, detached, delta=delta, groups=groups)
    given = torch.cat([values[key].double() for key in exact.of_values]) if exact.of_values else None
    rank = logits.new_empty(0) if exact.rank is None else exact.rank
    scalars = attach_whole(levels, exact.scalars, exact.of_logits, given, [*exact.of_values.values()])
    pairs = {"smoothing": definition.smoothing, "distribution": definition.distribution}
    monitored = partial(ranked_exactly, logits, labels, detached, delta=delta, groups=groups, **pairs)
    own = None if groups is None else groups[index]
    return Loss(scalars, rank.to(levels.compute_dtype()), index, lambda *columns: columns, monitored, levels, own)


class Criterion(nn.Module):
    """A loss as a module. Its settings are attributes with the names of the function's arguments.

    Args:
        monitor: whether ``forward`` keeps :attr:`stats`; an attribute too, which may change at any time.
        settings: by name.
    """

    takes_boxes = False
    """Whether ``forward`` takes predicted and target boxes."""
    _looked = False
    stats: dict[str, Tensor]
    """What ``monitor=True`` keeps of the last ``forward``, without a graph and without waiting for the device:
    0-dimensional tensors by name, which docs/monitoring.md describes. Empty before, and never part of
    ``state_dict()``."""

    if TYPE_CHECKING:  # the settings

        def __getattr__(self, name: str) -> Any: ...

    def __init__(self, monitor: bool = False, **settings: Any) -> None:
        super().__init__()
        if not isinstance(monitor, bool):
            raise TypeError(f"monitor: expected a bool, got {type(monitor).__name__}")
        self.monitor, self.stats = monitor, {}
        self._names = tuple(settings)
        for name, value in settings.items():
            setattr(self, name, value)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings by name."""
        return {name: getattr(self, name) for name in self._names}

    def _look_once(self, loss: Loss, boxes: tuple[Tensor, Tensor] | None = None) -> None:
        """Warn of doubtful arguments of the first ``forward``; of values unless the host would wait for them. With
        ``ALRP_TRITON_DEBUG=1`` every call has looked at the values already."""
        if torch.compiler.is_compiling() or self._looked:
            return
        self._looked, logits = True, loss.levels.logits
        if boxes is not None and self.training and torch.is_grad_enabled():
            doubts.warn_of_gradients(logits, *boxes)
        # Fake tensors have no values.
        plain = all(type(level) is Tensor for level in logits)
        if plain and not is_asynchronous(logits[0].device) and not doubts.asked():
            doubts.warn_of_scores(loss.levels)
            if boxes is not None:
                doubts.warn_of_boxes(boxes[1])

    def extra_repr(self) -> str:
        """The settings, as ``repr`` shows them."""
        shown = {
            name: value
            for name, value in self.settings.items()
            if not isinstance(value, nn.Module) and (name != "process_group" or value is not None)
        }
        if self.monitor:
            shown["monitor"] = True
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())


@among_processes
def score_loss(
    logits: Tensor | Sequence[Tensor],
    labels: Tensor | Sequence[Tensor],
    definition: Definition,
    *,
    delta: float,
    num_positives: int | None,
    groups: Tensor | Sequence[Tensor] | str | None,
    ignore_index: int,
    backend: str,
    process_group: ProcessGroup | bool | None,
) -> Loss:
    """A loss that needs only scores and labels."""
    levels = check_inputs(
        logits,
        labels,
        delta=delta,
        ignore_index=ignore_index,
        groups=groups,
        num_positives=num_positives,
        process_group=process_group,
    )
    return evaluate(definition, levels, {}, num_positives, delta=delta, backend=backend)


class ScoreLoss(Criterion):
    """A loss of scores and labels as a module; its settings are arguments of the function."""

    function: Callable[..., Loss]
    """The loss before its scalar is taken, such as what :func:`score_loss` returns."""

    @outside_graphs
    def forward(
        self,
        logits: Tensor | Sequence[Tensor],
        labels: Tensor | Sequence[Tensor],
        num_positives: int | None = None,
        groups: Tensor | Sequence[Tensor] | str | None = None,
    ) -> Tensor:
        """The loss of one batch, a scalar; arguments as the function takes them."""
        loss = type(self).function(logits, labels, num_positives=num_positives, groups=groups, **self.settings)
        self._look_once(loss)
        if self.monitor:
            self.stats = statistics(loss.ranked(), loss.scalars[0])
        return loss.scalars[0]
