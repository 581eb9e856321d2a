"""Many cases, in processes that may hang or end without a word; and the record of what came out."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch
from dialect import KERNELS
from fuzz_cases import draw_problem
from fuzz_run import Outcome, describe, name_of, run_case

SECONDS, PATIENCE = 600.0, 6000.0
"""A case that takes more seconds of a processor hangs; and one that takes more by the clock, which others may share. No
case comes near, on whatever machine: a second is much, and the first in a process may have to compile for a minute."""
_CHUNK = 200


def work(pipe: Any, seed: int, of: Sequence[str]) -> None:
    """Run chunks of indices that come through the pipe, and tell of each case as it begins and ends."""
    torch.set_num_threads(1)
    while True:
        chunk = pipe.recv()
        if chunk is None:
            return
        for index in chunk:
            pipe.send(index)
            pipe.send(run_case(seed, index, of))


class _Worker:
    """A process, what it has left to do, and since when it does what it does."""

    def __init__(self, seed: int, of: Sequence[str]) -> None:
        self.arguments, self.left = (seed, of), list[int]()
        self.running, self.since, self.used = -1, 0.0, 0.0
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, far = context.Pipe()
        self.process = context.Process(target=work, args=(far, *self.arguments), daemon=True)
        self.process.start()
        far.close()

    def give(self, chunk: Sequence[int]) -> None:
        self.left, self.running = list(chunk), -1
        self.pipe.send(self.left)

    def poll(self) -> Outcome | None:
        """What has ended; hangs and crashes are made into outcomes, and the rest goes to a new process."""
        alive = self.process.is_alive()  # before it is looked for what it has sent: what has ended sends nothing more
        if self.pipe.poll():
            with contextlib.suppress(EOFError, ConnectionResetError):
                message = self.pipe.recv()
                if isinstance(message, Outcome):
                    self.left.remove(message.index)
                    self.running = -1
                    return message
                self.running, self.since, self.used = message, time.monotonic(), _processor_seconds(self.process.pid)
                return None
            return self._lost(hangs=False)
        hangs = self._hangs()
        if alive and not hangs:
            return None
        return self._lost(hangs)

    def _hangs(self) -> bool:
        if self.running < 0:
            return False
        used = _processor_seconds(self.process.pid) - self.used
        return used > SECONDS or time.monotonic() - self.since > PATIENCE

    def _lost(self, hangs: bool) -> Outcome:
        index = self.running if self.running >= 0 else self.left[0]
        if not hangs:
            # Its end of the pipe closes a little before its exit code is known.
            self.process.join(PATIENCE)
        self.process.kill()
        self.process.join()
        told = "hangs" if hangs else f"ended its process, exit code {self.process.exitcode}"
        rest = [i for i in self.left if i != index]
        self._start()
        self.give(rest)
        problem = draw_problem(*self.arguments[:1], index, self.arguments[1], small=KERNELS)
        return Outcome(index, name_of(problem), problem.backend, "FAILED", f"{told}\n{describe(problem)}")

    def stop(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.pipe.send(None)
        self.process.join(1)
        self.process.kill()


def _processor_seconds(pid: int | None) -> float:
    """What a process has used so far; 0 where the system does not tell."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Record:
    """What is known so far; kept in a file, where there is one."""

    def __init__(self, seed: int, of: Sequence[str], path: Path | None) -> None:
        self.seed, self.of, self.path = seed, list(of), path
        self.done: set[int] = set()  # chunks
        self.counts: Counter[tuple[str, str, str]] = Counter()
        self.failures: list[Outcome] = []
        if path is not None and path.exists():
            kept = json.loads(path.read_text())
            if (kept["seed"], kept["backends"]) != (seed, self.of):
                raise SystemExit(f"{path} is of seed {kept['seed']} and backends {kept['backends']}")
            self.done = set(kept["chunks"])
            self.counts.update({tuple(key.split("|")): n for key, n in kept["counts"].items()})
            self.failures = [Outcome(*failure) for failure in kept["failures"]]

    def add(self, outcomes: Sequence[Outcome], chunk: int) -> None:
        """The outcomes of a whole chunk."""
        self.done.add(chunk)
        self.counts.update((o.member, o.backend, o.outcome) for o in outcomes)
        self.failures += [o for o in outcomes if o.outcome == "FAILED"]
        if self.path is not None:
            counts = {"|".join(key): n for key, n in sorted(self.counts.items())}
            kept = {"seed": self.seed, "backends": self.of, "chunks": sorted(self.done), "counts": counts}
            partial = self.path.with_suffix(".partial")
            partial.write_text(json.dumps({**kept, "failures": self.failures}, indent=1))
            os.replace(partial, self.path)

    @property
    def total(self) -> int:
        return sum(self.counts.values())


def run_many(record: Record, num_cases: int, jobs: int) -> Iterator[int]:
    """All chunks that are not done yet; yields 1 for each case."""
    chunks = {k: range(k * _CHUNK, min((k + 1) * _CHUNK, num_cases)) for k in range(-(-num_cases // _CHUNK))}
    waiting = [k for k in chunks if k not in record.done]
    workers = [_Worker(record.seed, record.of) for _ in range(min(jobs, len(waiting)))]
    at: dict[int, tuple[int, list[Outcome]]] = {}
    try:
        while waiting or at:
            for number, worker in enumerate(workers):
                if number not in at and waiting:
                    at[number] = waiting.pop(0), []
                    worker.give(chunks[at[number][0]])
            connection.wait([worker.pipe for worker in workers], timeout=0.5)
            for number, worker in enumerate(workers):
                outcome = worker.poll() if number in at else None
                if outcome is not None:
                    chunk, outcomes = at[number]
                    outcomes.append(outcome)
                    yield 1
                    if len(outcomes) == len(chunks[chunk]):
                        record.add(outcomes, chunk)
                        del at[number]
    finally:
        for worker in workers:
            worker.stop()
