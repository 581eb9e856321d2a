"""What Python and the engine share: the numbers of things, and the layout of structures (core/types.h)."""

from __future__ import annotations

import ctypes
import enum

import numpy as np

MAX_WARPS = 32
"""Of a CTA, which has 1024 threads at most."""


class Op(enum.IntEnum):
    """Instructions other than those that only compute, which ``semantics`` numbers."""

    LOAD = 1
    STORE = 2
    ATOMIC = 3
    SHUFFLE = 4
    VOTE = 5
    REDUCE = 6
    LOAD_MATRICES = 7
    STORE_MATRICES = 8
    BARRIER = 9
    WARP_BARRIER = 10
    BRANCH = 11
    EXIT = 12
    TRAP = 13
    NOTHING = 14


class Space(enum.IntEnum):
    """Where an address points to."""

    GLOBAL = 0
    SHARED = 1
    PARAM = 2


class Combine(enum.IntEnum):
    """What an atomic operation does with a number in memory, or a reduction with those of lanes."""

    ADD = 0
    MIN_S = 1
    MIN_U = 2
    MAX_S = 3
    MAX_U = 4
    AND = 5
    OR = 6
    XOR = 7
    EXCHANGE = 8
    COMPARE = 9
    ADD_F = 10
    ADD_FLUSHED = 11
    ADD_F16 = 12
    ADD_BF16 = 13
    ADD_F16X2 = 14
    ADD_BF16X2 = 15
    MIN_F = 16
    MAX_F = 17
    MIN_NAN = 18
    MAX_NAN = 19


class Shuffle(enum.IntEnum):
    """Which lane another lane's number comes from."""

    UP = 0
    DOWN = 1
    BUTTERFLY = 2
    INDEX = 3


class Vote(enum.IntEnum):
    """What lanes find out about a predicate of theirs."""

    BALLOT = 0
    ANY = 1
    ALL = 2
    UNIFORM = 3


class Special(enum.IntEnum):
    """Registers that are set when a warp begins."""

    TID_X = 0
    CTAID_X = 1
    CTAID_Y = 2
    CTAID_Z = 3
    NCTAID_X = 4
    NCTAID_Y = 5
    NCTAID_Z = 6
    LANEID = 7
    WARPID = 8


class Flag(enum.IntFlag):
    """How a launch runs; see the arguments of ``Device``."""

    CHECK = 1
    COUNT = 2
    NOISE = 4
    SHUFFLE = 8


class Sector(enum.IntFlag):
    """What happened to a sector of memory."""

    READ = 1
    WRITTEN = 2


class Kind(enum.IntEnum):
    """What a check finds. The texts are those of ``reports.KINDS``."""

    OUT_OF_BOUNDS = 1
    MISALIGNED = 2
    SHARED_BOUNDS = 3
    SHARED_UNSET = 4
    SHARED_RACE = 5
    GLOBAL_RACE = 6
    DIVERGED_BARRIER = 7
    DIVERGED_EXCHANGE = 8
    EXITED_AT_BARRIER = 9
    ENDLESS = 10
    TRAP = 11
    PARAM_BOUNDS = 12
    UNEVEN_BARRIER = 13
    LANE_CLASH = 14
    SAME_VALUE_SHARED = 15
    SAME_VALUE_GLOBAL = 16
    WARP_HAZARD = 17
    OUTSIDE_VIEW = 18
    UNGUARDED = 19


NUM_KINDS = 32
"""Room for them."""

INSTRUCTION = np.dtype(
    [(name, "i4") for name in ("op", "guard", "negated", "a", "b", "c", "e", "d")]
    + [("parts", "i4", (8,))]
    + [(name, "i4") for name in ("num_parts", "size", "register_size", "address_size")]
    + [(name, "i4") for name in ("is_signed", "space", "how", "target")]
    + [("offset", "i8")]
)
COUNT = np.dtype([(name, "u8") for name in ("runs", "lanes", "sectors", "lines", "clashes")])
GRANULE = np.dtype(
    [(name, "u4") for name in ("writer", "written", "reader", "read", "atomic_by", "atomic_when")]
    + [("store", "u8"), ("atomics", "u4"), ("unused", "u4")]
)
REPORT = np.dtype(
    [("kind", "i4"), ("place", "i4")]
    + [(name, "u4") for name in ("cta", "warp", "lane", "other")]
    + [("address", "u8"), ("detail", "u8")]
)


class Extent(ctypes.Structure):
    """A range of offsets."""

    _fields_ = [("low", ctypes.c_uint64), ("high", ctypes.c_uint64)]


class Allocation(ctypes.Structure):
    """The storage of tensors."""

    _fields_ = [
        ("memory", ctypes.c_void_p),
        ("low", ctypes.c_uint64),
        ("high", ctypes.c_uint64),
        ("views", ctypes.POINTER(Extent)),
        ("num_views", ctypes.c_int32),
        ("granule_shift", ctypes.c_int32),
        ("granules_from", ctypes.c_uint64),
        ("granules", ctypes.c_void_p),
        ("sectors", ctypes.c_void_p),
    ]


class Launch(ctypes.Structure):
    """Everything the engine needs to run a kernel once, and what it finds out."""

    _fields_ = [
        ("code", ctypes.c_void_p),
        ("frame", ctypes.c_void_p),
        ("params", ctypes.c_void_p),
        ("allocations", ctypes.POINTER(Allocation)),
        ("reports", ctypes.c_void_p),
        ("counts", ctypes.c_void_p),
        ("cta_total", ctypes.c_void_p),
        ("cta_longest", ctypes.c_void_p),
        ("seed", ctypes.c_uint64),
        ("budget", ctypes.c_uint64),
        ("issued", ctypes.c_uint64),
        ("frame_size", ctypes.c_int32),
        ("variables_size", ctypes.c_int32),
        ("params_size", ctypes.c_int32),
        ("shared_size", ctypes.c_int32),
        ("num_warps", ctypes.c_int32),
        ("threads_of_last_warp", ctypes.c_int32),
        ("num_allocations", ctypes.c_int32),
        ("max_reports", ctypes.c_int32),
        ("num_reports", ctypes.c_int32),
        ("flags", ctypes.c_int32),
        ("window", ctypes.c_int32),
        ("quantum", ctypes.c_int32),
        ("shared_shift", ctypes.c_int32),
        ("specials", ctypes.c_int32 * len(Special)),
        ("grid", ctypes.c_uint32 * 3),
        ("kinds", ctypes.c_uint32 * NUM_KINDS),
    ]


def header() -> str:
    """C code of the numbers above, and checks that structures have the same layout there."""
    enums = (Op, Space, Combine, Shuffle, Vote, Special, Flag, Sector, Kind)
    lines = [f"enum {{ {', '.join(f'{of.__name__.upper()}_{x.name} = {x.value}' for x in of)} }};" for of in enums]
    lines += [f"enum {{ MAX_WARPS = {MAX_WARPS}, NUM_KINDS = {NUM_KINDS}, NUM_SPECIALS = {len(Special)} }};"]
    return "\n".join([*lines, '#include "types.h"', *_assertions(), ""])


def _assertions() -> list[str]:
    lines = []
    for name, dtype in (("Instruction", INSTRUCTION), ("Count", COUNT), ("Granule", GRANULE), ("Report", REPORT)):
        lines.append(f'_Static_assert(sizeof({name}) == {dtype.itemsize}, "{name}");')
    for structure in (Extent, Allocation, Launch):
        name = structure.__name__
        lines.append(f'_Static_assert(sizeof({name}) == {ctypes.sizeof(structure)}, "{name}");')
        for field, *_ in structure._fields_:
            offset = getattr(structure, field).offset
            lines.append(f'_Static_assert(__builtin_offsetof({name}, {field}) == {offset}, "{name}.{field}");')
    return lines
