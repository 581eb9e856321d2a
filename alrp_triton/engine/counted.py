"""From logits to a loss: find and place positives, count negatives, rank, send, and attach the gradient to the
logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import operators, passes
from .inputs import Levels
from .pairs import PairFunction, Pairs
from .placed import MOST_COMPARED, Compared, Paired, Ranks, Sorted, compare, poison_of
from .processes import Meeting
from .scans import total


class Evaluated(NamedTuple):
    """The results of a formula: all ``[P]`` float64, multiplied by the share of each positive in the loss."""

    added: Sequence[Tensor]
    """What each positive adds to each of the loss's one or two scalars."""
    sent: Tensor
    """What each positive sends to its false positives: the gradient of the first scalar."""
    given: Tensor | None = None
    """The values for which the last scalar has a derivative."""
    derivative: Tensor | None = None
    """That derivative."""
    sorting: Tensor | None = None
    """The derivative of the second scalar with respect to the positives' own scores."""
    slopes: tuple[Tensor, Tensor] | None = None
    """The derivatives of the scalar with respect to N_FP(i) and rank+(i); with them scores get its true derivative, and
    nothing is sent."""


class Counted:
    """Placed positives and counted negatives. If several processes rank together, P is the number of positives of all
    of them, and each process holds all statistics; :attr:`own` is the part of this process.

    Args:
        levels: checked logits, labels and groups, and the processes that rank together.
        num_positives: P of this process, known on the host; with None they are counted and the host waits.
        delta: half width of the ramp H.
        backend: which passes run, see :mod:`.passes`.
        values: values of the loss, one for each positive; a NaN in them makes everything NaN; see :attr:`values`.
        name: the argument that gives the number of positives, for error messages.
        smoothing: replaces the ramp.
        distribution: q(x_ij); the share p(j|i) of a negative in the error of a positive is proportional to it. The
            default is H. With either function every pair is evaluated.
        descends: whether :attr:`Evaluated.slopes` will be sent, which takes sorted positives.
    """

    def __init__(
        self,
        levels: Levels,
        num_positives: int | None,
        *,
        delta: float,
        backend: str,
        values: Sequence[Tensor] = (),
        name: str = "num_positives",
        smoothing: PairFunction | None = None,
        distribution: PairFunction | None = None,
        descends: bool = False,
    ) -> None:
        self.levels, self.delta, self.backend = levels, float(delta), backend
        if num_positives is None and torch.compiler.is_compiling():
            # Every later shape would depend on data. The graph breaks here if it may.
            raise RuntimeError(f"{name}: expected an int where a whole graph is compiled or exported, got None")
        # In the form that operators take, without a derivative.
        detached = [level.detach() for level in levels.logits]
        self._detached = detached, levels.labels, list(levels.groups), levels.ignore_index
        # Kernels sort positives in the place step, unless other processes need them before.
        kernels, alone = passes.compares_positives(backend) and not descends, levels.processes is None
        any_order = kernels and alone and num_positives is not None and num_positives <= MOST_COMPARED
        found = operators.find(*self._detached, num_positives, not any_order, name, backend)
        self.indices, logits, numbers, *groups = found
        own = [logits, *groups]
        #: ``values`` of the positives of all processes, differentiable for those of this process.
        self.values: Sequence[Tensor] = values
        self._meeting: Meeting | None = None
        if levels.processes is not None:
            settings = {
                "delta": self.delta,
                "logits": logits.dtype == torch.float64,
                "groups": bool(groups),
                "extras": len(values),
                # Integers of different forms cannot be added.
                "smoothing": smoothing is not None,
                "distribution": distribution is not None,
                "backend": not passes.looks_at_pairs(backend),
            }
            self._meeting = levels.processes.meet(logits.shape[0], levels.num_logits(), settings)
            logits, *self.values = self._meeting.gather([logits, *values])
            groups = self._meeting.gather(groups)
        self.num_logits = levels.num_logits() if self._meeting is None else self._meeting.num_logits
        self._pairs: Pairs | None = None
        with torch.no_grad():
            self.placed: Sorted | Compared
            if kernels and logits.shape[0] <= MOST_COMPARED:
                self.indices, self.placed = compare(
                    self.indices, logits, numbers, groups, self.delta, levels.logits[0].dtype
                )
            else:
                kind = Paired if passes.looks_at_pairs(backend) else Sorted
                self.placed = kind(logits, groups[0] if groups else None, self.delta)
            if smoothing is not None or distribution is not None:
                assert isinstance(self.placed, Sorted)  # kernels do not have these functions
                self._pairs = Pairs(smoothing, distribution, self.placed, levels, self.delta)
            if smoothing is None:
                self._count(own)

    def _count(self, own: list[Tensor]) -> None:
        """Pass 1, into the totals."""
        operators.count(
            *self._detached,
            operators.present(*self.placed.table),
            own,
            self.placed.totals,
            self.num_logits,
            self.delta,
            self.backend,
        )
        self._add(self.placed.totals)

    def _add(self, totals: Tensor) -> Tensor:
        """Sum the totals over all processes, in place."""
        return totals if self._meeting is None else self._meeting.add(totals)

    @property
    def own(self) -> slice:
        """The positions of this process's positives among all."""
        return slice(0, self.indices.shape[0]) if self._meeting is None else self._meeting.own

    def gather(self, *columns: Tensor) -> Sequence[Tensor]:
        """``[P]`` numbers of all processes from those of this one, as in :attr:`values`; all processes must call it."""
        return columns if self._meeting is None else self._meeting.gather(columns)

    @property
    def num_processes(self) -> int:
        """The number of processes that rank together. Derivatives are multiplied by it, because DistributedDataParallel
        takes their mean."""
        return 1 if self._meeting is None else self._meeting.size

    def rank(self) -> Ranks:
        """The ranks of the positives."""
        values = [value.detach() for value in self.values]
        with torch.no_grad():
            if self._pairs is None:
                return self.placed.rank(self.num_logits, values)
            return self._pairs.rank(self.num_logits, values, self._add)

    def sums(self, values: Tensor, kind: str, poison: Tensor) -> Tensor:
        """A sum over the positives for each of them; see ``placed.Sorted.sums``."""
        if self._pairs is not None and kind in ("above", "received"):
            return self._pairs.sums(values, kind, poison)
        return self.placed.sums(values, kind, poison)

    def send(self, ranks: Ranks, evaluated: Evaluated, eps: float, doubtful: bool) -> tuple[Tensor, Tensor]:
        """The scalars of a loss in the compute dtype, with their derivatives; a single scalar is returned twice.

        Positive i pushes down the scores of its false positives, in the proportions p(j|i), and pushes up its own. It
        sends nothing if its false positives add up to ``eps`` or less. If the formula is ``doubtful``, a NaN anywhere
        makes everything NaN.
        """
        spread = ranks.num_false_positives if self._pairs is None else self._pairs.spread
        if isinstance(self.placed, Compared):
            # The kernels have the formulas of the other losses.
            (added,), derivative = evaluated.added, evaluated.derivative
            assert derivative is not None
            rows = torch.stack([evaluated.sent, spread, added, derivative])
            return self._send_by_kernels(rows, ranks.poison, evaluated.given, "", eps)
        with torch.no_grad():
            sends = spread > eps
            sent = torch.where(sends, evaluated.sent, 0.0)
            poison = ranks.poison
            if doubtful:
                poison = poison_of(poison.isnan(), (sent, *evaluated.added))
            if evaluated.slopes is None:
                weights = torch.where(sends, sent / spread, 0.0)
                lines = (self._pairs or self.placed).lines(weights, poison)
                own = torch.stack([-sent] if evaluated.sorting is None else [-sent, evaluated.sorting])
            else:
                poison = poison_of(poison.isnan(), evaluated.slopes)
                lines, of_positives = self.placed.derivatives(*evaluated.slopes, poison)
                own = of_positives[None]
            lines, own = lines * self.num_processes, ((own + poison) * self.num_processes)[:, self.own]
            dtype = self.levels.compute_dtype()
            scalars = [(total(added) + poison).to(dtype) for added in evaluated.added]
            derivative = None if evaluated.derivative is None else evaluated.derivative + poison
        first, second = scalars[0], scalars[1] if len(scalars) > 1 else None
        if self._pairs is not None:
            return self._pairs.attach(first, evaluated.given, derivative, self.indices, lines, own)
        attached: tuple[Tensor, Tensor] = operators.attach(
            first,
            second,
            self.levels.logits,
            *self._detached[1:],
            evaluated.given,
            derivative,
            operators.present(*self.placed.table),
            self.indices,
            lines,
            own,
            self.delta,
            self.backend,
        )
        return attached

    def lose(self, formula: str, eps: float) -> tuple[tuple[Tensor, Tensor], Tensor] | None:
        """The scalars of a loss, as in :meth:`send`, and rank(i) in their dtype, if the kernels have a formula of this
        name and may compare all positives."""
        if not formula or not isinstance(self.placed, Compared):
            return None
        values = [value.to(torch.promote_types(value.dtype, torch.float32)) for value in self.values]
        rows, rank, poison = self.placed.rows(self.num_logits, [value.detach() for value in values], formula, eps)
        scalars = self._send_by_kernels(rows, poison, values[0] if values else None, formula, eps)
        return scalars, rank[self.own]

    def _send_by_kernels(
        self, rows: Tensor, poison: Tensor, given: Tensor | None, formula: str, eps: float
    ) -> tuple[Tensor, Tensor]:
        assert isinstance(self.placed, Compared)
        first, second, *_ = operators.send(
            self.levels.logits,
            *self._detached[1:],
            given,
            self.indices,
            self.placed.positives,
            operators.present(*self.placed.table),
            rows,
            poison,
            self.own.start,
            self.num_processes,
            self.delta,
            float(eps),
            formula,
            self.backend,
        )
        return first, second


def attach_whole(
    levels: Levels,
    scalars: Sequence[Tensor],
    of_logits: Sequence[Tensor],
    given: Tensor | None,
    of_given: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """Scalars as in :meth:`Counted.send`, from the derivatives ``[M]`` of each with respect to all logits, and of the
    last one with respect to the given values, in parts."""
    first, *second = (scalar.to(levels.compute_dtype()) for scalar in scalars)
    nothing = first.new_empty(0)
    attached: tuple[Tensor, Tensor] = operators.attach(
        first,
        second[0] if second else None,
        levels.logits,
        [],
        [],
        levels.ignore_index,
        given,
        None if given is None else torch.cat(list(of_given)),
        [nothing, nothing],
        nothing.long(),
        torch.stack(list(of_logits)),
        nothing.new_empty(len(of_logits), 0),
        0.0,
        "reference",
    )
    return attached
