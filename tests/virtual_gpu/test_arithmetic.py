"""Arithmetic, as Triton compiles it and of instructions by themselves."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from .ptx import apply

# Code differs most between types, and between targets where they have instructions of their own.
TYPES_ON_GPUS = [(90, torch.float32), (90, torch.float64), (80, torch.float32), (100, torch.float32)]
INTEGERS_ON_GPUS = [(90, torch.int32), (90, torch.int64), (80, torch.int64), (100, torch.int32)]


@triton.jit
def integers_kernel(x, y, out, n, D, C: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    m = i < n
    a, b = tl.load(x + i, mask=m, other=1), tl.load(y + i, mask=m, other=1)
    tl.store(out + i, a // b, mask=m)
    tl.store(out + n + i, a % b, mask=m)
    tl.store(out + 2 * n + i, a // D, mask=m)
    tl.store(out + 3 * n + i, a // C, mask=m)
    tl.store(out + 4 * n + i, a * b, mask=m)
    tl.store(out + 5 * n + i, (a << (b & 15)) ^ (a >> (b & 7)) | (a & b), mask=m)
    tl.store(out + 6 * n + i, tl.maximum(a, b) - tl.minimum(a, b), mask=m)
    tl.store(out + 7 * n + i, tl.where(a < b, -a, ~b), mask=m)


@pytest.mark.parametrize(("gpu", "dtype"), INTEGERS_ON_GPUS, indirect=["gpu"])
def test_integers(gpu, dtype):
    top = 2**30 if dtype == torch.int32 else 2**62
    x = torch.cat([torch.randint(-top, top, (400,)), torch.arange(-50, 50)]).to(dtype)
    y = torch.cat([torch.randint(1, 100, (250,)), torch.randint(1, top, (250,))]).to(dtype)[torch.randperm(500)]
    out = torch.empty(8, 500, dtype=dtype)
    integers_kernel[(1,)](x, y, out, 500, 37, C=80, BLOCK=512)

    def divide(by: torch.Tensor | int) -> torch.Tensor:
        return torch.div(x, by, rounding_mode="trunc")

    expected = [divide(y), x - divide(y) * y, divide(37), divide(80), x * y]
    expected += [(x << (y & 15)) ^ (x >> (y & 7)) | (x & y)]
    expected += [torch.maximum(x, y) - torch.minimum(x, y), torch.where(x < y, -x, ~y)]
    assert torch.equal(out, torch.stack(expected))


@triton.jit
def floats_kernel(x, y, out, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    m = i < n
    a, b = tl.load(x + i, mask=m, other=1), tl.load(y + i, mask=m, other=1)
    tl.store(out + i, tl.minimum(a, b), mask=m)
    tl.store(out + n + i, tl.maximum(a, b), mask=m)
    tl.store(out + 2 * n + i, tl.where((a >= b) | (a != a), a - b, -b), mask=m)
    tl.store(out + 3 * n + i, tl.math.floor(b), mask=m)
    tl.store(out + 4 * n + i, a / b, mask=m)
    tl.store(out + 5 * n + i, tl.sqrt(tl.abs(a)), mask=m)
    tl.store(out + 6 * n + i, tl.exp(b), mask=m)
    tl.store(out + 7 * n + i, tl.log(tl.abs(a)), mask=m)
    tl.store(out + 8 * n + i, tl.fma(a, b, a), mask=m)


@pytest.mark.parametrize(("gpu", "dtype"), TYPES_ON_GPUS, indirect=["gpu"])
def test_floats(gpu, dtype):
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1.0, 1e-40, 1e38], dtype=dtype)
    pairs = torch.cartesian_prod(special, special)
    x = torch.cat([torch.randn(400, dtype=dtype), pairs[:, 0]])
    y = torch.cat([torch.randn(400, dtype=dtype), pairs[:, 1]])
    out = torch.empty(9, len(x), dtype=dtype)
    floats_kernel[(1,)](x, y, out, len(x), BLOCK=512)
    exact = [torch.fmin(x, y), torch.fmax(x, y), torch.where((x >= y) | x.isnan(), x - y, -y), y.floor()]
    torch.testing.assert_close(out[:4], torch.stack(exact), equal_nan=True, rtol=0, atol=0)
    # NumPy rounds square roots correctly; the device's approximate one takes subnormal numbers for zeros.
    is_approximate = dtype == torch.float32
    roots = torch.from_numpy(np.sqrt((flushed(x) if is_approximate else x).abs().numpy()))
    tolerance = {"rtol": 3e-7, "atol": 1e-38} if is_approximate else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(out[4:6], torch.stack([x / y, roots]), equal_nan=True, **tolerance)
    tolerance = {"rtol": 3e-7 if is_approximate else 1e-15, "atol": 1e-38}
    torch.testing.assert_close(out[6:8], torch.stack([y.exp(), x.abs().log()]), equal_nan=True, **tolerance)
    fma = x.double() * y.double() + x.double()
    if is_approximate:
        torch.testing.assert_close(out[8], fma.float(), equal_nan=True, rtol=1e-6, atol=0)
    else:
        # Rounded once, as fractions are when they become floats.
        finite = fma.isfinite()
        pairs = zip(x[finite].tolist(), y[finite].tolist())
        exact = torch.tensor([float(Fraction(a) * Fraction(b) + Fraction(a)) for a, b in pairs], dtype=dtype)
        torch.testing.assert_close(out[8][finite], exact, rtol=0, atol=0)
        torch.testing.assert_close(out[8][~finite], fma[~finite], rtol=0, atol=0, equal_nan=True)


def flushed(x):
    return torch.where(x.abs() < torch.finfo(torch.float32).tiny, torch.zeros_like(x).copysign(x), x)


@triton.jit
def saturating_kernel(x, y, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a, b = tl.load(x + i), tl.load(y + i)
    text: tl.constexpr = "fma.rn.sat.f32 $0, $1, $2, 0f3F000000;"
    result = tl.inline_asm_elementwise(text, "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1)
    tl.store(out + i, result)


def test_inline_assembly(gpu):
    x, y = torch.randn(256), torch.randn(256)
    x[:3] = torch.tensor([math.nan, math.inf, -math.inf])
    out = torch.empty(256)
    saturating_kernel[(1,)](x, y, out, BLOCK=256)
    expected = (x.double() * y.double() + 0.5).float().clamp(0, 1).nan_to_num(0)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-7)


SUBNORMAL = torch.tensor([1e-40, -1e-40, 1e-38, 0.5])


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("sqrt.approx.ftz.f32 {d}, {a};", lambda x: flushed(x).sqrt()),
        ("sqrt.rn.f32 {d}, {a};", lambda x: x.sqrt()),
        ("rcp.approx.ftz.f32 {d}, {a};", lambda x: 1 / flushed(x)),
        ("mul.ftz.f32 {d}, {a}, 0f3F000000;", lambda x: flushed(x * 0.5)),
        ("mul.f32 {d}, {a}, 0f3F000000;", lambda x: x * 0.5),
        ("max.ftz.f32 {d}, {a}, 0f00000000;", lambda x: flushed(x).clamp(min=0)),
    ],
)
def test_flushing_to_zero(instruction, expected):
    found = apply(instruction, SUBNORMAL, dtype=torch.float32)
    torch.testing.assert_close(found, expected(SUBNORMAL), rtol=0, atol=0, equal_nan=True)


def as_words(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int16).view(-1, 2).contiguous().view(torch.int32)[:, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves(dtype):
    x, y, z = (torch.randn(512).to(dtype) for _ in range(3))
    kind = "f16" if dtype == torch.float16 else "bf16"
    exact = {
        f"add.{kind} {{d}}, {{a}}, {{b}};": x + y,
        f"mul.rn.{kind} {{d}}, {{a}}, {{b}};": x * y,
        f"min.{kind} {{d}}, {{a}}, {{b}};": torch.minimum(x, y),
        f"fma.rn.{kind} {{d}}, {{a}}, {{b}}, {{c}};": (x.double() * y.double() + z.double()).to(dtype),
        f"neg.{kind} {{d}}, {{a}};": -x,
    }
    for instruction, expected in exact.items():
        assert torch.equal(apply(instruction, x, y, z, dtype=dtype), expected), instruction
        pairs = instruction.replace(kind, f"{kind}x2")
        found = apply(pairs, as_words(x), as_words(y), as_words(z), dtype=torch.int32)
        assert torch.equal(found, as_words(expected)), pairs


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_with_floats(dtype):
    x, y, z = torch.randn(512).to(dtype), torch.randn(512), torch.randn(512).to(dtype)
    kind = "f16" if dtype == torch.float16 else "bf16"
    for instruction, expected in (
        (f"add.rn.f32.{kind} {{d}}, {{a}}, {{b}};", x.float() + y),
        (f"sub.rn.f32.{kind} {{d}}, {{a}}, {{b}};", x.float() - y),
    ):
        assert torch.equal(apply(instruction, x, y, dtype=torch.float32), expected), instruction
    found = apply(f"fma.rn.f32.{kind} {{d}}, {{a}}, {{b}}, {{c}};", x, z, y, dtype=torch.float32)
    assert torch.equal(found, (x.double() * z.double() + y.double()).float())


def test_a_fused_product_of_halves_is_rounded_once():
    # The product lies half way between two numbers; what is added decides, but is too small for float64's sum.
    a = torch.tensor([1.0078125], dtype=torch.bfloat16)
    b = torch.tensor([1.5], dtype=torch.bfloat16)
    assert a.double() * b.double() == 1.51171875
    for small, expected in ((2.0**-80, 1.515625), (-(2.0**-80), 1.5078125)):
        c = torch.tensor([small], dtype=torch.bfloat16)
        found = apply("fma.rn.bf16 {d}, {a}, {b}, {c};", a, b, c, dtype=torch.bfloat16)
        assert found.item() == expected


def test_bits():
    x = torch.randint(-(2**31), 2**31, (500,), dtype=torch.int64).to(torch.int32)
    numbers = [int(k) & 0xFFFFFFFF for k in x]
    expected = {
        "popc.b32 {d}, {a};": [k.bit_count() for k in numbers],
        "clz.b32 {d}, {a};": [32 - k.bit_length() for k in numbers],
        "brev.b32 {d}, {a};": [int(f"{k:032b}"[::-1], 2) for k in numbers],
        "bfe.u32 {d}, {a}, 5, 12;": [k >> 5 & 0xFFF for k in numbers],
        "bfe.s32 {d}, {a}, 28, 12;": [int(k) >> 28 for k in x],
        "bfi.b32 {d}, {a}, {a}, 24, 4;": [(k & ~(15 << 24)) | ((k & 15) << 24) for k in numbers],
        "prmt.b32 {d}, {a}, {a}, 0x0123;": [int.from_bytes(k.to_bytes(4, "little"), "big") for k in numbers],
        "lop3.b32 {d}, {a}, 0xFF, 0xF0F0, 0x80;": [k & 0xF0 for k in numbers],
        "shf.l.wrap.b32 {d}, {a}, {a}, 9;": [(k << 9 | k >> 23) & 0xFFFFFFFF for k in numbers],
        "shf.r.clamp.b32 {d}, {a}, 7, 40;": [7 for _ in numbers],
        "mul.hi.u32 {d}, {a}, {a};": [k * k >> 32 for k in numbers],
        "div.u32 {d}, {a}, 0;": [0xFFFFFFFF for _ in numbers],
        "div.s32 {d}, {a}, -1;": [-int(k) & 0xFFFFFFFF for k in x],
    }
    for instruction, wanted in expected.items():
        found = apply(instruction, x, dtype=torch.int32)
        assert [int(k) & 0xFFFFFFFF for k in found] == [k & 0xFFFFFFFF for k in wanted], instruction


def test_predicates():
    x = torch.tensor([0, 1, 5, -1], dtype=torch.int32)
    body = "setp.gt.s32 %p1, {a}, 0; xor.pred %p2, %p1, 1; selp.b32 {d}, 1, 0, %p2;"
    assert apply(body, x, dtype=torch.int32).tolist() == [1, 0, 0, 1]
