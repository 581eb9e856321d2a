"""Which runs an experiment needs, and which of them are still missing."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from .contenders import CONTENDERS
from .run import METRICS, Run

Record = dict[str, Any]
Key = TypeVar("Key")
SELECTED_BY = "ap"
assert SELECTED_BY in METRICS


class Store(Generic[Key]):
    """Records of finished runs, a line each in one file, so that an interrupted experiment continues.

    Args:
        path: the file; it may not exist yet.
        kind: the dataclass of what tells a run from the others.
        setting: what all runs share.

    Raises:
        ValueError: the file has runs of another setting, or is damaged.
    """

    def __init__(self, path: Path, kind: type[Key], setting: dict[str, Any] | None = None) -> None:
        self.path, self.kind, self.setting = path, kind, setting
        self.records: dict[Key, Record] = {}
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        for number, line in enumerate(lines, 1):
            try:
                self._keep(json.loads(line))
            except (KeyError, ValueError) as error:
                raise ValueError(f"{path}, line {number}: {error}") from None

    def add(self, record: Record) -> Key:
        """Keep a record and write it at once; returns its run."""
        run = self._keep(record)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        return run

    def _keep(self, record: Record) -> Key:
        if self.setting is not None and record["setting"] != self.setting:
            raise ValueError(f"expected runs of the setting {self.setting}, got {record['setting']}")
        run = self.kind(*(record[field.name] for field in dataclasses.fields(self.kind)))  # type: ignore[arg-type]
        self.records[run] = record
        return run


class Plan:
    """The runs of one experiment.

    Args:
        store: the runs that are done.
        contenders: names of the losses.
        rates: learning rates, of which the one with the highest AP on ``val`` is taken for each loss.
        seeds: of the runs; rates are tried with the first.
        lengths: passes over the training images; rates are tried with the middle one.
    """

    def __init__(
        self,
        store: Store[Run],
        contenders: Sequence[str],
        rates: Sequence[float],
        seeds: Sequence[int],
        lengths: Sequence[float],
    ) -> None:
        self.store, self.contenders, self.rates = store, list(contenders), sorted(rates)
        self.seeds, self.lengths = list(seeds), sorted(lengths)
        self.length_of_search = self.lengths[len(self.lengths) // 2]

    def search(self, contender: str) -> list[Run]:
        """The runs that choose a learning rate."""
        searched = CONTENDERS[contender].rate_of or contender
        return [Run(searched, rate, self.seeds[0], self.length_of_search) for rate in self.rates]

    def learning_rate(self, contender: str) -> float | None:
        """The chosen learning rate; None as long as a run is missing."""
        runs, records = self.search(contender), self.store.records
        if any(run not in records for run in runs):
            return None
        return max(runs, key=lambda run: records[run]["val"][SELECTED_BY]).learning_rate

    def runs(self, contender: str, length: float) -> list[Run]:
        """The runs of all seeds; none as long as the learning rate is not known."""
        rate = self.learning_rate(contender)
        return [] if rate is None else [Run(contender, rate, seed, length) for seed in self.seeds]

    def records(self, contender: str, length: float) -> list[Record]:
        """Of the runs that are done."""
        runs = self.runs(contender, length)
        return [self.store.records[run] for run in runs if run in self.store.records]

    def missing(self) -> list[Run]:
        """The runs that can start now: searches first, then seed after seed, so that all losses have as many."""
        needed = [run for contender in self.contenders for run in self.search(contender)]
        for seed in range(len(self.seeds)):
            for length in self.lengths:
                needed += [
                    run for contender in self.contenders for run in self.runs(contender, length)[seed : seed + 1]
                ]
        return [run for run in dict.fromkeys(needed) if run not in self.store.records]

    def number(self) -> int:
        """How many runs are missing, those included that wait for a learning rate."""
        waiting = sum(self.learning_rate(contender) is None for contender in self.contenders)
        # One run of a search is a run of the first seed, too, but of the loss that is searched.
        each = len(self.seeds) * len(self.lengths)
        own = sum(CONTENDERS[name].rate_of is None and self.learning_rate(name) is None for name in self.contenders)
        return len(self.missing()) + waiting * each - own
