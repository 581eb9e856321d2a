"""Integers, bits and predicates."""

from __future__ import annotations

from .table import rule

TYPES = ("s16", "u16", "s32", "u32", "s64", "u64")
COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_WIDER = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64", "s64": "__int128", "u64": "unsigned __int128"}


def define() -> None:
    for kind in TYPES:
        _arithmetic(kind)
        (_unsigned if kind[0] == "u" else _signed)(kind)
        _products(kind)
        for name, sign in COMPARISONS.items():
            rule(f"setp.{name}.{kind}", "p", f"{kind} {kind}", f"a {sign} b")
    for bits in ("16", "32", "64"):
        _bits(bits)
    _pairs()
    _fields()
    _predicates()
    _packing()


def _arithmetic(kind: str) -> None:
    """What wraps around is that of unsigned numbers, since C does not define it of others."""
    u = f"u{kind[1:]}"
    rule(f"add.{kind}", u, f"{u} {u}", "a + b")
    rule(f"sub.{kind}", u, f"{u} {u}", "a - b")
    rule(f"mul.lo.{kind}", u, f"{u} {u}", "(u64_t)a * b")
    rule(f"mad.lo.{kind}", u, f"{u} {u} {u}", "(u64_t)a * b + c")
    rule(f"min.{kind}", kind, f"{kind} {kind}", "a < b ? a : b")
    rule(f"max.{kind}", kind, f"{kind} {kind}", "a > b ? a : b")


def _unsigned(kind: str) -> None:
    # PTX leaves a division by zero to the machine, which gives all ones.
    rule(f"div.{kind}", kind, f"{kind} {kind}", "b ? a / b : -1")
    rule(f"rem.{kind}", kind, f"{kind} {kind}", "b ? a % b : a")
    rule(f"shr.{kind}", kind, f"{kind} u32", f"b < {kind[1:]} ? a >> b : 0")


def _signed(kind: str) -> None:
    u, bits = f"u{kind[1:]}", int(kind[1:])
    # The lowest number by -1 overflows to itself on the device, and traps in C.
    rule(f"div.{kind}", kind, f"{kind} {kind}", f"b == 0 ? -1 : b == -1 ? ({kind}_t)(0 - ({u}_t)a) : a / b")
    rule(f"rem.{kind}", kind, f"{kind} {kind}", "b == 0 ? a : b == -1 ? 0 : a % b")
    rule(f"shr.{kind}", kind, f"{kind} u32", f"a >> (b < {bits} ? b : {bits - 1})")
    rule(f"neg.{kind}", u, u, "0 - a")
    rule(f"abs.{kind}", u, kind, f"a < 0 ? 0 - ({u}_t)a : ({u}_t)a")


def _products(kind: str) -> None:
    wider, bits = _WIDER[kind], kind[1:]
    if bits == "64":
        rule(f"mul.hi.{kind}", kind, f"{kind} {kind}", f"({wider})a * b >> 64")
        return
    rule(f"mul.hi.{kind}", kind, f"{kind} {kind}", f"({wider}_t)a * b >> {bits}")
    rule(f"mul.wide.{kind}", wider, f"{kind} {kind}", f"({wider}_t)a * b")
    u = f"u{wider[1:]}"
    rule(f"mad.wide.{kind}", u, f"{kind} {kind} {u}", f"({u}_t)(({wider}_t)a * b) + c")


def _bits(bits: str) -> None:
    u = f"u{bits}"
    rule(f"and.b{bits}", u, f"{u} {u}", "a & b")
    rule(f"or.b{bits}", u, f"{u} {u}", "a | b")
    rule(f"xor.b{bits}", u, f"{u} {u}", "a ^ b")
    rule(f"not.b{bits}", u, u, "~a")
    rule(f"shl.b{bits}", u, f"{u} u32", f"b < {bits} ? (u64_t)a << b : 0")
    rule(f"shr.b{bits}", u, f"{u} u32", f"b < {bits} ? a >> b : 0")
    for letter in "busf":
        rule(f"mov.{letter}{bits}", u, u, "a")
        rule(f"selp.{letter}{bits}", u, f"{u} {u} p", "c ? a : b")
    for name in ("eq", "ne"):
        rule(f"setp.{name}.b{bits}", "p", f"{u} {u}", f"a {COMPARISONS[name]} b")


def _pairs() -> None:
    """Two numbers of 16 bits in one register."""
    for letter in "su":
        rule(f"add.{letter}16x2", "u32", "u32 u32", "((a + (b & 0xFFFF0000)) & 0xFFFF0000) | ((a + b) & 0xFFFF)")
        for name, sign in (("min", "<"), ("max", ">")):
            lower = f"({letter}16_t)a {sign} ({letter}16_t)b ? a & 0xFFFF : b & 0xFFFF"
            upper = f"({letter}16_t)(a >> 16) {sign} ({letter}16_t)(b >> 16) ? a & 0xFFFF0000 : b & 0xFFFF0000"
            rule(f"{name}.{letter}16x2", "u32", "u32 u32", f"({lower}) | ({upper})")


def _fields() -> None:
    """Fields of bits, whose positions and lengths are the lowest eight bits of an operand."""
    rule("popc.b32", "u32", "u32", "__builtin_popcount(a)")
    rule("popc.b64", "u32", "u64", "__builtin_popcountll(a)")
    rule("clz.b32", "u32", "u32", "a ? __builtin_clz(a) : 32")
    rule("clz.b64", "u32", "u64", "a ? __builtin_clzll(a) : 64")
    rule("brev.b32", "u32", "u32", "reverse_bits(a) >> 32")
    rule("brev.b64", "u64", "u64", "reverse_bits(a)")
    for bits in ("32", "64"):
        rule(f"bfe.u{bits}", f"u{bits}", f"u{bits} u32 u32", f"extract_unsigned(a, b & 255, c & 255, {bits})")
        rule(f"bfe.s{bits}", f"u{bits}", f"s{bits} u32 u32", f"extract_signed(a, b & 255, c & 255, {bits})")
        operands = f"u{bits} u{bits} u32 u32"
        rule(f"bfi.b{bits}", f"u{bits}", operands, f"insert_bits(a, b, c & 255, e & 255, {bits})")
    rule("prmt.b32", "u32", "u32 u32 u32", "permute_bytes(a, b, c)")
    rule("lop3.b32", "u32", "u32 u32 u32 u32", "look_up(a, b, c, e)")
    rule("shf.l.wrap.b32", "u32", "u32 u32 u32", "((u64_t)b << 32 | a) << (c & 31) >> 32")
    rule("shf.r.wrap.b32", "u32", "u32 u32 u32", "((u64_t)b << 32 | a) >> (c & 31)")
    rule("shf.l.clamp.b32", "u32", "u32 u32 u32", "((u64_t)b << 32 | a) << (c < 32 ? c : 32) >> 32")
    rule("shf.r.clamp.b32", "u32", "u32 u32 u32", "((u64_t)b << 32 | a) >> (c < 32 ? c : 32)")


def _predicates() -> None:
    for name, expression in {"and": "a & b", "or": "a | b", "xor": "a ^ b"}.items():
        rule(f"{name}.pred", "p", "p p", f"({expression}) != 0")
    rule("not.pred", "p", "p", "!a")
    rule("mov.pred", "p", "p", "a != 0")


def _packing() -> None:
    """``mov`` of several registers into one, and of one into several, which takes an instruction for each part.

    PTX has no names for these; nor for reading the lower half of a register, as a conversion may.
    """
    rule("pack.2x32", "u64", "u32 u32", "(u64_t)b << 32 | a")
    rule("pack.2x16", "u32", "u16 u16", "(u32_t)b << 16 | a")
    rule("pack.4x16", "u64", "u16 u16 u16 u16", "(u64_t)e << 48 | (u64_t)c << 32 | (u32_t)b << 16 | a")
    for whole, part in ((64, 32), (64, 16), (32, 16)):
        for k in range(whole // part):
            rule(f"unpack.{whole}.{part}.{k}", f"u{part}", f"u{whole}", f"a >> {part * k}")
