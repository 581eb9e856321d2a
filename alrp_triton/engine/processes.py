"""One exact ranking over the processes of a ``torch.distributed`` group.

The processes send little: the scores of all P positives, from which each makes the same knots, and the integer totals
of their negatives, whose sum does not depend on the order. So every process holds the statistics of the whole batch,
bit for bit those of one process, and writes the gradient of its own logits. Nothing that is sent grows with the number
of logits.

Every process then has the same loss, a function of the logits of all processes. It backpropagates only into its own
logits, with the derivative times the number of processes. DistributedDataParallel takes the mean over the processes,
which is the gradient of the whole batch.
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
        ValueError: ``torch.distributed`` is not available or not initialised, or this process is not in the group.
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
        # Until :meth:`meet`, the others wait for this process.
        self._awaited = True

    def meet(self, num_positives: int, num_logits: int, settings: dict[str, float]) -> Meeting:
        """Exchange the sizes with the other processes.

        Args:
            num_positives: P of this process.
            num_logits: M of this process.
            settings: arguments that must be the same in all processes, by name.

        Raises:
            RuntimeError: another process has raised an error.
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
        """Tell the others that this process has failed, if they still wait for it in :meth:`meet`."""
        if self._awaited:
            self._awaited = False
            self._exchange([_FAILED])

    def _exchange(self, row: Sequence[float], length: int = 16) -> list[list[float]]:
        """The rows of all processes. With NCCL the host waits for the device here. With a group that also has gloo it
        does not, because these numbers are on the host."""
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
    """The processes of a group for one call of a loss. The group may be True for the default one, None for no others,
    or already :class:`Processes`."""
    return group if group is None or isinstance(group, Processes) else Processes(group)


class telling_failure:
    """A context that tells the other processes if its body raises before the processes have met; None for no others."""

    def __init__(self, processes: Processes | None) -> None:
        self._processes = processes

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if self._processes is not None and kind is not None and issubclass(kind, Exception):
            self._processes.fail()


def among_processes(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Decorate a loss with an argument ``process_group``: it tells the others if it raises before the processes have
    met, and it stays :func:`outside_graphs`."""

    @wraps(function)
    def call_among_processes(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        if kwargs.get("process_group") is None:
            return function(*args, **kwargs)
        kwargs["process_group"] = processes = processes_of(kwargs["process_group"])
        with telling_failure(processes):
            return function(*args, **kwargs)

    return outside_graphs(call_among_processes)


def outside_graphs(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Decorate a loss with an argument ``process_group``, or a method of a module that holds one. With a group
    ``torch.compile`` breaks its graph around the call, which then runs as without compilation. The sizes of the tables
    come from the other processes, and a graph cannot wait for them."""

    @wraps(function)
    def call_outside_graphs(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        holder = args[0] if args else None
        group = getattr(holder, "process_group", None) if isinstance(holder, nn.Module) else kwargs.get("process_group")
        if group is None or not torch.compiler.is_compiling():
            return function(*args, **kwargs)
        if function not in _eager:
            # Not earlier, because it imports the compiler.
            _eager[function] = torch.compiler.disable(function)
        result: _Result = _eager[function](*args, **kwargs)
        return result

    return call_outside_graphs


class Meeting:
    """The processes of one evaluation of a loss, with the number of positives of each."""

    def __init__(self, processes: Processes, counts: list[int], num_logits: int) -> None:
        self._processes, self._counts = processes, counts
        #: The number of processes.
        self.size = processes.size
        #: M of all processes.
        self.num_logits = num_logits
        first = sum(counts[: processes.rank])
        #: The positions of this process's positives among all, process after process.
        self.own = slice(first, first + counts[processes.rank])

    def gather(self, columns: Sequence[Tensor]) -> list[Tensor]:
        """The values of all processes for their positives, by one communication.

        Args:
            columns: ``[P]`` of this process each, of a floating-point dtype or int64.

        Returns:
            ``[P]`` of all processes each, in the same dtypes. Differentiable: the gradient of this process's part is
            multiplied by the number of processes.
        """
        if not columns:
            return []
        longest = max(self._counts)
        mine = torch.zeros(len(columns), longest, dtype=torch.int64, device=columns[0].device)
        for row, column in zip(mine, columns):
            # Send bits, not numbers, so that nothing changes, also for NaN.
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
        """Sum int64 totals of one shape over the processes, in place."""
        dist.all_reduce(totals, group=self._processes.group)
        return totals


class _Joined(torch.autograd.Function):
    """The values of all processes, with a derivative for those of this process."""

    @staticmethod
    def forward(ctx: Any, column: Tensor, everyone: Tensor, meeting: Meeting) -> Tensor:
        ctx.meeting = meeting
        return everyone

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad[ctx.meeting.own] * ctx.meeting.size, None, None
