"""Every loss, called in all its options with a driver that compiles what is launched and stops there, for GPUs that are
not here, also those that the virtual GPU cannot run."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from dialect import ALRP, AP, DEPTH, FAMILY, KERNELS, NDCG, PLAIN_AP, RANK_SORT, Member, Results, evaluate
from torch import Tensor
from virtual_gpu import Compilation, compiling_for
from virtual_gpu.harness import as_on_a_gpu, filled_memory

pytest.importorskip("triton")
if KERNELS:
    pytest.skip("has a driver of its own", allow_module_level=True)

import triton
from alrp_triton.kernels.settings import pinned

from alrp_triton import ALRPLoss, RankSortLoss, kernels
from alrp_triton.engine import counted

TARGETS: list[int | str] = [80, 90, 100, 120, "gfx942"]
CLASSES, ROWS, NUM_POS = 8, 64, 12
by_target = pytest.mark.parametrize(
    "target", TARGETS, ids=lambda target: target if target == "gfx942" else f"sm_{target}"
)


def rows(
    dtype: torch.dtype = torch.float32, labels: torch.dtype = torch.int64, number: int = ROWS
) -> tuple[Tensor, Tensor]:
    """Logits ``[R, C]`` and class labels."""
    return torch.zeros(number, CLASSES, dtype=dtype), torch.full((number,), CLASSES, dtype=labels)


def by_logit(labels: torch.dtype = torch.uint8) -> tuple[Tensor, Tensor]:
    return torch.zeros(ROWS * CLASSES), torch.zeros(ROWS * CLASSES, dtype=labels)


def channels_first() -> tuple[Tensor, Tensor]:
    """A level of a detector, ``[B, A C, H, W]`` seen as ``[B, H, W, A, C]``."""
    x = torch.zeros(2, 3 * CLASSES, 5, 7).view(2, 3, CLASSES, 5, 7).permute(0, 3, 4, 1, 2)
    return x, torch.full((2, 5, 7, 3), CLASSES)


def strided() -> tuple[Tensor, Tensor]:
    """Four axes, of which none follows another in memory, with a label for each logit."""
    x = torch.zeros(4, 6, 8, 10)[::2, ::2, ::2, ::2]
    return x, torch.zeros(x.shape, dtype=torch.int64)


Call = Callable[[], Results | None]


def call(member: Member, *levels: tuple[Tensor, Tensor], backend: str = "triton", **arguments: Any) -> Call:
    """A forward and backward, of so many positives as the kernels are told; their values are never looked at."""
    logits, labels = (list(tensors) for tensors in zip(*(levels or [rows()])))
    if member in (AP, PLAIN_AP, NDCG, DEPTH):
        arguments = {"num_positives": NUM_POS, **arguments}
    values = torch.zeros(arguments.get("num_positives") or NUM_POS)
    return lambda: evaluate(member, logits, labels, values, backend, **arguments)


def grouped(member: Member, each_logit: bool = False, **arguments: Any) -> Call:
    level = rows()
    groups = torch.zeros(level[0].shape if each_logit else level[1].shape, dtype=torch.int32)
    return call(member, level, groups=[groups], **arguments)


def sorted_ones(member: Member) -> Call:
    """As with more positives than are compared with one another."""
    run = call(member)

    def sorting() -> Results:
        with patch.object(counted, "MOST_COMPARED", -1):
            return run()

    return sorting


def criterion_of(
    kind: str, dtype: torch.dtype = torch.float32, module: Callable[..., Any] = ALRPLoss, level: Any = rows
) -> Call:
    """With errors of boxes, whose loss is differentiated, and self-balancing."""

    def run() -> None:
        pred, target = torch.zeros(NUM_POS, 4, dtype=dtype, requires_grad=True), torch.zeros(NUM_POS, 4)
        module(box_error=kind, backend="triton")(*level(), pred, target).loc.backward()

    return run


DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
CALLS: dict[str, Call] = {
    **{member.name: call(member) for member in FAMILY},
    **{f"{member.name}, step function": call(member, delta=0.0) for member in FAMILY},
    **{f"{member.name}, {name}": call(member, rows(dtype)) for member in FAMILY for name, dtype in DTYPES.items()},
    **{f"{member.name}, groups": grouped(member) for member in FAMILY},
    **{f"{member.name}, many positives": sorted_ones(member) for member in FAMILY},
    **{f"{member.name}, unknown number": call(member, num_positives=None) for member in (AP, NDCG, DEPTH)},
    "alrp, smooth": call(ALRP, loc_ranking="smooth"),
    "alrp, smooth, step function": call(ALRP, loc_ranking="smooth", delta=0.0),
    "no positives": call(AP, num_positives=0),
    "one positive": call(AP, num_positives=1),
    "labels by logit": call(ALRP, by_logit()),
    "channels first": call(ALRP, channels_first()),
    "strided": call(RANK_SORT, strided()),
    "small labels": call(AP, rows(labels=torch.int8)),
    "levels": call(ALRP, *[rows()] * 5),
    "levels, channels first": call(RANK_SORT, *[channels_first()] * 3),
    "levels of several structures": call(NDCG, rows(), by_logit(), channels_first(), rows(), by_logit()),
    "levels, groups": call(DEPTH, *[rows()] * 2, groups=[torch.zeros(ROWS, dtype=torch.int64)] * 2),
    "groups of logits": grouped(ALRP, each_logit=True),
    "groups of logits, float64": call(AP, rows(torch.float64), groups=[torch.zeros(ROWS, CLASSES).long()]),
    **{f"pairwise, {member.name}": call(member, backend="pairwise") for member in (ALRP, RANK_SORT, DEPTH)},
    **{f"pairwise, {name}": call(ALRP, rows(dtype), backend="pairwise") for name, dtype in DTYPES.items()},
    **{f"boxes, {kind}": criterion_of(kind) for kind in ("iou", "giou", "diou", "ciou")},
    **{f"boxes, {name}": criterion_of("ciou", dtype) for name, dtype in DTYPES.items()},
    "boxes, rank_sort": criterion_of("giou", module=RankSortLoss),
    "boxes, rank_sort, channels first": criterion_of("iou", module=RankSortLoss, level=channels_first),
    **{f"many logits, {name}": call(ALRP, rows(dtype, number=10_000)) for name, dtype in DTYPES.items()},
    "many logits": call(AP, rows(number=10_000)),
    "many logits, groups": call(AP, rows(number=10_000), groups=[torch.zeros(10_000, dtype=torch.int64)]),
    "pairwise, step function": call(ALRP, delta=0.0, backend="pairwise"),
    "pairwise, groups": grouped(RANK_SORT, backend="pairwise"),
    "pairwise, levels": call(AP, by_logit(), channels_first(), strided(), backend="pairwise"),
}


def compiled(run: Call, target: int | str, assemble: bool = False) -> Compilation:
    # Memory of zeros, since what kernels would have written is taken for indices.
    with compiling_for(target, assemble=assemble) as found, as_on_a_gpu(), filled_memory(0):
        run()
    return found


def adds_floats_atomically(ptx: str | bytes) -> bool:
    """Which would come out differently in another order."""
    text = ptx.decode() if isinstance(ptx, bytes) else ptx
    return bool(re.search(r"\b(?:atom|red)\.[\w.]*\.b?f(?:16|32|64)", text))


@pytest.mark.thinned(53)
@by_target
@pytest.mark.parametrize("name", CALLS)
def test_every_call_compiles(name: str, target: int | str) -> None:
    found = compiled(CALLS[name], target).kernels
    assert found
    assert not [kernel.name for kernel in found if adds_floats_atomically(kernel.asm.get("ptx", ""))]


@pytest.mark.nightly
@by_target
@pytest.mark.parametrize("name", CALLS)
def test_every_call_assembles(name: str, target: int | str) -> None:
    for kernel in compiled(CALLS[name], target, assemble=True).kernels:
        assert kernel.asm["hsaco" if target == "gfx942" else "cubin"], kernel.name
        assert kernel.metadata["shared"] <= 16 * 1024, kernel.name


def kernels_of_the_package() -> set[str]:
    modules = [importlib.import_module(f"{kernels.__name__}.{m.name}") for m in pkgutil.iter_modules(kernels.__path__)]
    functions = {name: f for module in modules for name, f in vars(module).items() if isinstance(f, triton.JITFunction)}
    return {name for name in functions if name.endswith("_kernel")}


def test_some_of_these_calls_launch_every_kernel() -> None:
    some = ("depth", "levels, channels first", "pairwise, rank_sort", "ap", "rank_sort, groups", "boxes, giou")
    some += ("boxes, rank_sort", "alrp, bfloat16", "many logits")
    found = {kernel.name for name in some for kernel in compiled(CALLS[name], 90).kernels}
    assert found == kernels_of_the_package()


def test_atomic_sums_of_floats_are_seen() -> None:
    assert adds_floats_atomically("@%p1 atom.global.gpu.relaxed.add.f32 %f1, [ %rd1 + 0 ], %f2;")
    assert adds_floats_atomically(b"red.relaxed.gpu.global.add.noftz.bf16x2 [%rd1], %r1;")
    assert not adds_floats_atomically("atom.global.gpu.relaxed.add.u64 %rd1, [ %rd2 + 0 ], %rd3; cvt.f32.s32 %f1, %r1;")


def test_the_ramp_of_a_close_block_is_one_instruction() -> None:
    kernel = next(k for k in compiled(CALLS["pairwise, alrp"], 90).kernels if k.name == "pairwise_count_kernel")
    settings = pinned("pairwise_count", "sm_90")
    pairs_of_a_thread = settings["block"] * settings["block_p"] // (32 * settings["num_warps"])
    ptx = kernel.asm["ptx"]
    assert (ptx.decode() if isinstance(ptx, bytes) else ptx).count("sub.sat.f32") == pairs_of_a_thread
