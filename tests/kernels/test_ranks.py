"""The steps between the passes by kernels that compare all with all, against sorted knots and against brute force."""

from __future__ import annotations

import pytest
import torch
from alrp_triton.kernels import coefficients, gradient, ranks
from alrp_triton.kernels.arrange import place_knots, search_table
from alrp_triton.kernels.knots import SETTINGS
from cases import FLOAT_MAX, INF, NAN
from checks import assert_same_bits
from test_knots import DOUBLE_MAX, POSITIVES, brute_ramps, brute_ramps_of_others, normal, probes, values_like
from torch import Tensor

from alrp_triton.engine import knots
from alrp_triton.engine.steps import SortedSteps

DELTAS = [1.0, 0.1, 0.0, 1e-30, 1e30]
NOTHING = torch.zeros((), dtype=torch.float64)
BLOCK, BLOCK_P = SETTINGS["block"], SETTINGS["block_p"]
CASES = POSITIVES | {
    "nan": torch.tensor([0.5, NAN, INF, -INF, NAN, 0.5]),
    "zeros": torch.tensor([0.0, -0.0, -0.0, 0.0]),
    "float64_subnormal": torch.arange(-3, 4).double() * 5e-324,
    "float64_nan": torch.tensor([0.5, NAN, INF, -INF, DOUBLE_MAX], dtype=torch.float64),
    **{f"{n}_of_few": (normal(n, n) * 4).round() / 4 for n in (2, BLOCK_P - 1, BLOCK_P, BLOCK_P + 1)},
    **{
        f"{n}_of_few": (normal(n, n) * 8).round() / 8 for n in (BLOCK // 2, BLOCK // 2 + 1, BLOCK - 1, BLOCK, BLOCK + 1)
    },
}


@pytest.fixture(autouse=True)
def empty_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not written shows."""
    original = torch.empty

    def empty(*size: int, **how: object) -> Tensor:
        made = original(*size, **how)
        return made.fill_(NAN if made.is_floating_point() else -1)

    monkeypatch.setattr(torch, "empty", empty)


@pytest.fixture(params=CASES, ids=str)
def pos_logits(request: pytest.FixtureRequest) -> Tensor:
    return CASES[request.param]


@pytest.fixture(params=DELTAS)
def delta(request: pytest.FixtureRequest) -> float:
    return request.param


def no_nan(pos_logits: Tensor) -> Tensor:
    return pos_logits[~pos_logits.isnan()]


def same_but_for_the_nans(name: str, actual: Tensor, expected: Tensor) -> None:
    """The same bits, zeros' signs included; which NaN it is says nothing."""
    assert actual.dtype == expected.dtype
    assert_same_bits(name, actual.isnan(), expected.isnan())
    assert_same_bits(name, actual.nan_to_num(0, INF, -INF), expected.nan_to_num(0, INF, -INF))
    assert_same_bits(name, actual.signbit() & ~actual.isnan(), expected.signbit() & ~expected.isnan())


def check(actual: Tensor, expected: Tensor, relative_to: Tensor) -> None:
    assert actual.dtype == torch.float64
    assert actual.shape == expected.shape
    assert not actual.isnan().any()
    assert ((actual - expected).abs() <= 1e-12 * relative_to).all()


def assert_same_knots(pos_logits: Tensor, delta: float) -> None:
    """Knots as sorting places them, those that begin a ramp before equal ones that end one. Which of several equal ones
    of a kind comes first is of no interest."""
    expected = knots.make_knots(pos_logits, delta)
    thresholds, begin, end = place_knots(pos_logits, delta)
    same_but_for_the_nans("thresholds", thresholds, expected.thresholds)
    same = (thresholds[1:] == thresholds[:-1]) | (thresholds[1:].isnan() & thresholds[:-1].isnan())
    # For each place the first of those that are alike.
    first = torch.arange(len(thresholds)).masked_fill(torch.cat([same.new_zeros(min(1, len(thresholds))), same]), 0)
    first = first.cummax(0).values
    places = torch.cat([begin, end]) - 1
    assert_same_bits("places", places.sort().values, torch.arange(2 * len(pos_logits)))
    for name, found, wanted in (("begin", begin, expected.begin), ("end", end, expected.end)):
        assert_same_bits(name, first[found - 1], first[wanted - 1])
        assert_same_bits(f"places of {name}", found.sort().values, wanted.sort().values)


@pytest.mark.thinned(3)
def test_knots_are_those_of_a_sort(pos_logits: Tensor, delta: float) -> None:
    assert_same_knots(pos_logits, delta)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_knots_of_any_bits(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**63), 2**63 - 1, (150,), generator=generator)
    pos_logits = bits.to(torch.int32).view(torch.float32) if dtype == torch.float32 else bits.view(torch.float64)
    for delta in (1.0, 0.3, 1e-30, 0.0):
        assert_same_knots(pos_logits, delta)


@pytest.mark.thinned(3)
def test_ranks(pos_logits: Tensor, delta: float) -> None:
    pos_logits = no_nan(pos_logits)
    steps = SortedSteps(pos_logits, delta)
    scores = torch.cat([probes(pos_logits, delta), normal(100).to(pos_logits.dtype)])
    scores = scores[~scores.isnan()]
    bucket = knots.buckets_of(scores, steps.thresholds)
    largest = torch.finfo(scores.dtype).max
    distance = scores.clamp(-largest, largest).double() - knots.bucket_floors(steps.thresholds)[bucket].double()
    unit = 2.0**-36
    offsets = (distance * knots.inverse_width(delta)).clamp(max=1).div(unit).long()
    totals = torch.zeros(2, 2 * len(pos_logits) + 2, dtype=torch.int64)
    totals[0].index_add_(0, bucket, torch.ones_like(bucket))
    totals[1].index_add_(0, bucket, offsets)
    # Bucket 0 is of no interest.
    totals[:, 0] = 77
    unit = torch.tensor(unit, dtype=torch.float64)
    table = steps.knots.begin, steps.knots.end
    values = torch.rand(2, len(pos_logits), dtype=torch.float64)
    found, poison = ranks.rank(pos_logits, steps.thresholds, *table, totals, unit, values, delta)
    assert poison == 0
    actual, rank_positive, both = found
    pairs = brute_ramps_of_others(pos_logits, delta).sum(1)
    check(rank_positive, 1 + pairs, 1 + pairs)
    assert_same_bits("rank", both, actual + rank_positive)
    assert (actual == 0).logical_or(actual >= 1e-10).all()
    # The same sums over buckets, in the order in which the buckets stand.
    counts, units = totals[:, :-1].double()
    place, (begin, end) = torch.arange(len(counts)), (tensor[:, None] for tensor in table)
    floors = knots.bucket_floors(steps.thresholds).double()
    inside = (floors - pos_logits.clamp(-largest, largest).double()[:, None] + delta) * knots.inverse_width(delta)
    inside = inside.clamp(max=1)
    under_way = torch.where((place >= begin) & (place < end), units * unit + counts * inside, 0.0)
    expected = torch.where(place >= end, counts, under_way).sum(1)
    check(actual, torch.where(expected < 1e-10, 0.0, expected), expected + 1)
    # The scores themselves, as exact as the fixed point; and the sorted knots.
    atol = 1e-10 + 2 * float(unit) * len(scores)
    if delta > 1e-20:
        brute = brute_ramps(scores, pos_logits, delta).sum(1)
        torch.testing.assert_close(actual, brute, rtol=0, atol=atol)
    torch.testing.assert_close(found, torch.stack(steps.rank(totals, unit, ())[:3]), rtol=0, atol=atol)


@pytest.mark.thinned(3)
def test_coefficients(pos_logits: Tensor, delta: float) -> None:
    pos_logits = no_nan(pos_logits)
    steps = SortedSteps(pos_logits, delta)
    weights = torch.stack([values_like(pos_logits, seed) for seed in range(2)])
    begin, end = steps.knots.begin, steps.knots.end
    actual = coefficients.coefficients(pos_logits, steps.thresholds, begin, end, weights, NOTHING, delta)
    largest = torch.finfo(pos_logits.dtype).max
    place, floors = torch.arange(2 * len(pos_logits) + 1)[:, None], knots.bucket_floors(steps.thresholds).double()
    inside = (floors[:, None] - pos_logits.clamp(-largest, largest).double() + delta) * knots.inverse_width(delta)
    inside = inside.clamp(max=1)
    under_way = (place >= begin) & (place < end)
    level = torch.where(place >= end, 1.0, torch.where(under_way, inside, 0.0))
    expected = torch.stack([torch.stack([level @ row, under_way.double() @ row]) for row in weights])
    check(actual, expected, weights.sum(1)[:, None, None] + 1)
    # Where scores can be, the same line as from sorted knots.
    wide = torch.cat([torch.tensor([True]), floors[2:] > floors[1:-1], torch.tensor([True])])[: len(floors)]
    atol = 1e-11 * (len(pos_logits) + 1)
    torch.testing.assert_close(actual[..., wide], steps.coefficients(weights, NOTHING)[..., wide], rtol=0, atol=atol)


def sorted_before(pos_logits: Tensor) -> Tensor:
    """Whether k is i or precedes it in descending order, ``[P, P]`` float64."""
    place = torch.empty_like(order := pos_logits.sort(stable=True).indices)
    place[order] = torch.arange(len(order))
    return (place[None, :] >= place[:, None]).double()


@pytest.mark.thinned(3)
def test_pair_sums(pos_logits: Tensor, delta: float) -> None:
    pos_logits = no_nan(pos_logits)
    values = torch.stack([values_like(pos_logits, seed) for seed in range(3)])
    steps, before = SortedSteps(pos_logits, delta), sorted_before(pos_logits)
    pairs = brute_ramps_of_others(pos_logits, delta)
    matrices = {
        "above": (pairs, steps.sums_above),
        "received": (pairs.T, steps.sums_received),
        "sorted": (before, steps.sums_sorted),
        "sorted_received": (before.T, steps.sums_sorted_received),
    }
    for kind, (matrix, by_sorting) in matrices.items():
        actual = ranks.pair_sums(pos_logits, values, NOTHING, kind, delta)
        check(actual, values @ matrix.T, values.sum(1, keepdim=True) + 1)
        for row, own in zip(values, actual):
            torch.testing.assert_close(own, by_sorting(row, NOTHING), rtol=0, atol=1e-11 * (len(pos_logits) + 1))
    actual = ranks.pair_sums(pos_logits, -values, NOTHING, "running_max", delta)
    for row, own in zip(-values, actual):
        assert_same_bits("running maximum", own, steps.running_max(row, NOTHING))


def test_running_max_keeps_nan() -> None:
    pos_logits, values = torch.tensor([3.0, 1.0, 2.0, 2.0]), torch.tensor([5.0, -INF, NAN, 7.0], dtype=torch.float64)
    found = ranks.pair_sums(pos_logits, values[None], NOTHING, "running_max", 1.0)[0]
    assert found[1] == -INF
    assert found[[0, 2, 3]].isnan().all()


@pytest.mark.parametrize("num_pos", [1, 200])
def test_the_same_bits_again(num_pos: int) -> None:
    pos_logits, values = normal(num_pos, 5), normal(2 * num_pos, 6, dtype=torch.float64).view(2, num_pos)
    table = place_knots(pos_logits, 0.5)
    for kind in ranks.KINDS:
        results = [ranks.pair_sums(pos_logits, values, NOTHING, kind, 0.5) for _ in range(2)]
        assert_same_bits(kind, *results)
        # Rows know nothing of each other, wherever they lie.
        assert_same_bits(kind, ranks.pair_sums(pos_logits, values[1:], NOTHING, kind, 0.5), results[0][1:])
        by_columns = values.T.contiguous().T
        assert_same_bits(kind, ranks.pair_sums(pos_logits, by_columns, NOTHING, kind, 0.5), results[0])
    results = [coefficients.coefficients(pos_logits, *table, values, NOTHING, 0.5) for _ in range(2)]
    assert_same_bits("coefficients", *results)


def test_a_huge_score_beside_small_ones() -> None:
    pos_logits = torch.tensor([1e-3, FLOAT_MAX, 0.0, -FLOAT_MAX])
    found = ranks.pair_sums(pos_logits, torch.ones(1, 4, dtype=torch.float64), NOTHING, "above", 1.0)[0]
    below = 0.5 * float(pos_logits[0])
    torch.testing.assert_close(
        found, torch.tensor([1.5 - below, 0.0, 1.5 + below, 3.0], dtype=torch.float64), rtol=1e-15, atol=0
    )


@pytest.mark.parametrize("num_pos", [0, 1, 9])
@pytest.mark.parametrize("where", ["a negative", "a positive", "a value"])
def test_a_nan_anywhere_is_everywhere(where: str, num_pos: int) -> None:
    pos_logits, values = normal(num_pos), torch.rand(2, num_pos, dtype=torch.float64)
    totals = torch.zeros(2, 2 * num_pos + 2, dtype=torch.int64)
    if where == "a negative":
        totals[0, -1] = 1
    elif num_pos == 0:
        return
    else:
        (pos_logits if where == "a positive" else values[1])[-1] = NAN
    table = pos_logits, *place_knots(pos_logits, 1.0)
    found, poison = ranks.rank(*table, totals, torch.ones((), dtype=torch.float64), values, 1.0)
    assert poison.isnan()
    assert found.isnan().all()
    given = torch.rand(3, num_pos, dtype=torch.float64)
    assert coefficients.coefficients(*table, given, poison, 1.0).isnan().all()
    assert ranks.pair_sums(pos_logits, given, poison, "sorted", 1.0).isnan().all()
    for result in coefficients.send(*table, *given, poison, 1.0, 0.5):
        assert result.isnan().all()


@pytest.mark.parametrize("eps", [0.0, 1e-5, 0.5])
@pytest.mark.parametrize("num_pos", [0, 1, BLOCK + 1])
def test_send(num_pos: int, eps: float) -> None:
    pos_logits, (excess, share, spread) = normal(num_pos), torch.rand(3, num_pos, dtype=torch.float64)
    spread[::3] = eps
    table = pos_logits, *place_knots(pos_logits, 0.25)
    found, own = coefficients.send(*table, excess, share, spread, NOTHING, 0.25, eps)
    sent = torch.where(spread > eps, excess * share, 0.0)
    assert_same_bits("own", own, -sent[None])
    expected = coefficients.coefficients(*table, torch.where(spread > eps, sent / spread, 0.0)[None], NOTHING, 0.25)
    assert_same_bits("coefficients", found, expected)


@pytest.mark.thinned(3)
def test_search_table(pos_logits: Tensor, delta: float) -> None:
    thresholds = knots.make_knots(pos_logits, delta).thresholds
    padded, floors = search_table(thresholds)
    same_but_for_the_nans("floors", floors, knots.bucket_floors(thresholds))
    same_but_for_the_nans("thresholds", padded[: len(thresholds)], thresholds)
    assert len(padded) == 1 << len(thresholds).bit_length()
    assert padded[len(thresholds) :].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 7), (2, 2, 300), (3, 0)])
def test_combine(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    rows, factors = torch.rand(shape, dtype=torch.float64), torch.randn(shape[0]).to(dtype)
    expected = (rows.flatten(1) * factors.double()[:, None]).sum(0).view(shape[1:])
    actual = gradient.combine(rows, factors, dtype)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual, expected.to(dtype))
