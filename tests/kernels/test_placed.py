"""What is P-sized, by kernels that compare all positives with all: against sorted knots, and every pair in float64."""

from __future__ import annotations

import pytest
import torch
from dialect import FLOAT_MAX, INF, NAN, all_cases, assert_same_bits
from drawn import BY_TORCH, DELTA, levels_of, place, same_numbers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from alrp_triton.engine import operators
from alrp_triton.engine.inputs import compute_dtype
from alrp_triton.engine.knots import bucket_floors, make_knots
from alrp_triton.engine.passes import gpu
from alrp_triton.engine.passes.protocol import Found
from alrp_triton.engine.placed import Compared, Ranks, Sorted
from alrp_triton.engine.sorting import sort_by_value
from alrp_triton.reference import difference, ramp

pytestmark = pytest.mark.usefixtures("small_blocks")
NOTHING = torch.zeros((), dtype=torch.float64)
CASES = {case.name: case for case in all_cases() if case.logits.numel()}
KINDS = ("above", "received", "sorted", "sorted_received", "running_max")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def check_placed(logits: Tensor, delta: float, groups: Tensor | None = None) -> tuple[Compared, Sorted]:
    """Knots as sorting places them, those that begin a ramp before equal ones that end one. Which of several equal ones
    of a kind comes first is of no interest."""
    placed, expected = place(logits, delta, groups), make_knots(logits, delta, groups)
    same_numbers("thresholds", placed.table.thresholds, expected.table.thresholds)
    if groups is not None:
        same_numbers("groups", placed.table.groups, expected.table.groups)
    begin, end = placed.positives[1:3]
    same_numbers("places", torch.cat([begin, end]).sort().values, torch.arange(2 * len(logits)) + 1)
    for found, wanted in ((begin, expected.begin), (end, expected.end)):
        same_numbers("places of a kind", found.sort().values, wanted.sort().values)
        same_numbers("knots", placed.table.thresholds[found - 1], placed.table.thresholds[wanted - 1])
    assert not placed.totals.any()
    return placed, Sorted(logits, groups, delta)


def check_ranked(placed: Compared, by_sorting: Sorted, scores: Tensor, of_scores: Tensor | None = None) -> None:
    """Ranks among negatives, sums and what is sent, in one ranking or of groups."""
    logits, groups, delta, num_pos = placed.logits, placed.groups, placed.delta, len(placed.logits)
    levels = levels_of((scores, torch.zeros(len(scores), dtype=torch.int64), *([] if groups is None else [of_scores])))
    nobody = Found(torch.empty(0, dtype=torch.int64), logits[:0], None if groups is None else groups[:0])
    BY_TORCH.count(levels, by_sorting.table, nobody, by_sorting.totals, delta, len(scores))
    placed.totals.copy_(by_sorting.totals)
    placed.totals[:, 0] = 77  # of no interest
    close = {"rtol": 1e-12, "atol": 1e-11 * (num_pos + len(scores) + 1)}
    found, expected = placed.rank(len(scores), ()), by_sorting.rank(len(scores), ())
    for name, one, other in zip(Ranks._fields, found, expected):
        same_numbers(name, one, other.expand(one.shape), **close)
    false = found.num_false_positives
    assert ((false == 0) | (false >= 1e-10)).all()
    if delta > 1e-20 or delta == 0:
        h = ramp(difference(scores.double(), logits.double()), delta)
        h = h if groups is None else h * (of_scores == groups[:, None])
        rounded = 1e-10 if logits.dtype == torch.float64 else 3e-8
        same_numbers("N_FP", false, h.sum(1), atol=rounded * (len(scores) + 1))
    values, (sent, spread, added, share) = random(num_pos) - 0.3, random(4, num_pos, seed=1)
    # Each is compiled by itself, for every width and dtype.
    for kind in KINDS if delta == DELTA and logits.dtype == torch.float32 else ("above", "running_max"):
        same_numbers(kind, placed.sums(values, kind, NOTHING), by_sorting.sums(values, kind, NOTHING), **close)
    spread[::3] = eps = 0.35  # which is less in float32
    given = torch.stack([sent, spread, added, share])
    result = gpu.send_positives(
        placed.positives, operators.present(*placed.table), given, NOTHING, None, "", delta, eps, 3
    )
    sent = torch.where(spread > eps, sent, 0.0)
    same_numbers("own", result.own, 3 * (0.0 - sent[None]))
    same_numbers("derivative", result.derivative, share)
    same_numbers("first", result.first.double(), added.sum(), 1e-6)
    assert torch.equal(result.first, result.second)
    lines = 3 * by_sorting.lines(torch.where(spread > eps, sent / spread, 0.0), NOTHING)
    floors = bucket_floors(placed.table.thresholds[: 2 * num_pos])
    # Where scores can be; of narrower buckets there may be anything.
    wide = torch.ones(len(floors), dtype=torch.bool)
    wide[1:-1] = floors[2:] > floors[1:-1]
    same_numbers("lines", result.lines[:, wide], lines[:, wide].to(logits.dtype), 1e-6, close["atol"])


@pytest.mark.thinned(6)
@pytest.mark.parametrize("delta", [DELTA, 0.0])
@pytest.mark.parametrize("name", CASES)
def test_every_case(name: str, delta: float) -> None:
    case = CASES[name]
    scores = case.logits.to(compute_dtype(case.logits.dtype))
    check_ranked(*check_placed(scores[case.labels == 1], delta), scores[case.labels == 0])


@pytest.mark.nightly
@pytest.mark.parametrize("delta", [1e-30, 1e30])
@pytest.mark.parametrize("name", CASES)
def test_every_case_by_ramps_of_any_width(name: str, delta: float) -> None:
    test_every_case(name, delta)


@pytest.mark.thinned(4)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("delta", [DELTA, 0.0])
def test_groups(delta: float, dtype: torch.dtype) -> None:
    ids = torch.tensor([-(2**63), -1, 0, 2**40, 2**63 - 1])
    for num_pos in (0, 1, 7, 8, 9, 15, 16, 17, 40):
        scores, groups = torch.randn(num_pos + 90).to(dtype), ids[torch.arange(num_pos + 90) ** 2 % 5]
        scores[::3] = scores[::3].round()
        placed = check_placed(scores[:num_pos], delta, groups[:num_pos])
        check_ranked(*placed, scores[num_pos:], groups[num_pos:])


ANY = (
    st.floats(width=32)
    | st.integers(-6, 6).map(lambda k: k * DELTA)
    | st.sampled_from([INF, -INF, NAN, 0.0, -0.0, 1e-45])
)


@pytest.mark.parametrize("delta", [DELTA, 0.0, 1e-30, 1e30])
@settings(max_examples=30)
@given(st.lists(st.tuples(ANY, st.integers(-1, 1)), max_size=40))
def test_ramps_of_any_scores(delta: float, positives: list[tuple[float, int]]) -> None:
    numbers = torch.tensor(positives, dtype=torch.float64).view(-1, 2)
    check_placed(numbers[:, 0].float(), delta)
    if delta == DELTA:
        check_placed(numbers[:, 0].float(), delta, numbers[:, 1].long())


@pytest.mark.parametrize("grouped", [False, True])
@settings(max_examples=10)
@given(st.permutations(range(40)))
def test_positives_in_any_order(grouped: bool, order: list[int]) -> None:
    index, logits = torch.arange(40) ** 2, (8 * random(40)).round().float()
    groups, numbers = torch.arange(40) % 3 if grouped else None, torch.tensor([40, 0])
    shuffled = index[order], logits[order], None if groups is None else groups[order]
    found = gpu.place_positives(Found(*shuffled, numbers), DELTA, logits.dtype)
    expected = gpu.place_positives(Found(index, logits, groups), DELTA, logits.dtype)
    for name, one, other in zip(found._fields, found, expected):
        for part, whole in zip(
            one if isinstance(one, tuple) else [one], other if isinstance(other, tuple) else [other]
        ):
            assert (part is None) == (whole is None)
            assert part is None or name == "totals" or same_numbers(name, part, whole) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ramps_of_any_bits(dtype: torch.dtype) -> None:
    bits = torch.randint(-(2**63), 2**63 - 1, (150,), generator=torch.Generator().manual_seed(0))
    for delta in (DELTA, 1e-30):
        check_placed(bits.int().view(torch.float32) if dtype == torch.float32 else bits.view(torch.float64), delta)


def test_a_huge_score_beside_small_ones() -> None:
    found = place(torch.tensor([1e-3, FLOAT_MAX, 0.0, -FLOAT_MAX]), 1.0).sums(torch.ones(4), "above", NOTHING)
    below = 0.5 * float(torch.tensor(1e-3))
    same_numbers("above", found, torch.tensor([1.5 - below, 0.0, 1.5 + below, 3.0], dtype=torch.float64), 1e-15)


def test_a_running_maximum_that_is_nan_or_infinite() -> None:
    values = torch.tensor([NAN, -INF, 2.0, 1.0], dtype=torch.float64)
    found = place(torch.tensor([1.0, 0.0, 3.0, 2.0]), DELTA).sums(values, "running_max", NOTHING)
    same_numbers("running_max", found, torch.tensor([NAN, -INF, NAN, NAN], dtype=torch.float64))


@pytest.mark.parametrize("num_pos", [0, 1, 9])
@pytest.mark.parametrize("where", ["a negative", "a positive", "a value"])
def test_a_nan_anywhere_is_everywhere(where: str, num_pos: int) -> None:
    if where != "a negative" and num_pos == 0:
        return
    logits, values = random(num_pos).float(), random(2, num_pos)
    if where != "a negative":
        (logits if where == "a positive" else values[1])[-1] = NAN
    placed = place(logits, DELTA)
    placed.totals[0, -1] = where == "a negative"
    ranks = placed.rank(9, list(values))
    assert ranks.poison.isnan()
    for name in set(Ranks._fields) - {"num_positives"}:
        assert getattr(ranks, name).isnan().all(), name
    assert placed.sums(values[0], "sorted", ranks.poison).isnan().all()
    given = placed.positives, operators.present(*placed.table)
    for result in gpu.send_positives(*given, random(4, num_pos), ranks.poison, None, "", DELTA, 0.0, 1):
        assert result.isnan().all()
    # What a formula of one's own has made, too.
    rows = random(4, num_pos)
    rows[2, -1:] = NAN
    assert num_pos == 0 or gpu.send_positives(*given, rows, NOTHING, None, "", DELTA, 0.0, 1).lines.isnan().all()


def sort(placed: Compared, ious: Tensor, eps: float = 0.0) -> tuple[Tensor, Tensor]:
    """The sorting error, and its derivative with respect to the positives' scores."""
    values = [ious]
    rows, _, poison = placed.rows(9, values, "rank_sort", eps)
    table = operators.present(*placed.table)
    sent = gpu.send_positives(placed.positives, table, rows, poison, ious, "rank_sort", placed.delta, eps, 1)
    return sent.second, sent.own[1]


@pytest.mark.thinned(4)
@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("delta", [DELTA, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sorting_errors(dtype: torch.dtype, delta: float, grouped: bool) -> None:
    """Of scores and IoUs many are equal, some scores infinite; or all are sorted, or all alike."""
    drawn = [
        [(16 * random(n, seed=n + k)).round().to(dtype) / 8 for k in (0, 99)] for n in (0, 1, 2, 7, 8, 9, 16, 17, 33)
    ]
    scores, ious = drawn[-1]
    infinite = scores.masked_fill(scores > 1.6, INF).masked_fill(scores < 0.2, -INF)
    drawn += [(infinite, ious), (ious, ious), (scores, ious * 0 + 0.5), (scores * 0 - 2, ious)]
    for x, v in drawn:
        groups = torch.tensor([-(2**63), 0, 2**63 - 1])[torch.arange(len(x)) % 3] if grouped else None
        share = Sorted(x, groups, delta).ranks(torch.zeros(len(x)).double(), NOTHING).share
        errors, gradients = sort_by_value(x, v, groups, share, delta, 0.0)
        second, own = sort(place(x, delta, groups), v)
        tolerance = 1e-6 if dtype == torch.float32 else 1e-12
        same_numbers("error", second, errors.sum().to(dtype), tolerance, tolerance)
        same_numbers("gradient", own, gradients, tolerance, tolerance)


def test_the_same_bits_again() -> None:
    logits, values = random(50).float(), random(50, seed=1)
    placed = place(logits, DELTA)
    for kind in KINDS:
        strided = torch.stack([values, values], dim=1)[:, 0]
        assert_same_bits(kind, placed.sums(values, kind, NOTHING), placed.sums(strided, kind, NOTHING))
    for one, other in zip(sort(placed, values.float()), sort(placed, values.float())):
        assert_same_bits("sorted", one, other)
