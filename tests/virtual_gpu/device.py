"""A virtual GPU: how launches run, and what they have shown."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import math
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from . import layout
from .engine import load_engine
from .layout import Flag, Kind, Special
from .memory import Memory
from .program import Program
from .reports import ERRORS, KINDS, Fault, describe
from .results import Result

_MAX_REPORTS = 64
_MAX_GRID = (2**31 - 1, 65535, 65535)


class Device:
    """A virtual GPU, on which launches of any thread run one after the other.

    Args:
        target: for which the compiler compiles, such as 90.
        check: whether to look for races and for shared memory that is read before it is set. Bounds and barriers are
            always checked.
        count: whether to count sectors of memory and atomic operations. Instructions are always counted.
        noise: whether registers and shared memory begin as noise.
        shuffle: whether CTAs and warps take turns in an order drawn by ``seed``.
        window: how many CTAs are under way at once.
        quantum: how many instructions a warp's turn has at most; 0: until a barrier.
        seed: of what is drawn.
        strict: whether a launch raises :class:`Fault` if a check finds an error.
        keep: whether to keep the results of launches.
        budget: how many instructions of warps a launch may have until it counts as endless.
        guarded: whether a launch outside of a guard of its device counts as an error.

    Attributes:
        results: of all launches, if kept.
        totals: of all launches.
        problems: how often checks found something, by kernel and kind (:data:`KINDS`).
        examples: one description of each of these.
        errors: descriptions of what is wrong in any case (:data:`ERRORS`), one of each kind for each launch.
    """

    def __init__(
        self,
        target: int = 90,
        *,
        check: bool = True,
        count: bool = False,
        noise: bool = True,
        shuffle: bool = True,
        window: int = 2,
        quantum: int = 200,
        seed: int = 0,
        strict: bool = False,
        keep: bool = True,
        budget: int = 10**12,
        guarded: bool = False,
    ) -> None:
        self.target, self.check, self.count, self.seed = target, check, count, seed
        self.noise, self.shuffle, self.window, self.quantum = noise, shuffle, max(1, window), quantum
        self.strict, self.keep, self.budget, self.guarded = strict, keep, budget, guarded
        self.results: list[Result] = []
        self.totals: Counter[str] = Counter()
        self.problems: Counter[str] = Counter()
        self.examples: dict[str, str] = {}
        self.errors: list[str] = []
        self._launches = itertools.count(1)
        self._lock = threading.RLock()
        self._guards = threading.local()

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """Within, this device is the current one of this thread."""
        depth = getattr(self._guards, "depth", 0)
        self._guards.depth = depth + 1
        try:
            yield
        finally:
            self._guards.depth = depth

    def run(
        self, program: Program, grid: tuple[int, int, int], shared: int, kinds: list[str], values: list[Any]
    ) -> Result:
        """Launch a kernel.

        Args:
            program: the kernel.
            grid: how many CTAs.
            shared: bytes of shared memory of a CTA, besides those that the kernel declares.
            kinds: Triton's types of the arguments.
            values: the arguments.
        """
        if any(length > most for length, most in zip(grid, _MAX_GRID)) or math.prod(grid) >= 2**32:
            raise ValueError(f"{program.name}: a grid of {grid}")
        if program.num_threads > 32 * layout.MAX_WARPS:
            raise ValueError(f"{program.name}: {program.num_threads} threads")
        with self._lock:
            return self._run(program, grid, program.own_shared + shared, Memory(program, kinds, values))

    def _run(self, program: Program, grid: tuple[int, int, int], shared: int, memory: Memory) -> Result:
        num_ctas = max(0, math.prod(grid))
        counts = np.zeros(len(program.code), layout.COUNT)
        reports = np.zeros(_MAX_REPORTS, layout.REPORT)
        cta_total, cta_longest = np.zeros((2, num_ctas), np.uint32)
        allocations = memory.allocations(self.check or self.count)
        launch = layout.Launch(
            code=program.code.ctypes.data,
            frame=program.frame.ctypes.data,
            params=memory.params.ctypes.data,
            allocations=allocations,
            reports=reports.ctypes.data,
            counts=counts.ctypes.data,
            cta_total=cta_total.ctypes.data,
            cta_longest=cta_longest.ctypes.data,
            seed=(self.seed << 32) + next(self._launches),
            budget=self.budget,
            frame_size=program.frame.nbytes,
            variables_size=program.variables_size,
            params_size=program.params_size,
            shared_size=shared,
            num_warps=-(-program.num_threads // 32),
            threads_of_last_warp=(program.num_threads - 1) % 32 + 1,
            num_allocations=len(allocations),
            max_reports=_MAX_REPORTS,
            flags=self._flags(),
            window=self.window,
            quantum=self.quantum,
            shared_shift=program.shared_granule.bit_length() - 1,
            specials=(ctypes.c_int32 * len(Special))(*program.specials),
            grid=(ctypes.c_uint32 * 3)(*(max(0, length) for length in grid)),
        )
        if num_ctas and not load_engine().run_launch(ctypes.byref(launch)):
            raise MemoryError(f"{program.name}: no memory for {self.window} CTAs")
        found: Counter[int] = Counter()
        if launch.num_reports:
            found.update({int(kind): number for kind, number in enumerate(launch.kinds) if number})
        texts = [(int(r["kind"]), describe(r, program, memory)) for r in reports[: launch.num_reports]]
        if self.guarded and not getattr(self._guards, "depth", 0):
            found[Kind.UNGUARDED] += 1
            texts.append((Kind.UNGUARDED, f"{program.name}: {KINDS[Kind.UNGUARDED]}"))
        result = Result(
            program=program,
            grid=grid,
            num_warps=launch.num_warps,
            shared=shared,
            counts=counts,
            cta_total=cta_total,
            cta_longest=cta_longest,
            reports=[text for _, text in texts],
            kinds=Counter({KINDS[kind]: number for kind, number in found.items()}),
        )
        if self.count:
            result.count_sectors([(s.granules, s.sectors) for s in memory.storages])
        self._note(result, texts)
        return result

    def _flags(self) -> int:
        flags = Flag(0)
        for flag, chosen in (
            (Flag.CHECK, self.check),
            (Flag.COUNT, self.count),
            (Flag.NOISE, self.noise),
            (Flag.SHUFFLE, self.shuffle),
        ):
            flags |= flag if chosen else Flag(0)
        return int(flags)

    def _note(self, result: Result, texts: list[tuple[int, str]]) -> None:
        self.totals["launches"] += 1
        self.totals["CTAs"] += len(result.cta_total)
        self.totals["thread instructions"] += result.thread_instructions
        self.totals["warp instructions"] += result.warp_instructions
        for words, number in result.kinds.items():
            self.problems[f"{result.name}: {words}"] += number
        errors: dict[int, str] = {}
        for kind, text in texts:
            self.examples.setdefault(f"{result.name}: {KINDS[kind]}", text)
            if kind in ERRORS:
                errors.setdefault(kind, text)
        self.errors += errors.values()
        if self.keep:
            self.results.append(result)
        if self.strict and errors:
            raise Fault("\n".join(errors.values()))
