"""What is claimed of the losses, next to what was measured."""

from __future__ import annotations

from collections.abc import Sequence

from .peers import BUCKETED, FOCAL, FOCAL_COMPILED, LOOP, OURS_BOXES, OURS_COMPILED, ours
from .presets import LARGE, LARGE_HALF, MEMORY, ON_CPU, SMALL
from .rows import CASE, Row, describe
from .tables import ratio, sets_of
from .workloads import REGIMES, Case

Claim = tuple[str, float, str, float]
"""What, how much, ``"<="`` or ``">="``, and the target."""
_EARLY, _MIDDLE, _LATE = (LARGE._replace(regime=regime) for regime in REGIMES)
_FLOORS = {_EARLY: 2.5, _MIDDLE: 2.0, _LATE: 1.5} | {LARGE_HALF._replace(regime=regime): 2.5 for regime in REGIMES}
RATIOS: dict[str, list[tuple[Case, str, str, str, float]]] = {
    "cpu": [
        *((ON_CPU._replace(regime=regime), OURS_BOXES, FOCAL, "<=", 1.5) for regime in REGIMES),
        *((ON_CPU._replace(regime=regime), BUCKETED, ours("torch"), ">=", 5) for regime in REGIMES),
        (ON_CPU._replace(regime="early"), LOOP, ours("torch"), ">=", 30),
        (ON_CPU._replace(regime="middle"), LOOP, ours("torch"), ">=", 15),
    ],
    "cuda": [
        *((case, FOCAL, OURS_BOXES, ">=", 5) for case in (_EARLY, _MIDDLE, _LATE)),
        *((case, FOCAL_COMPILED, OURS_COMPILED, ">=", 1) for case in (_EARLY, _MIDDLE, _LATE)),
        *((case, LOOP, ours("triton"), ">=", 1000) for case in (_EARLY, _MIDDLE, _LATE)),
    ],
}
"""Two contenders, whose times are divided."""
NUMBERS: dict[str, list[tuple[Case, str, float]]] = {
    "cpu": [(case, "beyond_gradient_mb", 64) for case in MEMORY],
    "cuda": [
        *((case, "floor_ratio", most) for case, most in _FLOORS.items()),
        *((case, "beyond_gradient_mb", 64) for case in _FLOORS),
        (SMALL, "best_ms", 0.15),
        # The loss's own 11, and two: the contender adds two scalars, and autograd makes the gradient of their sum.
        (SMALL, "launches", 13),
    ],
}
"""A column of :class:`~.rows.Row` (backend triton on a GPU, torch on a CPU), and its upper limit."""


def claims(rows: Sequence[Row]) -> list[Claim]:
    """The claims about each device that is among the rows, without those whose cases were not measured."""
    made: list[Claim] = []
    for of in sets_of(rows, "device"):
        kind, found = of[0].kind, {(*(getattr(row, name) for name in CASE), row.contender): row for row in of}
        for case, slow, fast, how, target in RATIOS[kind]:
            key = describe(case).values()
            if (value := ratio(found.get((*key, slow)), found.get((*key, fast)))) is not None:
                made.append((f"{case.name}: {slow} / {fast}", value, how, target))
        for case, column, most in NUMBERS[kind]:
            row = found.get((*describe(case).values(), ours("torch" if kind == "cpu" else "triton")))
            if row and (value := getattr(row, column)) is not None:
                made.append((f"{case.name}: {column.replace('_', ' ')}", value, "<=", most))
    return made
