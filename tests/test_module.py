"""ALRPLoss: the function, the boxes and the self-balancing weight in one module."""

import pytest
import torch
from dialect import assert_close, assert_same_bits, by_backend, problem_of_images, random_case

from alrp_triton import ALRPLoss, ALRPLossOutput, RankSortLoss, SelfBalance, alrp_loss, rank_sort_loss
from alrp_triton.boxes import box_error


def problem(num_logits=150, num_pos=8, dtype=torch.float32, seed=0):
    """Logits, labels, predicted and target boxes."""
    case = random_case(num_logits, num_pos, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(2, num_pos, 2, generator=generator) * 4
    pred, target = torch.cat([corner, corner + 10], dim=-1).to(dtype).unbind(0)
    return case.logits, case.labels, pred, target


def corner_distance(pred, target):
    return (pred - target).abs().mean(dim=1) / 40


def run(criterion, logits, labels, pred, target):
    """Output and both gradients of cls + loc."""
    x, boxes = logits.clone().requires_grad_(), pred.clone().requires_grad_()
    output = criterion(x, labels, boxes, target)
    (output.cls + output.loc).backward()
    return output, x.grad, boxes.grad


def test_defaults_are_the_papers():
    criterion = ALRPLoss()
    assert (criterion.delta, criterion.tau, criterion.box_error) == (1.0, 0.5, "giou")
    assert (criterion.eps, criterion.loc_ranking) == (1e-5, "sorted")
    assert (criterion.ignore_index, criterion.backend) == (-1, "auto")
    assert isinstance(criterion.self_balance, SelfBalance)
    assert criterion.self_balance.weight == 50
    logits, labels, pred, target = problem()
    output = criterion(logits, labels, pred, target)
    assert isinstance(output, ALRPLossOutput)
    cls, loc, rank = alrp_loss(logits, labels, box_error(pred, target, "giou", 0.5))
    assert_same_bits("cls", output.cls, cls)
    assert_same_bits("loc", output.loc, 50 * loc)
    assert_same_bits("rank", output.rank, rank)


def test_each_loss_has_a_self_balance_of_its_own():
    one, other = ALRPLoss(), ALRPLoss()
    assert one.self_balance is not other.self_balance
    for _ in range(2):
        one(*problem())
    one.self_balance.step_epoch()
    assert one.self_balance.weight != 50
    assert other.self_balance.weight == 50
    assert other.self_balance.count == 0
    shared = SelfBalance(init=3)
    assert ALRPLoss(self_balance=shared).self_balance is shared


@by_backend
@pytest.mark.parametrize("kind", ["iou", "giou", "diou", "ciou", corner_distance])
@pytest.mark.parametrize("tau", [0.0, 0.5, 0.7])
def test_weight_and_errors_reach_the_boxes(tau, kind, backend):
    logits, labels, pred, target = problem(60, 5)
    arguments = {"delta": 0.5, "loc_ranking": "smooth", "backend": backend}
    criterion = ALRPLoss(tau=tau, box_error=kind, self_balance=7.0, **arguments)
    output, grad_logits, grad_boxes = run(criterion, logits, labels, pred, target)
    x, boxes = logits.clone().requires_grad_(), pred.clone().requires_grad_()
    cls, loc, _ = alrp_loss(x, labels, box_error(boxes, target, kind, tau), **arguments)
    (cls + 7 * loc).backward()
    assert_same_bits("loc", output.loc, 7 * loc)
    assert_same_bits("grad_logits", grad_logits, x.grad)
    assert_close("grad_boxes", grad_boxes, boxes.grad, 1e-6)
    assert grad_boxes.abs().sum() > 0


@pytest.mark.parametrize(("weight", "factor"), [(None, 1.0), (0, 0.0), (1, 1.0), (2.5, 2.5)])
def test_constant_weights(weight, factor):
    logits, labels, pred, target = problem()
    plain = alrp_loss(logits, labels, box_error(pred, target, "giou", 0.5))
    criterion = ALRPLoss(self_balance=weight)
    for _ in range(3):
        output = criterion(logits, labels, pred, target)
        assert_same_bits("loc", output.loc, factor * plain.loc)
        assert_same_bits("cls", output.cls, plain.cls)
    assert not criterion.state_dict()


def test_weight_follows_unweighted_losses():
    criterion = ALRPLoss(self_balance=SelfBalance(init=50, period=2, average="ratios"))
    plain = []
    for seed in range(4):
        logits, labels, pred, target = problem(seed=seed)
        cls, loc, _ = (value.double() for value in alrp_loss(logits, labels, box_error(pred, target, "giou", 0.5)))
        plain.append((cls + loc) / loc)
        output = criterion(logits, labels, pred, target)
        # The second iteration completes a period and uses its weight already.
        weight = 50 if seed == 0 else sum(plain[:2]) / 2 if seed < 3 else sum(plain[2:]) / 2
        assert_close(f"iteration {seed}", output.loc, weight * loc, 1e-6)


def test_the_total_is_the_sum_of_the_parts():
    logits, labels, pred, target = problem()
    for criterion in (ALRPLoss(), RankSortLoss()):
        loss = criterion(logits, labels, pred, target)
        assert torch.equal(loss.total, loss.cls + loss.loc)
    errors = box_error(pred, target, "giou", 0.5)
    loss = alrp_loss(logits, labels, errors)
    assert torch.equal(loss.total, loss.cls + loss.loc)
    loss = rank_sort_loss(logits, labels, 1 - errors.detach())
    assert torch.equal(loss.total, loss.ranking + loss.sorting)


def test_an_output_says_what_to_differentiate():
    logits, labels, pred, target = problem()
    errors = box_error(pred, target, "giou", 0.5)
    outputs = [criterion(logits, labels, pred, target) for criterion in (ALRPLoss(), RankSortLoss())]
    for loss in (*outputs, alrp_loss(logits, labels, errors), rank_sort_loss(logits, labels, 1 - errors)):
        assert not hasattr(loss, "backward")
        with pytest.raises(AttributeError, match=rf"^{type(loss).__name__} .*\.total\.backward\(\)"):
            loss.backward()


def test_batches_without_positives():
    criterion = ALRPLoss(self_balance=SelfBalance(period=1))
    logits = torch.randn(5, 3, requires_grad=True)
    pred = torch.empty(0, 4, requires_grad=True)
    output = criterion(logits, torch.full((5,), 3), pred, torch.empty(0, 4))
    assert output.cls.item() == output.loc.item() == 0
    assert criterion.self_balance.weight == 50
    assert criterion.self_balance.count == 0
    (output.cls + output.loc).backward()
    assert not logits.grad.any()
    assert pred.grad.shape == (0, 4)


def test_levels_and_ignored_rows():
    logits, labels, pred, target = problem()
    whole = ALRPLoss(self_balance=None, ignore_index=255)(logits, labels.masked_fill(labels == -1, 255), pred, target)
    parts = ALRPLoss(self_balance=None)(logits.split(40), labels.split(40), pred, target)
    for one, other in zip(parts, whole):
        assert_same_bits("output", one, other)


WRONG = [
    *((ValueError, {"tau": tau}) for tau in (1.0, -0.1)),
    *((TypeError, {"tau": "0.5"}), (ValueError, {"box_error": "l1"}), (TypeError, {"box_error": 3})),
    *((TypeError, {"self_balance": balance}) for balance in ("auto", True)),
    *((ValueError, {"self_balance": balance}) for balance in (-1.0, float("nan"), float("inf"))),
]
WRONG_IN_FORWARD = [
    *((ValueError, {"delta": -1.0}), (TypeError, {"delta": "1"}), (ValueError, {"eps": -1.0})),
    *((ValueError, {"loc_ranking": "other"}), (ValueError, {"backend": "other"}), (TypeError, {"ignore_index": 0.5})),
]


def test_wrong_arguments():
    for error, arguments in WRONG:
        name = next(iter(arguments))
        with pytest.raises(error, match=f"^{name}: expected"):
            ALRPLoss(**arguments)
    for error, arguments in WRONG_IN_FORWARD:
        with pytest.raises(error, match=f"^{next(iter(arguments))}: expected"):
            ALRPLoss(**arguments)(*problem())


@pytest.mark.usefixtures("looking")
def test_wrong_boxes():
    logits, labels, pred, target = problem()
    criterion = ALRPLoss()
    with pytest.raises(ValueError, match=r"^pred_boxes: expected"):
        criterion(logits, labels, pred[:, :3], target)
    with pytest.raises(ValueError, match=r"^target_boxes: expected"):
        criterion(logits, labels, pred, target[:5])
    with pytest.raises(ValueError, match="expected one for each"):
        criterion(logits, labels, pred[:5], target[:5])
    assert criterion.self_balance.count == 0


def test_repr_names_the_settings():
    text = repr(ALRPLoss(delta=0.25, self_balance=2.0))
    assert "delta=0.25" in text
    assert "self_balance=2.0" in text
    assert "SelfBalance" in repr(ALRPLoss())


def test_groups():
    logits, classes, _, values = problem_of_images()
    boxes = torch.tensor([0.0, 0.0, 1.0, 1.0]).repeat(len(values), 1)
    module = ALRPLoss(delta=0.5, box_error=lambda pred, target: values, self_balance=3.0, eps=0.25)
    images = torch.arange(3)[:, None].expand(3, 14)
    found = module(logits, classes, boxes, boxes, images)
    expected = alrp_loss(logits, classes, values, delta=0.5, eps=0.25, groups=images)
    assert_same_bits("cls", found.cls, expected.cls)
    assert_same_bits("loc", found.loc, 3.0 * expected.loc)
    assert_same_bits("rank", found.rank, expected.rank)
    assert found.cls != module(logits, classes, boxes, boxes).cls
