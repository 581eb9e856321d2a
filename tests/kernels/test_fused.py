"""A whole loss as one operator: its parts against the steps they replace, and within autograd."""

from __future__ import annotations

from collections.abc import Iterator
from unittest.mock import patch

import pytest
import torch
from alrp_triton.kernels import arrange, formulas
from alrp_triton.kernels.positives import append, collect
from cases import INF, NAN, random_case
from checks import assert_close, assert_same_bits, judge
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from virtual_gpu.harness import as_on_a_gpu

from alrp_triton import alrp_loss, ap_loss, ndcg_loss, rank_sort_loss
from alrp_triton.engine import fused
from alrp_triton.engine.inputs import Levels

pytestmark = pytest.mark.usefixtures("small_blocks")

SCORES = {
    "ordinary": lambda g: torch.randn(37, generator=g),
    "many": lambda g: torch.randn(97, generator=g).mul(3).round(),
    "all equal": lambda g: torch.full((9,), -4.6),
    "zeros": lambda g: torch.tensor([0.0, -0.0, 0.0]),
    "infinite": lambda g: torch.tensor([INF, -INF, 3.0, -INF, INF, 3e38]),
    "nan": lambda g: torch.tensor([NAN, 1.0, -INF, NAN]),
    "one": lambda g: torch.randn(1, generator=g),
    "none": lambda g: torch.empty(0),
}


@pytest.fixture(params=[1.0, 0.1, 0.0])
def delta(request: pytest.FixtureRequest) -> float:
    return float(request.param)


@pytest.fixture
def unwaiting() -> Iterator[None]:
    """As on a GPU, where nobody looks how many positives there are."""
    with as_on_a_gpu():
        yield


def scattered(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and labels in which every other one is a positive, with these scores."""
    logits = torch.full((2 * len(scores) + 3,), -1.0, dtype=scores.dtype)
    labels = torch.zeros(len(logits), dtype=torch.int64)
    logits[1 : 2 * len(scores) : 2], labels[1 : 2 * len(scores) : 2] = scores, 1
    return logits, labels


@pytest.mark.thinned(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SCORES)
def test_arrangement_is_that_of_the_steps_it_replaces(name: str, dtype: torch.dtype, delta: float) -> None:
    scores = SCORES[name](torch.Generator().manual_seed(0)).to(dtype)
    levels, num_pos = [scattered(scores)], len(scores)
    shuffled = torch.randperm(num_pos, generator=torch.Generator().manual_seed(1))
    pos_index, pos_logits, found = collect(levels, num_pos, -1, dtype)
    with patch.object(torch, "empty", lambda *size, **how: torch.full(size, -1, **how)):
        result = arrange.arrange(found, pos_index[shuffled], pos_logits[shuffled], delta)
    thresholds, begin, end = arrange.place_knots(pos_logits, delta)
    padded, floors = arrange.search_table(thresholds)
    assert arrange.table_size(num_pos) == len(padded) <= len(result.thresholds)
    expected = {"pos_index": pos_index, "pos_logits": pos_logits, "floors": floors, "begin": begin, "end": end}
    for field, tensor in expected.items():
        assert_same_bits(field, getattr(result, field), tensor)
    assert_same_bits("thresholds", result.thresholds[: len(padded)], padded)
    assert result.thresholds[len(padded) :].isnan().all()


@pytest.mark.parametrize("change", ["more", "fewer", "label"])
def test_mistakes_make_all_scores_nan(change: str) -> None:
    logits, labels = scattered(torch.randn(20))
    num_pos = 20 + {"more": 1, "fewer": -1, "label": 0}[change]
    if change == "label":
        labels[0] = 7
    found, slots, scores = (torch.zeros(n, dtype=torch.int64) for n in (2, num_pos, num_pos))
    scores = torch.zeros(num_pos)
    append([(logits, labels)], found, slots, scores, -1)
    result = arrange.arrange(found, slots, scores, 1.0)
    assert result.pos_logits.isnan().all()
    assert result.thresholds[: 2 * num_pos].isnan().all()
    assert (result.pos_index >= 0).all()
    assert (result.pos_index < len(logits)).all()


@pytest.mark.parametrize("more", [-3, -1, 1, 30])
def test_a_wrong_number_of_errors_gives_nan(more: int, unwaiting: None) -> None:
    case = random_case(70, 7)
    x = case.logits.clone().requires_grad_()
    errors = torch.rand(7 + more).requires_grad_()
    cls, loc, _ = alrp_loss(x, case.labels, errors, backend="triton")
    (cls + loc).backward()
    assert cls.isnan()
    assert loc.isnan()
    assert x.grad is not None
    assert x.grad[case.labels == 0].isnan().all()
    assert errors.grad is not None
    assert errors.grad.isnan().all()


def test_a_wrong_number_of_errors_raises_where_one_may_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALRP_TRITON_DEBUG", "1")
    case = random_case(70, 7)
    with pytest.raises(ValueError, match="loc_errors: expected one for each positive label, 7, got 6"):
        alrp_loss(*case[1:3], case.loc_errors[1:], backend="triton")
    with pytest.raises(ValueError, match="num_positives: expected one for each positive label, 7, got 0"):
        ap_loss(*case[1:3], num_positives=0, backend="triton")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("loc_ranking", ["sorted", "smooth"])
def test_values_of_other_dtypes_and_strides(loc_ranking: str, dtype: torch.dtype) -> None:
    case = random_case(150, 20)
    errors = torch.stack([case.loc_errors, torch.zeros(20)], dim=1).to(dtype)[:, 0].requires_grad_()
    assert not errors.is_contiguous()
    loc = alrp_loss(case.logits, case.labels, errors, loc_ranking=loc_ranking, backend="triton").loc
    (gradient,) = torch.autograd.grad(loc, errors)
    assert gradient.dtype == dtype
    expected = judge(case._replace(loc_errors=errors.detach().double()), loc_ranking=loc_ranking)
    assert_close("loc", loc, expected.loc, 1e-6)
    margin = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float64: 1e-12}[dtype]
    assert_close("gradient", gradient, expected.grad_loc_errors, margin)


def test_each_component_by_itself() -> None:
    case = random_case(80, 9)
    for num_pos in (9, 0):
        x, errors = case.logits.clone().requires_grad_(), case.loc_errors[:num_pos].clone().requires_grad_()
        labels = case.labels if num_pos else case.labels.clamp(max=0)
        cls, loc, rank = alrp_loss(x, labels, errors, backend="triton")
        assert not rank.requires_grad
        of_cls = torch.autograd.grad(cls, [x, errors], retain_graph=True, allow_unused=True)
        assert of_cls[0] is not None
        assert bool(of_cls[0].any()) == (num_pos > 0)
        assert of_cls[1] is None
        of_loc = torch.autograd.grad(loc, [x, errors], allow_unused=True)
        # The scores have no gradient from loc; without positives there is one, of zeros.
        assert of_loc[0] is None if num_pos else not of_loc[0].any()
        assert of_loc[1] is not None


def test_upstream_gradients_and_components_do_not_mix() -> None:
    case = random_case(80, 9)
    x, errors = case.logits.clone().requires_grad_(), case.loc_errors.clone().requires_grad_()
    cls, loc, _ = alrp_loss(x, case.labels, errors, backend="triton")
    (3 * cls + 5 * loc).backward()
    expected = judge(case)
    assert_close("logits", x.grad, 3 * expected.grad_logits, 2e-7)
    assert_close("errors", errors.grad, 5 * expected.grad_loc_errors, 2e-7)


# All checks but the comparison of compiled results, which takes a table's NaN for a difference: see the last test.
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


def test_upstream_gradients_of_a_loss_that_sorts_do_not_mix() -> None:
    case = random_case(80, 9)
    for weights in ((3.0, 5.0), (0.0, 2.0), (2.0, 0.0)):
        gradients = []
        for backend in ("triton", "reference"):
            x = case.logits.clone().requires_grad_()
            ranking, sorting = rank_sort_loss(x, case.labels, case.loc_errors, backend=backend)
            # One that is not differentiated at all has no upstream gradient either.
            sum(weight * part for weight, part in zip(weights, (ranking, sorting)) if weight).backward()
            gradients.append(x.grad)
        assert_close("gradient", *gradients, 2e-7)


@pytest.mark.parametrize("eps", [0.0, 1.0, 5.0])
def test_few_false_positives_send_nothing(eps: float) -> None:
    case = random_case(150, 20)
    x = case.logits.clone().requires_grad_()
    alrp_loss(x, case.labels, case.loc_errors, eps=eps, backend="triton").cls.backward()
    expected = judge(case, eps=eps).grad_logits
    assert x.grad is not None
    assert_close("gradient", x.grad, expected, 1e-6)
    silent = (x.grad[case.labels == 1] == 0).sum()
    assert (0 < silent < 20) == (eps > 0)


def test_operators() -> None:
    case = random_case(90, 7)
    logits = [torch.randn(6, 5, generator=torch.Generator().manual_seed(0)), case.logits]
    labels = [torch.tensor([0, 5, 5, -1, 4, 5]), case.labels]
    settings = 1.0, -1, 1e-5
    for formula in formulas.FORMULAS:
        takes_values = formula.startswith("alrp") or formula == "rank_sort"
        values = torch.rand(9).requires_grad_(formula != "rank_sort") if takes_values else None
        leaves = [x.clone().requires_grad_() for x in logits]
        given = leaves, labels, values, 9, *settings, formula, "loc_errors"
        torch.library.opcheck(fused.evaluate_loss, given, test_utils=CHECKS)
    with torch.no_grad():
        for formula in ("alrp_sorted", "rank_sort"):
            tables = fused.evaluate_loss(logits, labels, torch.rand(9), 9, *settings, formula, "")[3:]
            upstream = torch.ones(()), torch.rand(()) if formula == "rank_sort" else None
            torch.library.opcheck(fused.write_loss_gradient, (*upstream, logits, labels, *tables, 1.0, -1))


def test_what_can_be_fused() -> None:
    x, y = torch.zeros(4), torch.zeros(4, dtype=torch.int64)
    levels = Levels([x], [y])
    assert fused.can_fuse(levels, 4096, "triton")
    assert not fused.can_fuse(levels, 4097, "triton")
    assert not fused.can_fuse(levels, None, "triton")
    assert not fused.can_fuse(Levels([x], [y], [y]), 3, "triton")
    assert not any(fused.can_fuse(levels, 3, backend) for backend in ("torch", "pairwise", "numba"))


def both_of_alrp(x: Tensor, y: Tensor, v: Tensor, **how: str) -> Tensor:
    # Of which PyTorch 2.6 cannot compile a slice.
    out = alrp_loss(x, y, v, **how)
    return torch.stack([out.cls, out.loc])


LOSSES = {
    "alrp": both_of_alrp,
    "ap": lambda x, y, v, **how: ap_loss(x, y, num_positives=len(v), **how),
    "ndcg": lambda x, y, v, **how: ndcg_loss(x, y, num_positives=len(v), **how),
    "rank_sort": lambda x, y, v, **how: sum(rank_sort_loss(x, y, v, **how)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_one_graph_for_any_number_of_positives(name: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(LOSSES[name], fullgraph=True, backend=counter, dynamic=True)
    counts = []
    for num_logits, num_pos in ((60, 9), (60, 7), (90, 12)):
        case = random_case(num_logits, num_pos)
        results = []
        for function in (compiled, LOSSES[name]):
            x, errors = case.logits.clone().requires_grad_(), case.loc_errors.clone().requires_grad_()
            loss = function(x, case.labels, errors, backend="triton")
            loss.sum().backward()
            results.append([loss.detach(), x.grad, *([] if errors.grad is None else [errors.grad])])
        for one, other in zip(*results):
            assert_same_bits("compiled", one, other)
        counts.append(counter.frame_count)
    assert counts == counts[:1] * 3
