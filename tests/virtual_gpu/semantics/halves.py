"""Floats of 16 bits, which lie in integer registers.

An operation is exact in a wider format, or rounded to odd there, and then rounded once.
"""

from __future__ import annotations

from .floats import comparisons
from .table import rule


def define() -> None:
    for kind in ("f16", "bf16"):
        whole = "{}"
        comparisons(kind, "u16", f"from_{kind}(a)", f"from_{kind}(b)")
        for names, number_of_operands in _OPERATIONS:
            for name in names.split():
                sources = " ".join(["u16"] * number_of_operands)
                rule(f"{name}.{kind}", "u16", sources, _result(name, kind, whole))
                sources = " ".join(["u32"] * number_of_operands)
                lower, upper = (_result(name, kind, half) for half in _HALVES)
                rule(f"{name}.{kind}x2", "u32", sources, f"(u32_t){upper} << 16 | (u16_t){lower}")
        # From sm_100 on, of a half and a float32.
        for name, sign in (("add", "+"), ("sub", "-")):
            mixed = f"canonical_f32(from_{kind}(a) {sign} b)"
            rule(f"{name}.f32.{kind} {name}.rn.f32.{kind}", "f32", "u16 f32", mixed)
        rule(f"fma.rn.f32.{kind}", "f32", "u16 u16 f32", f"canonical_f32(fmaf(from_{kind}(a), from_{kind}(b), c))")
        # A comparison of pairs sets two predicates, by an instruction for each.
        for k, half in enumerate(_HALVES):
            a, b = (f"from_{kind}({half.format(x)})" for x in "ab")
            comparisons(f"{kind}x2.{k}", "u32", a, b)


_HALVES = ("(u16_t){}", "(u16_t)({} >> 16)")
_OPERATIONS = (
    ("neg abs", 1),
    ("add add.rn sub sub.rn mul mul.rn min max min.NaN max.NaN", 2),
    ("fma.rn", 3),
)


def _result(name: str, kind: str, half: str) -> str:
    """The C expression of one half of the result; ``half`` takes that of an operand."""
    if name in ("neg", "abs"):
        operand = half.format("a")
        return f"(u16_t)({operand} ^ 0x8000)" if name == "neg" else f"(u16_t)({operand} & 0x7FFF)"
    a, b, c = (f"from_{kind}({half.format(x)})" for x in "abc")
    operation, _, modifier = name.partition(".")
    if operation in ("min", "max"):
        result = f"to_{kind}({operation}_f32({a}, {b}))"
        return f"({a} != {a} || {b} != {b} ? 0x7FFF : {result})" if modifier == "NaN" else result
    if operation == "fma":
        return f"to_{kind}(odd_f32(fma_to_odd({a}, {b}, {c})))"
    if operation == "mul":
        return f"to_{kind}(odd_f32((f64_t){a} * {b}))"
    # The sum's float32 has more than twice the bits, so that rounding it again changes nothing.
    return f"to_{kind}({a} {'+' if operation == 'add' else '-'} {b})"
