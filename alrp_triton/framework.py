"""A ranking loss of your own, from a formula.

A loss L = (1/Z) sum_i l(i) over the positives i (Definition 1 of Oksuz et al., NeurIPS 2020) is told by l(i), a
function of how i is ranked; by its target l*(i), the value it should have; and by Z. Algorithm 1 of the paper then says
what gradient the scores get: i sends l(i) - l*(i) to the negatives above it, in the proportions p(j|i). Average
precision, for one:

    def error(ranking):
        return ranking.num_false_positives / ranking.rank

    criterion = RankingLoss(error)
    loss = criterion(logits, labels)

Both passes over the logits are the package's own: exact, deterministic, in linear time. The losses of the package are
formulas of this kind; ``alrp_triton.losses.alrp.lrp_error`` is one with further numbers for each positive.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from . import reference
from .engine import Levels, PairFunction, Ranking, Statistics, check_inputs
from .engine.backends import TRITON_BACKENDS
from .engine.inputs import compute_dtype
from .engine.processes import among_processes
from .engine.sums import total
from .losses import exact

if TYPE_CHECKING:  # not everywhere there
    from torch.distributed import ProcessGroup

__all__ = ["Formula", "PairFunction", "RankingLoss", "Statistics", "ranking_loss"]

Formula = Callable[..., Tensor]
"""``formula(ranking, **extras) -> [P]``, with a :class:`Statistics` and float64 extras ``[P]``."""

Pairs = PairFunction | Callable[[Tensor, float], Tensor]


@among_processes
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
    smoothing: Pairs | None = None,
    distribution: Pairs | None = None,
    groups: Tensor | Sequence[Tensor] | None = None,
    ignore_index: int = -1,
    backend: str = "auto",
    group: ProcessGroup | bool | None = None,
) -> Tensor:
    r"""L = (1/Z) sum_i l(i), with the error-driven gradient of Algorithm 1.

    Positive i receives -(l(i) - l*(i)) / Z, and negative j the sum of (l(i) - l*(i)) p(j|i) / Z over i. Where l(i)
    depends on ``extras``, these receive the derivative of L, ranks being constants, as localisation errors do in aLRP.

    Args:
        logits, labels, ignore_index: see :func:`alrp_triton.alrp_loss`.
        error: l(i), called as ``error(ranking, **extras)``; returns ``[P]``.
        target: l*(i), called alike; None for 0. Exact zeros of l - l* at positives without false positives are not
            required: such a positive has nothing to send.
        normaliser: Z, called as ``normaliser(ranking)``; a number, or ``[P]`` with the Z of each positive's group. None
            for P, the mean over the positives.
        extras: by name, ``[P]`` floating-point tensors, one number for each positive in their flat order.
        num_positives: P; needed only where there are no extras, see :func:`alrp_triton.ap_loss`.
        delta: half width of the ramp H, from 1e-30 to 1e30, or 0 for the step; handed to pair functions.
        eps: a positive whose false positives add up to this or less sends no gradient.
        smoothing: takes the place of H in every statistic: a function of score differences and delta, see
            :class:`PairFunction`.
        distribution: q, for p(j|i) in proportion to q(n_j - p_i); by default H, the uniform distribution over the false
            positives. One that grows with the difference promotes harder examples.
        groups, group: see :func:`alrp_triton.alrp_loss`. With ``group`` formulas see the positives of all processes.
        backend: see :func:`alrp_triton.alrp_loss`. With ``smoothing`` or ``distribution`` every pair of a positive and
            a logit is looked at, in O(M P) time: on a GPU by the Triton kernels if the functions have a Triton form,
            and otherwise by PyTorch.

    Returns:
        A scalar: float64 for float64 logits, else float32. 0, attached to the graph, without positives.

    Raises:
        TypeError, ValueError, RuntimeError: see :func:`alrp_triton.alrp_loss`; and for a formula that returns anything
            but ``[P]`` numbers.
    """
    extras = dict(extras or {})
    levels = check_inputs(
        logits,
        labels,
        delta=delta,
        ignore_index=ignore_index,
        groups=groups,
        per_positive=extras,
        num_positives=num_positives,
        eps=eps,
        group=group,
    )
    _check_formulas(error=error, target=target, normaliser=normaliser)
    error, target = _checked("error", error), None if target is None else _checked("target", target)
    normaliser = None if normaliser is None else _checked("normaliser", normaliser)
    name, num_positives = _count(extras, num_positives)
    smoothing, distribution = _pair_function("smoothing", smoothing), _pair_function("distribution", distribution)
    backend = _choose_backend(backend, levels, {"smoothing": smoothing, "distribution": distribution})
    dtype = compute_dtype(levels.logits[0].dtype)
    if backend == "reference":
        flat_logits, flat_labels, flat_groups = exact.flatten(levels, ignore_index, num_positives, name)
        result = reference.ranking_loss(
            flat_logits,
            flat_labels,
            error,
            target=target,
            normaliser=normaliser,
            extras={key: value.detach() for key, value in extras.items()},
            delta=delta,
            eps=eps,
            smoothing=None if smoothing is None else smoothing.torch,
            distribution=None if distribution is None else distribution.torch,
            groups=flat_groups,
        )
        further = [(extras[key], gradient) for key, gradient in result.grad_extras.items()]
        return exact.attach(result.value, levels, result.grad_logits, further).to(dtype)

    ranking = Ranking(
        levels,
        num_positives,
        delta=delta,
        ignore_index=ignore_index,
        backend=backend,
        values=tuple(extras.values()),
        name=name,
        smoothing=smoothing,
        distribution=distribution,
    )
    values = {key: value.double() for key, value in zip(extras, ranking.values)}
    if ranking.rank.shape[0] == 0:
        error, target, normaliser = _nothing, None, None
    errors = error(ranking, **values)
    with torch.no_grad():
        share = ranking.share
        if normaliser is not None:
            share = share * ranking.num_positives / normaliser(ranking)
        excess = errors.detach()
        if target is not None:
            excess = excess - target(ranking, **values)
        share = share + ranking.poison_where((errors * share).isnan() | ranking.sent(excess, eps)[0].isnan())
    # The value may have a derivative with respect to the extras, of 0 if it does not; that of the scores goes onto a 0.
    value = total(errors * share) + ranking.poison + sum(given[:0].sum() for given in values.values())
    return (value + ranking.error_driven(torch.zeros_like(value), excess, share, eps)).to(dtype)


class RankingLoss(nn.Module):
    """:func:`ranking_loss` as a module, which holds the formula.

    Args:
        error, target, normaliser, delta, eps, smoothing, distribution, ignore_index, backend, group: see
            :func:`ranking_loss`.
    """

    def __init__(
        self,
        error: Formula,
        target: Formula | None = None,
        normaliser: Callable[[Statistics], Tensor | float] | None = None,
        *,
        delta: float = 1.0,
        eps: float = 0.0,
        smoothing: Pairs | None = None,
        distribution: Pairs | None = None,
        ignore_index: int = -1,
        backend: str = "auto",
        group: ProcessGroup | bool | None = None,
    ) -> None:
        super().__init__()
        _check_formulas(error=error, target=target, normaliser=normaliser)
        self.error, self.target, self.normaliser = error, target, normaliser
        self.smoothing = _pair_function("smoothing", smoothing)
        self.distribution = _pair_function("distribution", distribution)
        self.delta, self.eps, self.ignore_index, self.backend = delta, eps, ignore_index, backend
        self.group = group

    def forward(
        self,
        logits: Tensor | Sequence[Tensor],
        labels: Tensor | Sequence[Tensor],
        num_positives: int | None = None,
        groups: Tensor | Sequence[Tensor] | None = None,
        **extras: Tensor,
    ) -> Tensor:
        """The loss of one batch, a scalar; arguments as :func:`ranking_loss` takes them, extras by their names."""
        return ranking_loss(
            logits,
            labels,
            self.error,
            target=self.target,
            normaliser=self.normaliser,
            extras=extras,
            num_positives=num_positives,
            delta=self.delta,
            eps=self.eps,
            smoothing=self.smoothing,
            distribution=self.distribution,
            groups=groups,
            ignore_index=self.ignore_index,
            backend=self.backend,
            group=self.group,
        )

    def extra_repr(self) -> str:
        """The arguments, as ``repr`` shows them."""
        formulas = {name: getattr(self, name) for name in ("error", "target", "normaliser")}
        shown = [f"{name}={getattr(f, '__name__', f)}" for name, f in formulas.items() if f is not None]
        names = ("delta", "eps", "smoothing", "distribution", "ignore_index", "backend")
        return ", ".join([*shown, *(f"{name}={getattr(self, name)!r}" for name in names)])


def _nothing(ranking: Statistics, **extras: Tensor) -> Tensor:
    """The formula of no positives: users' own need not be made for that."""
    return ranking.rank


# What wraps a function that is given as such, as long as something holds it.
_wrapped: WeakValueDictionary[Callable[[Tensor, float], Tensor], PairFunction] = WeakValueDictionary()


def _pair_function(name: str, function: Pairs | None) -> PairFunction | None:
    if function is None or isinstance(function, PairFunction):
        return function
    if not callable(function):
        raise TypeError(f"{name}: expected a PairFunction or a function, got {type(function).__name__}")
    if not isinstance(function, Hashable):
        return PairFunction(function)
    wrapped = _wrapped.get(function)
    if wrapped is None:
        wrapped = _wrapped[function] = PairFunction(function)
    return wrapped


def _choose_backend(backend: str, levels: Levels, functions: dict[str, PairFunction | None]) -> str:
    chosen = levels.choose_backend(backend)
    lacking = [name for name, function in functions.items() if function is not None and function.triton is None]
    if chosen not in TRITON_BACKENDS or not lacking:
        return chosen
    if backend == "auto":
        return "torch"
    raise ValueError(f"{lacking[0]}: expected a PairFunction with a Triton form for backend {backend!r}")


def _check_formulas(**formulas: Any) -> None:
    for name, formula in formulas.items():
        if not callable(formula) and (formula is not None or name == "error"):
            raise TypeError(f"{name}: expected a function, got {type(formula).__name__}")


def _count(extras: dict[str, Tensor], num_positives: int | None) -> tuple[str, int | None]:
    """P as far as the host knows it, and the argument that says so."""
    known = {name: values.shape[0] for name, values in extras.items()}
    if num_positives is not None:
        known["num_positives"] = num_positives
    first = [*known, "num_positives"][0]
    for name, length in known.items():
        if length != known[first]:
            raise ValueError(f"{name}: expected as many as {first}, {known[first]}, got {length}")
    return first, known.get(first)


def _checked(name: str, formula: Callable[..., Any]) -> Callable[..., Tensor]:
    """The formula, with an error for a result that cannot be used."""

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
