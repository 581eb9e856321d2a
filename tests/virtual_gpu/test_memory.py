"""Loads, stores and atomic operations, also those by which threads work together."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from .ptx import at_thread, run


@triton.jit
def add_kernel(x, y, z, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = i < n
    tl.store(z + i, tl.load(x + i, mask=m) + tl.load(y + i, mask=m), mask=m)


# Where Triton knows nothing of a length, one kernel serves all of them.
any_length_kernel = triton.jit(add_kernel.fn, do_not_specialize=["n"])
DTYPES = [torch.float32, torch.float64, torch.int32, torch.int64, torch.int16, torch.int8]


@pytest.mark.parametrize(
    ("gpu", "dtype"), [*((90, d) for d in DTYPES), (80, DTYPES[0]), (100, DTYPES[0])], indirect=["gpu"]
)
def test_add(gpu, dtype):
    for n in (1, 31, 1000, 4096):
        x, y = (torch.randint(-100, 100, (n,)).to(dtype) for _ in range(2))
        z = torch.empty_like(x)
        any_length_kernel[(triton.cdiv(n, 512),)](x, y, z, n, BLOCK=512)
        assert torch.equal(z, x + y)
    assert gpu.results[-1].sectors_read == 2 * n * dtype.itemsize // 32
    assert gpu.results[-1].sectors_written == n * dtype.itemsize // 32


@pytest.mark.parametrize("gpu", [80, 90, 100], indirect=True)
def test_specialised_lengths(gpu):
    for n in (1, 4096):
        x, y = torch.randn(2, n)
        z = torch.empty(n)
        add_kernel[(triton.cdiv(n, 1024),)](x, y, z, n, BLOCK=1024)
        assert torch.equal(z, x + y)
    # Vectors, whose lanes read whole lines.
    loads = [k for k, what in enumerate(gpu.results[-1].program.classes) if what == "ld.global"]
    assert gpu.results[-1].counts["lines"][loads].sum() == 2 * 4096 * 4 // 128


@triton.jit
def reduce_kernel(x, out, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    v = tl.load(x + i, mask=i < n, other=0)
    tl.store(out, tl.sum(v))
    tl.store(out + 1, tl.max(v))
    tl.store(out + 2, tl.min(v))
    tl.store(out + 3, tl.argmax(v, 0).to(out.dtype.element_ty))
    tl.store(out + 4 + i, tl.cumsum(v, 0), mask=i < n)


reduce_any_length_kernel = triton.jit(reduce_kernel.fn, do_not_specialize=["n"])


@pytest.mark.parametrize(
    ("gpu", "dtype", "warps"),
    [
        *((90, torch.float32, warps) for warps in (1, 4, 8)),
        *((90, dtype, 4) for dtype in (torch.float64, torch.int32, torch.int64)),
        (90, torch.int32, 1),
        (90, torch.int64, 8),
        (80, torch.float64, 1),
        (80, torch.int32, 8),
        (100, torch.float32, 4),
        (100, torch.int64, 1),
    ],
    indirect=["gpu"],
)
def test_reductions_and_scans(gpu, dtype, warps):
    for n in (1, 100, 1024):
        x = torch.randint(-50, 50, (n,)).to(dtype)
        out = torch.zeros(4 + n, dtype=dtype)
        reduce_any_length_kernel[(1,)](x, out, n, BLOCK=1024, num_warps=warps)
        full = torch.cat([x, torch.zeros(1024 - n, dtype=dtype)])
        first = int((full == full.max()).nonzero()[0])
        assert out[:4].tolist() == [full.sum(), full.max(), full.min(), first]
        assert torch.equal(out[4:], x.cumsum(0, dtype=dtype))


@triton.jit
def matrix_kernel(x, rows, columns, split, R: tl.constexpr, C: tl.constexpr):
    r, c = tl.arange(0, R), tl.arange(0, C)
    v = tl.load(x + r[:, None] * C + c[None, :])
    tl.store(rows + r, tl.sum(v, axis=1))
    tl.store(columns + c, tl.max(v, axis=0))
    even, odd = tl.split(tl.reshape(v, [R * C // 2, 2]))
    k = tl.arange(0, R * C // 2)
    tl.store(split + k, even)
    tl.store(split + R * C // 2 + k, odd)


SHAPES = [(4, 128), (128, 32), (16, 16)]
MATRIX_DTYPES = [torch.float32, torch.float64, torch.int64, torch.float16]


@pytest.mark.parametrize(
    ("gpu", "dtype", "shape"),
    [
        *((90, dtype, shape) for dtype in MATRIX_DTYPES for shape in SHAPES),
        *((gpu, torch.float16, shape) for gpu in (80, 100) for shape in SHAPES),
    ],
    indirect=["gpu"],
)
def test_matrices(gpu, dtype, shape):
    r, c = shape
    x = torch.randint(-9, 9, shape).to(dtype)
    rows, columns, split = x.new_empty(r), x.new_empty(c), x.new_empty(r * c)
    matrix_kernel[(1,)](x, rows, columns, split, R=r, C=c)
    assert torch.equal(rows, x.sum(1))
    assert torch.equal(columns, x.amax(0))
    assert torch.equal(split, torch.cat([x.view(-1)[::2], x.view(-1)[1::2]]))


@triton.jit
def bins_kernel(x, counts, sums, first, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = i < n
    k = tl.load(x + i, mask=m, other=0)
    tl.atomic_add(counts + k, tl.full([BLOCK], 1, tl.int64), mask=m, sem="relaxed")
    tl.atomic_add(sums + k, i.to(tl.float32), mask=m)
    tl.atomic_min(first + k, i, mask=m)


@pytest.mark.parametrize("gpu", [80, 90, 100], indirect=True)
def test_atomics(gpu):
    n = 5000
    x = torch.randint(0, 37, (n,), dtype=torch.int32)
    counts, sums = torch.zeros(37, dtype=torch.int64), torch.zeros(37)
    first = torch.full((37,), n, dtype=torch.int32)
    bins_kernel[(10,)](x, counts, sums, first, n, BLOCK=512)
    assert torch.equal(counts, torch.bincount(x, minlength=37))
    assert torch.equal(sums, torch.zeros(37).index_add(0, x.long(), torch.arange(n).float()))
    assert torch.equal(first.long(), torch.tensor([int((x == k).nonzero()[0]) for k in range(37)]))
    assert gpu.results[-1].most_atomics == counts.max()


@triton.jit
def histogram_kernel(x, counts, BLOCK: tl.constexpr, BINS: tl.constexpr):
    tl.store(counts + tl.arange(0, BINS), tl.histogram(tl.load(x + tl.arange(0, BLOCK)), BINS))


def test_atomics_of_shared_memory(gpu):
    x = torch.randint(0, 32, (512,), dtype=torch.int32)
    counts = torch.zeros(32, dtype=torch.int32)
    histogram_kernel[(1,)](x, counts, BLOCK=512, BINS=32, num_warps=4)
    assert torch.equal(counts, torch.bincount(x, minlength=32).int())


def test_atomics_of_64_bits():
    x = torch.tensor([2**40, -(2**40), 0, 0])
    run("mov.b64 %d1, -1; red.global.add.u64 [%d0], %d1; atom.global.min.s64 %d2, [%d0+8], -5;", x)
    before = torch.full((32,), -1)
    body = "cvt.u64.u32 %d2, %r0; add.u64 %d2, %d2, 1; atom.global.cas.b64 %d3, [%d0+16], 0, %d2;"
    run(f"{body} {at_thread(1, 8)} st.global.b64 [%d40], %d3;", x, before)
    assert x.tolist() == [2**40 - 32, -(2**40), 1, 0]
    assert before.tolist() == [0] + [1] * 31


def test_atomic_additions_of_floats():
    x = torch.tensor([1e-40, 1.0])
    # In global memory they take subnormal numbers for zeros.
    run(
        "setp.eq.u32 %p1, %r0, 0; @%p1 red.global.add.f32 [%d0], 0f00000000; red.global.add.f32 [%d0+4], 0f3F800000;", x
    )
    assert x.tolist() == [0.0, 33.0]
    y = torch.tensor([1.0, 2.0], dtype=torch.float16)
    run("red.global.add.noftz.f16x2 [%d0], 0x38003C00;", y)
    assert y.tolist() == [33.0, 18.0]


@triton.jit
def slots_kernel(x, found, slots, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    one = (tl.load(x + i, mask=i < n, other=0) > 0).to(tl.int32)
    first = tl.atomic_add(found, tl.sum(one).to(tl.int64))
    tl.store(slots + first + tl.cumsum(one, 0) - one, i, mask=one > 0)


def test_appending(gpu):
    x = torch.randn(3000)
    found, slots = torch.zeros(1, dtype=torch.int64), torch.full((3000,), -1, dtype=torch.int32)
    slots_kernel[(12,)](x, found, slots, 3000, BLOCK=256)
    number = int((x > 0).sum())
    assert found == number
    assert torch.equal(slots[:number].sort().values.long(), (x > 0).nonzero()[:, 0])
