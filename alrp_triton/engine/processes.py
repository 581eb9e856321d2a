"""One ranking over the processes of a ``torch.distributed`` group, as exact as if their batches were one.

What the processes must tell one another is small: the scores of all P positives, from which each makes the same knots,
and the integers that the negatives of each add up to, whose sum does not depend on who is added first. So every process
holds the statistics of the whole batch, bit for bit those of one process, and writes the gradient of its own logits.
Nothing that is sent grows with the number of logits.

Every process then holds the same loss, a function of its own logits and of those of others. It backpropagates into its
own alone, with the derivative times the number of processes: DistributedDataParallel, which takes the mean over the
processes, arrives at the gradient of the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")
_HERE, _FAILED = 0.0, 1.0
_eager: dict[Callable[..., Any], Callable[..., Any]] = {}


class Processes:
    """The processes of a group, of which this is one.

    Args:
        group: a process group, or True for the default one.

    Raises:
        TypeError: ``group`` is neither.
        ValueError: ``torch.distributed`` is not there or not initialised, or this process is not in the group.
    """

    def __init__(self, group: Any) -> None:
        if not dist.is_available():
            raise ValueError("process_group: expected a PyTorch that has torch.distributed; this one was built without")
        if not dist.is_initialized():
            raise ValueError("process_group: expected torch.distributed to be initialised, by init_process_group")
        if group is not True and not isinstance(group, dist.ProcessGroup):
            if group is dist.GroupMember.NON_GROUP_MEMBER:
                raise ValueError("process_group: expected a group that this process is in")
            raise TypeError(f"process_group: expected a process group, True or None, got {type(group).__name__}")
        self.group = dist.group.WORLD if group is True else group
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        # Until they have met, the others wait for this process.
        self._awaited = True

    def meet(self, num_positives: int, num_logits: int, settings: dict[str, float]) -> Meeting:
        """Tell the others how much there is here, and hear the same of them.

        Args:
            num_positives: P of this process.
            num_logits: M of this process.
            settings: what has to be the same everywhere, by the names of the arguments.

        Raises:
            RuntimeError: another process has raised an error, and will not come to rank.
            ValueError: the settings of two processes differ.
        """
        self._awaited = False
        rows = self._exchange([_HERE, num_positives, num_logits, *settings.values()])
        for process, row in enumerate(rows):
            if row[0] == _FAILED:
                raise RuntimeError(f"process_group: process {process} raised an error: there is nothing to rank with")
            for name, mine, theirs in zip(settings, settings.values(), row[3:]):
                if mine != theirs:
                    raise ValueError(
                        f"{name}: expected the same in every process of the group, got {mine:g} in process {self.rank} "
                        f"and {theirs:g} in process {process}"
                    )
        return Meeting(self, [int(row[1]) for row in rows], sum(int(row[2]) for row in rows))

    def fail(self) -> None:
        """Tell the others, if they still wait for this process in :meth:`meet`, that it will not come."""
        if self._awaited:
            self._awaited = False
            self._exchange([_FAILED])

    def _exchange(self, row: Sequence[float], length: int = 16) -> list[list[float]]:
        """The rows of all processes. With NCCL the host waits for the device here; with a group that also has gloo it
        does not, since these numbers are the host's."""
        # Float64 holds counts up to 2^53 exactly.
        device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend(self.group) == "nccl" else "cpu"
        mine = torch.zeros(length, dtype=torch.float64, device=device)
        mine[: len(row)] = torch.tensor(row, dtype=torch.float64)
        rows: list[list[float]] = self._gather(mine).tolist()
        return rows

    def _gather(self, mine: Tensor) -> Tensor:
        """The tensors of all processes, of one shape, stacked."""
        everyone = mine.new_empty(self.size, *mine.shape)
        dist.all_gather(list(everyone.unbind()), mine.contiguous(), group=self.group)
        return everyone


def processes_of(group: Any) -> Processes | None:
    """The processes of a group, which may be True for the default one, or None for no others; for one call of a loss,
    within which they may be given instead of the group."""
    return group if group is None or isinstance(group, Processes) else Processes(group)


class telling_failure:
    """Where what is done inside raises before the processes have met, the others are told; None if there are none."""

    def __init__(self, processes: Processes | None) -> None:
        self._processes = processes

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if self._processes is not None and kind is not None and issubclass(kind, Exception):
            self._processes.fail()


def among_processes(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Decorate a loss with an argument ``process_group``: where it raises before the processes have met, the others
    are told; and it is kept :func:`outside_graphs`."""

    @wraps(function)
    def call_among_processes(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        if kwargs.get("process_group") is None:
            return function(*args, **kwargs)
        kwargs["process_group"] = processes = processes_of(kwargs["process_group"])
        with telling_failure(processes):
            return function(*args, **kwargs)

    return outside_graphs(call_among_processes)


def outside_graphs(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Decorate a loss with an argument ``process_group``, or a method of a module that holds one: with a group
    ``torch.compile`` breaks its graph around the call, which then runs as it would without. How large the tables are
    is heard from the others, and no graph can wait for that."""

    @wraps(function)
    def call_outside_graphs(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        holder = args[0] if args else None
        group = holder.process_group if isinstance(holder, nn.Module) else kwargs.get("process_group")
        if group is None or not torch.compiler.is_compiling():
            return function(*args, **kwargs)
        if function not in _eager:
            # Not before, since it imports the compiler.
            _eager[function] = torch.compiler.disable(function)
        result: _Result = _eager[function](*args, **kwargs)
        return result

    return call_outside_graphs


class Meeting:
    """The processes of one evaluation of a loss, who know how many positives each has."""

    def __init__(self, processes: Processes, counts: list[int], num_logits: int) -> None:
        self._processes, self._counts = processes, counts
        #: How many processes there are.
        self.size = processes.size
        #: M of all processes.
        self.num_logits = num_logits
        first = sum(counts[: processes.rank])
        #: Where this process's positives are among those of all, which come process after process.
        self.own = slice(first, first + counts[processes.rank])

    def gather(self, columns: Sequence[Tensor]) -> list[Tensor]:
        """What all processes have for their positives, by one communication.

        Args:
            columns: ``[P]`` of this process each, of a floating-point dtype or int64.

        Returns:
            ``[P]`` of all processes each, in the same dtypes. Differentiable: what reaches this process's part, times
            the number of processes.
        """
        if not columns:
            return []
        longest = max(self._counts)
        mine = torch.zeros(len(columns), longest, dtype=torch.int64, device=columns[0].device)
        for row, column in zip(mine, columns):
            # Bits, not numbers: what is sent is not changed on the way, NaN included.
            row[: len(column)] = column if column.dtype == torch.int64 else column.detach().double().view(torch.int64)
        everyone = self._processes._gather(mine)
        parts = [part[:, :count] for part, count in zip(everyone, self._counts)]
        gathered = torch.cat(parts, 1)
        found = []
        for bits, column in zip(gathered, columns):
            values = bits if column.dtype == torch.int64 else bits.view(torch.float64).to(column.dtype)
            found.append(_Joined.apply(column, values, self) if column.requires_grad else values)  # type: ignore[no-untyped-call]
        return found

    def add(self, totals: Tensor) -> Tensor:
        """The sum over the processes of int64 totals of one shape, in their place."""
        dist.all_reduce(totals, group=self._processes.group)
        return totals


class _Joined(torch.autograd.Function):
    """What all processes have, with a derivative with respect to what this one has."""

    @staticmethod
    def forward(ctx: Any, column: Tensor, everyone: Tensor, meeting: Meeting) -> Tensor:
        ctx.meeting = meeting
        return everyone

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad[ctx.meeting.own] * ctx.meeting.size, None, None
