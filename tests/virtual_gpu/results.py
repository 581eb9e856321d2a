"""What a launch has shown."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from .layout import Sector
from .program import Array, Program


@dataclass
class Result:
    """One launch.

    Attributes:
        counts: of each instruction (``layout.COUNT``): how many warps ran it, how many lanes took part; and if the
            device counts, sectors and lines of memory, and atomic operations that waited for another lane's.
        cta_total: instructions of each CTA's warps.
        cta_longest: those of its longest warp.
        reports: what checks found, some of each kind.
        kinds: how often, by kind.
        sectors_read: different sectors of 32 bytes of global memory, if the device counts.
        sectors_written: the same.
        most_atomics: on one element, if the device counts.
    """

    program: Program
    grid: tuple[int, int, int]
    num_warps: int
    shared: int
    counts: Array
    cta_total: Array
    cta_longest: Array
    reports: list[str]
    kinds: Counter[str]
    sectors_read: int = 0
    sectors_written: int = 0
    most_atomics: int = 0

    @property
    def name(self) -> str:
        return self.program.name

    @property
    def warp_instructions(self) -> int:
        return int(self.counts["runs"].sum())

    @property
    def thread_instructions(self) -> int:
        return int(self.counts["lanes"].sum())

    def by_class(self, column: str = "lanes") -> dict[str, int]:
        """A column of the counts, summed over instructions of one kind (``Program.classes``)."""
        found: Counter[str] = Counter()
        for kind, number in zip(self.program.classes, self.counts[column]):
            found[kind] += int(number)
        return dict(found)

    def count_sectors(self, storages: list[tuple[Array | None, Array | None]]) -> None:
        """Add what happened to storages: their granules and sectors."""
        for granules, sectors in storages:
            if granules is None or sectors is None:
                continue
            self.sectors_read += int(((sectors & Sector.READ) != 0).sum())
            self.sectors_written += int(((sectors & Sector.WRITTEN) != 0).sum())
            self.most_atomics = max(self.most_atomics, int(granules["atomics"].max(initial=0)))
