"""Runs beside one another, each in a process of its own, with progress bars."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from queue import Queue
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TimeRemainingColumn

Record = dict[str, Any]
Perform = Callable[[Any, Callable[[float], None]], Record]
"""Performs a run, and calls its second argument with the share that is done."""

_perform: Perform  # in a worker
_reports: Any  # in a worker: where it says how far it is

# The allocator of glibc gives large blocks back to the system, and every new one costs page faults: half of the time.
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**33)}


def _start_worker(make: Callable[[], Perform], reports: Any) -> None:
    global _perform, _reports
    if not torch.cuda.is_available():
        # So runs do not wait for one another, and give the same numbers whatever else runs.
        torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _perform, _reports = make(), reports


def _end_with_parent() -> None:
    """If the command is killed, its runs end, too."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(run: Any) -> Record:
    return _perform(run, lambda share: _reports.put((run, share)))


def perform_missing(
    missing: Callable[[], list[Any]],
    number: Callable[[], int],
    make: Callable[[], Perform],
    keep: Callable[[Record], str],
    jobs: int,
    console: Console,
) -> None:
    """Perform all runs that are missing.

    Args:
        missing: the runs that can start now, first ones first; each has a ``key``.
        number: of the runs that are known to be missing, those included that cannot start yet.
        make: makes what performs runs, in each process; can be pickled.
        keep: keeps a record as soon as its run ends; returns a line to print.
        jobs: runs at a time.
    """
    context = multiprocessing.get_context("spawn")
    os.environ |= _ALLOCATOR | os.environ
    with (
        context.Manager() as manager,
        ProcessPoolExecutor(jobs, context, _start_worker, (make, reports := manager.Queue())) as pool,
        Progress(
            "{task.description}", BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), console=console
        ) as bars,
    ):
        total = bars.add_task("[bold]runs", total=number())
        tasks: dict[Any, TaskID] = {}
        threading.Thread(target=_show, args=(reports, bars, tasks), daemon=True).start()
        running: dict[Future[Record], Any] = {}
        try:
            while True:
                waiting = [run for run in missing() if run not in running.values()]
                for run in waiting[: jobs - len(running)]:
                    running[pool.submit(_work, run)] = run
                    tasks[run] = bars.add_task(f"  {run.key}", total=1.0)
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    run = running.pop(future)
                    console.print(keep(future.result()))
                    bars.remove_task(tasks.pop(run))
                    done = bars.tasks[0].completed + 1
                    bars.update(total, completed=done, total=done + number())
        except BaseException:
            # A run that is not finished starts again next time.
            for process in list((pool._processes or {}).values()):
                process.terminate()
            raise


def _show(reports: Queue[tuple[Any, float]], bars: Progress, tasks: dict[Any, TaskID]) -> None:
    try:
        while True:
            run, share = reports.get()
            if run in tasks:
                bars.update(tasks[run], completed=share)
    except (EOFError, OSError):  # the manager has ended
        return
