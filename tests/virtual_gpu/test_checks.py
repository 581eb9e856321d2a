"""The checks, against kernels that are wrong."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from . import Device, Fault, virtual_gpu
from .parse import parse
from .ptx import at_thread, kernel, run
from .test_memory import reduce_kernel

RACE, SHARED_RACE, LANES = "race in global", "race in shared", "lanes store different values"
FIRST_WARP = "setp.lt.u32 %p1, %r0, 32;"
SHARED = "shl.b32 %r1, %r0, 2;"


@triton.jit
def over_kernel(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i <= n), mask=i < n)


def test_out_of_bounds_is_found():
    with (
        virtual_gpu(Device(strict=True)),
        pytest.raises(Fault, match=r"over_kernel: out of bounds.*ld\.global.*test_checks"),
    ):
        over_kernel[(2,)](torch.randn(100), torch.empty(100), 100, BLOCK=64)


def test_what_lies_outside_a_view_is_told_apart():
    with virtual_gpu(Device(strict=True)) as device:
        over_kernel[(2,)](torch.randn(200)[:100], torch.empty(100), 100, BLOCK=64)
        assert list(device.problems) == ["over_kernel: outside the arguments' views, inside their storage"]


def test_what_lies_before_the_begin_is_found():
    result = run("ld.global.b32 %r1, [%d0+-4];", torch.empty(1))
    assert result.kinds == {"out of bounds": 32}
    assert "byte -4 of the 4 that argument 0 lies in" in result.reports[0]


def test_misaligned_accesses_are_found():
    assert run("ld.global.b32 %r1, [%d0+2];", torch.empty(4)).kinds == {"misaligned": 32}
    assert run("st.shared.b32 [global_smem+2], 5;", shared=16).kinds["misaligned"] == 32


@triton.jit
def claim_kernel(y, BLOCK: tl.constexpr):
    tl.store(y, tl.program_id(0).to(tl.float32))


@triton.jit
def same_kernel(y, BLOCK: tl.constexpr):
    tl.store(y, 1.0)


@triton.jit
def neighbour_kernel(y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(y + (i + 1) % n))


def test_races_between_ctas_are_found():
    with virtual_gpu(Device(strict=True)):
        with pytest.raises(Fault, match=RACE):
            claim_kernel[(2,)](torch.zeros(1), BLOCK=1)
        with pytest.raises(Fault, match=RACE):
            neighbour_kernel[(2,)](torch.zeros(256), 256, BLOCK=128)
    with virtual_gpu(Device(strict=True)) as device:
        same_kernel[(5,)](torch.zeros(1), BLOCK=1)
        assert list(device.problems) == ["same_kernel: the same value stored twice in global memory"]


ADD, LOAD, WRITE = "red.global.add.u32 [%d0], 1;", "ld.global.b32 %r2, [%d0];", "st.global.b32 [%d0], %r0;"


@pytest.mark.parametrize(
    ("first", "second", "races"),
    [
        (LOAD, WRITE, True),
        (WRITE, LOAD, True),
        (ADD, LOAD, True),
        (LOAD, ADD, True),
        (ADD, WRITE, True),
        (ADD, ADD, False),
        (LOAD, LOAD, False),
    ],
)
def test_races_between_warps_are_found(first, second, races):
    """Whichever of them comes first; and a barrier between brings them in order."""
    body = f"setp.eq.u32 %p1, %r0, 0; setp.eq.u32 %p2, %r0, 32; @%p1 {first} {{}} @%p2 {second}"
    for seed in range(4):
        x = torch.ones(1, dtype=torch.int32)
        assert bool(run(body.format(""), x, threads=64, device=Device(seed=seed)).kinds) == races
        assert not run(body.format("bar.sync 0;"), x, threads=64, device=Device(seed=seed)).kinds


def test_a_race_with_the_first_of_two_readers_is_found():
    # The second warp reads, and then it alone writes what the first one has read too.
    body = f"{LOAD} setp.eq.u32 %p1, %r0, 32; @%p1 st.global.b32 [%d0], 5;"
    for seed in range(8):
        kinds = run(body, torch.zeros(1, dtype=torch.int32), threads=64, device=Device(seed=seed)).kinds
        assert kinds["race in global memory"], seed


def test_numbers_of_16_bits_in_one_word_are_no_race():
    # The tensor's elements have 32 bits, but the kernel takes it for one of 16.
    x = torch.zeros(32, dtype=torch.int32)
    body = f"{at_thread(0, 2)} cvt.u16.u32 %h1, %r0; st.global.b16 [%d40], %h1;"
    result = Device().run(kernel(body, 1, 64), (1, 1, 1), 0, ["*i16"], [x])
    assert not result.kinds
    assert x.view(torch.int16).tolist() == list(range(64))


@triton.jit
def clash_kernel(y, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i // 2, i)


def test_lanes_that_store_at_one_place_are_found():
    with virtual_gpu(Device(strict=True)), pytest.raises(Fault, match=f"{LANES}|{RACE}"):
        clash_kernel[(1,)](torch.zeros(64, dtype=torch.int32), BLOCK=128)
    assert run(WRITE, torch.zeros(1, dtype=torch.int32)).kinds == {"lanes store different values at one place": 31}
    assert not run("st.global.b32 [%d0], 5;", torch.zeros(1, dtype=torch.int32)).kinds
    assert run("st.shared.b32 [global_smem], %r0;", shared=16).kinds == {
        "lanes store different values at one place": 31
    }
    assert not run("st.shared.b32 [global_smem], 5;", shared=16).kinds


def test_races_in_shared_memory_are_found():
    store = f"{SHARED} st.shared.b32 [%r1], %r0;"
    load = "xor.b32 %r2, %r1, 128; ld.shared.b32 %r3, [%r2];"
    assert run(store + load, threads=64, shared=256).kinds["race in shared memory"]
    assert not run(f"{store} bar.sync 0; {load}", threads=64, shared=256).kinds
    # A later write needs a barrier too.
    again = f"{store} bar.sync 0; {load} {{}} st.shared.b32 [%r1], 1;"
    assert run(again.format(""), threads=64, shared=256).kinds["race in shared memory"]
    assert not run(again.format("bar.sync 0;"), threads=64, shared=256).kinds


def test_atomics_of_shared_memory_race_only_with_others():
    begin = f"{FIRST_WARP} @%p1 st.shared.b32 [global_smem], 0; bar.sync 0; atom.shared.add.u32 %r2, [global_smem], 1;"
    assert not run(begin, threads=64, shared=16).kinds
    assert run(f"{begin} ld.shared.b32 %r3, [global_smem];", threads=64, shared=16).kinds["race in shared memory"]


def test_unset_shared_memory_is_found():
    assert run("ld.shared.b32 %r1, [global_smem];", shared=16).kinds == {"unset shared memory read": 32}
    assert run("st.shared.b32 [global_smem+16], %r0;", shared=16).kinds == {"shared memory out of bounds": 32}


def test_lanes_that_exchange_by_shared_memory_are_told():
    exchange = f"{SHARED} st.shared.b32 [%r1], %r0; {{}} xor.b32 %r2, %r1, 4; ld.shared.b32 %r3, [%r2];"
    words = "lanes of one warp exchange by shared memory without a barrier"
    assert run(exchange.format(""), shared=128).kinds == {words: 32}
    assert not run(exchange.format("bar.warp.sync -1;"), shared=128).kinds
    assert not run(exchange.format("bar.sync 0;"), shared=128).kinds


def test_wrong_barriers_are_found():
    half = "setp.lt.u32 %p1, %r0, 16;"
    assert run(f"{half} @%p1 bar.sync 0;").kinds["barrier in a diverged warp"] == 1
    assert run(f"{half} @%p1 bra $there; bar.sync 0;\n$there:").kinds["barrier in a diverged warp"] == 1
    shuffle = "shfl.sync.bfly.b32 %r1, %r0, 1, 31, -1;"
    result = run(f"{half} @%p1 {shuffle}")
    assert result.kinds["exchange between lanes of a diverged warp"] == 1
    assert "lanes 0x0000ffff of 0xffffffff" in result.reports[0]
    ended = "a warp ended, another waits at a barrier"
    assert run(f"{FIRST_WARP} @%p1 ret; bar.sync 0;", threads=64).kinds[ended] == 1
    different = f"{FIRST_WARP} @%p1 bra $there; bar.sync 0; ret;\n$there:\nbar.sync 0;"
    assert run(different, threads=64).kinds["warps wait at different barriers"] == 1


def test_endless_loops_and_traps_are_found():
    for quantum in (0, 200):
        assert run("$again:\nbra $again;", device=Device(budget=1000, quantum=quantum)).kinds == {"endless": 1}
    assert run("trap;").kinds == {"trap": 1}


def test_a_missing_barrier_is_found():
    """Each barrier of a compiled reduction is there for a reason, or else follows from one that is."""
    x, out = torch.randn(1024), torch.zeros(4 + 1024)
    with virtual_gpu():
        compiled = reduce_kernel.warmup(x, out, 1024, BLOCK=1024, num_warps=4, grid=(1,))
    lines = compiled.asm["ptx"].decode().splitlines()
    barriers = [k for k, line in enumerate(lines) if "bar.sync" in line]
    missed = 0
    for k in barriers:
        program = parse("\n".join(line for n, line in enumerate(lines) if n != k))
        launches = (
            Device(seed=seed).run(
                program, (1, 1, 1), compiled.metadata.shared, ["*fp32", "*fp32", "i32"], [x, out, 1024]
            )
            for seed in range(4)
        )
        missed += not any(result.kinds["race in shared memory"] for result in launches)
    assert len(barriers) > 6
    assert missed <= 3
