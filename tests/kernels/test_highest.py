"""The highest logit of each positive's row, against PyTorch."""

from __future__ import annotations

import pytest
import torch
from drawn import LAYOUTS, draw_levels, levels_of, same_numbers

from alrp_triton.engine.inputs import Levels
from alrp_triton.engine.passes import gpu
from alrp_triton.engine.passes.find import highest_in_row

NAN = float("nan")


def check(levels: Levels, index: torch.Tensor | None = None) -> torch.Tensor:
    """Of some logits of all levels, the first and the last of each among them."""
    ends, total = [], 0
    for x in levels.logits:
        if x.numel():
            ends += [total, total + x.numel() - 1]
        total += x.numel()
    drawn = torch.randint(total, (40,), generator=torch.Generator().manual_seed(0))
    index = torch.cat([torch.tensor(ends), drawn]) if index is None else index
    ours = gpu.highest_in_row(levels, index)
    same_numbers("highest", ours, highest_in_row(levels, index))
    return ours


@pytest.mark.thinned(2)
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "no rows"])
def test_layouts(layout: str) -> None:
    check(draw_levels([layout]))


@pytest.mark.parametrize(
    "names",
    [
        ["rows", "no rows", "channels first", "rows", "a row", "classes in bytes"],
        ["vector", "four axes", "transposed", "bytes"],
        ["rows"] * 10,
        ["groups of rows"] * 2,
    ],
)
def test_levels(names: list[str]) -> None:
    """Of several structures, and more than a launch takes."""
    levels = draw_levels(names)
    check(Levels(levels.logits, levels.labels, ()))


@pytest.mark.thinned(2)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("columns", [1, 2, 64, 65, 300])
def test_long_rows(columns: int, dtype: torch.dtype) -> None:
    x = torch.randn(9, columns, generator=torch.Generator().manual_seed(columns)).to(dtype)
    for labels in (torch.zeros(9, dtype=torch.int64), torch.zeros(x.shape, dtype=torch.int64)):
        check(levels_of((x, labels)))


def test_ignored_logits_and_nan() -> None:
    x = torch.tensor([[1.0, 5.0, 3.0], [NAN, 2.0, 1.0], [NAN, 2.0, 1.0], [4.0, 4.0, 4.0], [-3.0, -4.0, -5.0]])
    y = torch.tensor([[0, -1, 1], [0, 1, 0], [-1, 1, 0], [-1, -1, -1], [0, 0, 0]])
    found = check(levels_of((x, y)), torch.tensor([2, 4, 7, 9, 14]))
    same_numbers("by hand", found, torch.tensor([3.0, NAN, 2.0, -torch.inf, -3.0]))
    # A label of a row concerns all of it.
    rows = levels_of((x, torch.tensor([-1, 0, 0, 0, 0])))
    same_numbers("rows", check(rows, torch.tensor([0, 14])), torch.tensor([5.0, -3.0]))


def test_nothing() -> None:
    for levels in (draw_levels(["rows"]), draw_levels(["no rows"])):
        assert gpu.highest_in_row(levels, torch.empty(0, dtype=torch.int64)).shape == (0,)
