"""Every kernel through the real compiler, for GPUs that need not be there: the interpreter accepts what it refuses."""

from __future__ import annotations

import re

import pytest
import torch
from cases import KERNELS

pytest.importorskip("triton", minversion="3.3", reason="earlier releases compile through another interface")
if KERNELS:
    pytest.skip("kernels are not compiled in Triton's interpreter", allow_module_level=True)

import triton
from alrp_triton.kernels import buckets, levels
from alrp_triton.kernels.formulas import FORMULAS
from alrp_triton.kernels.walk import Walk, make_walk

from benchmarks.static import KERNELS, TARGETS, VARIANTS, compile_kernel, figures, spilled

LINEAR, PAIRWISE = ("buckets", "gradient"), ("pairwise_count", "pairwise_gradient")
COMPARING = ("arrange", "knots", "table", "rank", "sums", "running_max", "coefficients", "send", "combine")
FUSED = ("errors", "interpolate", "finish", "own")
SORTING = ("sorting_errors", "sorting_received")

# Registers at most, of 255; four warps of 512 / registers blocks keep a streaming kernel's loads in flight up to 80.
REGISTERS = {"buckets": 80, "gradient": 80, "pairwise_count": 128, "pairwise_gradient": 128, "positives": 64}
REGISTERS |= {"collect": 96, "order": 96}
REGISTERS |= {"arrange": 80, "knots": 80, "table": 32, "combine": 64}
REGISTERS |= {"errors": 80, "interpolate": 64, "finish": 64, "own": 32}
REGISTERS |= dict.fromkeys(("rank", "sums", "running_max", "coefficients", "send"), 128)
REGISTERS |= {"sorting_errors": 80, "sorting_received": 64}
# Instructions per logit (linear: the whole kernel) or per pair (pairwise: the inner loop), at most.
INSTRUCTIONS = {"buckets": 180, "gradient": 115, "pairwise_count": 2.6, "pairwise_gradient": 3.1}
INSTRUCTIONS |= {"sorting_errors": 24, "sorting_received": 16}
# A program that finds its level selects some ten numbers among those of five.
LEVELS = 1.2
# The same with groups or a function, whose pairs cost more.
GENERAL_REGISTERS = {"buckets": 80, "gradient": 64, "pairwise_count": 128, "pairwise_gradient": 96}
GENERAL_INSTRUCTIONS = {"buckets": 320, "gradient": 290, "pairwise_count": 26, "pairwise_gradient": 26}


# Together with test_gate.py, which reads the same machine code, in one process for each target.
by_target = pytest.mark.parametrize(
    "target", [pytest.param(target, marks=pytest.mark.xdist_group(f"compiled for {target}")) for target in TARGETS]
)


@by_target
@pytest.mark.parametrize("kernel", KERNELS)
def test_pinned_configurations_fit_and_do_not_spill(kernel: str, target: str) -> None:
    found = figures(kernel, target)
    assert found.registers is not None
    assert found.registers <= REGISTERS[kernel]
    assert found.spill_bytes == 0
    assert found.shared_bytes <= 16 * 1024
    if target.startswith("sm_") and kernel in INSTRUCTIONS:
        cost = found.per_logit if kernel in LINEAR else found.per_pair
        assert cost is not None
        assert cost <= INSTRUCTIONS[kernel]


@by_target
@pytest.mark.parametrize(
    ("kernel", "variant"), [(kernel, variant) for variant in VARIANTS if variant for kernel in VARIANTS[variant]]
)
def test_groups_and_functions_fit_and_do_not_spill(kernel: str, variant: str, target: str) -> None:
    found = figures(kernel, target, variant)
    assert found.registers is not None
    assert found.registers <= (REGISTERS if variant == "levels" else GENERAL_REGISTERS).get(kernel, 80)
    assert found.spill_bytes == 0
    assert found.shared_bytes <= 16 * 1024
    if target.startswith("sm_") and kernel != "collect":
        cost = found.per_logit if kernel in LINEAR else found.per_pair
        assert cost is not None
        most = (INSTRUCTIONS if variant == "levels" else GENERAL_INSTRUCTIONS).get(kernel, 30)
        assert cost <= most * (LEVELS if variant.endswith("levels") else 1)


def test_the_ramp_of_a_close_block_is_one_instruction() -> None:
    compiled, settings = compile_kernel("pairwise_count", "sm_90")
    pairs_of_a_thread = settings["block"] * settings["block_p"] // (32 * settings["num_warps"])
    assert compiled.asm["ptx"].count("sub.sat.f32") == pairs_of_a_thread


@pytest.mark.parametrize(("variant", "kernel"), [(v, k) for v in VARIANTS for k in VARIANTS[v]])
def test_no_kernel_adds_floats_atomically(kernel: str, variant: str) -> None:
    ptx = compile_kernel(kernel, "sm_90", variant=variant)[0].asm["ptx"]
    atomics = [line for line in ptx.splitlines() if re.search(r"\b(atom|red)\.", line)]
    assert bool(atomics) == (kernel in ("buckets", "pairwise_count", "collect"))
    assert not [line for line in atomics if ".f16" in line or ".f32" in line or ".f64" in line or "bf16" in line]


@pytest.mark.thinned(3)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_compile(dtype: torch.dtype, target: str) -> None:
    for kernel in (*LINEAR, *PAIRWISE, *COMPARING, *FUSED):
        # ptxas may keep one float64 of a thread in memory to have more threads.
        assert spilled(kernel, target, logits=dtype) <= (8 if dtype == torch.float64 else 0)
    for variant in VARIANTS:
        if variant:
            for kernel in VARIANTS[variant]:
                compile_kernel(kernel, target, variant=variant, logits=dtype)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("axes", [1, 2, 3, 4])
@pytest.mark.parametrize("kernel", ["buckets", "gradient", "pairwise_gradient", "positives", "collect"])
def test_all_layouts_compile(kernel: str, axes: int, target: str) -> None:
    # A narrow and a wide label type are enough: nothing but one load depends on it.
    how = {"axes": axes, "per_class": False, "labels": "u8" if axes % 2 else "i64"}
    # ptxas may keep one number of a thread in memory to have more threads.
    assert spilled(kernel, target, **how) <= (8 if kernel == "gradient" else 0)
    for variant in ("grouped", "levels"):
        if kernel in VARIANTS[variant]:
            assert spilled(kernel, target, variant, **how) <= 8


@pytest.mark.thinned(2)
@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
def test_the_step_function_and_extreme_numbers_of_positives_compile(target: str) -> None:
    for kernel in (*PAIRWISE, *SORTING):
        for variant in ("", "grouped"):
            compile_kernel(kernel, target, variant=variant, step_function=True)
    for kernel in LINEAR:
        for steps in (0, 1, 16):
            for variant in ("", "grouped"):
                compile_kernel(kernel, target, variant=variant, steps=steps)
    for kernel in (*COMPARING, *FUSED):
        for dtype in (torch.float32, torch.float64):
            compile_kernel(kernel, target, step_function=True, logits=dtype)


class _NoDevice:
    """A driver that says what it would compile for, and cannot launch."""

    def get_current_target(self) -> object:
        return TARGETS["sm_90"]

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class _Compiled:
    """Compiles a kernel, where it would be launched, and keeps the hashes of what it was compiled to."""

    def __init__(self, kernel: object) -> None:
        self.kernel, self.hashes = kernel, []

    def __getitem__(self, grid: tuple[int, ...]) -> object:
        return lambda *given, **named: self.hashes.append(self.kernel.warmup(*given, grid=grid, **named).hash)


def pyramid(height: int, channels_first: bool) -> list[Walk]:
    walks = []
    for i in range(5):
        h, w = height // 2**i + 2, 3 * height // 2**i + 2
        x = torch.empty(2, 9 * 4, h, w).view(2, 9, 4, h, w).permute(0, 3, 4, 1, 2)
        y = torch.empty(2, h, w, 9, dtype=torch.int64)
        walks.append(make_walk(x if channels_first else x.contiguous(), y))
    return walks


@pytest.mark.parametrize(("channels_first", "kinds"), [(False, 2), (True, 2)])
def test_no_size_of_image_makes_a_new_kernel(channels_first: bool, kinds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for whether all levels' numbers of logits are multiples of 16."""
    one, several = _Compiled(buckets.bucket_kernel), _Compiled(buckets.bucket_levels_kernel)
    run = levels._run
    monkeypatch.setattr(levels, "_run", lambda functions, *given: run((one, several), *given))
    driver, active = triton.runtime.driver, dict(vars(triton.runtime.driver))
    driver.set_active(_NoDevice())
    try:
        for height in (*range(16, 40), 64, 128, 200):
            buckets.count_into_buckets(pyramid(height, channels_first), torch.empty(10), torch.empty(11), 1.0, 1.0, -1)
    finally:
        # To reset it by its own method takes a device.
        vars(driver).update(active)
    assert len(several.hashes) == 27
    assert not one.hashes
    assert len(set(several.hashes)) == kinds


# Of NVIDIA's, the target that first runs out of registers.
@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
@pytest.mark.parametrize("formula", FORMULAS)
def test_all_formulas_compile(formula: str, target: str) -> None:
    for kernel in ("errors", "finish"):
        assert spilled(kernel, target, formula=formula) == 0
