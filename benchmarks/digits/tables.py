"""The tables of the experiments, as rows of text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..training.plan import Record
from ..training.tables import Table, spread
from .schedule import Schedule
from .settings import ALRP, LONG, LONGER, SETTINGS, TABLES

METRICS = {"AP": "ap", "AP50": "ap50", "AP75": "ap75", "AP90": "ap90", "oLRP": "olrp", "rho": "rho"}
ORDERS = {"as learned": "test", "worst": "worst_order", "best": "best_order"}


def tables(schedule: Schedule) -> list[Table]:
    """Those of which a row is complete: every seed of its setting has been run."""
    titles = {
        2: ("what the loss is made of", "loss"),
        3: ("constant weights of the localisation part", "weight"),
        4: ("initial weights of self-balancing", "initial weight"),
        6: ("which anchors are positive, and which are ignored", "assigner"),
    }
    found = []
    for number, (title, first) in titles.items():
        rows = []
        for name in TABLES[number]:
            records = _records(schedule, name)
            if records:
                rows.append([_title(number, name), *_metrics(records, "test"), f"{records[0]['learning_rate']:g}"])
        columns = [first, *METRICS, "learning rate"]
        found.append(Table(f"table-{number}", f"Table {number}: {title}", columns, rows))
    found.append(_long(schedule))
    found.append(_orders(schedule))
    found.append(_learning_rates(schedule))
    return [table for table in found if table.rows]


def _title(number: int, name: str) -> str:
    if name == ALRP and number != 2:
        return {3: "self-balancing", 4: "50", 6: "matcher, ignoring from 0.4"}[number]
    return SETTINGS[name].title.removeprefix("+ " if number == 6 else "")


def _records(schedule: Schedule, name: str, times: int = 1) -> list[Record]:
    runs = schedule.runs(name, times) if name in schedule.settings else []
    records = schedule.store.records
    return [records[run] for run in runs] if all(run in records for run in runs) else []


def _metrics(records: Sequence[Record], of: str) -> list[str]:
    return [spread(record[of][key] for record in records) for key in METRICS.values()]


def _long(schedule: Schedule) -> Table:
    rows = [
        [SETTINGS[name].title, *_metrics(records, "test")]
        for name in LONG
        if (records := _records(schedule, name, LONGER))
    ]
    title = f"Table 2, trained for {LONGER * schedule.iterations} iterations"
    return Table("table-2-long", title, ["loss", *METRICS], rows)


def _orders(schedule: Schedule) -> Table:
    records = _records(schedule, ALRP)
    rows = [[title, *_metrics(records, key)] for title, key in ORDERS.items()] if records else []
    return Table("table-5", "Table 5: other orders of the same true positives", ["order", *METRICS], rows)


def _learning_rates(schedule: Schedule) -> Table:
    names = [name for name in schedule.settings if SETTINGS[name].learning_rate_of is None]
    precision = {name: schedule.precision(name) for name in names}
    rates = sorted({rate for found in precision.values() for rate in found})
    show: Callable[[float | None], str] = lambda value: "" if value is None else f"{100 * value:.1f}"  # noqa: E731
    rows = [[SETTINGS[name].title, *(show(precision[name].get(rate)) for rate in rates)] for name in names]
    columns = ["loss", *(f"{rate:g}" for rate in rates)]
    return Table("learning-rates", "AP on validation scenes by learning rate", columns, rows if rates else [])
