"""Which runs the tables need, and which of them are still missing."""

from __future__ import annotations

from collections.abc import Iterable

from ..training.plan import Store
from .run import Run
from .settings import LEARNING_RATES, LONG, LONGER, SETTINGS

MAX_EXTENSIONS = 3


class Schedule:
    """The runs of one experiment.

    Args:
        store: what has been run.
        settings: names of the settings to compare.
        seeds: seeds of each setting, at least one; the learning rate is searched with the first.
        iterations: length of each run.
    """

    def __init__(self, store: Store[Run], settings: Iterable[str], seeds: Iterable[int], iterations: int) -> None:
        self.store, self.settings = store, list(settings)
        self.seeds, self.iterations = list(seeds), iterations

    def missing(self) -> list[Run]:
        """The runs that can be started now, those that others wait for first."""
        needed: dict[Run, None] = {}
        for name in sorted(self.settings, key=lambda name: SETTINGS[name].learning_rate_of is not None):
            for run in [*self._search(SETTINGS[name].learning_rate_of or name), *self.runs(name)]:
                needed[run] = None
        for name in LONG:
            needed |= dict.fromkeys(self.runs(name, LONGER) if name in self.settings else [])
        return [run for run in needed if run not in self.store.records]

    def number(self) -> int:
        """How many runs are known to be missing; more follow once learning rates are known."""
        return len(self.missing())

    def learning_rate(self, name: str) -> float | None:
        """The searched learning rate of a setting: the one with the best AP on validation scenes. None: not yet."""
        name = SETTINGS[name].learning_rate_of or name
        precision = self.precision(name)
        if any(run not in self.store.records for run in self._search(name)):
            return None
        return max(precision, key=lambda rate: precision[rate])

    def runs(self, name: str, times: int = 1) -> list[Run]:
        """The runs of every seed that the tables average, as soon as the learning rate is known, ``times`` as long."""
        rate = self.learning_rate(name)
        return [] if rate is None else [Run(name, rate, seed, times * self.iterations) for seed in self.seeds]

    def precision(self, name: str) -> dict[float, float]:
        """AP on validation scenes by learning rate, of the runs with the first seed that there are."""
        return {
            run.learning_rate: record["validation"]["ap"]
            for run, record in self.store.records.items()
            if (run.setting, run.seed, run.iterations) == (name, self.seeds[0], self.iterations)
        }

    def _search(self, name: str) -> list[Run]:
        """The runs that find a learning rate: the first grid, widened on the side where the best lies at its end."""
        rates = list(LEARNING_RATES)
        precision = self.precision(name)
        for _ in range(MAX_EXTENSIONS):
            if any(rate not in precision for rate in rates):
                break
            best = max(rates, key=lambda rate: precision[rate])
            if best == rates[0]:
                rates.insert(0, best / 2)
            elif best == rates[-1]:
                rates.append(best * 2)
            else:
                break
        return [Run(name, rate, self.seeds[0], self.iterations) for rate in rates]
