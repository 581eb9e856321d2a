"""Virtual GPUs and Triton: whose kernels, whose cache, and what remains of them afterwards."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from . import Device, Unsupported, compiling_for, driver, virtual_gpu
from .caches import cache_folder


@triton.jit
def fill_kernel(x, value, BLOCK: tl.constexpr):
    tl.store(x + tl.arange(0, BLOCK), value)


@triton.jit
def sum_kernel(x, BLOCK: tl.constexpr):
    tl.store(x, tl.sum(tl.load(x + tl.arange(0, BLOCK))))


@triton.jit
def half_kernel(x, y):
    i = tl.arange(0, 64)
    tl.store(y + i, tl.load(x + i).to(tl.float16).to(tl.float32) * 3)


def files_in(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*")}


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A cache of the user's."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return tmp_path


def test_targets_have_kernels_of_their_own():
    for target in (80, 90, 100):
        with virtual_gpu(Device(target)) as device:
            fill_kernel[(1,)](torch.empty(64), 1.0, BLOCK=64)
        assert f".target sm_{target}" in device.results[0].program.ptx


def test_drivers_may_be_nested():
    x = torch.empty(64)
    with virtual_gpu(Device(90)) as outer:
        with virtual_gpu(Device(80)) as inner:
            fill_kernel[(1,)](x, 1.0, BLOCK=64)
        with compiling_for(90, assemble=False):
            fill_kernel[(1,)](x, 2.0, BLOCK=64)
        assert (x == 1).all()
        fill_kernel[(1,)](x, 3.0, BLOCK=64)
    assert (len(outer.results), len(inner.results)) == (1, 1)
    assert (x == 3).all()


def test_what_was_there_before_is_there_afterwards(elsewhere):
    drivers, before = triton.runtime.driver, triton.runtime.driver._active
    backends = dict(triton.backends.backends)
    with contextlib.suppress(KeyError), virtual_gpu():
        assert Path(triton.knobs.cache.dir).parent == cache_folder()
        raise KeyError
    assert drivers._active is before
    assert triton.backends.backends == backends
    assert triton.knobs.cache.dir == os.environ["TRITON_CACHE_DIR"] == str(elsewhere)


def test_the_users_cache_is_left_alone(elsewhere):
    with virtual_gpu():
        fill_kernel[(1,)](torch.empty(128), 1.0, BLOCK=128)
    with compiling_for(90, assemble=True):
        fill_kernel[(1,)](torch.empty(128), 1.0, BLOCK=128)
    assert not files_in(elsewhere)


def test_kernels_may_be_compiled_before_they_are_launched():
    with virtual_gpu(Device(strict=True)) as device:
        compiled = fill_kernel.warmup(torch.float32, 1.0, BLOCK=32, grid=(1,))
        assert not device.results
        x = torch.empty(32)
        compiled[(1, 1, 1)](x, 1.0, 32)
        assert (x == 1).all()


def test_hooks_see_launches():
    calls = []

    def enter(metadata):
        calls.append(("enter", metadata.get()["name"]))

    def leave(metadata):
        calls.append(("leave", metadata.get()["name"]))

    runtime = triton.knobs.runtime
    with virtual_gpu():
        runtime.launch_enter_hook.add(enter)
        runtime.launch_exit_hook.add(leave)
        try:
            fill_kernel[(1,)](torch.empty(64), 1.0, BLOCK=64)
        finally:
            runtime.launch_enter_hook.remove(enter)
            runtime.launch_exit_hook.remove(leave)
    assert calls == [("enter", "fill_kernel"), ("leave", "fill_kernel")]


def test_too_much_shared_memory_does_not_fit(monkeypatch):
    # Of a target that no other test has, since Triton remembers how much there is.
    monkeypatch.setitem(driver.SHARED, 89, 8)
    with virtual_gpu(Device(89)), pytest.raises(triton.runtime.errors.OutOfResources):
        sum_kernel[(1,)](torch.empty(1024), BLOCK=1024, num_warps=4)


def test_clusters_are_not_modelled():
    with virtual_gpu(), pytest.raises(Unsupported):
        fill_kernel[(1,)](torch.empty(64), 1.0, BLOCK=64, num_ctas=2)


@pytest.mark.parametrize("assemble", [False, True])
@pytest.mark.parametrize("target", [80, 90, 100, 120, "gfx942"])
def test_compiling_without_running(target, assemble):
    x, y = torch.ones(64), torch.ones(64)
    for _ in range(2):
        with compiling_for(target, assemble=assemble) as compilation:
            half_kernel[(1,)](x, y)
            half_kernel[(2,)](x, y)
            fill_kernel[(1,)](x, 2.0, BLOCK=64)
        assert [kernel.name for kernel in compilation.kernels] == ["half_kernel", "fill_kernel"]
    assert (x == 1).all()
    assert (y == 1).all()
    compiled = compilation.kernels[0]
    assembly, binary = ("amdgcn", "hsaco") if target == "gfx942" else ("ptx", "cubin")
    assert str(target) in compiled.asm[assembly]
    assert (binary in compiled.asm) == assemble
    assert compiled.metadata["num_warps"] == 4
    if assemble:
        assert compiled.asm[binary][:4] == b"\x7fELF"


def test_what_does_not_compile():
    with compiling_for(90, assemble=False), pytest.raises(triton.CompilationError):
        fill_kernel[(1,)](torch.empty(64), 1.0, BLOCK=65)
