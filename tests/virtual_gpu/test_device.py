"""What a device remembers, launches of several threads, and guards."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import triton
import triton.language as tl

from . import ERRORS, KINDS, Device, Fault, virtual_gpu
from .layout import Kind
from .ptx import at_thread, kernel, run

COUNT_UP = f"{at_thread(0, 4)} ld.global.b32 %r1, [%d40]; add.u32 %r1, %r1, 1; st.global.b32 [%d40], %r1;"
OVER = "ld.global.b32 %r1, [%d0+4096];"


@triton.jit
def fill_kernel(x, value):
    tl.store(x + tl.arange(0, 64), value)


def test_results_and_totals():
    device = Device(count=True)
    x = torch.zeros(32, dtype=torch.int32)
    result = run(COUNT_UP, x, device=device)
    run(COUNT_UP, x, device=device)
    assert (x == 2).all()
    assert device.results[0] is result
    assert device.totals["launches"] == device.totals["CTAs"] == len(device.results) == 2
    assert device.totals["warp instructions"] * 32 == device.totals["thread instructions"]
    assert result.by_class("runs") == {
        "ld.param": 1,
        "mov": 1,
        "int32": 1,
        "int64": 1,
        "ld.global": 1,
        "st.global": 1,
        "branch": 1,
        "none": 0,
    }
    assert (result.sectors_read, result.sectors_written) == (4, 4)
    assert result.cta_total.tolist() == result.cta_longest.tolist() == [result.warp_instructions]
    forgetful = Device(keep=False)
    run(COUNT_UP, x, device=forgetful)
    assert not forgetful.results


def test_problems_and_errors():
    device = Device()
    for _ in range(2):
        run(OVER, torch.empty(1), device=device)
    assert device.problems == {"kernel: out of bounds": 64}
    assert len(device.errors) == 2
    assert device.errors[0] == device.examples["kernel: out of bounds"]
    run("ld.shared.b32 %r1, [global_smem];", shared=16, device=device)
    assert len(device.problems) == 2
    assert len(device.errors) == 2, "what may be meant is no error"
    assert set(KINDS) == set(Kind)
    assert set(KINDS) > ERRORS


def test_a_strict_device_raises_and_remembers():
    device = Device(strict=True)
    with pytest.raises(Fault, match="out of bounds"):
        run(OVER, torch.empty(1), device=device)
    assert len(device.errors) == len(device.results) == 1


def test_the_seed_decides_who_comes_first():
    def last_writer(seed: int) -> int:
        x = torch.zeros(1, dtype=torch.int32)
        run("mov.u32 %r1, %ctaid.x; st.global.b32 [%d0], %r1;", x, grid=(8, 1, 1), device=Device(seed=seed))
        return int(x)

    found = [last_writer(seed) for seed in range(8)]
    assert found == [last_writer(seed) for seed in range(8)]
    assert len(set(found)) > 1


def test_registers_and_shared_memory_begin_as_noise():
    out = torch.zeros(32, dtype=torch.int32)
    for body in ("", "ld.shared.b32 %r1, [global_smem];"):
        body += f"{at_thread(0, 4)} st.global.b32 [%d40], %r1;"
        run(body, out, shared=16)
        assert (out != 0).all()
        run(body, out, shared=16, device=Device(noise=False))
        assert (out == 0).all()


def test_grids_and_blocks_that_no_gpu_takes():
    x = torch.zeros(32, dtype=torch.int32)
    for grid in ((1, 65536, 1), (1, 1, 65536), (2**31, 1, 1), (2**20, 2**14, 1)):
        with pytest.raises(ValueError, match="grid"):
            run(COUNT_UP, x, grid=grid)
    with pytest.raises(ValueError, match="1056 threads"):
        run(COUNT_UP, x, threads=1056)
    run(COUNT_UP, x, grid=(0, 5, 1))
    assert (x == 0).all()


def test_launches_of_several_threads():
    device = Device()
    x = torch.zeros(1024, dtype=torch.int32)
    program = kernel(COUNT_UP, 1, 1024)
    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(device.run, program, (1, 1, 1), 0, ["*i32"], [x]) for _ in range(200)]
        assert not any(future.result().kinds for future in futures)
    assert (x == 200).all()
    assert device.totals["launches"] == len(device.results) == 200


def test_launches_outside_of_a_guard():
    x = torch.empty(64)
    with virtual_gpu(Device(guarded=True)) as device:
        interface = triton.runtime.driver.active.get_device_interface()
        with interface.device(x.device):
            fill_kernel[(1,)](x, 1.0)
            with interface.device(x.device):
                fill_kernel[(1,)](x, 2.0)
            fill_kernel[(1,)](x, 3.0)
            assert not device.problems
            # Another thread has a current device of its own.
            other = threading.Thread(target=lambda: fill_kernel[(1,)](x, 4.0))
            other.start()
            other.join()
        assert device.problems == {"fill_kernel: launched outside of a device guard": 1}
        fill_kernel[(1,)](x, 5.0)
        assert device.problems == {"fill_kernel: launched outside of a device guard": 2}
    with virtual_gpu() as device:
        fill_kernel[(1,)](x, 6.0)
        assert not device.problems
