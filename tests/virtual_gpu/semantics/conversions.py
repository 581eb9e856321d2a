"""Conversions between types."""

from __future__ import annotations

import itertools

from .integers import TYPES
from .table import rule

_TOWARDS_INTEGERS = {"rzi": "trunc", "rni": "rint", "rmi": "floor", "rpi": "ceil"}


def define() -> None:
    _between_integers()
    for kind, integer in itertools.product(("f32", "f64"), TYPES):
        rule(f"cvt.rn.{kind}.{integer}", kind, integer, f"({kind}_t)a")
        for mode, function in _TOWARDS_INTEGERS.items():
            f = "f" if kind == "f32" else ""
            value = _clamped(integer, kind, f"{function}{f}(a)")
            rule(f"cvt.{mode}.{integer}.{kind}", integer, kind, value)
            if kind == "f32":
                flushed = _clamped(integer, kind, f"{function}f(flush(a))")
                rule(f"cvt.{mode}.ftz.{integer}.f32", integer, kind, flushed)
    rule("cvt.f64.f32", "f64", "f32", "a")
    rule("cvt.rn.f32.f64", "f32", "f64", "canonical_f32((f32_t)a)")
    rule("cvt.rn.ftz.f32.f64", "f32", "f64", "canonical_f32(flush((f32_t)a))")
    for kind in ("f16", "bf16"):
        _halves(kind)


def _between_integers() -> None:
    """Numbers of eight bits lie in registers of 16."""
    for into, of in itertools.product(("u8", "s8", *TYPES), repeat=2):
        result, operand = (max(16, int(kind[1:])) for kind in (into, of))
        rule(f"cvt.{into}.{of}", f"{into[0]}{result}", f"u{operand}", f"({into}_t)({of}_t)a")


def _clamped(integer: str, kind: str, value: str) -> str:
    """A rounded value within an integer's range; a NaN is 0, or the lowest bit pattern where 64 bits are involved."""
    bits, signed = int(integer[1:]), integer[0] == "s"
    low = f"-0x1p{bits - 1}" if signed else "0.0"
    high = f"0x1p{bits - signed}"
    top_bit = f"({integer}_t)((u64_t)1 << {bits - 1})"
    lowest = top_bit if signed else "0"
    highest = f"({integer}_t)~{top_bit}" if signed else f"({integer}_t)-1"
    of_nan = top_bit if kind == "f64" or bits == 64 else "0"
    return (
        f"{value} != {value} ? {of_nan} : {value} < {low} ? {lowest} : {value} >= {high} ? {highest}"
        f" : ({integer}_t){value}"
    )


def _halves(kind: str) -> None:
    rule(f"cvt.f32.{kind}", "f32", "u16", f"from_{kind}(a)")
    rule(f"cvt.f64.{kind}", "f64", "u16", f"from_{kind}(a)")
    rule(f"cvt.rn.{kind}.f32", "u16", "f32", f"to_{kind}(a)")
    rule(f"cvt.rn.{kind}x2.f32", "u32", "f32 f32", f"(u32_t)to_{kind}(a) << 16 | to_{kind}(b)")
    rule(f"cvt.rn.{kind}.f64", "u16", "f64", f"to_{kind}(odd_f32(a))")
    for integer in ("s16", "u16", "s32", "u32"):
        # Exact in float64.
        rule(f"cvt.rn.{kind}.{integer}", "u16", integer, f"to_{kind}(odd_f32(a))")
        for mode, function in _TOWARDS_INTEGERS.items():
            rule(
                f"cvt.{mode}.{integer}.{kind}", integer, "u16", _clamped(integer, "f32", f"{function}f(from_{kind}(a))")
            )
