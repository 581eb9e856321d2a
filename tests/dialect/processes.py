"""Several processes with a process group between them, which run a test's functions side by side; and what it means
that they rank as one."""

from __future__ import annotations

import contextlib
import os
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from .cases import KERNELS, Case, all_cases
from .family import FAMILY, Results, assert_agree, evaluate
from .interpreters import new_processes
from .kernel_session import kernel_session, sound_kernels

# One that hangs fails its test at last; none that is only slow, on a busy machine, takes so long.
TIMEOUT = timedelta(minutes=30)
# What a module of such tests is marked by.
MARKS = [
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo"),
    pytest.mark.xdist_group("processes"),  # which are then started once
]
SIZE = 4
HALF = (torch.float16, torch.bfloat16)
BACKENDS = ("triton", "pairwise") if KERNELS else ("torch", "numba")
CASES = {case.name: case for case in all_cases()}
# Three times a gradient, rounded, is not three times the rounded one.
ROUNDED = ["errors_bfloat16", *(name for name, case in CASES.items() if case.logits.dtype in HALF)]


class Pool:
    """``size`` processes with a group of all, and of the first 1, 2, ... of them (:func:`group_of`); with NCCL each
    has a GPU of its own."""

    def __init__(self, size: int, store: Path, backend: str = "gloo") -> None:
        context = new_processes()
        self._pipes, self._processes = [], []
        for rank in range(size):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, store.as_uri(), theirs, backend), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(mine)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What ``function(rank, *arguments)`` returns in each process; what one raises is raised here."""
        for pipe in self._pipes:
            pipe.send((function, arguments))
        answers = [pipe.recv() for pipe in self._pipes]
        for rank, (failed, value) in enumerate(answers):
            if failed:
                raise AssertionError(f"process {rank}: {value}")
        return [value for _, value in answers]

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(20)
            process.kill()


_groups: dict[int, Any] = {}


def group_of(size: int) -> Any:
    """In a process of the pool: the group of the first ``size`` processes."""
    return _groups[size]


def _serve(rank: int, size: int, store: str, pipe: Connection, backend: str) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    if "nccl" in backend:
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, init_method=store, rank=rank, world_size=size, timeout=TIMEOUT)
    for n in range(1, size + 1):
        _groups[n] = dist.new_group(list(range(n)), timeout=TIMEOUT)
    session = contextlib.ExitStack()
    session.enter_context(kernel_session())
    while (task := pipe.recv()) is not None:
        function, arguments = task
        try:
            with sound_kernels():
                answer = function(rank, *arguments)
            pipe.send((False, answer))
        except BaseException:
            pipe.send((True, traceback.format_exc()))
    dist.destroy_process_group()


@contextlib.contextmanager
def counting_bytes() -> Iterator[list[int]]:
    """In a process: the bytes that it gives to each collective meanwhile."""
    sent: list[int] = []
    gather, add = dist.all_gather, dist.all_reduce

    def counted_gather(out: list[Tensor], mine: Tensor, **further: Any) -> Any:
        sent.append(mine.nbytes)
        return gather(out, mine, **further)

    def counted_add(mine: Tensor, **further: Any) -> Any:
        sent.append(mine.nbytes)
        return add(mine, **further)

    with patch.object(dist, "all_gather", counted_gather), patch.object(dist, "all_reduce", counted_add):
        yield sent


def cut(case: Case, values: Tensor, size: int, seed: int = 0) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Logits, labels and values of each process: uneven parts of the case, the last of them empty."""
    generator = torch.Generator().manual_seed(seed)
    inner = torch.randint(len(case.logits) + 1, (max(size - 2, 0),), generator=generator).sort().values.tolist()
    ends = [*inner, len(case.logits), len(case.logits)][:size] if size > 1 else [len(case.logits)]
    parts, begin, first = [], 0, 0
    for end in ends:
        count = int((case.labels[begin:end] == 1).sum())
        parts.append((case.logits[begin:end], case.labels[begin:end], values[first : first + count]))
        begin, first = end, first + count
    return parts


def together(found: list[Results], size: int) -> Results:
    """Of what the processes found, scalars, which have to be the same, and the rest in a row; gradients as
    DistributedDataParallel makes them."""
    results = {}
    for name, first in found[0].items():
        parts = [one[name] for one in found]
        if first.dim() == 0:
            assert all(torch.equal(part, first) or (part.isnan() and first.isnan()) for part in parts), name
            results[name] = first
        else:
            results[name] = torch.cat(parts) / (size if " by " in name else 1)
    return results


def family_of(rank: int, name: str, size: int, backend: str, settings: dict[str, Any]) -> list[Results] | None:
    """In a process: every member for its part of a case."""
    if rank >= size:
        return None
    results = []
    for member in FAMILY:
        part = cut(CASES[name], member.values(CASES[name]), size)[rank]
        results.append(evaluate(member, *part, backend, process_group=group_of(size), **settings))
    return results


def assert_as_alone(pool: Pool, name: str, size: int, backend: str, **settings: Any) -> None:
    found = [one for one in pool.run(family_of, name, size, backend, settings) if one is not None]
    assert len(found) == size
    for member, *of_member in zip(FAMILY, *found):
        expected = evaluate(member, *CASES[name][1:3], member.values(CASES[name]), backend, **settings)
        said = f"{member.name}, {name}, {size} processes"
        joined = together(of_member, size)
        # Statistics are the same integers, so that what is made of them is the same, whoever counted.
        for component in member.components:
            if backend != "triton":  # which alone takes other kernels
                torch.testing.assert_close(joined[component], expected[component], rtol=0, atol=0, equal_nan=True)
        if name not in ROUNDED:
            assert_agree(joined, expected, said=said)
