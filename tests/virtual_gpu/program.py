"""A kernel, ready to be run."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .layout import Op, Space

Array = npt.NDArray[Any]


class Unsupported(Exception):
    """Something beyond what the virtual GPU models."""


class Param(NamedTuple):
    """A parameter of a kernel: where it lies in constant memory."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class Program:
    """One kernel; of each instruction its code, its text, its line in the PTX and where in the source it comes from."""

    name: str
    code: Array
    texts: list[str] = field(repr=False)
    lines: list[int] = field(repr=False)
    sources: list[str] = field(repr=False)
    frame: Array = field(repr=False)
    """The registers of one warp when it begins: variables, which are not set, and then constants."""
    variables_size: int
    specials: tuple[int, ...]
    """Where in the frame each ``layout.Special`` lies, or -1."""
    params: list[Param]
    num_threads: int
    """Of a CTA."""
    own_shared: int
    """Bytes of shared memory of a CTA besides those that a launch gives."""
    ptx: str = field(repr=False)

    @functools.cached_property
    def params_size(self) -> int:
        return max((param.offset + param.size for param in self.params), default=0)

    @functools.cached_property
    def shared_granule(self) -> int:
        """The fewest bytes of shared memory that an instruction accesses by themselves."""
        matrices = np.isin(self.code["op"], (Op.LOAD_MATRICES, Op.STORE_MATRICES))
        accesses = np.isin(self.code["op"], (Op.LOAD, Op.STORE, Op.ATOMIC)) & (self.code["space"] == Space.SHARED)
        return int(min(2 if matrices.any() else 8, self.code["size"][accesses].min(initial=8)))

    @functools.cached_property
    def classes(self) -> list[str]:
        """What kind of instruction each one is, such as ``fp32`` or ``ld.global``.

        Of an instruction that is run as several, all but the first are ``none``.
        """
        return [_class_of(row, text) for row, text in zip(self.code, self.texts)]


_OF_OP = {
    Op.LOAD_MATRICES: "ld.shared",
    Op.STORE_MATRICES: "st.shared",
    Op.SHUFFLE: "shfl",
    Op.VOTE: "vote",
    Op.REDUCE: "redux",
    Op.BARRIER: "bar",
    Op.WARP_BARRIER: "bar",
    Op.BRANCH: "branch",
    Op.EXIT: "branch",
    Op.TRAP: "branch",
    Op.NOTHING: "none",
}
_OF_FIRST_WORD = {"mov": "mov", "cvta": "mov", "selp": "selp", "setp": "setp+pred"}
_OF_TYPE = {"pred": "setp+pred", "f64": "fp64"}
_OF_TYPE |= dict.fromkeys(("f32", "f32x2", "f16", "f16x2", "bf16", "bf16x2"), "fp32")


def classes(program: Program) -> list[str]:
    """What kind of instruction each one of a program is, such as ``fp32`` or ``ld.global``."""
    return program.classes


def _class_of(row: Any, text: str) -> str:
    if not text:
        return "none"
    op = int(row["op"])
    if op in (Op.LOAD, Op.STORE, Op.ATOMIC):
        what = {Op.LOAD: "ld", Op.STORE: "st", Op.ATOMIC: "atom"}[Op(op)]
        return f"{what}.{Space(row['space']).name.lower()}"
    if op in _OF_OP:
        return _OF_OP[Op(op)]
    name = re.sub(r"^@!?\S+ ", "", text).partition(" ")[0]
    first, kind = name.partition(".")[0], name.rpartition(".")[2]
    if first in _OF_FIRST_WORD:
        return _OF_FIRST_WORD[first]
    if first == "cvt":
        return "cvt.float" if re.search(r"\.b?f\d", name) else "cvt.int"
    if kind in _OF_TYPE:
        return _OF_TYPE[kind]
    return "int64" if kind.endswith("64") or ".wide" in name else "int32"
