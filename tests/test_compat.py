"""The authors' signature: their results, and their heads' use of them."""

import pytest
import torch
from dialect import GOLDEN, assert_close, assert_same_bits, drawn_case, load_golden, random_case

from alrp_triton import alrp_loss
from alrp_triton.compat import aLRPLoss


def loc_of_a_head(rank, order, errors):
    """What a head of the authors' makes of ranks and order: errors summed up from the top, over ranks from the top."""
    from_top = order.flip(0)
    return (errors[from_top].cumsum(0) / rank[from_top]).mean()


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.float32])
def test_golden(path, dtype):
    case, golden = load_golden(path)
    x = case.logits.clone().requires_grad_()
    errors = case.loc_errors.clone().requires_grad_()
    cls, rank, order = aLRPLoss.apply(x, case.labels.to(dtype), errors)
    assert cls.shape == ()
    assert not rank.requires_grad
    assert order.dtype == torch.int64
    assert_close("cls", cls, golden["alrp_cls"], 1e-6)
    assert_close("rank", rank, golden["alrp_rank"], 1e-6)
    loc = loc_of_a_head(rank, order, errors)
    assert_close("loc", loc, golden["alrp_loc"], 1e-6)
    (cls + loc).backward()
    assert_close("grad_logits", x.grad, golden["alrp_grad_logits"], 1e-6)
    assert_close("grad_loc_errors", errors.grad, golden["alrp_grad_loc_errors"], 1e-6)


def test_arguments_by_place():
    case = random_case(200, 20)
    expected = alrp_loss(*case[1:], delta=0.25, eps=0.5)
    cls, rank, _ = aLRPLoss.apply(case.logits, case.labels, case.loc_errors, 0.25, 0.5)
    assert_same_bits("cls", cls, expected.cls)
    assert_same_bits("rank", rank, expected.rank)


@pytest.mark.parametrize(
    "case",
    [
        random_case(300, 40, "middle"),
        drawn_case("ties", [-1.0, 0.0, 0.5], 200, 40),
        drawn_case("infinite", [float("-inf"), 0.0, float("inf")], 100, 20),
        random_case(1, 1),
        random_case(300, 40, "early", dtype=torch.bfloat16),
    ],
    ids=lambda case: case.name,
)
def test_order_is_stable_and_gives_the_sorted_loc(case):
    positives = case.logits[case.labels == 1].tolist()
    _, rank, order = aLRPLoss.apply(case.logits, case.labels, case.loc_errors)
    assert order.tolist() == sorted(range(len(positives)), key=lambda i: positives[i])
    assert_close("loc", loc_of_a_head(rank, order, case.loc_errors), alrp_loss(*case[1:]).loc, 1e-6)


def test_targets_other_than_0_and_1_are_ignored():
    case = random_case(120, 12, ignored=0.3)
    expected = aLRPLoss.apply(*case[1:])
    ignored = case.labels == -1
    for value in (-1, 2, 7, -100):
        for dtype in (torch.int32, torch.int64, torch.float32, torch.float64):
            targets = case.labels.masked_fill(ignored, value).to(dtype)
            for one, other in zip(aLRPLoss.apply(case.logits, targets, case.loc_errors), expected):
                assert_same_bits(f"{value}, {dtype}", one, other)
    for value in (0.5, float("nan")):
        targets = case.labels.float().masked_fill(ignored, value)
        for one, other in zip(aLRPLoss.apply(case.logits, targets, case.loc_errors), expected):
            assert_same_bits(str(value), one, other)


def test_errors_are_constants_here():
    case = random_case(100, 10)
    errors = case.loc_errors.clone().requires_grad_()
    x = case.logits.clone().requires_grad_()
    cls, _, _ = aLRPLoss.apply(x, case.labels, errors)
    cls.backward()
    assert errors.grad is None
    # But they take part in the score gradient.
    other = case.logits.clone().requires_grad_()
    aLRPLoss.apply(other, case.labels, torch.zeros(10))[0].backward()
    assert not torch.equal(x.grad, other.grad)


def test_no_positives():
    x = torch.randn(20, requires_grad=True)
    cls, rank, order = aLRPLoss.apply(x, torch.zeros(20), torch.empty(0))
    assert cls.shape == ()
    assert cls == 0
    assert rank.shape == order.shape == (0,)
    assert order.dtype == torch.int64
    cls.backward()
    assert not x.grad.any()


def test_wrong_arguments():
    logits, labels, errors = torch.zeros(4), torch.tensor([1, 0, 0, 1]), torch.zeros(2)
    for error, name, arguments in [
        (TypeError, "targets", (logits, [1, 0, 0, 1], errors)),
        (ValueError, "targets", (logits, labels[:3], errors)),
        (TypeError, "logits", ([0.0] * 4, labels, errors)),
        (TypeError, "logits", (logits.long(), labels, errors)),
        (TypeError, "(regression_losses|loc_errors)", (logits, labels, [0.0, 0.0])),
        (ValueError, "(regression_losses|loc_errors)", (logits, labels, torch.zeros(3))),
        (ValueError, "delta", (logits, labels, errors, -1.0)),
        (ValueError, "eps", (logits, labels, errors, 1.0, -1.0)),
    ]:
        with pytest.raises(error, match=f"^{name}: expected"):
            aLRPLoss.apply(*arguments)
