"""Your own ranking loss from a formula.

A loss L = (1/Z) sum_i l(i) over the positives i (Definition 1 of Oksuz et al., NeurIPS 2020) is defined by l(i), a
function of the ranking of i, by its target l*(i), and by Z. Algorithm 1 of the paper gives the gradient of the scores:
i sends l(i) - l*(i) to the negatives above it, in the proportions p(j|i). An example is average precision:

    def error(ranking):
        return ranking.num_false_positives / ranking.rank

    criterion = RankingLoss(error)
    loss = criterion(logits, labels)

The loss uses the two passes of the package: exact, deterministic, in linear time. The losses of the package are such
formulas too; ``alrp_triton.losses.alrp.lrp_error`` is one with values for each positive.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import reference
from .engine import Evaluated, PairFunction, Ranking, Statistics, check_inputs
from .engine.processes import among_processes, outside_graphs
from .losses.framework import Criterion, Definition, Exact, Loss, evaluate
from .losses.monitor import statistics

if TYPE_CHECKING:  # not everywhere there
    from torch.distributed import ProcessGroup

__all__ = ["Formula", "PairFunction", "RankingLoss", "Statistics", "ranking_loss"]

Formula = Callable[..., Tensor]
"""``formula(ranking, **extras) -> [P]``, with a :class:`Statistics` and float64 extras ``[P]``."""


def ranking_loss(
    logits: Tensor | Sequence[Tensor],
    labels: Tensor | Sequence[Tensor],
    error: Formula,
    *,
    target: Formula | None = None,
    normaliser: Callable[[Statistics], Tensor | float] | None = None,
    extras: Mapping[str, Tensor] | None = None,
    num_positives: int | None = None,
    delta: float = 1.0,
    eps: float = 0.0,
    gradient: str = "error-driven",
    smoothing: PairFunction | None = None,
    distribution: PairFunction | None = None,
    groups: Tensor | Sequence[Tensor] | str | None = None,
    ignore_index: int = -1,
    backend: str = "auto",
    process_group: ProcessGroup | bool | None = None,
) -> Tensor:
    r"""L = (1/Z) sum_i l(i), with the error-driven gradient of Algorithm 1.

    Positive i receives -(l(i) - l*(i)) / Z, and negative j the sum of (l(i) - l*(i)) p(j|i) / Z over i. If l(i) depends
    on ``extras``, these get the derivative of L with constant ranks, like localisation errors in aLRP.

    Args:
        logits, labels, ignore_index: see :func:`alrp_triton.alrp_loss`.
        error: l(i), called as ``error(ranking, **extras)``; returns ``[P]``.
        target: l*(i), called in the same way; None for 0. l - l* need not be 0 at positives without false positives,
            because these send nothing.
        normaliser: Z, called as ``normaliser(ranking)``; a number, or ``[P]`` with the Z of each positive's group. None
            for P, the mean over the positives.
        extras: by name, ``[P]`` floating-point tensors, one number for each positive in their flat order.
        num_positives: P; needed only without extras, see :func:`alrp_triton.ap_loss`.
        delta: half width of the ramp H, from 1e-30 to 1e30, or 0 for the step; pair functions get it too.
        eps: a positive whose false positives add up to this or less sends no gradient.
        gradient: ``"error-driven"``, as above, or ``"true"``: the derivative of L with respect to the scores, through
            N_FP(i) and rank+(i). The ramp's derivative is 1 / (2 delta) from p_i - delta up to, but not at, p_i +
            delta, and 0 elsewhere. Formulas then may use neither ``sums_above``, ``sums_sorted`` nor ``running_max``;
            ``delta`` is above 0; and there is no ``target``, ``eps``, ``smoothing`` or ``distribution``.
        smoothing: replaces H in every statistic; a function of score differences and delta, see :class:`PairFunction`.
        distribution: q, for p(j|i) in proportion to q(n_j - p_i); by default H, the uniform distribution over the false
            positives. A function that grows with the difference gives harder negatives larger gradients.
        groups, process_group: see :func:`alrp_triton.alrp_loss`. With ``process_group`` formulas get the positives of
            all processes.
        backend: see :func:`alrp_triton.alrp_loss`. With ``smoothing`` or ``distribution`` PyTorch evaluates every pair
            of a positive and a logit, in O(M P) time; the Triton backends raise an error.

    Returns:
        A scalar: float64 for float64 logits, else float32. 0, attached to the graph, without positives.

    Raises:
        TypeError, ValueError, RuntimeError: see :func:`alrp_triton.alrp_loss`; and if a formula does not return ``[P]``
            numbers.
    """
    return _rank(
        logits,
        labels,
        error,
        target=target,
        normaliser=normaliser,
        extras=extras,
        num_positives=num_positives,
        delta=delta,
        eps=eps,
        gradient=gradient,
        smoothing=smoothing,
        distribution=distribution,
        groups=groups,
        ignore_index=ignore_index,
        backend=backend,
        process_group=process_group,
    ).scalars[0]


@among_processes
def _rank(
    logits: Any,
    labels: Any,
    error: Formula,
    *,
    target: Formula | None,
    normaliser: Callable[[Statistics], Tensor | float] | None,
    extras: Mapping[str, Tensor] | None,
    num_positives: int | None,
    delta: float,
    eps: float,
    gradient: str,
    smoothing: PairFunction | None,
    distribution: PairFunction | None,
    backend: str,
    **further: Any,
) -> Loss:
    extras = dict(extras or {})
    levels = check_inputs(
        logits,
        labels,
        delta=delta,
        per_positive=extras,
        num_positives=num_positives,
        eps=eps,
        **further,
    )
    _check_functions(error=error, target=target, normaliser=normaliser, smoothing=smoothing, distribution=distribution)
    is_true = _check_gradient(gradient, delta, eps, target=target, smoothing=smoothing, distribution=distribution)
    formulas = {"error": error, "target": target, "normaliser": normaliser}
    functions: dict[str, Any] = {
        name: None if formula is None else _checked(name, formula) for name, formula in formulas.items()
    }
    pairs: dict[str, Any] = {"smoothing": smoothing, "distribution": distribution}
    definition = Definition(
        partial(_descend if is_true else _evaluate, names=tuple(extras), **functions),
        partial(_reference, eps=eps, true_gradient=is_true, **functions, **pairs),
        eps,
        **pairs,
        descends=is_true,
    )
    num_positives = _count(extras, num_positives)
    loss = evaluate(definition, levels, extras, num_positives, delta=delta, backend=backend)
    value = loss.scalars[0]
    # The derivative with respect to extras that l(i) does not use is 0.
    value = value + sum(given[:0].sum().to(value.dtype) for given in extras.values() if given.requires_grad)
    return loss._replace(scalars=(value, value))


def _evaluate(
    ranking: Ranking,
    *values: Tensor,
    names: tuple[str, ...],
    error: Formula,
    target: Formula | None,
    normaliser: Callable[[Statistics], Tensor | float] | None,
) -> Evaluated:
    if ranking.rank.shape[0] == 0:
        # A user's formula need not support this.
        error, target, normaliser = _nothing, None, None
    extras = dict(zip(names, values))
    errors = error(ranking, **extras)
    with torch.no_grad():
        share = ranking.share
        if normaliser is not None:
            share = share * ranking.num_positives / normaliser(ranking)
        excess = errors.detach()
        if target is not None:
            excess = excess - target(ranking, **extras)
        return Evaluated((errors.detach() * share,), excess * share, errors, share)


class _Smooth:
    """The statistics of a formula that is differentiated by scores."""

    def __init__(self, num_false_positives: Tensor, rank_positive: Tensor, num_positives: Tensor) -> None:
        self.num_false_positives, self.rank_positive = num_false_positives, rank_positive
        self.rank, self.num_positives = rank_positive + num_false_positives, num_positives

    def __getattr__(self, name: str) -> Any:
        if name in ("sums_above", "sums_sorted", "running_max"):
            raise TypeError(f"gradient: 'true' is not there for a formula with {name}")
        raise AttributeError(name)


def _descend(
    ranking: Ranking,
    *values: Tensor,
    names: tuple[str, ...],
    error: Formula,
    target: None,
    normaliser: Callable[[Statistics], Tensor | float] | None,
) -> Evaluated:
    """As :func:`_evaluate`, with the derivatives of the errors with respect to the ranks."""
    evaluated = _evaluate(ranking, *values, names=names, error=error, target=None, normaliser=normaliser)
    extras = {name: value.detach() for name, value in zip(names, values)}

    def errors(num_false_positives: Tensor, rank_positive: Tensor) -> Tensor:
        return error(_Smooth(num_false_positives, rank_positive, ranking.num_positives), **extras)

    found, ranks = ranking.num_false_positives, ranking.rank_positive
    if found.shape[0] == 0:
        return evaluated._replace(slopes=(found, found))
    differentiated: Any = torch.func.vjp(errors, found, ranks)
    return evaluated._replace(slopes=differentiated[1](evaluated.derivative))


def _reference(logits: Tensor, labels: Tensor, extras: dict[str, Tensor], error: Formula, **settings: Any) -> Exact:
    result = reference.ranking_loss(logits, labels, error, extras=extras, **settings)
    return Exact((result.value,), (result.grad_logits,), result.grad_extras)


class RankingLoss(Criterion):
    """:func:`ranking_loss` as a module, which holds the formula.

    Args:
        error, target, normaliser, delta, eps, gradient, smoothing, distribution, ignore_index, backend, process_group:
            see :func:`ranking_loss`.
        monitor: see :attr:`stats`.
    """

    takes_boxes = False  # forward takes num_positives instead of boxes and returns one scalar

    def __init__(
        self,
        error: Formula,
        target: Formula | None = None,
        normaliser: Callable[[Statistics], Tensor | float] | None = None,
        *,
        delta: float = 1.0,
        eps: float = 0.0,
        gradient: str = "error-driven",
        smoothing: PairFunction | None = None,
        distribution: PairFunction | None = None,
        ignore_index: int = -1,
        backend: str = "auto",
        process_group: ProcessGroup | bool | None = None,
        monitor: bool = False,
    ) -> None:
        _check_functions(
            error=error, target=target, normaliser=normaliser, smoothing=smoothing, distribution=distribution
        )
        super().__init__(
            error=error,
            target=target,
            normaliser=normaliser,
            delta=delta,
            eps=eps,
            gradient=gradient,
            smoothing=smoothing,
            distribution=distribution,
            ignore_index=ignore_index,
            backend=backend,
            process_group=process_group,
            monitor=monitor,
        )

    @outside_graphs
    def forward(
        self,
        logits: Tensor | Sequence[Tensor],
        labels: Tensor | Sequence[Tensor],
        num_positives: int | None = None,
        groups: Tensor | Sequence[Tensor] | str | None = None,
        **extras: Tensor,
    ) -> Tensor:
        """The loss of one batch, a scalar; arguments as :func:`ranking_loss` takes them, extras by their names."""
        loss = _rank(logits, labels, extras=extras, num_positives=num_positives, groups=groups, **self.settings)
        self._look_once(loss)
        if self.monitor:
            self.stats = statistics(loss.ranked(), loss.scalars[0])
        return loss.scalars[0]

    def extra_repr(self) -> str:
        """The settings, as ``repr`` shows them."""
        shown = [f"{name}={getattr(value, '__name__', repr(value))}" for name, value in self.settings.items()]
        shown += ["monitor=True"] if self.monitor else []
        return ", ".join(text for text in shown if not text.endswith("=None"))


def _nothing(ranking: Statistics, **extras: Tensor) -> Tensor:
    """The formula without positives; a user's formula need not support this."""
    return ranking.rank


def _check_functions(**functions: Any) -> None:
    for name, function in functions.items():
        if not callable(function) and (function is not None or name == "error"):
            raise TypeError(f"{name}: expected a function, got {type(function).__name__}")


def _check_gradient(gradient: str, delta: float, eps: float, **functions: object) -> bool:
    """Whether it is the true one."""
    if gradient not in ("error-driven", "true"):
        raise ValueError(f"gradient: expected 'error-driven' or 'true', got {gradient!r}")
    if gradient == "true":
        if delta == 0:
            raise ValueError(
                "delta: expected a number > 0 with gradient='true', since the step has no derivative, got 0"
            )
        given = [name for name, function in functions.items() if function is not None] + ["eps"] * (eps != 0)
        if given:
            raise ValueError(f"{given[0]}: expected none with gradient='true', which distributes no errors")
    return gradient == "true"


def _count(extras: dict[str, Tensor], num_positives: int | None) -> int | None:
    """P if the host knows it, otherwise None."""
    known = {name: values.shape[0] for name, values in extras.items()}
    if num_positives is not None:
        known["num_positives"] = num_positives
    first = [*known, "num_positives"][0]
    for name, length in known.items():
        if length != known[first]:
            raise ValueError(f"{name}: expected as many as {first}, {known[first]}, got {length}")
    return known.get(first)


def _checked(name: str, formula: Callable[..., Any]) -> Callable[..., Tensor]:
    """The formula, with an error for a wrong result."""

    def checked(ranking: Statistics, **extras: Tensor) -> Tensor:
        result, expected = formula(ranking, **extras), ranking.rank.shape
        if name == "normaliser" and (isinstance(result, (int, float)) or getattr(result, "shape", None) == ()):
            result = torch.as_tensor(result, dtype=torch.float64, device=ranking.rank.device).expand(expected)
        if not isinstance(result, Tensor):
            raise TypeError(f"{name}: expected it to return a tensor {list(expected)}, got {type(result).__name__}")
        if result.shape != expected:
            raise ValueError(f"{name}: expected it to return shape {list(expected)}, got {list(result.shape)}")
        return result.double()

    return checked
