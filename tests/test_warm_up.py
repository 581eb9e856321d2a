"""Compiling before a training starts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from dialect import COMPILED_FOR
from torch import nn
from virtual_gpu import compiling_for

from alrp_triton import ALRPLoss, APLoss, NDCGLoss, RankSortLoss, warm_up

CRITERIA: dict[str, Any] = {
    "alrp": lambda: ALRPLoss(backend="triton"),
    "ap": lambda: APLoss(backend="triton"),
    "ndcg": lambda: NDCGLoss(backend="triton"),
    "rank_sort": lambda: RankSortLoss(backend="triton"),
}
of_compiled_kernels = pytest.mark.skipif(not COMPILED_FOR, reason="compiles nothing here")


def iterate(
    criterion: nn.Module, sides: list[int], num_positives: int, classes: int, dtype: torch.dtype, **how: Any
) -> None:
    """An iteration of a training on two images."""
    levels, labels = [], []
    for i, side in enumerate(sides):
        if how.get("anchors"):
            x = torch.zeros(2, how["anchors"] * classes, side, side + 1, dtype=dtype)
            x = x.view(2, how["anchors"], classes, side, side + 1).permute(0, 3, 4, 1, 2)
        else:
            x = torch.zeros(2, side * (side + 1), classes, dtype=dtype)
        levels.append(x.requires_grad_())
        labels.append(torch.full(x.shape[:-1], classes))
        if i == 0:
            labels[0].view(-1)[:num_positives] = 0
    settings = {}
    if how.get("by_image"):
        settings["groups"] = [torch.arange(2).view(2, *[1] * (y.dim() - 1)).expand(y.shape) for y in labels]
    boxes = torch.ones(num_positives, 4).requires_grad_()
    given = (boxes, boxes.detach()) if isinstance(criterion, ALRPLoss | RankSortLoss) else ()
    loss = criterion(levels, labels, *given, **({} if given else {"num_positives": num_positives}), **settings)
    sum([loss] if isinstance(loss, torch.Tensor) else loss[:2]).backward()


@of_compiled_kernels
@pytest.mark.parametrize(
    ("name", "how", "classes", "dtype"),
    [
        ("alrp", {"num_levels": 5}, 80, torch.bfloat16),
        ("alrp", {"num_levels": 2, "by_image": True}, 3, torch.float32),
        ("rank_sort", {"num_levels": 2, "anchors": 3}, 7, torch.float16),
        ("ap", {}, 1, torch.float32),
        ("ndcg", {"num_levels": 2}, 20, torch.float32),
    ],
)
def test_nothing_is_compiled_later(name: str, how: dict[str, Any], classes: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    with compiling_for(COMPILED_FOR, assemble=False) as found:
        warm_up(classes, 60, dtype, criterion=CRITERIA[name](), device="cpu", **how)
        before = [kernel.name for kernel in found.kernels]
        assert {"find_kernel", "count_kernel", "rank_kernel", "write_kernel"} <= {*before}
        for _ in range(30):
            number = int(torch.randint(1, 61, (), generator=generator))
            sides = torch.randint(8, 70, (how.get("num_levels", 1),), generator=generator).tolist()
            iterate(CRITERIA[name](), sides, number, classes, dtype, **how)
        assert [kernel.name for kernel in found.kernels[len(before) :]] == []


@of_compiled_kernels
def test_positives_that_pass_1_has_no_shared_memory_for() -> None:
    with compiling_for(COMPILED_FOR, assemble=False) as found:
        warm_up(20, 1500, criterion=CRITERIA["ap"](), device="cpu")
        before = len(found.kernels)
        for number in (900, 1023, 1024, 1300):
            iterate(CRITERIA["ap"](), [64], number, 20, torch.float32)
        assert [kernel.name for kernel in found.kernels[before:]] == []


@of_compiled_kernels
def test_an_epoch_takes_few_kernels() -> None:
    """Of RetinaNet's inputs: one of each, and two of pass 1 if some batches are small."""
    with compiling_for(COMPILED_FOR, assemble=False) as found:
        warm_up(80, 1000, criterion=CRITERIA["alrp"](), device="cpu", num_levels=5)
    names = sorted(kernel.name.removesuffix("_kernel") for kernel in found.kernels)
    of_boxes = ["balance", "compare_boxes"]
    assert names == [*of_boxes, "count", "count", "find", "fold", "lay", "place", "rank", "send", "write"]


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_on_a_cpu(backend: str) -> None:
    """It runs, and changes nothing of the criterion."""
    criterion = ALRPLoss(backend=backend)
    state = copy.deepcopy(criterion.state_dict())
    warm_up(3, 40, criterion=criterion, device="cpu", num_levels=2)
    for name, value in criterion.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_errors() -> None:
    for numbers, name in (((0, 5), "num_classes"), ((5, 0), "max_positives")):
        with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
            warm_up(*numbers, device="cpu")
    with pytest.raises(ValueError, match="num_levels"):
        warm_up(5, 5, num_levels=0, device="cpu")
    with pytest.raises(TypeError, match="dtype"):
        warm_up(5, 5, torch.int64, device="cpu")
    with pytest.raises(TypeError, match="label_dtype"):
        warm_up(5, 5, label_dtype=torch.float32, device="cpu")
