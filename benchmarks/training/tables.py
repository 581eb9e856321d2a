"""The tables of an experiment, as rows of text, and what follows from them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .contenders import CONTENDERS
from .plan import SELECTED_BY, Plan

METRICS = {
    "AP": "ap",
    "AP50": "ap50",
    "AP75": "ap75",
    "AP90": "ap90",
    "oLRP": "olrp",
    "Loc": "olrp_loc",
    "FP": "olrp_fp",
    "FN": "olrp_fn",
    "rho": "rho",
}


@dataclass(frozen=True)
class Table:
    """A table: its name in a document, a title, the columns, and rows of as many cells."""

    name: str
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """With the numbers to the right."""
        rules = ["---", *["---:"] * (len(self.columns) - 1)]
        return "\n".join("| " + " | ".join(cells) + " |" for cells in (self.columns, rules, *self.rows))


def tables(plan: Plan, split: str) -> list[Table]:
    """A table for each length, AP by class for the longest, and the learning rates.

    Args:
        split: what is shown of each record: ``test``, or ``val``.
    """
    found = []
    for length in plan.lengths:
        rows = []
        for name in plan.contenders:
            records = plan.records(name, length)
            if records:
                seconds = statistics.median(record["training_seconds"] for record in records)
                metrics = [spread(record[split][key] for record in records) for key in METRICS.values()]
                rate = f"{records[0]['learning_rate']:g}"
                rows.append([CONTENDERS[name].title, *metrics, str(len(records)), rate, f"{seconds:.0f}"])
        columns = ["loss", *METRICS, "runs", "rate", "seconds"]
        found.append(Table(f"passes-{length:g}", _passes(length), columns, rows))
    found += [_classes(plan, split), _rates(plan)]
    return [table for table in found if table.rows]


def _passes(length: float) -> str:
    return f"{length:g} pass{'' if length == 1 else 'es'} over the training images"


def spread(values: Iterable[float | None]) -> str:
    """Mean and sample standard deviation in hundredths; for one value it alone, a dash if any is undefined."""
    values = list(values)
    hundredths = [100 * value for value in values if value is not None]
    if len(hundredths) < len(values):
        return "-"
    if len(hundredths) < 2:
        return f"{hundredths[0]:.1f}"
    return f"{statistics.mean(hundredths):.1f} ± {statistics.stdev(hundredths):.1f}"


def _classes(plan: Plan, split: str) -> Table:
    length = plan.lengths[-1]
    by_name = {name: records for name in plan.contenders if (records := plan.records(name, length))}
    classes = sorted({each for records in by_name.values() for record in records for each in record[split]["by_class"]})
    rows = [
        [each, *(spread(record[split]["by_class"][each][0] for record in records) for records in by_name.values())]
        for each in classes
    ]
    columns = ["class", *(CONTENDERS[name].title for name in by_name)]
    return Table("classes", f"AP by class, {_passes(length)}", columns, rows if by_name else [])


def _rates(plan: Plan) -> Table:
    rows = []
    for name in (name for name in plan.contenders if CONTENDERS[name].rate_of is None):
        records = [plan.store.records.get(run) for run in plan.search(name)]
        cells = ["" if record is None else f"{100 * record['val'][SELECTED_BY]:.1f}" for record in records]
        if any(cells):
            rows.append([CONTENDERS[name].title, *cells])
    title = f"AP on val by learning rate, {_passes(plan.length_of_search)}, one run each"
    return Table("rates", title, ["loss", *(f"{rate:g}" for rate in plan.rates)], rows)


def findings(plan: Plan, split: str) -> list[str]:
    """A sentence for each length: which loss is ahead, by more than the spread of a difference. Losses with one run are
    left out."""
    found = []
    for length in plan.lengths:
        by_name = {
            name: [record[split][SELECTED_BY] for record in records]
            for name in plan.contenders
            if len(records := plan.records(name, length)) > 1
        }
        if len(by_name) < 2:
            continue
        best = max(by_name, key=lambda name: statistics.mean(by_name[name]))
        alike = [name for name in by_name if name != best and not _is_above(by_name[best], by_name[name])]
        titles = [CONTENDERS[name].title for name in alike]
        others = f"; no difference seen to {', '.join(titles)}" if titles else ", ahead of all others"
        mean = 100 * statistics.mean(by_name[best])
        found.append(f"After {_passes(length)}: {CONTENDERS[best].title} has the highest AP ({mean:.1f}){others}.")
    return found


def _is_above(first: list[float], second: list[float]) -> bool:
    """Whether the difference of two means is larger than its spread, twice its standard error."""
    error = math.sqrt(statistics.variance(first) / len(first) + statistics.variance(second) / len(second))
    return statistics.mean(first) - statistics.mean(second) > 2 * error
