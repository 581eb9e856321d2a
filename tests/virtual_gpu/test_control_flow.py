"""Branches, loops, lanes that diverge, and what lanes exchange."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from . import Device, Unsupported
from .parse import parse
from .ptx import at_thread, kernel, run

STORE = f"{at_thread(0, 4)} st.global.b32 [%d40], %r1;"


@triton.jit
def search_kernel(table, x, out, n, length, highest, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = i < n
    value = tl.load(x + i, mask=m, other=0)
    place = tl.zeros([BLOCK], tl.int32)
    step = highest
    while step > 0:
        reached = place + step
        other = tl.load(table + reached - 1, mask=reached <= length, other=float("inf"))
        place = tl.where(other <= value, reached, place)
        step = step // 2
    tl.store(out + i, place, mask=m)


def test_a_loop_that_gathers(gpu):
    table, x = torch.randn(1000).sort().values, torch.randn(3000)
    out = torch.empty(3000, dtype=torch.int32)
    search_kernel[(12,)](table, x, out, 3000, 1000, 512, BLOCK=256)
    assert torch.equal(out.long(), torch.searchsorted(table, x, right=True))


@triton.jit
def branch_kernel(x, out, limit, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + i)
    if tl.max(v) > limit:
        tl.store(out + i, v * 2)
    else:
        tl.store(out + i, tl.sort(v))


@pytest.mark.parametrize("gpu", [80, 90, 100], indirect=True)
def test_branches_and_sorting(gpu):
    x = torch.randn(4, 128)
    out = torch.empty_like(x)
    limit = float(x.amax(1).median())
    branch_kernel[(4,)](x, out, limit, BLOCK=128)
    for row, found in zip(x, out):
        assert torch.equal(found, row * 2 if row.max() > limit else row.sort().values)


@triton.jit
def places_kernel(out):
    x, y, z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    columns, rows = tl.num_programs(0), tl.num_programs(1)
    tl.store(out + (z * rows + y) * columns + x, 100 * z + 10 * y + x)


def test_places_in_a_grid(gpu):
    out = torch.empty(2, 3, 5, dtype=torch.int32)
    places_kernel[(5, 3, 2)](out)
    x, y, z = torch.arange(5), torch.arange(3), torch.arange(2)
    assert torch.equal(out.long(), 100 * z[:, None, None] + 10 * y[:, None] + x)


def test_lanes_that_diverge_meet_again():
    out = torch.empty(32, dtype=torch.int32)
    # A loop of as many rounds as the lane's number, and then an exchange, for which all lanes have to be there.
    body = f"""
  mov.b32 %r1, 0;
$again:
  setp.ge.u32 %p1, %r1, %r0;
  @%p1 bra $done;
  add.u32 %r1, %r1, 1;
  bra $again;
$done:
  shfl.sync.bfly.b32 %r1, %r1, 1, 31, -1;
  {STORE}
"""
    assert not run(body, out).kinds
    assert out.tolist() == [lane ^ 1 for lane in range(32)]


def test_lanes_that_end():
    out = torch.full((32,), -1, dtype=torch.int32)
    result = run(f"setp.lt.u32 %p1, %r0, 10; @%p1 ret; mov.b32 %r1, %r0; {STORE}", out)
    assert not result.kinds
    assert out.tolist() == [-1] * 10 + list(range(10, 32))
    assert result.by_class()["st.global"] == 22
    # The last warp has fewer threads.
    out = torch.full((41,), -1, dtype=torch.int32)
    run(f"mov.b32 %r1, %r0; {STORE}", out, threads=40)
    assert out.tolist() == [*range(40), -1]


def test_the_end_without_an_instruction():
    out = torch.zeros(32, dtype=torch.int32)
    ptx = kernel(f"mov.b32 %r1, 7; {STORE} bra $end;\n$end:", 1).ptx.replace("  ret;\n", "")
    assert not Device().run(parse(ptx), (1, 1, 1), 0, ["*i32"], [out]).kinds
    assert (out == 7).all()


def test_exchanges():
    out = torch.empty(32, dtype=torch.int32)
    lanes = torch.arange(32, dtype=torch.int32)
    expected = {
        "shfl.sync.up.b32 %r1|%p1, %r0, 3, 0, -1;": torch.where(lanes >= 3, lanes - 3, lanes),
        "shfl.sync.down.b32 %r1, %r0, 3, 31, -1;": torch.where(lanes < 29, lanes + 3, lanes),
        # In segments of eight lanes.
        "shfl.sync.idx.b32 %r1, %r0, 5, 0x181F, -1;": lanes // 8 * 8 + 5,
        "shfl.sync.down.b32 %r1, %r0, 3, 0x1807, -1;": torch.where(lanes % 8 < 5, lanes + 3, lanes),
        "redux.sync.add.s32 %r1, %r0, -1;": lanes.sum().expand(32),
        "redux.sync.max.u32 %r1, %r0, 0xffffffff;": lanes.max().expand(32),
        "setp.lt.u32 %p1, %r0, 3; vote.sync.ballot.b32 %r1, %p1, -1;": torch.full((32,), 7),
        "setp.lt.u32 %p1, %r0, 3; vote.sync.all.pred %p2, %p1, -1; selp.b32 %r1, 1, 0, %p2;": torch.zeros(32),
        "setp.lt.u32 %p1, %r0, 32; vote.sync.uni.pred %p2, %p1, -1; selp.b32 %r1, 1, 0, %p2;": torch.ones(32),
    }
    for body, wanted in expected.items():
        assert not run(f"{body} {STORE}", out).kinds, body
        assert torch.equal(out.long(), wanted.long()), body


def test_reductions_of_floats_and_nan():
    x, out = torch.randn(32), torch.empty(32)
    x[7] = torch.nan
    body = f"{at_thread(0, 4)} ld.global.b32 %r1, [%d40]; redux.sync.min{{}}.f32 %r1, %r1, -1;"
    body += f"{at_thread(1, 4)} st.global.b32 [%d40], %r1;"
    run(body.format(""), x, out)
    assert out[0] == x.nan_to_num(torch.inf).min()
    run(body.format(".NaN"), x, out)
    assert out.isnan().all()


def test_registers_of_a_scope_hide_others():
    out = torch.empty(32, dtype=torch.int32)
    body = """
  mov.b32 %r1, 5;
  {
    .reg .b32 %r1;
    mov.b32 %r1, 9;
  }
"""
    run(body + STORE, out)
    assert (out == 5).all()


@pytest.mark.parametrize(
    "statement",
    [
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%r1}, {%r2}, {%r3}, {%r4};",
        "ld.b32 %r1, [%d0];",
        "ld.global.b128 %d1, [%d0];",
        "ld.shared::cluster.b32 %r1, [%r2];",
        "atom.global.add.v2.f32 %d1, [%d0], %d1;",
        "atom.global.inc.u32 %r1, [%d0], 5;",
        "redux.sync.min.abs.f32 %r1, %r1, -1;",
        "bar.sync 1;",
        "bar.red.popc.u32 %r1, 0, %p1;",
        "shfl.sync.up.b32 %r1, %r1, 1, 0, 15;",
        "vote.sync.any.pred %p1, !%p2, -1;",
        "add.s32 %r1, %h1, %r2;",
        "mov.b32 %r1, %clock;",
        "mov.b32 %r1, unknown;",
        "cvta.to.shared.u64 %d1, %d1;",
        ".local .b8 depot[16];",
        "bra $nowhere;",
        "call.uni other, (%r1);",
        "cp.async.wait_all;",
    ],
)
def test_what_is_not_modelled_says_so(statement):
    with pytest.raises(Unsupported, match=r".*\w"):
        kernel(statement, 1)
