"""Conversions between types: of all numbers of 16 bits, and of numbers around them."""

from __future__ import annotations

import itertools

import pytest
import torch
import triton
import triton.language as tl

from .ptx import apply

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
INTEGERS = [torch.int32, torch.int64, torch.int16, torch.int8]


@triton.jit
def convert_kernel(x, first, second, third, fourth, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < n)
    tl.store(first + i, value.to(first.dtype.element_ty), mask=i < n)
    tl.store(second + i, value.to(second.dtype.element_ty), mask=i < n)
    tl.store(third + i, value.to(third.dtype.element_ty), mask=i < n)
    tl.store(fourth + i, value.to(fourth.dtype.element_ty), mask=i < n)


def converted(x: torch.Tensor, dtypes: list[torch.dtype]) -> list[torch.Tensor]:
    results = [torch.empty(len(x), dtype=dtype) for dtype in dtypes]
    convert_kernel[(triton.cdiv(len(x), 1024),)](x, *results, len(x), BLOCK=1024)
    return results


def numbers(dtype: torch.dtype) -> torch.Tensor:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    if dtype.itemsize == 2:
        return every.view(dtype)
    near = torch.cat([every.view(half).to(dtype) for half in (torch.float16, torch.bfloat16)])
    next_one = torch.nextafter(near, torch.tensor(torch.inf, dtype=dtype))
    between = (near + torch.nextafter(near, near + 1)) / 2
    return torch.cat([near, next_one, between, near * 1.0009765625, near * 1.00390625, torch.randn(1000, dtype=dtype)])


def rounded_once(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Where PyTorch goes by way of float32: first to odd, which leaves the last bit set where that is not exact."""
    odd = x.float()
    odd = torch.where(odd.double().abs() > x.abs(), (odd.view(torch.int32) - 1).view(torch.float32), odd)
    odd = torch.where((odd.double() == x) | x.isnan(), odd, (odd.view(torch.int32) | 1).view(torch.float32))
    return odd.to(dtype)


@pytest.mark.parametrize(
    ("gpu", "of"),
    [*itertools.product([80, 90], FLOATS), (100, torch.float32), (100, torch.bfloat16)],
    indirect=["gpu"],
)
def test_conversions_of_floats(gpu, of):
    x = numbers(of)
    for into, found in zip(FLOATS, converted(x, FLOATS)):
        expected = rounded_once(x, into) if of == torch.float64 and into.itemsize == 2 else x.to(into)
        numbers_alike = (found == expected) & (found.signbit() == expected.signbit())
        assert (numbers_alike | (found.isnan() & expected.isnan())).all(), into


@pytest.mark.parametrize(
    ("gpu", "of"),
    [
        *((90, of) for of in (torch.float32, torch.float64, torch.int32, torch.int64, torch.int8, torch.uint8)),
        (80, torch.float32),
        (100, torch.int64),
    ],
    indirect=["gpu"],
)
def test_conversions_to_integers(gpu, of):
    x = torch.cat([torch.arange(-130, 300) / (2 if of.is_floating_point else 1), torch.tensor([1e4, -1e4, 32767.0])])
    for into in INTEGERS:
        within = x.clamp(torch.iinfo(into).min, torch.iinfo(into).max).to(of)
        found = converted(within, INTEGERS)[INTEGERS.index(into)]
        assert torch.equal(found, within.to(into)), into


def test_what_is_out_of_an_integers_range():
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 3e9, -3e9, 1e20])
    top, bottom = 2**31 - 1, -(2**31)
    assert apply("cvt.rzi.s32.f32 {d}, {a};", x, dtype=torch.int32).tolist() == [0, top, bottom, top, bottom, top]
    assert apply("cvt.rzi.u32.f32 {d}, {a};", x, dtype=torch.int32).tolist() == [0, -1, 0, int(3e9) - 2**32, 0, -1]
    of_64 = apply("cvt.rzi.s64.f64 {d}, {a};", x.double(), dtype=torch.int64).tolist()
    assert of_64 == [-(2**63), 2**63 - 1, -(2**63), int(3e9), -int(3e9), 2**63 - 1]
    assert apply("cvt.rzi.s32.f64 {d}, {a};", x.double()[:1], dtype=torch.int32).tolist() == [bottom]


def test_integers_and_halves():
    x = torch.tensor([0, 1, -7, 2049, 65519, 65520, 100000], dtype=torch.int32)
    found = apply("cvt.rn.f16.s32 {d}, {a};", x, dtype=torch.float16)
    assert torch.equal(found, x.to(torch.float16))
    halves = torch.tensor([0.5, -2.75, 1000, torch.inf], dtype=torch.float16)
    assert apply("cvt.rzi.s32.f16 {d}, {a};", halves, dtype=torch.int32).tolist() == [0, -2, 1000, 2**31 - 1]


def test_a_conversion_reads_the_lower_part_of_a_wider_register():
    x = torch.tensor([0x12345680, -1], dtype=torch.int32)
    assert apply("cvt.s64.s8 {d}, {a};", x, dtype=torch.int64).tolist() == [-128, -1]
    assert apply("cvt.u32.u16 {d}, {a};", x, dtype=torch.int32).tolist() == [0x5680, 0xFFFF]


def test_moves_of_parts():
    x = torch.tensor([0x0004000300020001], dtype=torch.int64)
    body = "mov.b64 {{%h1, %h2, %h3, %h4}}, {a}; mov.b64 {d}, {{%h4, %h3, %h2, %h1}};"
    assert apply(body, x, dtype=torch.int64).tolist() == [0x0001000200030004]
    body = "mov.b64 {{%r1, %r2}}, {a}; mov.b32 {{_, %h1}}, %r1; mov.b32 %r3, {{%h1, %h1}}; mov.b64 {d}, {{%r2, %r3}};"
    assert apply(body, x, dtype=torch.int64).tolist() == [0x0002000200040003]
