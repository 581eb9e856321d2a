"""Floats of 32 and 64 bits.

Results are rounded to nearest even, also those of approximate instructions, and a NaN is the one that the device makes.
"""

from __future__ import annotations

from .integers import COMPARISONS
from .table import rule

_ARITHMETIC = {"add": "+", "sub": "-", "mul": "*", "div": "/"}


def define() -> None:
    for kind in ("f32", "f64"):
        _arithmetic(kind)
        comparisons(kind, kind, "a", "b")
    _flushing()
    _saturating()
    _transcendental()
    _pairs()
    # The device looks at the upper half of its argument and leaves the lower half of the result 0.
    rule("rcp.approx.ftz.f64", "f64", "f64", "reciprocal_of_upper_half(a)")


def comparisons(suffix: str, register: str, a: str, b: str) -> None:
    """``setp`` of two expressions in each way: a plain comparison fails with a NaN, one in -u then holds."""
    for name, sign in COMPARISONS.items():
        ordered = f"{a} {sign} {b}" if name != "ne" else f"{a} < {b} || {a} > {b}"
        opposite = {"eq": f"{a} < {b} || {a} > {b}", "ne": f"{a} == {b}", "lt": f"{a} >= {b}"}
        opposite |= {"le": f"{a} > {b}", "gt": f"{a} <= {b}", "ge": f"{a} < {b}"}
        rule(f"setp.{name}.{suffix}", "p", f"{register} {register}", ordered)
        rule(f"setp.{name}u.{suffix}", "p", f"{register} {register}", f"!({opposite[name]})")
    rule(f"setp.nan.{suffix}", "p", f"{register} {register}", f"{a} != {a} || {b} != {b}")
    rule(f"setp.num.{suffix}", "p", f"{register} {register}", f"{a} == {a} && {b} == {b}")


def _arithmetic(kind: str) -> None:
    f = "f" if kind == "f32" else ""
    two, three, nan = f"{kind} {kind}", f"{kind} {kind} {kind}", f"canonical_{kind}"
    for name, sign in _ARITHMETIC.items():
        rule(f"{name}.{kind} {name}.rn.{kind}", kind, two, f"{nan}(a {sign} b)")
    rule(f"fma.rn.{kind}", kind, three, f"{nan}(fma{f}(a, b, c))")
    rule(f"neg.{kind}", kind, kind, "-a")
    rule(f"abs.{kind}", kind, kind, f"fabs{f}(a)")
    rule(f"copysign.{kind}", kind, two, f"copysign{f}(b, a)")
    for name in ("min", "max"):
        rule(f"{name}.{kind}", kind, two, f"{nan}({name}_{kind}(a, b))")
        rule(f"{name}.NaN.{kind}", kind, two, f"a != a || b != b ? {nan}(a + b) : {name}_{kind}(a, b)")
    rule(f"sqrt.rn.{kind}", kind, kind, f"{nan}(sqrt{f}(a))")
    rule(f"rcp.rn.{kind}", kind, kind, f"{nan}(1 / a)")
    rule(f"rsqrt.approx.{kind}", kind, kind, f"{nan}(1 / sqrt{f}(a))")
    for mode, function in {"rzi": "trunc", "rni": "rint", "rmi": "floor", "rpi": "ceil"}.items():
        rule(f"cvt.{mode}.{kind}.{kind}", kind, kind, f"{nan}({function}{f}(a))")


def _flushing() -> None:
    """``.ftz``: subnormal operands and results are zeros of their sign."""
    two, three = "f32 f32", "f32 f32 f32"
    for name, sign in _ARITHMETIC.items():
        modifiers = (".full.ftz", ".approx.ftz") if name == "div" else (".ftz", ".rn.ftz")
        names = " ".join(f"{name}{modifier}.f32" for modifier in modifiers)
        rule(names, "f32", two, f"canonical_f32(flush(flush(a) {sign} flush(b)))")
    rule("div.rn.ftz.f32", "f32", two, "canonical_f32(flush(flush(a) / flush(b)))")
    rule("div.full.f32 div.approx.f32", "f32", two, "canonical_f32(a / b)")
    rule("fma.rn.ftz.f32", "f32", three, "canonical_f32(flush(fmaf(flush(a), flush(b), flush(c))))")
    rule("abs.ftz.f32", "f32", "f32", "flush(fabsf(a))")
    rule("neg.ftz.f32", "f32", "f32", "flush(-a)")
    for name in ("min", "max"):
        rule(f"{name}.ftz.f32", "f32", two, f"canonical_f32({name}_f32(flush(a), flush(b)))")
        with_nan = f"a != a || b != b ? canonical_f32(a + b) : {name}_f32(flush(a), flush(b))"
        rule(f"{name}.ftz.NaN.f32", "f32", two, with_nan)
        # Of three operands; in PTX the name is the same.
        rule(f"{name}3.f32", "f32", three, f"canonical_f32({name}_f32({name}_f32(a, b), c))")
    rule("sqrt.rn.ftz.f32 sqrt.approx.ftz.f32", "f32", "f32", "canonical_f32(flush(sqrtf(flush(a))))")
    rule("rcp.rn.ftz.f32 rcp.approx.ftz.f32", "f32", "f32", "canonical_f32(flush(1 / flush(a)))")
    rule("rsqrt.approx.ftz.f32", "f32", "f32", "canonical_f32(1 / sqrtf(flush(a)))")
    for mode, function in {"rzi": "trunc", "rni": "rint", "rmi": "floor", "rpi": "ceil"}.items():
        rule(f"cvt.{mode}.ftz.f32.f32", "f32", "f32", f"canonical_f32({function}f(flush(a)))")


def _saturating() -> None:
    """``.sat``: results lie in 0 to 1, and a NaN is 0."""
    two, three = "f32 f32", "f32 f32 f32"
    for name in ("add", "sub", "mul"):
        sign = _ARITHMETIC[name]
        rule(f"{name}.sat.f32 {name}.rn.sat.f32", "f32", two, f"saturate(a {sign} b)")
        flushed = f"saturate(flush(flush(a) {sign} flush(b)))"
        rule(f"{name}.ftz.sat.f32 {name}.rn.ftz.sat.f32", "f32", two, flushed)
    rule("fma.rn.sat.f32", "f32", three, "saturate(fmaf(a, b, c))")
    rule("fma.rn.ftz.sat.f32", "f32", three, "saturate(flush(fmaf(flush(a), flush(b), flush(c))))")
    rule("cvt.sat.f32.f32", "f32", "f32", "saturate(a)")


def _transcendental() -> None:
    rule("sqrt.approx.f32", "f32", "f32", "canonical_f32(sqrtf(a))")
    rule("rcp.approx.f32", "f32", "f32", "canonical_f32(1 / a)")
    functions = {"ex2": "exp2f", "lg2": "log2f", "sin": "sinf", "cos": "cosf"}
    for name, function in functions.items():
        rule(f"{name}.approx.f32", "f32", "f32", f"canonical_f32({function}(a))")
        rule(f"{name}.approx.ftz.f32", "f32", "f32", f"canonical_f32(flush({function}(flush(a))))")
    rule("tanh.approx.f32", "f32", "f32", "canonical_f32(tanhf(a))")


def _pairs() -> None:
    """Two floats in one register of 64 bits, from sm_100 on."""
    for name in ("add", "sub", "mul"):
        sign = _ARITHMETIC[name]
        pair = f"pair(low(a) {sign} low(b), high(a) {sign} high(b))"
        rule(f"{name}.f32x2 {name}.rn.f32x2", "u64", "u64 u64", pair)
        flushed = (f"flush(flush({half}(a)) {sign} flush({half}(b)))" for half in ("low", "high"))
        rule(f"{name}.ftz.f32x2 {name}.rn.ftz.f32x2", "u64", "u64 u64", f"pair({', '.join(flushed)})")
    three = "u64 u64 u64"
    rule("fma.rn.f32x2", "u64", three, "pair(fmaf(low(a), low(b), low(c)), fmaf(high(a), high(b), high(c)))")
    flushed = (f"flush(fmaf(flush({half}(a)), flush({half}(b)), flush({half}(c))))" for half in ("low", "high"))
    rule("fma.rn.ftz.f32x2", "u64", three, f"pair({', '.join(flushed)})")
