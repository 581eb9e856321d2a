"""The arguments of a kernel: tensors, of which it may access what they cover, tuples and numbers."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from . import Device, Fault, Unsupported, virtual_gpu
from .ptx import at_thread, kernel, run


@triton.jit
def pair_kernel(both, out, c, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(both[0] + i) + 2 * tl.load(both[1] + i) + c)


def test_tuples(gpu):
    x, y, out = torch.randn(64), torch.randn(64), torch.empty(64)
    pair_kernel[(1,)]((x, y, None, 1), out, 3, BLOCK=64)
    assert torch.equal(out, x + 2 * y + 3)


SUM_OF_ALL = "\n".join(f"ld.global.b32 %r2, [%d{k}]; add.s32 %r1, %r1, %r2;" for k in range(24))


def test_many_views_of_one_storage():
    whole, out = torch.arange(100, dtype=torch.int32), torch.empty(1, dtype=torch.int32)
    views = [whole[3 * k : 3 * k + 1] for k in range(24)]
    result = run(f"mov.b32 %r1, 0; {SUM_OF_ALL} st.global.b32 [%d24], %r1;", *views, out)
    assert not result.kinds
    assert out.item() == sum(view.item() for view in views)


def test_expanded_and_empty_tensors():
    x, out = torch.tensor([5], dtype=torch.int32), torch.empty(32, dtype=torch.int32)
    body = f"ld.global.b32 %r1, [%d0]; {at_thread(1, 4)} st.global.b32 [%d40], %r1;"
    assert not run(body, x.expand(4, 7), out).kinds
    assert (out == 5).all()
    for empty in (torch.empty(0, dtype=torch.int32), torch.empty(0, 3, dtype=torch.int32)):
        assert run(body, empty, out).kinds["out of bounds"] == 32
    assert run(body, x[:0], out).kinds == {"outside the arguments' views, inside their storage": 32}


def test_a_vector_that_lies_partly_outside():
    x, out = torch.arange(6, dtype=torch.int32), torch.empty(1, dtype=torch.int32)
    body = "ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%d0+16]; st.global.b32 [%d1], %r1;"
    device = Device(strict=True)
    with pytest.raises(Fault, match=r"out of bounds.*16 bytes at byte 16 of the 24 that argument 0"):
        run(body, x, out, device=device)


def test_what_is_no_tensor_of_the_cpu():
    for value in (5, torch.empty(3, device="meta")):
        with pytest.raises(TypeError, match="tensors of the CPU"):
            Device().run(kernel("", 1), (1, 1, 1), 0, ["*fp32"], [value])


def test_scratch_memory_is_not_modelled():
    with pytest.raises(Unsupported):
        Device().run(kernel("", 4), (1, 1, 1), 0, ["*fp32"], [torch.empty(1)])


@triton.jit
def numbers_kernel(out, small, large, flag, half):
    tl.store(out, small)
    tl.store(out + 1, large)
    tl.store(out + 2, flag)
    tl.store(out + 3, half)


def test_numbers_as_arguments():
    out = torch.empty(4, dtype=torch.float64)
    with virtual_gpu(Device(strict=True)):
        numbers_kernel[(1,)](out, -3, 2**40, True, 0.1)
    assert out.tolist() == [-3, 2**40, 1, torch.tensor(0.1).item()]
