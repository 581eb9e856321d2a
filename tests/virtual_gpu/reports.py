"""What checks find, in words."""

from __future__ import annotations

from typing import Any

from .layout import Kind, Space
from .memory import Memory
from .program import Program

KINDS: dict[int, str] = {
    Kind.OUT_OF_BOUNDS: "out of bounds",
    Kind.MISALIGNED: "misaligned",
    Kind.SHARED_BOUNDS: "shared memory out of bounds",
    Kind.SHARED_UNSET: "unset shared memory read",
    Kind.SHARED_RACE: "race in shared memory",
    Kind.GLOBAL_RACE: "race in global memory",
    Kind.DIVERGED_BARRIER: "barrier in a diverged warp",
    Kind.DIVERGED_EXCHANGE: "exchange between lanes of a diverged warp",
    Kind.EXITED_AT_BARRIER: "a warp ended, another waits at a barrier",
    Kind.ENDLESS: "endless",
    Kind.TRAP: "trap",
    Kind.PARAM_BOUNDS: "parameters out of bounds",
    Kind.UNEVEN_BARRIER: "warps wait at different barriers",
    Kind.LANE_CLASH: "lanes store different values at one place",
    Kind.SAME_VALUE_SHARED: "the same value stored twice in shared memory",
    Kind.SAME_VALUE_GLOBAL: "the same value stored twice in global memory",
    Kind.WARP_HAZARD: "lanes of one warp exchange by shared memory without a barrier",
    Kind.OUTSIDE_VIEW: "outside the arguments' views, inside their storage",
    Kind.UNGUARDED: "launched outside of a device guard",
}
"""The words for each kind."""

ERRORS: frozenset[int] = frozenset(Kind) - {
    Kind.SHARED_UNSET,
    Kind.UNEVEN_BARRIER,
    Kind.SAME_VALUE_SHARED,
    Kind.SAME_VALUE_GLOBAL,
    Kind.WARP_HAZARD,
    Kind.OUTSIDE_VIEW,
}
"""Those that are wrong in any case; the others may be meant."""

_RACES = {1: "a write", 2: "a read", 3: "an atomic operation"}


class Fault(RuntimeError):
    """What a check of the virtual GPU found."""


def describe(report: Any, program: Program, memory: Memory) -> str:
    """A report of the engine: which kernel, what is wrong, who did it and which instruction, of which line."""
    kind, place = int(report["kind"]), int(report["place"])
    who = f"CTA {report['cta']}, warp {report['warp']}, lane {report['lane']}"
    words = [f"{program.name}: {KINDS[kind]}", who]
    details = _details(kind, report, program, memory)
    words += [details] if details else []
    return f"{': '.join(words)}: {program.texts[place]}   // {program.sources[place]}"


def _details(kind: int, report: Any, program: Program, memory: Memory) -> str:
    address, detail = int(report["address"]), int(report["detail"])
    if kind in (Kind.DIVERGED_BARRIER, Kind.DIVERGED_EXCHANGE):
        return f"lanes {address:#010x} of {detail:#010x}"
    if kind == Kind.UNEVEN_BARRIER:
        return f"another waits at {program.sources[address]}"
    if kind in (Kind.EXITED_AT_BARRIER, Kind.ENDLESS, Kind.TRAP):
        return ""
    is_global = program.code["space"][report["place"]] == Space.GLOBAL
    where = memory.describe(address) if is_global else f"address {address:#x}"
    if kind in (Kind.SHARED_RACE, Kind.SAME_VALUE_SHARED):
        return f"with {_RACES[detail]} at {where}"
    if kind in (Kind.GLOBAL_RACE, Kind.SAME_VALUE_GLOBAL):
        other = int(report["other"])
        of = f"CTA {other}" if other < 2**32 - 2 else "several CTAs"
        return f"with {_RACES[detail]} of {of} at {where}"
    return f"{detail} bytes at {where}"
