"""The P-sized heart against brute force; the search for buckets, lookups and sums."""

from fractions import Fraction

import pytest
import torch
from dialect import FLOAT_MAX, INF, NAN, threads

from alrp_triton.engine import knots, scans
from alrp_triton.engine.passes.tables import BucketSearch, Sums, look_up
from alrp_triton.reference import difference, ramp

DELTAS = [1.0, 0.5, 0.1, 0.0, 37.5, 1e-6]
DOUBLE_MAX = torch.finfo(torch.float64).max


def normal(count, seed=0, scale=1.0, dtype=torch.float32):
    return (torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale).to(dtype)


POSITIVES = {
    "none": torch.empty(0),
    "one": torch.tensor([0.3]),
    "normal": normal(50),
    "wide": normal(40, scale=100.0),
    "dense": normal(60, scale=1e-5) + 1,
    "ties": torch.tensor([1.0, 0.0, 1.0, 1.0, -2.0, 0.0, 2.0, -0.0]),
    "two_deltas_apart": torch.arange(-6, 7).float(),
    "spaced_wider_than_delta": 2.0**24 + torch.arange(-4, 5).float() * 2,
    "about_1e9": 1e9 + 64 * torch.arange(9).float(),
    "far": torch.tensor([-1e30, -5.0, 0.0, 1e-30, 5.0, 1e30]),
    "float_max": torch.tensor([FLOAT_MAX, -FLOAT_MAX, 0.0, 3e38]),
    "infinite": torch.tensor([INF, -INF, 0.5, INF, -INF, FLOAT_MAX]),
    "subnormal": torch.arange(-3, 4).float() * 2.0**-149,
    "float64": normal(30, seed=3, dtype=torch.float64),
    "float64_1e9": 1e9 + torch.arange(-5, 6).double() * 2.0**-23,
    "float64_1e15": 1e15 + torch.arange(-5, 6).double() / 8,
    "float64_extreme": torch.tensor([DOUBLE_MAX, -DOUBLE_MAX, 0.0, INF, -INF], dtype=torch.float64),
}
# With this many the table's last bits are spent; everything is relative to the sum of the values.
TOLERANCE = 1e-11


def probes(pos_logits, delta):
    """Scores at, next to and between all that matters."""
    exact = pos_logits.double()
    near = torch.cat([exact - delta, exact, exact + delta, exact + delta / 3, exact - delta / 7]).to(pos_logits.dtype)
    ends = torch.tensor([INF, -INF, FLOAT_MAX, -FLOAT_MAX, 0.0, 1e-45], dtype=pos_logits.dtype)
    up, down = torch.nextafter(near, torch.full_like(near, INF)), torch.nextafter(near, torch.full_like(near, -INF))
    return torch.cat([near, up, down, ends])


def brute_ramps(scores, pos_logits, delta):
    """H(t - p_i), ``[P, T]``."""
    return ramp(difference(scores.double(), pos_logits.double()), delta)


def brute_ramps_of_others(pos_logits, delta):
    """H(p_k - p_i), ``[P, P]``, 0 for k = i."""
    return brute_ramps(pos_logits, pos_logits, delta).fill_diagonal_(0)


def values_like(pos_logits, seed=0):
    return torch.rand(len(pos_logits), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(params=POSITIVES, ids=str)
def pos_logits(request):
    return POSITIVES[request.param]


@pytest.fixture(params=DELTAS)
def delta(request):
    return request.param


def test_thresholds_are_sorted_and_buckets_count_them(pos_logits, delta):
    table = knots.make_knots(pos_logits, delta)
    assert table.table.thresholds.dtype == pos_logits.dtype
    assert table.table.thresholds.shape == (4 * len(pos_logits) + 1,)
    assert table.table.thresholds[2 * len(pos_logits) :].isnan().all()
    assert (~(table.table.thresholds.diff() < 0)).all()
    scores = probes(pos_logits, delta)
    counted = (scores[:, None] >= table.table.thresholds).sum(1)
    assert knots.buckets_of(scores, table.table.thresholds).tolist() == counted.tolist()
    assert sorted([*table.begin.tolist(), *table.end.tolist()]) == list(range(1, 2 * len(pos_logits) + 1))


@pytest.mark.thinned(2)
def test_a_score_lies_in_a_ramp_exactly_where_its_difference_says(pos_logits, delta):
    """In rational arithmetic: the ramp has begun where t - p >= -delta, and ended where t - p >= delta."""
    pos_logits = pos_logits[:11]
    table = knots.make_knots(pos_logits, delta)
    scores = probes(pos_logits, delta)
    buckets = knots.buckets_of(scores, table.table.thresholds)
    for i, p in enumerate(pos_logits.tolist()):
        for t, bucket in zip(scores.tolist(), buckets.tolist()):
            if t == p:
                begun, ended = True, delta == 0
            elif abs(t) == INF or abs(p) == INF:
                begun = ended = t > p
            else:
                x = Fraction(t) - Fraction(p)
                begun, ended = x >= -Fraction(delta), x >= Fraction(delta)
            assert (bucket >= table.begin[i]) == begun, f"t = {t!r}, p = {p!r}"
            assert (bucket >= table.end[i]) == ended, f"t = {t!r}, p = {p!r}"


def test_ramp_coefficients(pos_logits, delta):
    table = knots.make_knots(pos_logits, delta)
    weights = values_like(pos_logits)
    scores = probes(pos_logits, delta)
    level, slope = knots.ramp_coefficients(table, weights)
    largest = torch.finfo(scores.dtype).max
    bucket = knots.buckets_of(scores, table.table.thresholds)
    distance = scores.clamp(-largest, largest).double() - knots.bucket_floors(table.table.thresholds)[bucket].double()
    u = (distance / (2 * delta) if delta > 0 else torch.zeros_like(distance)).clamp(max=1)
    actual = level[bucket] + slope[bucket] * u
    expected = weights @ brute_ramps(scores, pos_logits, delta)
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE * float(weights.sum() + 1))


def test_slope_is_nothing_where_no_ramp_is_under_way(pos_logits, delta):
    """There the offset is meaningless."""
    table = knots.make_knots(pos_logits, delta)
    _, slope = knots.ramp_coefficients(table, values_like(pos_logits))
    bucket = torch.arange(len(slope))[:, None]
    active = ((bucket >= table.begin) & (bucket < table.end)).any(1)
    assert slope[~active].abs().sum() <= TOLERANCE
    assert not active[0]
    assert not active[-1]


def test_ramp_sums(pos_logits, delta):
    table = knots.make_knots(pos_logits, delta)
    values = torch.stack([values_like(pos_logits, seed) for seed in range(3)])
    expected = values @ brute_ramps_of_others(pos_logits, delta).T
    torch.testing.assert_close(knots.ramp_sums(table, values), expected, rtol=0, atol=TOLERANCE * (len(pos_logits) + 1))


def test_received_sums(pos_logits, delta):
    table = knots.make_knots(pos_logits, delta)
    values = values_like(pos_logits)
    expected = values @ brute_ramps_of_others(pos_logits, delta)
    atol = TOLERANCE * (len(pos_logits) + 1)
    torch.testing.assert_close(knots.received_sums(table, values), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("idle_offset", [0.0, 1.0])
def test_false_positives(idle_offset, pos_logits, delta):
    table = knots.make_knots(pos_logits, delta)
    scores = torch.cat([probes(pos_logits, delta), normal(100).to(pos_logits.dtype)])
    bucket = knots.buckets_of(scores, table.table.thresholds)
    largest = torch.finfo(scores.dtype).max
    distance = scores.clamp(-largest, largest).double() - knots.bucket_floors(table.table.thresholds)[bucket].double()
    # Where no ramp is under way any offset of a ramp's width may stand.
    number = torch.arange(2 * len(pos_logits) + 1)[:, None]
    active = ((number >= table.begin) & (number < table.end)).any(1)
    distance = torch.where(active[bucket], distance, idle_offset * 2 * delta)
    counts = torch.zeros(len(number), dtype=torch.float64).index_add_(0, bucket, torch.ones_like(distance))
    offsets = torch.zeros(len(number), dtype=torch.float64).index_add_(0, bucket, distance)
    expected = brute_ramps(scores, pos_logits, delta).sum(1)
    atol = 1e-10 + TOLERANCE * len(scores)
    torch.testing.assert_close(knots.false_positives(table, counts, offsets), expected, rtol=0, atol=atol)


def test_what_is_rounding_alone_is_no_false_positive():
    """A negative where a ramp begins, as rounded: a loss would divide by what is left of its height."""
    table = knots.make_knots(torch.ones(1, dtype=torch.float64), 0.1)
    counts, offsets = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    assert knots.false_positives(table, counts, offsets).tolist() == [0.0]


def test_order_is_a_stable_ascending_sort(pos_logits):
    table = knots.make_knots(pos_logits, 1.0)
    scores = pos_logits.tolist()
    assert table.order.tolist() == sorted(range(len(scores)), key=lambda i: scores[i])


def clustered(seed=0):
    """Most thresholds within one cell of a grid over all of them."""
    return torch.cat([torch.tensor([-1e4, 1e4]), normal(500, seed, scale=1e-3)])


THRESHOLDS = {
    "none": torch.empty(0),
    "one": torch.tensor([2.0]),
    "all_equal": torch.full((37,), -4.6),
    "two_values": torch.tensor([0.0] * 9 + [1.0] * 70),
    "normal": normal(2000, 1),
    "clustered": clustered(),
    "clustered_at_the_end": torch.cat([torch.tensor([-1e6]), normal(300, 2, scale=1e-4) + 1e6]),
    "next_to_each_other": torch.tensor([1.0 + k * 2.0**-23 for k in range(200)]),
    "geometric": torch.tensor([s * 10.0**k for s in (-1, 1) for k in range(-45, 38)]),
    "float_max": torch.tensor([-FLOAT_MAX, -1.0, 0.0, 1.0, FLOAT_MAX]),
    "infinite": torch.tensor([-INF, -INF, -1.0, 0.0, 1.0, INF, INF]),
    "nan_on_top": torch.tensor([-INF, -1.0, 0.5, 0.5, INF, NAN, NAN]),
    "only_nan": torch.tensor([NAN, NAN]),
    "only_infinite": torch.tensor([-INF, INF]),
    "finite_and_nan": torch.tensor([0.25, NAN]),
    "subnormal": torch.arange(-40, 41).float() * 2.0**-149,
    "float64": normal(700, 4, dtype=torch.float64),
    "float64_subnormal": torch.arange(-40, 41).double() * 5e-324,
    "float64_max": torch.tensor([-DOUBLE_MAX, -1.0, 0.0, 1.0, DOUBLE_MAX] * 20, dtype=torch.float64),
}


@pytest.mark.parametrize("name", THRESHOLDS)
def test_search_counts_thresholds_at_or_below(name):
    thresholds = THRESHOLDS[name].sort().values
    real = thresholds[~thresholds.isnan()]
    ends = torch.tensor([-INF, INF, FLOAT_MAX, -FLOAT_MAX, 0.0, -0.0, 1e-45, 1.5], dtype=thresholds.dtype)
    between = (real[1:] / 2 + real[:-1] / 2)[~(real[1:] / 2 + real[:-1] / 2).isnan()]
    up, down = (torch.nextafter(real, torch.full_like(real, end)) for end in (INF, -INF))
    scores = torch.cat([real, up, down, between, ends, normal(500, 9, scale=3.0).to(thresholds.dtype)])
    expected = (scores[:, None] >= thresholds).sum(1)
    assert BucketSearch(thresholds)(scores).tolist() == expected.tolist()
    assert knots.buckets_of(scores, thresholds).tolist() == expected.tolist()


def test_sums_to_the_end_keep_what_is_small_there():
    """As differences of sums from the beginning they would be 0."""
    found = scans.suffix_sums(torch.tensor([[1e17, 3.0, 1.0]], dtype=torch.float64))
    assert found.tolist() == [[1e17, 4.0, 1.0, 0.0]]


@pytest.mark.parametrize("num_threads", [1, 2, 3, 4])
@pytest.mark.parametrize("length", [0, 1, 6, 12, 13])
def test_lookups_and_sums_of_any_length_on_any_number_of_threads(num_threads, length):
    """They are folded into rows, one for each thread."""
    table, index = torch.arange(7) ** 2, torch.arange(length) % 7
    with threads(num_threads):
        assert look_up(table, index).tolist() == [int(i) ** 2 for i in index]
        sums = Sums(8, torch.device("cpu"))
        sums.add(index, torch.full((length,), 1 << 40))
        sums.add_at(7, 5)
        assert sums.total().tolist() == [int((index == k).sum()) << 40 for k in range(7)] + [5]


@pytest.mark.parametrize(("made_with", "used_with"), [(4, 1), (1, 4), (4, 3), (6, 4), (5, 6)])
def test_sums_serve_another_number_of_threads(made_with, used_with):
    with threads(made_with):
        sums = Sums(3, torch.device("cpu"))
    with threads(used_with):
        sums.add(torch.arange(12) % 3, torch.arange(12))
        assert sums.total().tolist() == [18, 22, 26]
