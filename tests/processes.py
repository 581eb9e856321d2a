"""Several processes with a process group between them, which run a test's functions side by side."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# One that hangs fails its test soon.
TIMEOUT = timedelta(seconds=60)


class Pool:
    """``size`` processes with a gloo group of all, and of the first 1, 2, ... of them (:func:`group_of`)."""

    def __init__(self, size: int, store: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes, self._processes = [], []
        for rank in range(size):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, str(store), theirs), daemon=True)
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


def _serve(rank: int, size: int, store: str, pipe: Connection) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=TIMEOUT)
    for n in range(1, size + 1):
        _groups[n] = dist.new_group(list(range(n)), timeout=TIMEOUT)
    while (task := pipe.recv()) is not None:
        function, arguments = task
        try:
            pipe.send((False, function(rank, *arguments)))
        except BaseException:
            pipe.send((True, traceback.format_exc()))
    dist.destroy_process_group()


def shards(parts: Sequence[torch.Tensor], rank: int) -> torch.Tensor:
    """The part of this process; of those that have none, an empty one."""
    return parts[rank] if rank < len(parts) else parts[0][:0]
