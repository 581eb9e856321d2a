"""Which levels go together, what a program learns of its own, and how often an iteration makes a GPU start something,
or a compiler."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import triton
import triton.language as tl
from alrp_triton.kernels import launch
from alrp_triton.kernels.lanes import quotient
from alrp_triton.kernels.launch import Part, join, level_of, on_device_of, tiles_of
from alrp_triton.kernels.layout import Layout, Walk, walk_over
from alrp_triton.kernels.search import number_below
from dialect import BORROWED, COMPILED_FOR, INTERPRETED
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from virtual_gpu import compiling_for

from alrp_triton import ALRPLoss, APLoss, rank_sort_loss
from benchmarks.launches import CRITERIA, LOSSES, launches_of

of_compiled_kernels = pytest.mark.skipif(
    INTERPRETED or BORROWED, reason="launches are counted where kernels are compiled, and nothing is copied for them"
)
X = torch.empty(2, 3, 4, 5)
ROWS, IMAGES = X[..., 0], torch.zeros(2, 1, 1).expand(2, 3, 4)


@pytest.mark.parametrize(
    ("logits", "labels", "groups", "sizes", "flat"),
    [
        (X, X, None, (120,), True),
        (X, torch.zeros(2, 3, 4), None, (5, 24), True),
        (X, ROWS, None, (5, 24), True),
        (X[0, 0, 0], torch.tensor(3), None, (5,), True),
        (X.permute(0, 2, 3, 1), torch.zeros(2, 4, 5), None, (3, 20, 2), False),
        (X[:, :1], X[:, :1], None, (20, 2), False),
        (X[..., ::2], X[..., ::2], None, (3, 24), False),
        (X[:, :, :, 1:], torch.zeros(2, 3, 4), None, (4, 24), False),
        (torch.empty(1, 1), torch.zeros(1, 1), None, (1,), True),
        (X, X, torch.zeros(2, 3, 4), (5, 24), True),
        (X, X, X, (120,), True),
        (X, torch.zeros(2, 3, 4), IMAGES, (5, 12, 2), True),
        (X, X, IMAGES, (60, 2), True),
        (X, X, torch.tensor(3).expand(2, 3, 4), (120,), True),
        (X.view(2, 3, 2, 2, 5).permute(4, 2, 1, 3, 0), torch.zeros(5, 2, 3, 2, 2), None, (120,), True),
    ],
)
def test_axes_that_follow_each_other_are_one(
    logits: Tensor, labels: Tensor, groups: Tensor | None, sizes: tuple[int, ...], flat: bool
) -> None:
    layout = walk_over(logits, labels, groups).layout
    assert (layout.sizes, layout.flat) == (sizes, flat)


@pytest.mark.parametrize(
    ("logits", "labels", "sizes", "class_axis", "index_steps"),
    [
        (X, torch.zeros(2, 3, 4), (5, 24), 0, None),
        (X.permute(0, 2, 3, 1), torch.zeros(2, 4, 5), (20, 3, 2), 1, (3, 1, 60)),
        (X.view(2, 3, 2, 2, 5).permute(0, 3, 4, 1, 2), torch.zeros(2, 2, 5, 3), (10, 2, 3, 2), 1, (6, 1, 2, 60)),
        (X.permute(1, 2, 3, 0), torch.zeros(3, 4, 5), (60, 2), 1, (2, 1)),
        (X.permute(3, 2, 1, 0), torch.zeros(5, 4, 3, 2).to(torch.int8), (5, 4, 3, 2), 0, (24, 6, 2, 1)),
        # Not dense: as in row-major order.
        (X[:, :, ::2].permute(0, 2, 3, 1), torch.zeros(2, 2, 5), (3, 5, 2, 2), 0, None),
        (X[:1].expand(2, 3, 4, 5), torch.zeros(2, 3, 4), (5, 12, 2), 0, None),
        (torch.empty(4, 1, 6).permute(0, 2, 1), torch.zeros(4, 6), (1, 24), 0, None),
    ],
)
def test_levels_are_walked_as_they_lie_in_memory(
    logits: Tensor,
    labels: Tensor,
    sizes: tuple[int, ...],
    class_axis: int,
    index_steps: tuple[int, ...] | None,
) -> None:
    layout = walk_over(logits, labels, None, in_memory_order=True).layout
    assert (layout.sizes, layout.class_axis, layout.index_steps) == (sizes, class_axis, index_steps)
    assert layout.flat or index_steps is None


def level(rows: int = 16, columns: int = 5, kind: torch.dtype = torch.float32, step: int = 1, offset: int = 0) -> Walk:
    x = torch.empty(2 * rows * columns * step + offset).to(kind)[offset:].view(2 * rows, columns * step)[::2, ::step]
    return walk_over(x, torch.zeros(rows), None)


def test_which_levels_go_together() -> None:
    one = level()
    for other in (level(columns=4), level(kind=torch.float16), level(step=2), level(offset=1), walk_over(X, X, None)):
        assert [[part.walk for part in parts] for parts in join([one, other, one])] == [[one, one], [other]]
    alike = [level(n) for n in (16, 2, 0, 100)] * 4
    joined = join(alike)
    assert [len(parts) for parts in joined] == [8, 4]
    starts = {id(part.walk): part.first_index for parts in joined for part in parts}
    assert max(starts.values()) == sum(walk.logits.numel() for walk in alike[:-1])


@triton.jit
def fields_kernel(levels, out):  # type: ignore[no-untyped-def]
    level = level_of(levels, tl.program_id(0))
    to = out + 8 * tl.program_id(0)
    tl.store(to, level.tile)
    tl.store(to + 1, level.num_logits)
    tl.store(to + 2, level.first_index)
    tl.store(to + 3, level.sizes[1])
    tl.store(to + 4, level.logit_steps[0])
    tl.store(to + 5, level.logit_steps[1])
    tl.store(to + 6, level.label_steps[1])
    tl.store(to + 7, tl.load(level.labels).to(tl.int64))


@pytest.mark.parametrize("sizes", [[1, 2**32, 5, 2**33, 3], [16, 2**32, 48, 2**33, 32]])
def test_every_program_finds_its_level(sizes: list[int]) -> None:
    """However large it is; numbers of logits that are multiples of 16 are taken apart."""
    parts, expected, first_index, tile = [], [], 2**40, 2**31
    for i, size in enumerate(sizes):
        steps = ((1, (0, 2**40, 3, 16, 2)[i]), (0, i + 2**33), (1, 3))
        logits, labels = torch.zeros(1, 1).expand(size, 3), torch.full((1,), i).expand(size)
        parts.append(Part(Walk(logits, labels, None, Layout((3, size), steps, False, None, 0), 3), None, first_index))
        for number in range(triton.cdiv(3 * size, tile)):
            expected.append([number, 3 * size, first_index, size, 1, steps[0][1], steps[1][1], i])
        first_index += 3 * size
    num_tiles, levels = tiles_of(parts, tile)
    out = torch.full((num_tiles, 8), -1)
    with on_device_of(out):
        fields_kernel[(num_tiles,)](levels, out)
    assert out.tolist() == expected


def test_codes_are_of_one_kind() -> None:
    """Not 1, nor a multiple of 16, so that Triton does not compile anew."""
    assert all(code > 1 and code % 2 for code in map(launch.code, range(100)))


@triton.jit
def below_kernel(values, ascending, length, highest, out):  # type: ignore[no-untyped-def]
    i = tl.program_id(0)
    tl.store(out + i, number_below(tl.load(values + i), ascending, length, highest))


@pytest.mark.parametrize("length", [0, 2, 3, 7, 8, 9, 33])
def test_number_below(length: int) -> None:
    ascending = torch.arange(length + 3) * 2**33
    values = torch.cat([ascending - 1, ascending, ascending + 1])
    out = torch.full_like(values, -1)
    with on_device_of(values):
        below_kernel[(len(values),)](values, ascending, length, 1 << length.bit_length() >> 1, out)
    assert torch.equal(out, torch.searchsorted(ascending[:length], values))


@triton.jit(do_not_specialize=["size"])
def quotient_kernel(out, size, number, LANES: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.program_id(0) * LANES + tl.arange(0, LANES)
    tl.store(out + i, quotient(i, size, LANES), mask=i < number)


@pytest.mark.parametrize("size", [*range(1, 70), 127, 128, 129, 1000, 8191, 2**20 - 1, 2**30 + 7])
def test_quotients(size: int) -> None:
    """Of all numbers below the size and a tile more; of large sizes those at the ends."""
    number = min(size, 9000) + 64
    out = torch.full((number,), -1, dtype=torch.int32)
    with on_device_of(out):
        quotient_kernel[(triton.cdiv(number, 64),)](out, size, number, LANES=64)
    assert torch.equal(out, (torch.arange(number) // size).int())


@of_compiled_kernels
@pytest.mark.parametrize("channels_first", [True, pytest.param(False, marks=pytest.mark.nightly)])
def test_no_size_of_image_and_no_number_of_positives_makes_a_new_kernel(channels_first: bool) -> None:
    """But for whether all levels' numbers of logits are multiples of 16, and whether there are many."""

    @settings(max_examples=500)
    @given(st.lists(st.integers(4, 90), min_size=2, max_size=2), st.integers(1, 120))
    @example([15, 16], 40)
    @example([4, 5], 48)
    @example([80, 80], 32)
    @example([81, 81], 1)
    def train(heights: list[int], num_pos: int) -> None:
        logits = [torch.zeros(2, 3, 5, h, h + 1).permute(0, 3, 4, 1, 2) for h in heights]
        labels = [torch.zeros(x.shape[:-1], dtype=torch.int64) for x in logits]
        leaves = [(x if channels_first else x.contiguous()).requires_grad_() for x in logits]
        sum(rank_sort_loss(leaves, labels, torch.zeros(num_pos), backend="triton")).backward()

    with compiling_for(COMPILED_FOR, assemble=False) as found:
        train()
    counted = Counter(kernel.name.removesuffix("_kernel") for kernel in found.kernels)
    assert counted == {"find": 2, "place": 1, "lay": 1, "count": 4, "fold": 1, "rank": 1, "send": 1, "write": 2}


@of_compiled_kernels
@pytest.mark.parametrize(
    ("name", "most"), [("alrp", 9), ("alrp, groups", 10), ("ap", 9), ("ndcg", 8), ("rank_sort", 8), ("own", 15)]
)
def test_launches_of_an_iteration(name: str, most: int) -> None:
    """Whatever the number of levels; of a formula of one's own, with another PyTorch there may be some more."""
    forward, backward = launches_of(LOSSES[name], 40, num_levels=5)
    assert sum(forward.values()) + sum(backward.values()) <= most
    # It multiplies by the upstream gradient and writes the positives' own itself.
    assert {kernel: number for kernel, number in backward.items() if kernel.endswith("_kernel")} == {"write_kernel": 1}


@of_compiled_kernels
@pytest.mark.parametrize(("name", "most"), [("ALRPLoss", 14), ("RankSortLoss", 79), ("APLoss", 9), ("NDCGLoss", 8)])
def test_launches_of_a_criterion(name: str, most: int) -> None:
    """The highest logits of rows are PyTorch's operations, more of them with more levels. Many logits share several
    tables, which are made and added up."""
    for num_neg, more in ((100, 0), (22_000, 2)):
        forward, backward = launches_of(CRITERIA[name], 40, num_levels=5, num_neg=num_neg)
        assert sum(forward.values()) + sum(backward.values()) <= most + more


@of_compiled_kernels
def test_launches_of_statistics() -> None:
    """One more kernel, which ranks from what is counted, and few of PyTorch's operations."""
    made = {
        "ALRPLoss": (lambda g: [*ALRPLoss(backend="triton", monitor=True)(g.logits, g.labels, *g.boxes)], 55),
        "APLoss": (lambda g: [APLoss(backend="triton", monitor=True)(g.logits, g.labels, len(g.values))], 27),
    }
    for name, (monitored, most) in made.items():
        (silent, _), (forward, _) = launches_of(CRITERIA[name], 40), launches_of(monitored, 40)
        added = forward - silent
        assert {kernel: number for kernel, number in added.items() if kernel.endswith("_kernel")} == {"rank_kernel": 1}
        assert sum(added.values()) <= most
