"""PTX statements into instructions of the engine."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from . import accesses
from .layout import Op, Shuffle, Vote
from .operands import Operands
from .program import Unsupported
from .rows import Row
from .semantics import NUMBERS, RULES, width_of

_GUARD = re.compile(r"@(!?)\s*(%?[\w$]+)\s+")
_OPERAND = re.compile(r"(?:[^,{\[]|\{[^}]*\}|\[[^\]]*\])+")
_BARRIER = re.compile(r"bar(rier)?(\.cta)?\.sync(\.aligned)?")
_SHUFFLES = {"up": Shuffle.UP, "down": Shuffle.DOWN, "bfly": Shuffle.BUTTERFLY, "idx": Shuffle.INDEX}
_VOTES = {"ballot": Vote.BALLOT, "any": Vote.ANY, "all": Vote.ALL, "uni": Vote.UNIFORM}
_EVERY_LANE = ("-1", "0xffffffff", "0xFFFFFFFF", "4294967295")
# What makes no difference where all accesses come in one order, and nothing takes time.
_IDLE = ("membar", "fence", "griddepcontrol", "nanosleep", "prefetch", "prefetchu", "applypriority", "createpolicy")


class Statement(NamedTuple):
    """A statement, its line in the PTX, and where in the source it comes from."""

    text: str
    line: int
    source: str


class Code:
    """Instructions so far; a statement adds one or, where the engine has no such instruction, several."""

    def __init__(self, operands: Operands) -> None:
        self.operands = operands
        self.rows: list[Row] = []
        self.origins: list[Statement] = []
        self._labels: dict[str, int] = {}
        self._branches: list[tuple[int, str]] = []
        self._statement = Statement("", 0, "")
        self._length_before = 0
        self._guard = (-1, 0)

    def label(self, name: str) -> None:
        self._labels[name] = len(self.rows)

    def finish(self) -> None:
        """End lanes that get to the end, and let branches know where their labels are."""
        self.rows.append(Row(Op.EXIT))
        self.origins.append(Statement("", 0, ""))
        for k, label in self._branches:
            if label not in self._labels:
                raise Unsupported(f"label {label}")
            self.rows[k] = self.rows[k]._replace(target=self._labels[label])

    def add(self, statement: Statement) -> None:
        """Add what a statement does.

        Raises:
            Unsupported: if that is not modelled.
        """
        self._statement = statement
        self._length_before = len(self.rows)
        text = statement.text
        guard = _GUARD.match(text) if text[0] == "@" else None
        self._guard = (self.operands.operand(guard[2], 32), int(guard[1] == "!")) if guard else (-1, 0)
        name, _, rest = (text[guard.end() :] if guard else text).partition(" ")
        given = [operand.strip() for operand in (_OPERAND.findall(rest) if "{" in rest else rest.split(","))]
        handler = _HANDLERS.get(name.partition(".")[0], _compute)
        try:
            handler(self, name, given if rest else [])
        except (Unsupported, LookupError, ValueError) as error:
            why = f" ({error})" if isinstance(error, Unsupported) and str(error) else ""
            raise Unsupported(f"{text}{why}") from error

    def emit(self, row: Row) -> None:
        guard, negated = self._guard
        self.rows.append(row._replace(guard=guard, negated=negated) if guard != -1 else row)
        # What a statement does beyond its first instruction does not count as one.
        first = self._length_before == len(self.origins)
        self.origins.append(self._statement if first else self._statement._replace(text=""))

    def branch(self, label: str) -> None:
        self._branches.append((len(self.rows), label))
        self.emit(Row(Op.BRANCH))

    def compute(self, rule: str, destination: int, sources: list[int]) -> None:
        a, b, c, e = [*sources, -1, -1, -1, -1][:4]
        size = width_of(RULES[rule].destination) // 8
        self.emit(Row(NUMBERS[rule], a=a, b=b, c=c, e=e, d=destination, size=size))


def _compute(code: Code, name: str, given: list[str]) -> None:
    if name in ("min.f32", "max.f32") and len(given) == 4:
        name = name.replace(".", "3.")
    rule = RULES.get(name)
    if rule is None or len(given) != 1 + len(rule.sources):
        raise Unsupported
    sources = [
        code.operands.predicate(text) if kind == "p" else _source(code, name, text, width_of(kind))
        for text, kind in zip(given[1:], rule.sources)
    ]
    code.compute(name, code.operands.operand(given[0], width_of(rule.destination)), sources)


def _source(code: Code, name: str, text: str, width: int) -> int:
    own = code.operands.width(text)
    if own is None or own <= width or not name.startswith("cvt."):
        return code.operands.operand(text, width)
    # A conversion reads the lower bits of a wider register.
    narrowed = code.operands.temporary(width)
    code.compute(f"unpack.{own}.{width}.0", narrowed, [code.operands.operand(text, own)])
    return narrowed


def _compare(code: Code, name: str, given: list[str]) -> None:
    if not name.endswith("x2"):
        _compute(code, name, given)
        return
    for k, destination in enumerate(given[0].split("|")):
        _compute(code, f"{name}.{k}", [destination, *given[1:]])


def _move(code: Code, name: str, given: list[str]) -> None:
    into, of = given
    if "{" not in into + of:
        _compute(code, name, given)
        return
    whole = int(name.split(".")[1][1:])
    parts = [part.strip() for part in (into if into[0] == "{" else of).strip("{}").split(",")]
    width = whole // len(parts)
    if into[0] != "{":
        sources = [code.operands.operand(part, width) for part in parts]
        code.compute(f"pack.{len(parts)}x{width}", code.operands.operand(into, whole), sources)
        return
    # A part may be the register that is taken apart.
    source = code.operands.operand(of, whole)
    for k, part in enumerate(parts):
        if part != "_":
            code.compute(f"unpack.{whole}.{width}.{k}", code.operands.operand(part, width), [source])


def _generic_address(code: Code, name: str, given: list[str]) -> None:
    # Addresses of global memory are generic ones as they are.
    if name not in ("cvta.to.global.u64", "cvta.global.u64"):
        raise Unsupported
    _compute(code, "mov.b64", given)


def _need_every_lane(code: Code, members: str) -> None:
    # What a register holds is not looked at: the engine reports any lane that is missing.
    if members not in _EVERY_LANE and code.operands.width(members) is None:
        raise Unsupported


def _shuffle(code: Code, name: str, given: list[str]) -> None:
    how = _SHUFFLES[name.removeprefix("shfl.sync.").removesuffix(".b32")]
    into, of, b, c, members = given
    _need_every_lane(code, members)
    destination, _, inside = into.partition("|")
    operand = code.operands.operand
    code.emit(
        Row(
            Op.SHUFFLE,
            how=how,
            a=operand(of, 32),
            b=operand(b, 32),
            c=operand(c, 32),
            d=operand(destination, 32),
            e=operand(inside, 32) if inside else -1,
        )
    )


def _vote(code: Code, name: str, given: list[str]) -> None:
    how = _VOTES[name.removeprefix("vote.sync.").rpartition(".")[0]]
    into, of, members = given
    _need_every_lane(code, members)
    code.emit(Row(Op.VOTE, how=how, d=code.operands.operand(into, 32), a=code.operands.predicate(of)))


def _reduce(code: Code, name: str, given: list[str]) -> None:
    how, kind = name.removeprefix("redux.sync.").rsplit(".", 1)
    into, of, members = given
    _need_every_lane(code, members)
    combination = accesses.combination(how, kind)
    code.emit(Row(Op.REDUCE, how=combination, d=code.operands.operand(into, 32), a=code.operands.operand(of, 32)))


def _barrier(code: Code, name: str, given: list[str]) -> None:
    if name == "bar.warp.sync" and given[0] in _EVERY_LANE:
        code.emit(Row(Op.WARP_BARRIER))
    elif _BARRIER.fullmatch(name) and given == ["0"]:
        code.emit(Row(Op.BARRIER))
    else:
        raise Unsupported


def _simple(op: Op) -> Callable[[Code, str, list[str]], None]:
    return lambda code, name, given: code.emit(Row(op))


def _branch(code: Code, name: str, given: list[str]) -> None:
    code.branch(given[0])


_HANDLERS: dict[str, Callable[[Code, str, list[str]], None]] = {
    **dict.fromkeys(_IDLE, _simple(Op.NOTHING)),
    **dict.fromkeys(("ret", "exit"), _simple(Op.EXIT)),
    "trap": _simple(Op.TRAP),
    "bra": _branch,
    **dict.fromkeys(("bar", "barrier"), _barrier),
    "shfl": _shuffle,
    "vote": _vote,
    "redux": _reduce,
    "mov": _move,
    "cvta": _generic_address,
    "setp": _compare,
    **dict.fromkeys(("ld", "st"), accesses.access),
    **dict.fromkeys(("atom", "red"), accesses.atomic),
    **dict.fromkeys(("ldmatrix", "stmatrix"), accesses.matrices),
}
