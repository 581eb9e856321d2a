"""Which cases the suite runs, for how long, and what is claimed of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from .peers import BUCKETED, FOCAL, FOCAL_COMPILED, LOOP, OURS_BOXES, OURS_COMPILED, ours
from .report import claim
from .rows import Row, describe
from .workloads import REGIMES, Case


class Preset(NamedTuple):
    """A choice of cases."""

    about: str
    cases: tuple[Case, ...]
    seconds: float
    """For the runs of one contender on one case."""
    repeats: int
    """At the most."""
    sweeps: tuple[Case, ...] = ()
    """Further cases, without the compiled contenders: each new shape would be compiled anew."""
    scale: tuple[Case, ...] = ()
    """One iteration each, of the backends to be used at such sizes alone."""


def _regimes(*cases: Case) -> list[Case]:
    return [case._replace(regime=regime) for case in cases for regime in REGIMES]


# 8 images of 512 x 512 in RetinaNet: 31.4 million logits. One of them on a CPU: 3.93 million.
LARGE = Case("retinanet", batch=8, num_positives=1000)
LARGE_HALF = LARGE._replace(dtype="bfloat16")
# 6 images of 1024 x 1024: 1.57 million.
SMALL = Case("proposals", "middle", image=1024, batch=6, num_positives=300)
ON_CPU = Case("retinanet", batch=1, num_positives=500)

_HEADS = (
    Case("atss", batch=16, layout="levels"),
    Case("foveabox", batch=16, layout="levels"),
    Case("second-stage", batch=16),
    Case("lvis", batch=4),
    Case("proposals", batch=16, image=800, layout="levels-last"),
)
_LAYOUTS = (LARGE._replace(layout="levels"), LARGE._replace(layout="levels-last"))
_POSITIVES = tuple(LARGE._replace(num_positives=p) for p in (1, 10, 100, 5_000, 20_000))
_SIZES = tuple(Case("retinanet", batch=b, num_positives=1000) for b in (2, 4, 16))
_SCALE = tuple(
    Case("retinanet", num_positives=20_000, num_logits=m, dtype=dtype)
    for dtype in ("bfloat16", "float32")
    for m in (10**5, 10**6, 10**7, 10**8, 10**9)
)
_CPU_SCALE = tuple(Case("retinanet", num_positives=1000, num_logits=m) for m in (10**5, 10**6, 10**7, 10**8, 10**9))
_CPU_SCALE += tuple(Case("retinanet", num_positives=p, num_logits=10**7) for p in (10, 100, 10_000, 100_000))
_TARGETS = tuple(_regimes(LARGE, LARGE_HALF))
_SMOKE = (
    Case("retinanet", "middle", image=64, batch=2, num_positives=20),
    Case("atss", "late", image=64, batch=2, num_positives=20, dtype="bfloat16", layout="levels"),
)
_CPU_SWEEPS = (
    *(ON_CPU._replace(num_positives=p) for p in (1, 50, 5_000)),
    *(ON_CPU._replace(image=image) for image in (128, 256, 768)),
    ON_CPU._replace(layout="levels"),
    Case("atss", batch=2, dtype="bfloat16", layout="levels"),
    Case("proposals", batch=2),
    Case("second-stage", batch=2),
)
_ALL_HEADS = (
    *_SIZES,
    *_regimes(*_HEADS, *_LAYOUTS),
    *(case._replace(dtype=dtype) for case in _HEADS for dtype in ("bfloat16", "float16")),
    *_regimes(LARGE._replace(dtype="float16")),
)

PRESETS = {
    "smoke": Preset("seconds on a CPU: whether all of it runs", (), 0.1, 5, sweeps=_SMOKE),
    "cpu": Preset("two cores, about 10 minutes", tuple(_regimes(ON_CPU)), 6.0, 15, _CPU_SWEEPS),
    "cpu-scale": Preset("four decades of logits and of positives; takes 10 GB", (), 1.0, 1, scale=_CPU_SCALE),
    "h100": Preset(
        "what is claimed of a GPU, below 8 minutes on an H100", _TARGETS, 0.5, 50, (SMALL, *_POSITIVES), _SCALE
    ),
    "full": Preset(
        "every head, regime, dtype and layout", _TARGETS, 1.0, 50, (SMALL, *_POSITIVES, *_ALL_HEADS), _SCALE
    ),
}


class _Found:
    """Rows that have a time, by case and contender."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self._rows = {(tuple(describe_row(row)), row.contender): row for row in rows if row.both_ms is not None}

    def __call__(self, case: Case, contender: str) -> Row | None:
        return self._rows.get((tuple(describe(case).values()), contender))


def describe_row(row: Row) -> list[Any]:
    """The same columns as :func:`~.rows.describe` gives of a case."""
    return [getattr(row, name) for name in describe(LARGE)]


def claims(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """What is claimed, of each kind of device that is among the rows; cases that were not run are left out."""
    made = []
    for device in dict.fromkeys((row.kind, row.device) for row in rows):
        found = _Found(row for row in rows if (row.kind, row.device) == device)
        made += _cpu_claims(found) if device[0] == "cpu" else _gpu_claims(found)
    return made


def _ratio(slow: Row | None, fast: Row | None, time: Callable[[Row], float | None]) -> float | None:
    over, under = slow and time(slow), fast and time(fast)
    return over / under if over and under else None


def _add(made: list[dict[str, Any]], name: str, value: float | None, relation: str, target: float) -> None:
    if value is not None:
        made.append(claim(name, value, relation, target))


def _both(row: Row) -> float | None:
    return row.both_ms


def _best(row: Row) -> float | None:
    return row.best_ms


def _gpu_claims(found: _Found) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    mine = ours("triton")
    for regime, float32_floor in (("late", 1.5), ("middle", 2.0), ("early", 2.5)):
        case, half = LARGE._replace(regime=regime), LARGE_HALF._replace(regime=regime)
        for dtype, of, target in (("float32", case, float32_floor), ("bfloat16", half, 2.5)):
            row = found(of, mine)
            by = "graph" if row and row.graph_ms is not None else "events"
            _add(made, f"byte floors, {dtype}, {regime} ({by})", row.floor_ratio if row else None, "<=", target)
            memory = row.beyond_gradient_mb if row else None
            _add(made, f"MB beyond logits and gradient, {dtype}, {regime}", memory, "<=", 64)
        # Eager against eager, compiled against compiled, each with GIoU of the same boxes.
        eager = _ratio(found(case, FOCAL), found(case, OURS_BOXES), _both)
        _add(made, f"focal / ours, both + GIoU, eager, {regime}", eager, ">=", 5)
        compiled = _ratio(found(case, FOCAL_COMPILED), found(case, OURS_COMPILED), _best)
        _add(made, f"focal / ours, both + GIoU, compiled, {regime}", compiled, ">=", 1)
        loop = _ratio(found(case, LOOP), found(case, mine), _both)
        _add(made, f"loop (scaled from some positives) / ours, {regime}", loop, ">=", 1000)
    row = found(SMALL, mine)
    by = "graph" if row and row.graph_ms is not None else "events"
    _add(made, f"ms, small input ({by})", row.best_ms if row else None, "<=", 0.15)
    # The contender adds two scalars, and autograd makes the gradient of their sum: neither is the loss's.
    by_the_loss = row.launches - 2 if row and row.launches is not None else None
    _add(made, "launches, small input, without the caller's two", by_the_loss, "<=", 8)
    return made


def _cpu_claims(found: _Found) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    cases = [ON_CPU._replace(regime=regime) for regime in REGIMES]
    to_focal = [_ratio(found(case, OURS_BOXES), found(case, FOCAL), _both) for case in cases]
    if None not in to_focal:
        _add(made, "ours / focal, both + GIoU, eager, slowest regime", max(filter(None, to_focal)), "<=", 1.5)
    for regime, case in zip(REGIMES, cases):
        ratio = _ratio(found(case, BUCKETED), found(case, ours("torch")), _both)
        _add(made, f"bucketed by means / ours, {regime}", ratio, ">=", 5)
    return made
