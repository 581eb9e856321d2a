"""Runs beside one another, each in a process of its own, with progress bars."""

from __future__ import annotations

import multiprocessing
import os
import threading
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from queue import Queue
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TimeRemainingColumn

from .run import Run, perform
from .schedule import Record, Schedule
from .settings import num_threads

_reports: Any = None  # in a worker: where it says how far it has come


def _start_worker(reports: Any) -> None:
    global _reports
    _reports = reports
    torch.set_num_threads(num_threads())
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Where the command is killed, its runs end, too."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(run: Run, device: str) -> Record:
    return perform(run, torch.device(device), lambda iteration: _reports.put((run, iteration)))


def train_missing(schedule: Schedule, jobs: int, device: str, console: Console) -> None:
    """Run all that is missing, ``jobs`` at a time; each is written down as soon as it ends."""
    context = multiprocessing.get_context("spawn")
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn())
    with (
        context.Manager() as manager,
        ProcessPoolExecutor(jobs, context, _start_worker, (reports := manager.Queue(),)) as pool,
        Progress(*columns, TimeRemainingColumn(), console=console) as bars,
    ):
        done = len(schedule.store.records)
        total = bars.add_task("[bold]runs", total=None, completed=done)
        tasks: dict[Run, TaskID] = {}
        listener = threading.Thread(target=_show, args=(reports, bars, tasks), daemon=True)
        listener.start()
        running: dict[Future[Record], Run] = {}
        try:
            while True:
                waiting = [run for run in schedule.missing() if run not in running.values()]
                for run in waiting[: jobs - len(running)]:
                    running[pool.submit(_work, run, device)] = run
                    tasks[run] = bars.add_task(f"  {run.key}", total=run.iterations)
                if not running:
                    break
                known = len(schedule.store.records) + len(waiting) + len(running)
                bars.update(total, total=known)  # more follow once learning rates are known
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    run = running.pop(future)
                    record = future.result()
                    schedule.store.add(record)
                    bars.remove_task(tasks.pop(run))
                    bars.advance(total)
                    console.print(
                        f"{run.key}: AP {record['test']['ap']:.3f}, oLRP {record['test']['olrp']:.3f}, "
                        f"validation AP {record['validation']['ap']:.3f}, {record['training_seconds']:.0f} s"
                    )
        except BaseException:
            # What is running cannot be saved half-way: it is run again next time.
            for process in list((pool._processes or {}).values()):
                process.terminate()
            raise


def _show(reports: Queue[tuple[Run, int]], bars: Progress, tasks: dict[Run, TaskID]) -> None:
    try:
        while True:
            run, iteration = reports.get()
            if run in tasks:
                bars.update(tasks[run], completed=iteration)
    except (EOFError, OSError):  # the manager has ended
        return
