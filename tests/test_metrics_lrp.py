"""LRP, its optimum, AP and rank correlation, from matched detections."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alrp_triton.metrics import LRPResult, average_precision, lrp, optimal_lrp, rank_correlation

NAN = math.nan
# Five detections of six objects: scores, which are true, and their IoUs.
SCORES = [0.9, 0.8, 0.6, 0.4, 0.2]
HITS = [True, False, True, True, False]
IOUS = [0.9, NAN, 0.7, 0.6, NAN]

# Few different values, so that scores tie.
DETECTIONS = st.lists(
    st.tuples(
        st.integers(0, 6).map(lambda score: score / 4 - 0.5), st.booleans(), st.floats(0, 1, allow_subnormal=False)
    ),
    max_size=12,
)


def columns(detections: list[tuple[float, bool, float]], tau: float) -> tuple[Any, Any, Any]:
    scores, hits, places = np.array(detections, dtype=np.float64).reshape(-1, 3).T
    return scores, hits.astype(bool), tau + (1 - tau) * places


def assert_equal(found: LRPResult, *expected: float) -> None:
    assert found == pytest.approx(expected, rel=0, abs=1e-12, nan_ok=True)


def test_by_hand() -> None:
    # All: errors (0.1 + 0.3 + 0.4)/0.5 = 1.6; 2 false, 3 missed: (1.6 + 2 + 3)/(3 + 2 + 3) = 6.6/8.
    assert_equal(lrp(SCORES, HITS, IOUS, 6), 0.825, 0.8 / 3, 2 / 5, 3 / 6, -math.inf, 3, 2, 3)
    # From 0.6: (0.1 + 0.3)/0.5 = 0.8; 1 false, 4 missed: 5.8/7. A score equal to the threshold is kept.
    assert_equal(lrp(SCORES, HITS, IOUS, 6, threshold=0.6), 5.8 / 7, 0.2, 1 / 3, 4 / 6, 0.6, 2, 1, 4)
    assert lrp(SCORES, HITS, IOUS, 6, threshold=0.61)[:4] == pytest.approx((6.2 / 7, 0.1, 0.5, 5 / 6))
    # By threshold 5.2/6, 6.2/7, 5.8/7, 5.6/7, 6.6/8: the least is at 0.4, of (0.1 + 0.3 + 0.4)/0.5 = 1.6, 1 and 3.
    assert_equal(optimal_lrp(SCORES, HITS, IOUS, 6), 5.6 / 7, 0.8 / 3, 1 / 4, 3 / 6, 0.4, 3, 1, 3)


def test_order_does_not_matter() -> None:
    places = [3, 0, 4, 2, 1]
    shuffled = [[values[i] for i in places] for values in (SCORES, HITS, IOUS)]
    assert optimal_lrp(*shuffled, 6) == optimal_lrp(SCORES, HITS, IOUS, 6)
    assert lrp(*shuffled, 6, threshold=0.6) == lrp(SCORES, HITS, IOUS, 6, threshold=0.6)
    assert average_precision(*shuffled[:2], 6) == average_precision(SCORES, HITS, 6)


def test_extremes() -> None:
    hits, ious = [True, True], [1.0, 1.0]
    assert_equal(optimal_lrp([0.3, 0.7], hits, ious, 2), 0, 0, 0, 0, 0.3, 2, 0, 0)
    # Boxes at tau are as good as none: the threshold is the highest of those that do equally well.
    assert_equal(optimal_lrp([0.3, 0.7], hits, [0.5, 0.5], 2), 1, 0.5, 0, 0.5, 0.7, 1, 0, 1)
    assert_equal(optimal_lrp([], [], [], 3), 1, NAN, NAN, 1, NAN, 0, 0, 3)
    assert_equal(optimal_lrp([0.3, 0.7], [False, False], [0, 0], 3), 1, NAN, NAN, 1, NAN, 0, 0, 3)
    assert_equal(optimal_lrp([0.3, 0.7], [False, False], [0, 0], 0), NAN, NAN, NAN, NAN, NAN, 0, 0, 0)
    assert_equal(lrp([], [], [], 3), 1, NAN, NAN, 1, -math.inf, 0, 0, 3)
    assert_equal(lrp([0.3], [False], [0], 3), 1, NAN, 1, 1, -math.inf, 0, 1, 3)
    assert_equal(lrp([0.3], [False], [0], 0), 1, NAN, 1, NAN, -math.inf, 0, 1, 0)
    assert_equal(lrp([0.3], [False], [0], 0, threshold=0.5), NAN, NAN, NAN, NAN, 0.5, 0, 0, 0)
    assert_equal(lrp([0.3, 0.7], hits, ious, 2, threshold=math.inf), 1, NAN, NAN, 1, math.inf, 0, 0, 2)
    assert_equal(optimal_lrp([math.inf, -math.inf], hits, ious, 2), 0, 0, 0, 0, -math.inf, 2, 0, 0)


def test_a_threshold_cannot_split_ties() -> None:
    # Kept alone, the first would have an LRP of 0; what is possible is both: 1/2.
    for hits in ([True, False], [False, True]):
        assert_equal(optimal_lrp([0.5, 0.5], hits, [1, 1], 1), 0.5, 0, 0.5, 0, 0.5, 1, 1, 0)
    assert average_precision([0.5, 0.5], [True, False], 1) == 0.5
    assert_equal(optimal_lrp([math.inf, math.inf], [True, False], [1, 0], 1), 0.5, 0, 0.5, 0, math.inf, 1, 1, 0)


@settings(max_examples=300, deadline=None)
@given(DETECTIONS, st.integers(0, 5), st.sampled_from([0.0, 0.5, 0.75]))
def test_against_the_definition(detections: list[tuple[float, bool, float]], missed: int, tau: float) -> None:
    scores, hits, ious = columns(detections, tau)
    num_objects = int(hits.sum()) + missed
    found = optimal_lrp(scores, hits, ious, num_objects, tau=tau)
    if num_objects == 0:
        assert math.isnan(found.lrp)
        return
    errors = {}
    for threshold in [*scores, math.inf]:
        kept = [(hit, iou) for score, hit, iou in zip(scores, hits, ious) if score >= threshold]
        true = [iou for hit, iou in kept if hit]
        false = len(kept) - len(true)
        total = sum((1 - iou) / (1 - tau) for iou in true) + false + num_objects - len(true)
        errors[threshold] = total / (false + num_objects)
        one = lrp(scores, hits, ious, num_objects, tau=tau, threshold=threshold)
        assert one.lrp == pytest.approx(errors[threshold], abs=1e-12)
        # The three components make up the whole, weighted by what they are shares of.
        parts = [(one.loc / (1 - tau), len(true)), (one.fp, len(kept)), (one.fn, num_objects)]
        whole = sum(share * weight for share, weight in parts if weight)
        assert one.lrp * (false + num_objects) == pytest.approx(whole, abs=1e-12)
    assert 0 <= found.lrp <= 1 + 1e-12
    assert found.lrp == pytest.approx(min(errors.values()), abs=1e-12)
    if hits.any():
        assert errors[found.threshold] == pytest.approx(found.lrp, abs=1e-12)
        again = lrp(scores, hits, ious, num_objects, tau=tau, threshold=found.threshold)
        assert again == pytest.approx(tuple(found), abs=1e-12, nan_ok=True)


def test_average_precision_by_hand() -> None:
    # Precision 1/1, 2/3, 3/4 at recalls 1/6, 2/6, 3/6; interpolated 1, 3/4, 3/4: (1 + 3/4 + 3/4)/6.
    assert average_precision(SCORES, HITS, 6) == pytest.approx(2.5 / 6)
    # At recalls 0, 1/4, 1/2 and 3/4, 1 it is 1, 3/4, 3/4 and 0, 0.
    assert average_precision(SCORES, HITS, 6, recall_points=5) == pytest.approx(2.5 / 5)
    assert average_precision([], [], 3) == 0
    assert average_precision([0.5], [True], 1, recall_points=101) == 1
    assert math.isnan(average_precision([0.5], [False], 0))


@settings(max_examples=100, deadline=None)
@given(DETECTIONS, st.integers(1, 5))
def test_sampled_average_precision_comes_near_the_area(
    detections: list[tuple[float, bool, float]], missed: int
) -> None:
    scores, hits, _ = columns(detections, 0.5)
    num_objects = int(hits.sum()) + missed
    area = average_precision(scores, hits, num_objects)
    for points in (2, 11, 101, 10_001):
        assert abs(average_precision(scores, hits, num_objects, recall_points=points) - area) <= 1 / points + 1e-12


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=15))
def test_rank_correlation_against_counting(pairs: list[tuple[int, int]]) -> None:
    ranks = []
    for side in zip(*pairs):
        # Among equals, the mean rank; centred.
        places = [sum(other < one for other in side) + sum(other == one for other in side) / 2 for one in side]
        ranks.append([place - len(side) / 2 for place in places])
    x, y = ranks or ([], [])
    scale = sum(a * a for a in x) * sum(b * b for b in y)
    expected = sum(a * b for a, b in zip(x, y)) / math.sqrt(scale) if scale else NAN
    first, second = [one for one, _ in pairs], [other for _, other in pairs]
    assert rank_correlation(first, second) == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_single_precision_of_ious_at_tau_is_no_error() -> None:
    iou = np.array([0.7], dtype=np.float32)
    assert float(iou[0]) < 0.7
    assert lrp(np.array([0.5], dtype=np.float32), np.array([True]), iou, 1, tau=0.7).lrp == pytest.approx(1)


def test_inputs_are_not_changed() -> None:
    inputs = np.array(SCORES), np.array(HITS), np.array(IOUS)
    copies = [values.copy() for values in inputs]
    optimal_lrp(*inputs, 6)
    lrp(*inputs, 6)
    for values, copy in zip(inputs, copies):
        np.testing.assert_array_equal(values, copy)


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"scores": [0.1, NAN]}, ValueError, "scores: expected numbers, got NaN at 1"),
        ({"scores": [[0.1, 0.2]]}, ValueError, r"scores: expected shape \[N\], got \[1, 2\]"),
        ({"scores": ["a", "b"]}, TypeError, "scores: expected real numbers"),
        ({"scores": [0.1, [0.2]]}, TypeError, "scores: expected real numbers"),
        ({"scores": [0.1]}, ValueError, r"is_true_positive: expected the shape of scores, \[1\], got \[2\]"),
        ({"is_true_positive": [1, 0]}, TypeError, "is_true_positive: expected booleans"),
        ({"ious": [0.9]}, ValueError, r"ious: expected the shape of scores, \[2\], got \[1\]"),
        ({"ious": [0.4, 0]}, ValueError, r"ious: expected \[tau, 1\] = \[0.5, 1\] for true positives, got 0.4 at 0"),
        ({"ious": [1.1, 0]}, ValueError, "got 1.1 at 0"),
        ({"ious": [NAN, 0]}, ValueError, "ious: expected numbers, got NaN"),
        ({"num_ground_truth": 0}, ValueError, "num_ground_truth: expected at least the 1 true positives, got 0"),
        ({"num_ground_truth": -1, "is_true_positive": [False, False]}, ValueError, "num_ground_truth"),
        ({"num_ground_truth": 2.0}, TypeError, "num_ground_truth: expected an integer, got float"),
        ({"num_ground_truth": True}, TypeError, "num_ground_truth: expected an integer, got bool"),
        ({"tau": 1}, ValueError, r"tau: expected a number in \[0, 1\), got 1"),
        ({"tau": -0.1}, ValueError, "tau"),
        ({"tau": NAN}, ValueError, "tau"),
        ({"tau": "0.5"}, TypeError, "tau: expected a number"),
    ],
)
def test_wrong_inputs(changes: dict[str, Any], error: type[Exception], said: str) -> None:
    inputs = {"scores": [0.9, 0.8], "is_true_positive": [True, False], "ious": [0.9, 0], "num_ground_truth": 2}
    for function in (lrp, optimal_lrp):
        function(**inputs)
        with pytest.raises(error, match=said):
            function(**inputs | changes)


def test_other_wrong_inputs() -> None:
    with pytest.raises(ValueError, match="threshold: expected a number, got NaN"):
        lrp(SCORES, HITS, IOUS, 6, threshold=NAN)
    with pytest.raises(TypeError, match="threshold: expected a number, got str"):
        lrp(SCORES, HITS, IOUS, 6, threshold="0.5")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="recall_points: expected at least 2, got 1"):
        average_precision(SCORES, HITS, 6, recall_points=1)
    with pytest.raises(TypeError, match="recall_points: expected an integer"):
        average_precision(SCORES, HITS, 6, recall_points=11.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"ious: expected the shape of scores, \[2\], got \[1\]"):
        rank_correlation([1, 2], [1])
    with pytest.raises(ValueError, match="ious: expected numbers, got NaN at 1"):
        rank_correlation([1, 2], [1, NAN])
