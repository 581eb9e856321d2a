"""``monitor=True``: what the statistics are, and that they change and cost nothing else."""

from __future__ import annotations

import copy
import io
import pickle
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from dialect import (
    KERNELS,
    NAN,
    Case,
    all_cases,
    assert_close,
    assert_same_bits,
    by_backend,
    by_engine_backend,
    imprecision,
    listed_case,
    random_case,
    squared_ramp,
)
from dialect.processes import BACKENDS, MARKS, SIZE, cut
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from alrp_triton import ALRPLoss, APLoss, NDCGLoss, RankSortLoss, SelfBalance, ap_loss, ndcg_loss
from alrp_triton.engine.placed import MOST_COMPARED
from alrp_triton.framework import RankingLoss
from alrp_triton.reference import difference, ramp

Stats = dict[str, Tensor]
RANKS = ["num_positives", *(f"num_false_positives_p{n}" for n in (10, 50, 90)), "share_solved", "precision"]
OF_BOXES = ["score_loc_correlation", "cls", "loc", "weight"]
CRITERIA: dict[str, Callable[..., Any]] = {
    # With tau = 0 errors are 1 - IoU, so that both of these see the same order of the boxes.
    "alrp": lambda **settings: ALRPLoss(tau=0.0, box_error="iou", **settings),
    "rank_sort": lambda **settings: RankSortLoss(**{"delta": 1.0, **settings}),
    "ap": APLoss,
    "ndcg": NDCGLoss,
    "own": lambda **settings: RankingLoss(imprecision, **settings),
}
by_criterion = pytest.mark.parametrize("name", CRITERIA)
CASES = {case.name: case for case in all_cases()}
TIES = ["integers", "halves", "two_values", "all_equal", "all_zero"]
FEW = ["one_positive", "a_positive", "no_negatives", "nothing", "a_negative", "all_ignored", "no_positives"]
OTHERS = ["middle", "late", "bfloat16", "float16", "float64", "positives_at_both_ends", "ignored_nan"]
CHOSEN = ["middle", "integers", "no_positives", "positives_at_both_ends"] if KERNELS else [*TIES, *FEW, *OTHERS]


def ious_of(case: Case) -> Tensor:
    """Of few values, so that many are equal."""
    return 1 - (3 * case.loc_errors.float()).round() / 4


def boxes_of(case: Case) -> tuple[Tensor, Tensor]:
    """Predicted and target boxes with these IoUs, whose quotients are exact."""
    target = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).repeat(case.num_positives, 1)
    predicted = target.clone()
    predicted[:, 3] = ious_of(case)
    return predicted, target


def run(criterion: Any, case: Case, **arguments: Any) -> Any:
    """What the criterion returns; gradients are in the case's logits, if they have one."""
    if criterion.takes_boxes:
        return criterion(case.logits, case.labels, *boxes_of(case), **arguments)
    return criterion(case.logits, case.labels, case.num_positives, **arguments)


def stats_of(criterion: Any, case: Case, **arguments: Any) -> Stats:
    run(criterion, case, **arguments)
    stats: Stats = criterion.stats
    return stats


def by_hand(case: Case, delta: float = 1.0, groups: Tensor | None = None) -> dict[str, float]:
    """The statistics of the ranks, positive by positive."""
    logits, labels = case.logits.double(), case.labels
    ids = torch.zeros_like(labels) if groups is None else groups
    found, precisions = [], {}
    for i in (labels == 1).nonzero()[:, 0].tolist():
        heights = ramp(difference(logits, logits[i : i + 1]), delta)[0]
        together = ids == ids[i]
        false = float(heights[together & (labels == 0)].sum())
        true = 1 + float(heights[together & (labels == 1)].sum()) - float(heights[i])
        found.append(false)
        precisions.setdefault(int(ids[i]), []).append(true / (true + false))
    ordered = sorted(found)

    def quantile(tenths: int) -> float:
        """The first that at least so many of the positives do not exceed."""
        return next((x for n, x in enumerate(ordered, 1) if 10 * n >= tenths * len(ordered)), 0.0)

    means = [sum(each) / len(each) for each in precisions.values()]
    return {
        "num_positives": float(len(found)),
        **{f"num_false_positives_p{10 * tenths}": quantile(tenths) for tenths in (1, 5, 9)},
        "share_solved": sum(x == 0 for x in found) / max(len(found), 1),
        "precision": sum(means) / max(len(means), 1),
    }


def spearman(first: list[float], second: list[float]) -> float:
    """By the definition: the linear correlation of ranks, where equal values share their mean rank."""

    def ranks(values: list[float]) -> Tensor:
        middle = [sum(v < x for v in values) + (sum(v == x for v in values) - 1) / 2 for x in values]
        return torch.tensor(middle, dtype=torch.float64)

    x, y = ranks(first), ranks(second)
    if len(first) < 2 or (x == x[0]).all() or (y == y[0]).all():
        return 0.0
    return float(torch.corrcoef(torch.stack([x, y]))[0, 1])


def assert_stats(found: Stats, expected: dict[str, float]) -> None:
    for name, value in expected.items():
        assert float(found[name]) == pytest.approx(value, rel=2e-6, abs=1e-6), name


@pytest.mark.thinned(5 if KERNELS else 9)
@pytest.mark.parametrize("case", CHOSEN)
@by_criterion
@by_backend
def test_the_statistics_are_those_by_hand(backend: str, name: str, case: str) -> None:
    criterion, problem = CRITERIA[name](backend=backend, monitor=True), CASES[case]
    out, stats = run(criterion, problem), criterion.stats
    assert list(stats) == [*RANKS, *(OF_BOXES if criterion.takes_boxes else ["cls"])]
    dtype = torch.float64 if problem.logits.dtype == torch.float64 else torch.float32
    for value in stats.values():
        assert (value.shape, value.dtype, value.requires_grad) == ((), dtype, False)
        assert value.untyped_storage().nbytes() == value.nbytes  # what is saved of it, too
    assert_stats(stats, by_hand(problem))
    assert_same_bits("cls", stats["cls"], (out.cls if criterion.takes_boxes else out).detach())
    if criterion.takes_boxes:
        assert_same_bits("loc", stats["loc"], out.loc.detach())
        scores = problem.logits[problem.labels == 1].tolist()
        assert_stats(stats, {"score_loc_correlation": spearman(scores, ious_of(problem).tolist())})


@by_backend
@pytest.mark.parametrize("delta", [0.0, 0.3])
def test_of_other_ramps(backend: str, delta: float) -> None:
    for name in ("alrp", "ap"):
        criterion = CRITERIA[name](backend=backend, delta=delta, monitor=True)
        assert_stats(stats_of(criterion, CASES["integers"]), by_hand(CASES["integers"], delta))


@by_backend
def test_a_better_order_of_boxes_correlates_more(backend: str) -> None:
    case = listed_case("ordered", [3.0, 2.0, 1.0, 0.0], [0.5])._replace(loc_errors=torch.tensor([0.0, 0.4, 0.7, 1.0]))
    for name in ("alrp", "rank_sort"):
        criterion = CRITERIA[name](backend=backend, monitor=True)
        assert stats_of(criterion, case)["score_loc_correlation"] == 1
        assert stats_of(criterion, case._replace(loc_errors=1 - case.loc_errors))["score_loc_correlation"] == -1


@pytest.mark.filterwarnings("error")
@by_backend
def test_of_errors_in_half_precision_that_are_not_contiguous(backend: str) -> None:
    case = random_case(90, 9)
    errors = case.loc_errors.bfloat16()[:, None].repeat(1, 2)[:, 0]
    criterion = ALRPLoss(box_error=lambda *_: errors, backend=backend, monitor=True)
    expected = spearman(case.logits[case.labels == 1].tolist(), (-errors).tolist())
    assert_stats(stats_of(criterion, case), {"score_loc_correlation": expected})


@pytest.mark.thinned(2 if KERNELS else 3)
@by_criterion
@by_backend
def test_in_groups(backend: str, name: str) -> None:
    """Each positive among its own negatives; the precision is the mean over the groups, as the loss is."""
    case = CASES["integers"]
    groups = torch.randint(4, case.labels.shape, generator=torch.Generator().manual_seed(0)) ** 2
    criterion = CRITERIA[name](backend=backend, monitor=True)
    stats = stats_of(criterion, case, groups=groups)
    assert_stats(stats, by_hand(case, groups=groups))
    if name in ("alrp", "own"):
        assert_close("1 - precision", 1 - stats["precision"], stats["cls"], 1e-6)


@by_engine_backend
def test_of_more_positives_than_kernels_compare(backend: str) -> None:
    if backend == "pairwise":
        pytest.skip("compares all in any case")
    case = random_case(MOST_COMPARED + 300, MOST_COMPARED + 1)
    expected = by_hand(case) if not KERNELS else {"num_positives": MOST_COMPARED + 1}
    assert_stats(stats_of(APLoss(backend=backend, monitor=True), case), expected)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_of_a_ramp_of_ones_own(backend: str) -> None:
    criterion = RankingLoss(imprecision, smoothing=squared_ramp, backend=backend, monitor=True)
    stats = stats_of(criterion, CASES["integers"])
    assert_close("1 - precision", 1 - stats["precision"], stats["cls"], 1e-6)
    assert stats["num_false_positives_p50"] < by_hand(CASES["integers"])["num_false_positives_p50"]


@by_backend
def test_without_positives_all_is_0_but_the_weight(backend: str) -> None:
    for name, make in CRITERIA.items():
        stats = stats_of(make(backend=backend, monitor=True), CASES["no_positives"])
        others = {key: float(value) for key, value in stats.items() if value}
        assert others == ({"weight": 50.0} if name == "alrp" else {})


@pytest.mark.thinned(2 if KERNELS else 5)
@pytest.mark.parametrize("place", ["positive", "negative", "without positives"])
@by_criterion
@by_backend
def test_a_nan_is_in_every_statistic_of_the_ranks(backend: str, name: str, place: str) -> None:
    case = CASES["no_positives" if place == "without positives" else "two_values"]
    logits = case.logits.clone()
    logits[(case.labels == (place == "positive")).nonzero()[0]] = NAN
    stats = stats_of(CRITERIA[name](backend=backend, monitor=True), case._replace(logits=logits))
    assert stats["num_positives"] == case.num_positives
    for key, value in stats.items():
        # No period ends with such an iteration.
        assert value.isnan() == (key not in ("num_positives", "weight") or (key, name) == ("weight", "rank_sort")), key


@by_backend
def test_the_weight_is_the_one_that_was_used(backend: str) -> None:
    case = random_case(90, 9)
    for balance in (SelfBalance(period=2), 3.0, 0, None):
        criterion = CRITERIA["alrp"](self_balance=balance, backend=backend, monitor=True)
        plain = CRITERIA["alrp"](self_balance=None, backend=backend)
        for iteration in range(3):
            stats = stats_of(criterion, case)
            assert_close("loc", stats["loc"], stats["weight"] * run(plain, case).loc, 1e-6)
            if isinstance(balance, SelfBalance):
                assert (stats["weight"] == 50) == (iteration == 0)
    balanced, alone = (CRITERIA["rank_sort"](self_balance=b, backend=backend, monitor=True) for b in (True, False))
    stats, unweighted = stats_of(balanced, case), stats_of(alone, case)
    assert_close("loc", stats["loc"], stats["weight"] * unweighted["loc"], 1e-6)
    assert unweighted["weight"] == 1
    assert stats["weight"] != 1


@by_criterion
@by_backend
def test_nothing_else_changes(backend: str, name: str) -> None:
    outcomes = []
    for monitor in (True, False):
        case = random_case(150, 12)
        x = case.logits.clone().requires_grad_()
        criterion = CRITERIA[name](backend=backend, monitor=monitor)
        out = run(criterion, case._replace(logits=x))
        loss = out.cls + out.loc if criterion.takes_boxes else out
        outcomes.append((loss.detach(), *torch.autograd.grad(loss, x)))
        assert bool(criterion.stats) == monitor
    for one, other in zip(*outcomes):
        assert_same_bits("result", one, other)


class Called(TorchDispatchMode):
    """Counts all operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


def called(function: Callable[..., Any], *arguments: Any) -> Counter[str]:
    with Called() as mode:
        function(*arguments)
    return mode.counts


@by_engine_backend
def test_no_logits_are_read_again_and_nothing_is_done_if_it_is_off(backend: str) -> None:
    case = random_case(90, 9)
    for name, make in CRITERIA.items():
        both = [make(backend=backend, monitor=monitor) for monitor in (True, False)]
        for criterion in both:
            run(criterion, case)  # the first forward looks at its arguments
        on, off = (called(run, criterion, case) for criterion in both)
        for step in ("find", "count"):
            assert on[f"alrp_triton::{step}"] == off[f"alrp_triton::{step}"] == 1
        assert sum(on.values()) > sum(off.values())
        if name in FUNCTIONS:
            assert off == called(FUNCTIONS[name], case.logits, case.labels, case.num_positives, backend)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "ap": lambda x, y, p, backend: ap_loss(x, y, num_positives=p, backend=backend),
    "ndcg": lambda x, y, p, backend: ndcg_loss(x, y, num_positives=p, backend=backend),
}


@by_criterion
def test_it_may_be_turned_on_and_off(name: str) -> None:
    criterion, case = CRITERIA[name](), random_case(90, 9)
    assert criterion.stats == {}
    assert "monitor" not in repr(criterion)
    criterion.monitor = True
    stats = stats_of(criterion, case)
    assert "monitor=True" in repr(criterion)
    criterion.monitor = False
    assert stats_of(criterion, random_case(90, 7)) is stats
    with pytest.raises(TypeError, match=r"^monitor: expected a bool, got int"):
        CRITERIA[name](monitor=1)


@by_criterion
def test_a_loss_may_be_changed_in_place(name: str) -> None:
    """As for accumulated gradients."""
    criterion = CRITERIA[name](monitor=True)
    out = run(criterion, random_case(90, 9))
    loss = out.loc if criterion.takes_boxes else out
    key = "loc" if criterion.takes_boxes else "cls"
    before = criterion.stats[key].clone()
    loss /= 4
    assert_same_bits(key, criterion.stats[key], before)


@by_criterion
def test_copies_and_checkpoints(name: str) -> None:
    case = random_case(90, 9)
    x = case.logits.clone().requires_grad_()
    criterion = CRITERIA[name](monitor=True)
    names = set(criterion.state_dict())
    stats = stats_of(criterion, case._replace(logits=x))
    assert set(criterion.state_dict()) == names
    saved = io.BytesIO()
    torch.save(criterion.state_dict(), saved)
    saved.seek(0)
    restored = CRITERIA[name](monitor=True)
    restored.load_state_dict(torch.load(saved))
    assert restored.stats == {}
    copies = [copy.deepcopy(criterion)]
    if name == "alrp" or name == "ap":
        fresh = {"alrp": ALRPLoss, "ap": APLoss}[name](monitor=True)
        fresh.stats = criterion.stats
        copies.append(pickle.loads(pickle.dumps(fresh)))
    for other in copies:
        assert other.monitor
        for key, value in stats.items():
            assert_same_bits(key, other.stats[key], value)


class Saving(nn.Module):
    """A criterion behind a layer, which is computed again in backward or not."""

    def __init__(self, criterion: nn.Module, again: bool) -> None:
        super().__init__()
        self.scale, self.criterion, self.again = nn.Parameter(torch.tensor(2.0)), criterion, again

    def forward(self, case: Case) -> Tensor:
        def loss(logits: Tensor) -> Tensor:
            out = run(self.criterion, case._replace(logits=logits * self.scale))
            return out if isinstance(out, Tensor) else out.cls + out.loc

        return checkpoint(loss, case.logits, use_reentrant=False) if self.again else loss(case.logits)


@by_criterion
def test_a_recomputation_keeps_the_same(name: str) -> None:
    found = []
    for again in (True, False):
        model = Saving(CRITERIA[name](monitor=True), again)
        model(random_case(90, 9)).backward()
        found.append({**model.criterion.stats, "gradient": model.scale.grad})
    for key, value in found[0].items():
        assert_same_bits(key, value, found[1][key])


@pytest.mark.skipif(KERNELS, reason="needs no kernel")
@pytest.mark.thinned(5)
@by_criterion
def test_in_one_graph_for_any_number_of_positives(name: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    one, other = (CRITERIA[name](monitor=True, backend="torch") for _ in range(2))
    compiled, counts = torch.compile(one, fullgraph=True, backend=counter, dynamic=True), []
    for num_logits, num_pos in ((90, 9), (90, 7), (130, 30)):
        case = random_case(num_logits, num_pos, ignored=0.3)
        run_compiled = case._replace(logits=case.logits.clone().requires_grad_())
        if one.takes_boxes:
            compiled(run_compiled.logits, case.labels, *boxes_of(case))
        else:
            compiled(run_compiled.logits, case.labels, num_pos)
        for key, value in stats_of(other, case).items():
            assert_close(key, one.stats[key], value, 1e-6)
            assert not one.stats[key].requires_grad
        counts.append(counter.frame_count)
    assert counts == counts[:1] * 3


def in_processes() -> dict[str, Callable[..., Any]]:
    """By the backend of such tests; a ramp of one's own has PyTorch's, and communicates more."""
    makers = {name: partial(make, backend=BACKENDS[0], monitor=True) for name, make in CRITERIA.items()}
    return makers | {"smoothing": partial(RankingLoss, imprecision, smoothing=squared_ramp, monitor=True)}


def in_a_process(rank: int, parts: list[Any], groups: list[Tensor]) -> list[Stats]:
    part = Case("", *parts[rank])
    # That one process monitors and others do not makes none of them wait.
    run(APLoss(process_group=True, monitor=rank == 0), part)
    found = [stats_of(make(process_group=True), part) for make in in_processes().values()]
    return [*found, stats_of(in_processes()["alrp"](process_group=True), part, groups=groups[rank])]


@pytest.mark.xdist_group("processes")
@MARKS[0]
@pytest.mark.parametrize("name", ["integers", "no_positives"])
def test_processes_have_the_statistics_of_all(pool: Any, name: str) -> None:
    case = CASES[name]
    parts = cut(case, case.loc_errors, SIZE)
    groups = torch.arange(len(case.logits)) % 3
    found = pool.run(in_a_process, parts, list(groups.split([len(part[0]) for part in parts])))
    expected = [stats_of(make(), case) for make in in_processes().values()]
    expected.append(stats_of(in_processes()["alrp"](), case, groups=groups))
    for of_process in found:
        for one, other in zip(of_process, expected, strict=True):
            assert one.keys() == other.keys()
            for key, value in other.items():
                assert_close(key, one[key], value, 1e-6)
