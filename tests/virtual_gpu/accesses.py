"""PTX statements that access memory."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from .layout import Combine, Op, Space
from .operands import Address
from .program import Unsupported
from .rows import NO_PARTS, Row

if TYPE_CHECKING:
    from .statements import Code

_SPACES = {"global": Space.GLOBAL, "shared": Space.SHARED, "param": Space.PARAM}
# What an access may say about order, scope and caches, none of which makes a difference here.
_HINTS = re.compile(
    r"\.(relaxed|acquire|release|acq_rel|volatile|weak|gpu|sys|cta|cluster|nc|ca|cg|cs|lu|cv|wb|wt)(?=\.|$)"
    r"|\.L1::\w+|\.L2::\w+|\.level::\w+|::cta|\.unified"
)
_VECTORS = {"v2": 2, "v4": 4, "v8": 8}
_COMBINATIONS = {
    "add.f32": Combine.ADD_F,
    "add.f64": Combine.ADD_F,
    "add.noftz.f16": Combine.ADD_F16,
    "add.noftz.bf16": Combine.ADD_BF16,
    "add.noftz.f16x2": Combine.ADD_F16X2,
    "add.noftz.bf16x2": Combine.ADD_BF16X2,
    "min.f32": Combine.MIN_F,
    "max.f32": Combine.MAX_F,
    "min.NaN.f32": Combine.MIN_NAN,
    "max.NaN.f32": Combine.MAX_NAN,
}
for _bits in ("32", "64"):
    _COMBINATIONS |= dict.fromkeys((f"add.u{_bits}", f"add.s{_bits}"), Combine.ADD)
    _COMBINATIONS |= {f"min.s{_bits}": Combine.MIN_S, f"max.s{_bits}": Combine.MAX_S}
    _COMBINATIONS |= {f"min.u{_bits}": Combine.MIN_U, f"max.u{_bits}": Combine.MAX_U}
    _COMBINATIONS |= {f"and.b{_bits}": Combine.AND, f"or.b{_bits}": Combine.OR, f"xor.b{_bits}": Combine.XOR}
    _COMBINATIONS |= {f"exch.b{_bits}": Combine.EXCHANGE, f"cas.b{_bits}": Combine.COMPARE}
_COMBINATIONS["cas.b16"] = Combine.COMPARE


def combination(how: str, kind: str) -> Combine:
    """What an operation does with numbers of a type."""
    return _COMBINATIONS[f"{how}.{kind}"]


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.strip("{} ").split(",")]


def _address(code: Code, text: str, space: Space) -> Address:
    address = code.operands.address(text, 32 if space == Space.SHARED else 64)
    if address.width != (32 if space == Space.SHARED else 64):
        raise Unsupported
    return address


def access(code: Code, name: str, given: list[str]) -> None:
    """``ld`` and ``st``, of one number or a vector."""
    op, space, *vector, kind = _HINTS.sub("", name).split(".")
    loads = op == "ld"
    values, place = (given[0], given[1]) if loads else (given[1], given[0])
    address = _address(code, place, _SPACES[space])
    names = _names(values)
    if len(names) != (_VECTORS[vector[0]] if vector else 1):
        raise Unsupported
    size = int(kind[1:]) // 8
    if size not in (1, 2, 4, 8):
        raise Unsupported
    # Registers may be wider than the numbers.
    width = next((w for w in map(code.operands.width, names) if w), max(16, 8 * size))
    parts = [-1 if part == "_" else code.operands.operand(part, width) for part in names]
    code.emit(
        Row(
            Op.LOAD if loads else Op.STORE,
            a=address.base,
            parts=(*parts, *NO_PARTS)[:8],
            num_parts=len(parts),
            size=size,
            register_size=width // 8,
            address_size=address.width // 8,
            is_signed=int(kind[0] == "s"),
            space=_SPACES[space],
            offset=address.offset,
        )
    )


def atomic(code: Code, name: str, given: list[str]) -> None:
    """``atom``, which brings the number before, and ``red``, which does not."""
    op, space, *how, kind = _HINTS.sub("", name).split(".")
    combine = combination(".".join(how), kind)
    if combine == Combine.ADD_F and kind == "f32" and space == "global":
        # Only in shared memory it keeps subnormal numbers.
        combine = Combine.ADD_FLUSHED
    into = given.pop(0) if op == "atom" else "_"
    place, *values = given
    address = _address(code, place, _SPACES[space])
    width = 32 if kind.endswith("x2") else int(re.sub(r"\D", "", kind))
    code.emit(
        Row(
            Op.ATOMIC,
            a=address.base,
            b=code.operands.operand(values[0], width),
            c=code.operands.operand(values[1], width) if combine == Combine.COMPARE else -1,
            d=-1 if into == "_" else code.operands.operand(into, width),
            size=width // 8,
            register_size=width // 8,
            address_size=address.width // 8,
            space=_SPACES[space],
            how=combine,
            offset=address.offset,
        )
    )


def matrices(code: Code, name: str, given: list[str]) -> None:
    """``ldmatrix`` and ``stmatrix`` of eight rows of eight numbers of 16 bits."""
    op, *_, kind = name.split(".")
    if "m8n8" not in name or kind != "b16":
        raise Unsupported
    loads = op == "ldmatrix"
    values, place = given if loads else reversed(given)
    address = _address(code, place, Space.SHARED)
    parts = [code.operands.operand(part, 32) for part in _names(values)]
    code.emit(
        Row(
            Op.LOAD_MATRICES if loads else Op.STORE_MATRICES,
            a=address.base,
            parts=(*parts, *NO_PARTS)[:8],
            num_parts=len(parts),
            how=int(".trans" in name),
            space=Space.SHARED,
            offset=address.offset,
        )
    )
