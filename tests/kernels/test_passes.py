"""The passes over levels of every layout, dtype and kind of label: to the bit those of PyTorch, and every pair."""

from __future__ import annotations

import contextlib
from unittest.mock import patch

import numpy as np
import pytest
import torch
from dialect import COMPILED_FOR, INF, NAN
from drawn import (
    CLASSES,
    DELTA,
    GROUPED,
    IDS,
    LAYOUTS,
    LINEAR,
    OF_MANY,
    Draw,
    check_linear,
    check_pairwise,
    check_written,
    draw_levels,
    flatten,
    levels_of,
    small_blocks,
    split,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from virtual_gpu import Device
from virtual_gpu.harness import package_on

from alrp_triton.engine.inputs import Levels
from alrp_triton.engine.knots import make_knots
from alrp_triton.engine.passes import gpu
from alrp_triton.engine.passes.protocol import Own

pytestmark = pytest.mark.usefixtures("small_blocks")
both = pytest.mark.parametrize("check", [check_linear, check_pairwise], ids=["linear", "pairwise"])


@both
@pytest.mark.thinned(11)
@pytest.mark.parametrize("layout", [*LAYOUTS, *GROUPED])
def test_layouts(layout, check):
    check(draw_levels([layout]))


@pytest.mark.parametrize(("classes", "dtype"), [(8, torch.float32), (8, torch.bfloat16), (12, torch.float32)])
def test_neighbours_that_share_a_label(classes, dtype):
    """As many as a thread loads at once; some rows are ignored, and every class among these is met."""
    draw = Draw(3, dtype)
    labels = torch.cat([torch.arange(-1, classes + 1), draw.choose(torch.arange(-1, classes + 1), (60,))])
    check_linear(levels_of((draw.scores(len(labels), classes), labels)))


@pytest.mark.parametrize("layout", ["channels first", "classes outermost"])
def test_positives_of_levels_that_are_walked_as_they_lie(layout):
    check_linear(draw_levels([layout, layout], 90))


@pytest.mark.thinned(5)
@pytest.mark.parametrize("block", [128, 1024])
@pytest.mark.parametrize("layout", ["four axes", "groups, channels first", "vector"])
def test_blocks_of_any_size(layout, block, monkeypatch):
    small_blocks(monkeypatch, block)
    check_linear(draw_levels([layout], 90))


@both
@pytest.mark.thinned(4)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", ["rows", "groups of logits"])
def test_dtypes(layout, dtype, check):
    check(draw_levels([layout], dtype=dtype))


@both
@pytest.mark.thinned(4)
@pytest.mark.parametrize("layout", ["rows", "groups of rows"])
@pytest.mark.parametrize("delta", [0.0, 1e-30, 1e30])
def test_widths_of_ramps(delta, layout, check):
    check(draw_levels([layout]), delta)


@both
@pytest.mark.thinned(3)
@pytest.mark.parametrize("ids", [torch.int8, torch.uint8, torch.int32])
def test_ids_at_the_ends_of_their_dtype(ids, check):
    levels = draw_levels(["groups of rows"], ids=ids)
    assert set(levels.groups[0].tolist()) == set(IDS[ids])
    assert check(levels).sum() > 0


MANY = [*["rows"] * 6, "no rows", *["rows"] * 4, "channels first", "vector", "channels first"]
SOME = ["groups of rows", "groups of logits", "groups of rows", "groups of logits"]
NIGHTLY = pytest.mark.nightly


@pytest.mark.parametrize(
    ("names", "check"),
    [
        (MANY, check_linear),
        (SOME, check_linear),
        (["rows", "rows", "vector", "no rows", "rows"], check_pairwise),
        pytest.param(MANY, check_pairwise, marks=NIGHTLY),
        pytest.param([*LAYOUTS], check_linear, marks=NIGHTLY),
        pytest.param([*GROUPED], check_linear, marks=NIGHTLY),
        pytest.param([*GROUPED], check_pairwise, marks=NIGHTLY),
    ],
)
def test_levels_are_ranked_together(names, check):
    """More than go together in a launch, of many structures and several sizes."""
    layouts, sizes = LAYOUTS | GROUPED, [17, 16, 15, 33, 9, 32, 12, 8, 31, 8, 18, 14, 16, 40, 8]
    check(levels_of(*(layouts[name](Draw(seed), n) for seed, (name, n) in enumerate(zip(names, sizes)))))


@settings(max_examples=20)
@given(*[st.sampled_from([1, 2, 15, 16, 31, 63, 64, 65, 127, 128, 129, 200])] * 2, st.integers(4, 7), st.data())
def test_edges_of_blocks(first, second, num_pos, data):
    """Levels of sizes around a tile's, with positives at their edges; equal scores."""
    total = max(first + second, 8)
    second = total - first
    edges = [i for i in (0, 63, 64, first - 1, first, total - 1) if 0 <= i < total]
    places = st.lists(
        st.sampled_from(edges) | st.integers(0, total - 1), min_size=num_pos, max_size=num_pos, unique=True
    )
    x, y = Draw(total).scores(total), torch.zeros(total, dtype=torch.int64)
    y[1::9] = -1
    y[data.draw(places)] = 1
    check_linear(split(x, y, [first, second]))


def listed(positives, negatives, groups=None) -> Levels:
    x = torch.tensor([*positives, *negatives])
    y = torch.tensor([1] * len(positives) + [0] * len(negatives))
    return levels_of((x, y) if groups is None else (x, y, torch.tensor(groups)))


@both
@pytest.mark.parametrize(
    ("positives", "negatives"),
    [
        ([], [1.0, INF, -INF, NAN]),
        ([0.25], [0.25]),
        ([0.25], []),
        ([-4.6] * 6, [-4.6] * 9),
        ([0.5, -0.5] * 3, [NAN, 0.5, NAN]),
        ([INF, -INF, 3e38, 0.0], [INF, -INF, -3.4e38, 3.4e38, 0.0, 1.0]),
        ([0.0, -0.0, 1e-45, 1.0], [-1e-45, 0.0, -0.0]),
    ],
    ids=str,
)
def test_few(positives, negatives, check):
    check(listed(positives, negatives))


@both
def test_groups_without_positives_or_with_nan(check):
    check(listed([0.0, 1.0, 0.5, 0.5], [0.5, 2.0, 1.0, INF, NAN, NAN], [3, -7, 3, 3, 3, -7, 2**40, -8, 4, 3]))
    check(listed([], [0.5, NAN, INF], [3, -7, 3]))


@pytest.mark.parametrize("delta", [0.0, DELTA])
def test_equal_infinities_differ_by_0(delta):
    """Of two equal ones each counts H(0), in one group; the others all or nothing."""
    at_0, scores = 0.5 if delta else 1.0, [INF, -INF, 1.0]
    assert check_pairwise(listed(scores, scores, [5] * 6), delta).tolist() == [at_0, 2 + at_0, 1 + at_0]
    assert check_pairwise(listed(scores, scores, [5] * 3 + [-5, -5, 5]), delta).tolist() == [0, 1, at_0]


@pytest.mark.parametrize("ignore_index", [-100, 0, 1, CLASSES, pytest.param(2**40, marks=NIGHTLY)])
def test_any_label_may_be_the_ignored_one(ignore_index):
    x, y = Draw().scores(60, CLASSES), torch.arange(60) % (CLASSES + 1)
    y[5] = ignore_index
    check_linear(levels_of((x, y))._replace(ignore_index=ignore_index))


@pytest.mark.parametrize("ignore_index", [0, 1])
def test_any_label_of_a_logit_may_be_the_ignored_one(ignore_index):
    x, y = Draw().scores(90), (torch.arange(90) % 4 == 0).long()
    check_linear(levels_of((x, y))._replace(ignore_index=ignore_index))


FAR = 2**30 - 4  # that a launch takes as 32 bits


@pytest.mark.parametrize(
    ("shape", "strides", "classes"),
    [((4, 4), (1, FAR), ()), ((2, 4, 2), (2, FAR, 1), ()), ((2, 4, 2), (2, FAR, 1), (CLASSES,))],
)
def test_offsets_beyond_32_bits(shape, strides, classes):
    """Labels and groups, of logits or of rows, that lie a thousand million elements apart along the first axis or
    another, of which nothing else is ever touched."""
    far = [torch.from_numpy(np.zeros(3 * 2**30, np.int8)).as_strided(shape, strides) for _ in range(2)]
    draw = Draw(2)
    levels = levels_of((draw.scores(*shape, *classes), *far))
    far[0].copy_(draw.flags(*shape)), far[1].copy_(draw.groups(*shape) % 2)
    # To note who touched each of so many elements would take too much memory.
    device = Device(COMPILED_FOR, check=False) if COMPILED_FOR else None
    with package_on(device) if device else contextlib.nullcontext():
        check_linear(levels)
    assert not (device and device.errors)


def passes(levels: Levels, num_positives: int) -> tuple[list[int], gpu.place.Placed, Tensor]:
    """All three, for a number of positives that may be wrong: the numbers found, what is placed, the gradients."""
    found = LINEAR.find(levels, num_positives, "")
    placed = gpu.place_positives(found, DELTA, levels.logits[0].dtype)
    LINEAR.count(levels, placed.table, found, placed.totals, DELTA, OF_MANY)
    lines = torch.full((2, 2 * num_positives + 1), NAN, dtype=torch.float64)
    own = Own(placed.indices, torch.full((1, num_positives), NAN, dtype=torch.float64))
    gradients = LINEAR.write(levels, placed.table, lines, own, [torch.ones(())], DELTA)
    return found.numbers.tolist(), placed, torch.cat([gradient.reshape(-1) for gradient in gradients])


@pytest.mark.parametrize("more", [-3, -1, 1, 4, pytest.param(-40, marks=NIGHTLY), pytest.param(400, marks=NIGHTLY)])
@pytest.mark.parametrize("layout", ["vector", "groups of rows", "channels first", pytest.param("rows", marks=NIGHTLY)])
def test_a_wrong_number_gives_nan_and_places_that_exist(layout, more):
    levels = draw_levels([layout])
    labels = flatten(levels)[1]
    index = (labels == 1).nonzero().squeeze(1)
    number = max(0, len(index) + more)
    numbers, placed, gradient = passes(levels, number)
    assert numbers == [len(index), 0]
    assert len(placed.indices) == number
    assert set(placed.indices.tolist()) <= {0, *index.tolist()}
    assert (placed.indices.diff() >= 0).all()
    assert placed.positives.logits.isnan().all()
    assert placed.table.thresholds[: 2 * number].isnan().all()
    # What is missing counts as the first of all logits.
    assert torch.equal(gradient[1:].isnan(), labels[1:] != -1)
    assert not gradient[1:][labels[1:] == -1].any()


@pytest.mark.parametrize("label", [-2, CLASSES + 1, 1000])
@pytest.mark.parametrize("per_class", [True, False])
def test_labels_out_of_range(label, per_class):
    labels = torch.zeros((60,) if per_class else (240,), dtype=torch.int16 if per_class else torch.int64)
    labels[-1] = label
    number = 59 if per_class else 0
    numbers, placed, _ = passes(
        levels_of((torch.randn(60, CLASSES) if per_class else torch.randn(240), labels)), number
    )
    assert numbers[0] == number
    assert numbers[1] > 0
    assert placed.positives.logits.isnan().all()


# --- What positives get: their own gradients, wherever in a tile they are. ---
TABLE = make_knots(torch.tensor([0.0]), DELTA).table
SIZES = [64, 65, 0, 63, 130, 1, 64]


def at(index: list[int], dtype: torch.dtype = torch.float32) -> Levels:
    """Levels with positives there, and what is ignored at some other places."""
    x, y = Draw(1, dtype).scores(sum(SIZES)), torch.zeros(sum(SIZES), dtype=torch.int64)
    y[5::7] = -1
    y[index] = 1
    return split(x, y, SIZES)


EDGES = sorted({0, *(sum(SIZES[:i]) + d for i in range(1, 8) for d in (-1, 0))} - {sum(SIZES)})
PLACES = [[], [0], [386], EDGES, [63, 64], [191, 192, 193], [3, 9, *range(119, 128)], [*range(64, 129)], [*range(387)]]


@pytest.mark.thinned(2)
@pytest.mark.parametrize("scalars", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_own_gradients(dtype, scalars):
    table = make_knots(torch.zeros(1, dtype=dtype if dtype == torch.float64 else torch.float32), DELTA).table
    for places in PLACES:
        check_written(at(places, dtype), table, torch.tensor(places, dtype=torch.int64), DELTA, scalars=scalars)


def write(levels: Levels, index: list[int], own: list[float], factor: float, level: float = -2.0) -> Tensor:
    """Gradients, of which negatives get one number."""
    lines = torch.zeros(2, 3, dtype=torch.float64)
    lines[0] = level
    given = Own(torch.tensor(index, dtype=torch.int64), torch.tensor([own], dtype=torch.float64))
    return torch.cat(LINEAR.write(levels, TABLE, lines, given, [torch.tensor(factor)], DELTA))


def test_the_factor_comes_before_the_rounding():
    """What would be 0 in half precision, were it rounded before it is multiplied."""
    found = write(at([3], torch.bfloat16), [3], [1e-42], 1e38, 4.0)
    assert found[3] == torch.tensor(1e-4).bfloat16() > 0
    assert found[4].isinf()


@pytest.mark.parametrize("factor", [INF, -INF, NAN])
def test_what_is_ignored_gets_0_whatever_the_factor(factor):
    levels = at([3, 70])
    levels.logits[0][5::7] = NAN
    found, ignored = write(levels, [3, 70], [1.0, 1.0], factor), flatten(levels)[1] == -1
    assert not found[ignored].any()
    assert not found[~ignored].isfinite().any()


@pytest.mark.parametrize("known", range(6))
def test_positives_that_are_not_known_get_what_a_negative_gets(known):
    """And nothing is read beyond those that are, behind which lie others."""
    places = [3, 63, 64, 100]
    index, own = torch.tensor([*places, 101, 101]), torch.full((1, 6), 777.0, dtype=torch.float64)
    own[0, :known] = 5.0
    with patch.object(Tensor, "contiguous", lambda tensor: tensor):
        lines = torch.zeros(2, 3, dtype=torch.float64) - 2
        given = Own(index[:known], own[:, :known])
        levels = at(places)
        found = torch.cat(LINEAR.write(levels, TABLE, lines, given, [torch.ones(())], DELTA))
    assert (found == 777).sum() == 0
    assert (found[places[:known]] == 5).all()
    assert (found[places[known:]] != 5).all()
