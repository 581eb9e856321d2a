"""Peers of the suite against the reference, and the inputs that all contenders get."""

from __future__ import annotations

import math

import pytest
import torch
from alrp_triton.benchmarks import peers, presets
from alrp_triton.benchmarks.accuracy import LARGEST_ERROR, Judge, reduced
from alrp_triton.benchmarks.baselines import per_positive_loop
from alrp_triton.benchmarks.peers import bucketed_by_means, vectorised
from alrp_triton.benchmarks.workloads import DTYPES, HEADS, LAYOUTS, REGIMES, Case, make_inputs
from torch import Tensor

from alrp_triton import reference

CPU = torch.device("cpu")
SMALL = Case("atss", "middle", image=32, batch=2, num_positives=12)


def problem(regime: str, num_negatives: int = 600, num_positives: int = 20) -> tuple[Tensor, Tensor, Tensor]:
    """Scores in float64, labels, localisation errors; one logit in ten is ignored."""
    generator = torch.Generator().manual_seed(5)
    (neg_mean, neg_std), (pos_mean, pos_std) = REGIMES[regime]
    size = num_negatives + num_positives
    logits = torch.randn(size, generator=generator, dtype=torch.float64)
    labels = torch.zeros(size, dtype=torch.int8)
    labels[::10] = -1
    labels[torch.arange(num_positives) * (size // num_positives) + 3] = 1
    logits = torch.where(labels == 1, pos_mean + pos_std * logits, neg_mean + neg_std * logits)
    return logits, labels, torch.rand(int((labels == 1).sum()), generator=generator, dtype=torch.float64)


def gradient_error(peer, logits: Tensor, labels: Tensor, errors: Tensor, delta: float) -> float:
    """Relative norm of the error of the score gradient; the value is compared, too, where that is exact."""
    leaf = logits.clone().requires_grad_()
    result = peer(leaf, labels, errors, delta)
    value = result[0] if isinstance(result, tuple) else result
    value.backward()
    exact = reference.alrp(logits, labels, errors, delta=delta)
    error = float((leaf.grad - exact.grad_logits).norm() / exact.grad_logits.norm())
    if error < 1e-6:
        torch.testing.assert_close(value.detach(), exact.cls, rtol=1e-6, atol=1e-9)
    return error


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("peer", [per_positive_loop, vectorised])
def test_exact_peers(peer, regime: str) -> None:
    assert gradient_error(peer, *problem(regime), delta=1.0) < 1e-9


@pytest.mark.parametrize("peer", [vectorised, bucketed_by_means])
def test_chunks_of_positives_change_nothing(peer, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = gradient_error(peer, *problem("middle"), delta=1.0)
    monkeypatch.setattr(peers, "PAIRS_AT_ONCE", 1700)  # a few positives in each chunk, and an uneven last one
    assert gradient_error(peer, *problem("middle"), delta=1.0) == pytest.approx(whole, abs=1e-12)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("ties", [False, True])
def test_buckets_are_exact_for_the_step(regime: str, ties: bool) -> None:
    logits, labels, errors = problem(regime)
    if ties:  # between positives and negatives, too
        logits = (logits * 8).round() / 8
    assert gradient_error(bucketed_by_means, logits, labels, errors, delta=0.0) < 1e-9


def test_buckets_of_one_negative_are_exact() -> None:
    scores = torch.linspace(-2, 2, 41, dtype=torch.float64)
    order = torch.randperm(41, generator=torch.Generator().manual_seed(0))
    labels = (torch.arange(41) % 2)[order]  # negative, positive, negative, ... by score
    errors = torch.linspace(0, 0.9, 20, dtype=torch.float64)
    assert gradient_error(bucketed_by_means, scores[order], labels, errors, delta=1.0) < 1e-9


@pytest.mark.parametrize("regime", REGIMES)
def test_buckets_are_an_approximation_for_the_ramp(regime: str) -> None:
    logits, labels, errors = problem(regime)
    assert 1e-5 < gradient_error(bucketed_by_means, logits, labels, errors, delta=1.0) < 0.5
    leaf = logits.requires_grad_()
    bucketed_by_means(leaf, labels, errors).backward()
    assert leaf.grad[labels == -1].eq(0).all()
    assert leaf.grad.sum().abs() < 1e-9 * leaf.grad.abs().sum()


@pytest.mark.parametrize("peer", [per_positive_loop, vectorised, bucketed_by_means])
def test_peers_without_negatives_in_reach(peer) -> None:
    for negatives in ([], [-9.0, -8.0]):
        scores = torch.tensor([0.5, 1.0, *negatives], dtype=torch.float64, requires_grad=True)
        labels = torch.tensor([1, 1, *(0 for _ in negatives)])
        result = peer(scores, labels, torch.tensor([0.1, 0.2], dtype=torch.float64))
        value = result[0] if isinstance(result, tuple) else result
        value.backward()
        assert value == 0
        assert scores.grad.eq(0).all()


def test_means_of_many_are_not_lost_in_float32() -> None:
    members = torch.full((3_000_000,), -4.6)
    means = peers._means(members, torch.tensor([0, 2_999_999, 1, 0]))
    torch.testing.assert_close(means, torch.tensor([0, -4.6, -4.6, 0]), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("dtype", "layout"), [("float32", "flat"), ("bfloat16", "levels"), ("float16", "levels-last")])
@pytest.mark.parametrize("regime", REGIMES)
def test_contenders_are_what_they_claim(regime: str, dtype: str, layout: str) -> None:
    judge = Judge(Case("retinanet", regime, image=32, batch=2, num_positives=20, dtype=dtype, layout=layout), CPU)
    for contender in (c for c in peers.contenders(CPU).values() if not c.compiled):
        error = judge.error(contender)
        if contender.exact:
            assert error <= LARGEST_ERROR, contender.name
        else:
            assert error is None if contender.exact is None else error > 10 * LARGEST_ERROR, contender.name


@pytest.mark.parametrize("layout", ["flat", "levels"])
def test_focal_from_classes_is_focal_from_targets(layout: str) -> None:
    inputs = make_inputs(SMALL._replace(layout=layout))
    gradients = []
    for loss in (peers.focal_giou, peers._on_tensors(peers._focal_giou, compiled=False)):
        inputs.clear()
        value = loss(inputs)
        value.backward()
        gradients.append([value.detach(), inputs.gradient(), inputs.pred_boxes.grad])
    torch.testing.assert_close(*gradients)


# Inputs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("head", HEADS)
def test_inputs(head: str, layout: str, dtype: str) -> None:
    case = Case(head, "late", image=100, batch=2, num_positives=17, dtype=dtype, layout=layout)
    if head == "second-stage" and layout != "flat":
        with pytest.raises(ValueError, match="no levels"):
            make_inputs(case)
        return
    inputs, again, other = make_inputs(case), make_inputs(case), make_inputs(case, seed=1)
    flat, classes = inputs.flat().detach(), HEADS[head].classes
    places = 2 * sum(math.ceil(100 / stride) ** 2 for stride in HEADS[head].strides)
    rows_expected = places * HEADS[head].anchors if head != "second-stage" else 2 * 512
    assert case.rows == rows_expected
    assert flat.shape == inputs.logit_labels.shape == (case.logits,) == (rows_expected * classes,)
    assert flat.dtype == DTYPES[dtype]
    assert flat.isfinite().all()
    assert (flat == 0).double().mean() < 0.01
    assert len(inputs.levels) == (1 if layout == "flat" else 5)
    # At most one positive for each anchor, P of them; with the regime's scores.
    labels = torch.cat([level.reshape(-1) for level in inputs.class_labels])
    assert labels.dtype == torch.int64
    assert ((labels >= 0) & (labels <= classes)).all()
    assert (labels < classes).sum() == inputs.logit_labels.sum() == 17 == case.positives
    assert inputs.logit_labels.view(-1, classes).sum(1).max() == 1
    positives = flat[inputs.logit_labels == 1].double()
    assert positives.mean() > 0 > -5 > flat.double().mean()
    assert all(leaf.requires_grad and leaf.is_leaf for leaf in inputs.leaves)
    assert inputs.loc_errors.shape == (17,)
    assert inputs.pred_boxes.shape == inputs.target_boxes.shape == (17, 4)
    # The same every time.
    assert torch.equal(flat, again.flat())
    assert torch.equal(inputs.logit_labels, again.logit_labels)
    assert torch.equal(inputs.pred_boxes, again.pred_boxes)
    assert not torch.equal(flat, other.flat())


def test_levels_are_views_of_what_convolutions_write() -> None:
    case = Case("retinanet", image=64, batch=2, num_positives=9, layout="levels")
    for level in make_inputs(case).levels:
        batch, height, width, anchors, classes = level.shape
        assert (batch, height, anchors, classes) == (2, width, 9, 80)
        channels_first = level.permute(0, 3, 4, 1, 2)
        assert channels_first.is_contiguous()
        if height > 1:
            assert level.stride(-1) == height * width
            assert not level.is_contiguous()
        assert level.untyped_storage().nbytes() == level.nbytes
    for level in make_inputs(case._replace(layout="levels-last")).levels:
        assert level.shape[0] == 2
        assert level.shape[2] == 80
        assert level.is_contiguous()


def test_regimes_and_sizes() -> None:
    for regime, ((neg_mean, neg_std), _) in REGIMES.items():
        scores = make_inputs(SMALL._replace(regime=regime)).flat().detach()
        assert float(scores.mean()) == pytest.approx(neg_mean, abs=0.1)
        assert float(scores.std()) == pytest.approx(neg_std, rel=0.1)
    # 49 104 anchors of 80 classes for each image of 512 x 512.
    assert presets.LARGE.logits == 8 * 49_104 * 80
    assert presets.LARGE.bytes_moved == 12 * presets.LARGE.logits
    assert presets.LARGE_HALF.bytes_moved == 6 * presets.LARGE.logits
    assert presets.SMALL.logits == pytest.approx(1.6e6, rel=0.02)
    scaled = Case("retinanet", num_positives=20_000, num_logits=10**5)
    assert (scaled.logits, scaled.rows, scaled.classes) == (10**5, 20_000, 5)


@pytest.mark.parametrize("positives", [1, 20_000])
def test_number_of_positives(positives: int) -> None:
    inputs = make_inputs(Case("proposals", image=256, batch=2, num_positives=positives))
    assert inputs.logit_labels.sum() == positives == len(inputs.loc_errors)


def test_too_many_positives() -> None:
    with pytest.raises(ValueError, match=r"num_positives.*1 to 1024"):
        make_inputs(Case("second-stage", batch=2, num_positives=1025))
    with pytest.raises(ValueError, match="num_positives"):
        make_inputs(SMALL._replace(num_positives=0))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_part_of_the_positives(layout: str) -> None:
    inputs = make_inputs(SMALL._replace(layout=layout))
    part = inputs.with_positives(5)
    assert part.logit_labels.sum() == part.case.positives == len(part.loc_errors) == 5
    assert part.levels is inputs.levels
    assert torch.equal(part.logit_labels.nonzero(), inputs.logit_labels.nonzero()[:5])
    assert inputs.logit_labels.sum() == 12


@pytest.mark.parametrize("name", presets.PRESETS)
def test_cases_of_presets_fit_together(name: str) -> None:
    preset = presets.PRESETS[name]
    for case in (*preset.cases, *preset.sweeps, *preset.scale):
        assert 1 <= case.positives <= case.rows, case.name
        small = reduced(case, 3e7)
        assert small.positives * small.logits <= 1.3 * 3e7, case.name
        assert 1 <= small.positives <= small.rows, case.name
        for name in ("head", "regime", "dtype", "layout"):
            assert getattr(small, name) == getattr(case, name)
        assert small.classes == case.classes or case.num_logits
