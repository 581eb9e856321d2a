"""Mixed precision: the same half-precision scores give the same loss, and overflow skips a step and nothing else."""

import copy

import pytest
import torch
from dialect import (
    KERNELS,
    Criterion,
    Detector,
    assert_rounded,
    assert_same_bits,
    by_backend,
    by_criterion,
    make_batch,
)
from torch.amp import GradScaler

by_half = pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])


def scores(half):
    """What a head gives under autocast, and what else the loss takes."""
    model, batch = Detector("ap_loss"), make_batch()
    with torch.no_grad():
        logits = [(4 * model.score(level)).to(half) for level in batch.features]
    boxes = batch.targets + 0.125 * torch.rand(4, generator=torch.Generator().manual_seed(0))
    return logits, batch.labels, boxes, batch.targets


def run(criterion, logits, labels, boxes, targets, upstream=1.0):
    """Losses, the scores' gradients of all levels, and the boxes'."""
    leaves, boxes = [x.clone().requires_grad_() for x in logits], boxes.clone().requires_grad_()
    losses = criterion(leaves, labels, boxes, targets)
    (sum(losses) * upstream).backward()
    return [loss.detach() for loss in losses], torch.cat([x.grad.flatten() for x in leaves]), boxes.grad


def assert_same_boxes(found, expected):
    assert (found is None) == (expected is None)
    if found is not None:
        assert_same_bits("boxes", found, expected)


@by_half
@by_criterion
@by_backend
def test_half_precision_scores_give_the_float32_result(backend, member, half):
    """Bit for bit, losses and boxes; the scores' gradients are the float32 ones, rounded."""
    logits, *rest = scores(half)
    losses, gradient, boxes = run(Criterion(member, backend=backend), logits, *rest)
    full = [x.float() for x in logits]
    expected, exact, expected_boxes = run(Criterion(member, backend=backend), full, *rest)
    for one, other in zip(losses, expected):
        assert_same_bits("loss", one, other)
        assert one.dtype == torch.float32
    assert gradient.dtype == half
    assert gradient.abs().sum() > 0
    # Rounded once from what float32 itself was rounded from.
    assert_rounded("gradient", gradient, exact.double(), 1e-7)
    assert_same_boxes(boxes, expected_boxes)


@pytest.mark.thinned(1 if KERNELS else 2)
@by_half
@by_criterion
@by_backend
def test_a_criterion_within_autocast_gives_what_it_gives_outside(backend, member, half):
    """Half-precision and float32 scores alike; backward within the region or after it."""
    for logits, *rest in (scores(half), scores(torch.float32)):
        expected, gradient, boxes = run(Criterion(member, backend=backend), logits, *rest)
        with torch.autocast("cpu", half):
            found, found_gradient, found_boxes = run(Criterion(member, backend=backend), logits, *rest)
        leaves, leaf = [x.clone().requires_grad_() for x in logits], rest[1].clone().requires_grad_()
        with torch.autocast("cpu", half):
            losses = Criterion(member, backend=backend)(leaves, rest[0], leaf, rest[2])
        sum(losses).backward()
        later = [loss.detach() for loss in losses]
        for one, two, other in zip(found, later, expected):
            assert_same_bits("loss", one, other)
            assert_same_bits("loss", two, other)
        assert_same_bits("gradient", found_gradient, gradient)
        assert_same_bits("gradient", torch.cat([x.grad.flatten() for x in leaves]), gradient)
        assert_same_boxes(found_boxes, boxes)
        assert_same_boxes(leaf.grad, boxes)


@by_criterion
@by_backend
def test_a_scale_reaches_the_gradient_before_it_is_rounded(backend, member):
    """What would underflow in float16 does not where the loss is scaled, which is what a GradScaler is for."""
    logits, *rest = scores(torch.float16)
    exact = run(Criterion(member, backend=backend), [x.double() for x in logits], *rest)[1]
    plain = run(Criterion(member, backend=backend), logits, *rest, upstream=2.0**-20)[1]
    scaled = run(Criterion(member, backend=backend), logits, *rest, upstream=2.0**10)[1]
    assert (plain[exact != 0] == 0).any()
    assert_rounded("scaled", scaled, exact * 2.0**10, 1e-6)


def train(member, backend, batches, bad=None):
    """Float16 autocast with a GradScaler over batches; ``bad`` spoils that batch, or says that it is left out, where
    the scale alone changes as it would have."""
    model = Detector(member, backend=backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scaler, history = GradScaler("cpu", init_scale=2.0**10), []
    for i, batch in enumerate(batches):
        if bad == "left out" and i == 2:
            scaler.update(scaler.get_scale() / 2)
            continue
        if bad is not None and i == 2:
            features = [level.clone() for level in batch.features]
            features[0][int(batch.rows[0]) if bad == "positive" else 0] = torch.nan
            batch = batch._replace(features=features)
        before = copy.deepcopy(model.state_dict())
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            losses = model(*batch)
        scaler.scale(sum(losses)).backward()
        scaler.step(optimizer)
        scaler.update()
        finite = all(loss.isfinite() for loss in losses)
        if bad is not None and i == 2:
            assert not finite
            for name, value in model.state_dict().items():
                assert_same_bits(name, value, before[name])
        else:
            assert finite
        history.append(scaler.get_scale())
    return model, optimizer, history


def trained_batches():
    """In the third, row 0 takes part and is no positive."""
    batches = [make_batch(seed=seed) for seed in range(5)]
    labels = [level.clone() for level in batches[2].labels]
    if 0 not in batches[2].rows:
        labels[0][0] = 4
    batches[2] = batches[2]._replace(labels=labels)
    assert batches[2].rows[0] < len(labels[0])
    return batches


@pytest.mark.thinned(1 if KERNELS else 2)
@by_criterion
@by_backend
@pytest.mark.parametrize("bad", ["positive", "negative"])
def test_a_batch_that_overflowed_leaves_no_trace(bad, backend, member):
    """NaN among the scores makes the loss NaN, a scaler skips the step, and self-balancing takes no note of it: what
    follows is as if the batch had not been."""
    batches = trained_batches()
    model, optimizer, scales = train(member, backend, batches, bad)
    without, other, _ = train(member, backend, batches, "left out")
    assert scales == [1024.0, 1024.0, 512.0, 512.0, 512.0]
    for name, value in without.state_dict().items():
        assert_same_bits(name, model.state_dict()[name], value)
    for p, q in zip(optimizer.state.values(), other.state.values()):
        assert_same_bits("momentum", p["momentum_buffer"], q["momentum_buffer"])
    untouched = Detector(member).score.weight
    assert not torch.equal(model.score.weight, untouched)


@pytest.mark.skipif(KERNELS, reason="the scale is applied by code that the other tests run there")
@by_criterion
@by_backend
def test_a_scale_that_is_too_large_is_found(backend, member):
    """Gradients beyond float16 come out infinite, never wrapped or clipped: steps are skipped until the scale fits."""
    model, batch = Detector(member, backend=backend), make_batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler, skipped = GradScaler("cpu", init_scale=2.0**22), 0
    for _ in range(16):
        before = model.score.weight.detach().clone()
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            losses = model(*batch)
        assert all(loss.isfinite() for loss in losses)
        scaler.scale(sum(losses)).backward()
        gradient = model.score.weight.grad
        scaler.step(optimizer)
        scaler.update()
        if torch.equal(before, model.score.weight):
            assert not gradient.isfinite().all()
            skipped += 1
        else:
            break
    assert 0 < skipped < 16
    assert scaler.get_scale() == 2.0 ** (22 - skipped)
