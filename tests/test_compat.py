"""The authors' signature: their results, and their heads' use of them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from dialect import GOLDEN, assert_close, assert_same_bits, drawn_case, load_golden, random_case

from alrp_triton import alrp_loss, compat
from alrp_triton.compat import APLoss, BucketedAPLoss, BucketedRankSort, RankLoss, RankSort, SortLoss, aLRPLoss


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


def qualities(case, ious):
    """Targets with the IoU of each positive."""
    targets = case.labels.float()
    targets[case.labels == 1] = ious
    return targets


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden_ap(path):
    case, golden = load_golden(path)
    for loss, targets in ((APLoss, case.labels), (BucketedAPLoss, qualities(case, golden["rs_ious"]))):
        x = case.logits.clone().requires_grad_()
        found = loss.apply(x, targets)
        found.backward()
        assert_close("loss", found, golden["ap"], 1e-6)
        assert_close("gradient", x.grad, golden["ap_grad_logits"], 1e-6)


@pytest.mark.parametrize("loss", [RankSort, BucketedRankSort])
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden_rank_sort(path, loss):
    """The gradient of both is that of the first, as the heads expect."""
    case, golden = load_golden(path)
    x = case.logits.clone().requires_grad_()
    ranking, sorting = loss.apply(x, qualities(case, golden["rs_ious"]))
    assert_close("ranking", ranking, golden["rs_rank"], 1e-6)
    assert_close("sorting", sorting, golden["rs_sort"], 1e-6)
    assert not sorting.requires_grad
    ranking.backward()
    assert_close("gradient", x.grad, golden["rs_grad_logits"], 1e-6)


@pytest.mark.parametrize("delta", [0.1, 0.4])
@pytest.mark.parametrize(("name", "loss"), [("rank", RankLoss), ("sort", SortLoss)])
def test_golden_edges(name, loss, delta):
    golden = np.load(Path(__file__).parent / "golden" / "members" / "ranked.npz")
    logits, targets, value, gradient = (
        torch.from_numpy(golden[key]) for key in ("logits", "targets", f"{name}_{delta}", f"{name}_{delta}_grad")
    )
    x = logits.clone().requires_grad_()
    found = loss.apply(x, targets, 1, delta)
    (2 * found).backward()
    assert_close("loss", found, value, 1e-6)
    assert_close("gradient", x.grad, 2 * gradient, 1e-6)


def test_every_loss_without_positives():
    for name in set(compat.__all__) - {"aLRPLoss"}:
        x = torch.randn(20, requires_grad=True)
        found = getattr(compat, name).apply(x, torch.zeros(20))
        loss = found[0] if isinstance(found, tuple) else found
        assert loss.shape == ()
        assert loss == 0
        loss.backward()
        assert not x.grad.any()


def test_targets_below_0_are_ignored():
    case = random_case(120, 12, ignored=0.3)
    ious = torch.rand(12) + 0.1
    targets = qualities(case, ious)
    alone = case.labels >= 0
    for loss in (RankSort, RankLoss, SortLoss, BucketedAPLoss):
        found = loss.apply(case.logits, targets)
        expected = loss.apply(case.logits[alone], targets[alone])
        torch.testing.assert_close(found, expected)


def test_wrong_arguments_of_the_others():
    logits, targets = torch.zeros(4), torch.tensor([0.5, 0, 0, 1])
    for name in set(compat.__all__) - {"aLRPLoss"}:
        loss = getattr(compat, name)
        with pytest.raises(ValueError, match=r"^targets: expected the shape"):
            loss.apply(logits, targets[:3])
        with pytest.raises(TypeError, match=r"^targets: expected a tensor"):
            loss.apply(logits, [1, 0, 0, 1])
        with pytest.raises(ValueError, match=r"^delta: expected"):
            loss.apply(logits, targets, **{"delta_RS" if "Sort" in name and loss is not SortLoss else "delta": -1.0})
    for loss in (RankSort, RankLoss, SortLoss):
        with pytest.raises(ValueError, match=r"^eps: expected 1e-10, as published, got 0"):
            loss.apply(logits, targets, eps=0)
