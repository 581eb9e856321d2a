"""Every loss of the family in one graph of torch.compile, for any number of positives."""

import pytest
import torch
from dialect import (
    KERNELS,
    assert_close,
    assert_same_bits,
    depth_error,
    depth_normaliser,
    depth_target,
    random_case,
    weighted_error,
)
from torch._dynamo.testing import CompileCounterWithBackend

from alrp_triton import APLoss, RankSortLoss, ap_loss, ndcg_loss, rank_sort_loss
from alrp_triton.framework import RankingLoss, ranking_loss


def SQUARE(x, delta):
    return (x / (2 * delta) + 0.5).clamp(0, 1) ** 2


def imprecision(ranking):
    return ranking.num_false_positives / ranking.rank


# aLRP is in test_operators.py. Each as a scalar of logits, labels, numbers of the positives, and how many these are.
LOSSES = {
    "ap": lambda x, y, v, p, **a: ap_loss(x, y, num_positives=p, **a),
    "ndcg": lambda x, y, v, p, **a: ndcg_loss(x, y, num_positives=p, **a),
    "rank_sort": lambda x, y, v, p, **a: sum(rank_sort_loss(x, y, v, **a)),
    "formula": lambda x, y, v, p, **a: ranking_loss(x, y, imprecision, num_positives=p, **a),
    "depth": lambda x, y, v, p, **a: ranking_loss(
        x, y, depth_error, target=depth_target, normaliser=depth_normaliser, extras={"costs": v}, **a
    ),
    "pairs": lambda x, y, v, p, **a: ranking_loss(
        x, y, weighted_error, extras={"weights": v}, smoothing=SQUARE, distribution=SQUARE, **a
    ),
}
# Compiling takes seconds; where kernels run the operators are seen in other tests.
pytestmark = pytest.mark.skipif(KERNELS, reason="needs no kernel")


def results(function, case, **arguments):
    x, values = case.logits.clone().requires_grad_(), case.loc_errors.clone().requires_grad_()
    loss = function(x, case.labels, values, case.num_positives, **arguments)
    loss.backward()
    return [loss.detach(), x.grad, *([] if values.grad is None else [values.grad])]


def check(function, sizes, dynamic, groups=0):
    """Compiled once, the same bits as eager for cases of these sizes."""
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    one = torch.compile(function, fullgraph=True, backend=counter, dynamic=dynamic)
    counts = []
    for num_logits, num_pos in sizes:
        case = random_case(num_logits, num_pos, ignored=0.3)
        arguments = {"groups": torch.arange(num_logits) % groups} if groups else {}
        found, expected = (results(f, case, **arguments) for f in (one, function))
        assert len(found) == len(expected)
        for actual, wanted in zip(found, expected):
            assert_same_bits(f"{num_logits}, {num_pos}", actual, wanted)
        counts.append(counter.frame_count)
    assert counts == counts[:1] * len(sizes)


@pytest.mark.thinned(4)
@pytest.mark.parametrize("name", ["ap", "rank_sort", "depth", "pairs"])
def test_one_graph_serves_any_number_of_positives_and_logits(name):
    """Else torch.compile would give up after some eight batches or image sizes."""
    check(LOSSES[name], [(90, 9), (90, 7), (130, 30)], dynamic=True)


@pytest.mark.nightly
def test_graphs_of_groups():
    """The scans of groups take as many steps as 2P has binary digits, for which there is a graph each."""
    check(LOSSES["ndcg"], [(90, 12), (90, 15), (130, 10)], dynamic=True, groups=3)


def test_by_default():
    check(LOSSES["rank_sort"], [(90, 9)], dynamic=None)


def test_no_positives():
    check(LOSSES["rank_sort"], [(90, 0)], dynamic=True)


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def levels():
    torch.manual_seed(0)
    logits = [torch.randn(8, 5), torch.randn(2, 3, 5)]
    labels = [torch.tensor([0, 5, 5, 1, -1, 5, 4, 5]), torch.tensor([[5, 2, -1], [5, 5, 0]])]
    return logits, labels, [torch.arange(8) % 2, torch.tensor([[0] * 3, [1] * 3])]


@pytest.mark.parametrize("make", [APLoss, lambda: RankingLoss(imprecision, distribution=SQUARE)], ids=["ap", "pairs"])
def test_compiled_modules_on_levels(make):
    logits, labels, groups = levels()
    criterion, outcomes = make(), []
    for function in (compiled(criterion), criterion):
        leaves = [x.clone().requires_grad_() for x in logits]
        loss = function(leaves, labels, 5, groups)
        loss.backward()
        outcomes.append([loss.detach(), *(x.grad for x in leaves)])
    for actual, expected in zip(*outcomes):
        assert_same_bits("compiled", actual, expected)


def test_compiled_rank_sort_on_levels():
    logits, labels, _ = levels()
    corner = torch.rand(5, 2)
    pred, target = torch.cat([corner, corner + 1 + torch.rand(5, 2)], dim=1), torch.cat([corner, corner + 1], dim=1)
    outcomes = []
    for function in (compiled(RankSortLoss()), RankSortLoss()):
        leaves, b = [x.clone().requires_grad_() for x in logits], pred.clone().requires_grad_()
        output = function(leaves, labels, b, target)
        (output.cls + output.loc).backward()
        outcomes.append([*(value.detach() for value in output), *(x.grad for x in leaves), b.grad])
    for actual, expected in zip(*outcomes):
        assert_close("compiled", actual, expected, 2e-7)


def test_positives_that_nobody_counted():
    """Their number has to be read from the device, which may break the graph; but never gives something else."""
    case = random_case(90, 9)
    try:
        value = compiled(LOSSES["ap"])(*case[1:], None)
    except torch._dynamo.exc.TorchDynamoException:
        return
    assert_same_bits("value", value, LOSSES["ap"](*case[1:], None))
