"""Whole losses by kernels: larger problems than elsewhere, all ways that there are to one loss, and autograd."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle, product
from typing import Any

import pytest
import torch
from dialect import (
    ALRP,
    AP,
    DEPTH,
    FAMILY,
    FLOAT_MAX,
    INF,
    INTERPRETED,
    NAN,
    NDCG,
    PLAIN_AP,
    RANK_SORT,
    REGIMES,
    Member,
    assert_agree,
    assert_close,
    assert_same_bits,
    evaluate,
    judge,
    of_case,
    random_case,
)
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from alrp_triton import alrp_loss, ap_loss, rank_sort_loss
from alrp_triton.engine import counted

CLASSES = 20
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SIZES = ((1, 3000), (7, 20_000), (300, 24_000), (1000, 60_000))
Problem = tuple[list[Tensor], list[Tensor], Tensor]


def by_logit(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    labels = (torch.arange(CLASSES) == y[:, None]).to(torch.int8)
    return x.view(-1), labels.masked_fill(y[:, None] == -1, -1).view(-1)


def channels_first(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    x, y = x[: len(x) // 8 * 8].view(1, 8, -1, CLASSES), y[: len(y) // 8 * 8].view(1, 8, -1)
    return x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1), y


LAYOUTS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "rows": lambda x, y: (x, y),
    "by logit": by_logit,
    "channels first": channels_first,
    "strided": lambda x, y: (torch.cat([x[:, :1], x, x[:, :2]], dim=1)[:, 1:-2], torch.stack([y, y], dim=1)[:, 0]),
    "levels": lambda x, y: (x, y),
}
SPECIAL: dict[str, Callable[[Tensor], Tensor]] = {
    "ordinary": lambda x: x,
    "ties": lambda x: (4 * x).round() / 4,
    "infinite": lambda x: x.where(x < x.quantile(0.99), INF).where(x > x.quantile(0.01), -INF),
    "far": lambda x: x.where(x < x.quantile(0.98), 0.9 * FLOAT_MAX).where(x > x.quantile(0.02), -0.9 * FLOAT_MAX),
    "nan": lambda x: x.index_fill(0, torch.tensor(len(x) // 2), NAN),
}


def make_problem(num_pos: int, num_logits: int, regime: str, layout: str, special: str, dtype: torch.dtype) -> Problem:
    """Logits ``[M / C, C]`` and class labels, a twentieth ignored, arranged in some way."""
    generator = torch.Generator().manual_seed(num_pos)
    (neg_mean, neg_std), (pos_mean, pos_std) = REGIMES[regime]
    rows = num_logits // CLASSES
    x = torch.randn(rows, CLASSES, generator=generator) * neg_std + neg_mean
    y, order = torch.full((rows,), CLASSES), torch.randperm(rows, generator=generator)
    y[order[:num_pos]] = torch.randint(CLASSES, (num_pos,), generator=generator)
    y[order[num_pos : num_pos + rows // 20]] = -1
    x[order[:num_pos], y[order[:num_pos]]] = torch.randn(num_pos, generator=generator) * pos_std + pos_mean
    parts = [slice(None)] if layout != "levels" else [slice(0, rows // 2), slice(rows // 2, -8), slice(-8, None)]
    x = SPECIAL[special](x)
    logits, labels = zip(*(LAYOUTS[layout](x[part], y[part]) for part in parts))
    left = sum(
        int((y == 1).sum() if x.dim() == y.dim() else ((y >= 0) & (y < CLASSES)).sum()) for x, y in zip(logits, labels)
    )
    return [level.to(dtype) for level in logits], list(labels), torch.rand(left, generator=generator)


def cases() -> list[object]:
    """Sizes, dtypes and layouts with one another; regimes, specialities, losses, deltas in turns of other lengths."""
    turns = zip(
        product(SIZES, DTYPES, LAYOUTS),
        cycle(REGIMES),
        cycle(SPECIAL),
        cycle((ALRP, AP, PLAIN_AP, NDCG, RANK_SORT, *FAMILY[5:])),
        cycle((1.0, 0.5, 0.0)),
    )
    return [
        pytest.param(*size, dtype, layout, regime, special, member, delta, id=f"{size[0]}-{dtype}-{layout}-{member}")
        for (size, dtype, layout), regime, special, member, delta in turns
    ]


def tolerance(dtype: torch.dtype) -> float:
    return {torch.float64: 1e-12, torch.float32: 1e-6}.get(dtype, 2 * torch.finfo(dtype).eps)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter would take minutes for each")
@pytest.mark.thinned(53)
@pytest.mark.parametrize(("num_pos", "num_logits", "dtype", "layout", "regime", "special", "member", "delta"), cases())
def test_problems_of_every_kind(
    num_pos: int,
    num_logits: int,
    dtype: torch.dtype,
    layout: str,
    regime: str,
    special: str,
    member: Member,
    delta: float,
) -> None:
    problem = make_problem(num_pos, num_logits, regime, layout, special, dtype)
    found, expected = (evaluate(member, *problem, backend, delta=delta) for backend in ("triton", "torch"))
    assert_agree(found, expected, tolerance(dtype))
    if 1 < num_pos <= 300 and dtype == torch.float32 and special != "nan":
        assert_agree(evaluate(member, *problem, "pairwise", delta=delta), expected, max(tolerance(dtype), 2e-6))


@pytest.mark.nightly
@pytest.mark.skipif(INTERPRETED, reason="the interpreter would take minutes for each")
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("num_pos", [4096, 5000])
@pytest.mark.parametrize("member", [ALRP, RANK_SORT, DEPTH], ids=repr)
def test_as_many_positives_as_are_compared_and_more(member: Member, num_pos: int, grouped: bool) -> None:
    problem = make_problem(num_pos, 20 * num_pos + 400, "middle", "rows", "ordinary", torch.float32)
    groups = {"groups": [torch.arange(len(problem[1][0])) % 3]} if grouped else {}
    found, expected = (evaluate(member, *problem, backend, **groups) for backend in ("triton", "torch"))
    assert_agree(found, expected)


@pytest.mark.thinned(8)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("delta", [1.0, 0.0])
@pytest.mark.parametrize("member", FAMILY, ids=repr)
def test_all_ways_give_one_loss(
    member: Member, delta: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where kernels know the formula, where they do what is P-sized for one in PyTorch, and where that is sorted."""
    case = random_case(150, 20, dtype=dtype)
    expected = of_case(member, case, "torch", delta=delta)
    ways = [of_case(member, case, "triton", delta=delta)]
    with monkeypatch.context() as context:
        context.setattr(counted.Counted, "lose", lambda *given: None)
        if len(member.components) == 1:  # of formulas in PyTorch
            ways.append(of_case(member, case, "triton", delta=delta))
        context.setattr(counted, "MOST_COMPARED", -1)
        ways.append(of_case(member, case, "triton", delta=delta))
    for found in ways:
        assert_agree(found, expected, 1e-6 if dtype == torch.float32 else 1e-10)


def test_formulas_at_their_edges() -> None:
    """NDCG's where a logarithm would lose the digits of a small N_FP, Rank & Sort's where H(0) is 1."""
    case = random_case(60, 8)
    few = torch.tensor([0.0, 5.0, -1 + 1e-8], dtype=torch.float64), torch.tensor([1, 1, 0]), torch.ones(2)
    step = case.logits, case.labels, RANK_SORT.values(case)
    for member, given, delta, allowed in ((NDCG, few, 1.0, 1e-12), (RANK_SORT, step, 0.0, 1e-6)):
        found, expected = (evaluate(member, *given, backend, delta=delta) for backend in ("triton", "torch"))
        assert_agree(found, expected, allowed)


@pytest.mark.parametrize("member", [ALRP, RANK_SORT], ids=repr)
def test_upstream_gradients_and_components_do_not_mix(member: Member) -> None:
    case = random_case(150, 20)
    expected, (first, second) = judge(member, case), member.components
    for weights in ((3.0, 5.0), (0.0, 2.0), (2.0, 0.0)):
        leaves = {
            "logits": case.logits.clone().requires_grad_(),
            "values": member.values(case).clone().requires_grad_(),
        }
        loss = member.loss(leaves["logits"], case.labels, leaves["values"], backend="triton")
        # One that is not differentiated at all has no upstream gradient either.
        sum(weight * loss[name] for weight, name in zip(weights, (first, second)) if weight).backward()
        for name, leaf in leaves.items():
            parts = [(w, expected.get(f"{c} by {name}")) for w, c in zip(weights, (first, second)) if w]
            wanted = [weight * part for weight, part in parts if part is not None]
            assert (leaf.grad is None) == (not wanted)
            if wanted:
                assert_close(name, leaf.grad, sum(wanted), 2e-7)


@pytest.mark.parametrize("more", [-1, 1, pytest.param(30, marks=pytest.mark.nightly)])
def test_a_wrong_number_of_errors_gives_nan(more: int) -> None:
    case = random_case(150, 20)
    x, errors = case.logits.clone().requires_grad_(), torch.rand(20 + more).requires_grad_()
    cls, loc, _ = alrp_loss(x, case.labels, errors, backend="triton")
    (cls + loc).backward()
    for tensor in (cls, loc, errors.grad, x.grad[case.labels == 0]):
        assert tensor.isnan().all()


def test_a_wrong_number_of_errors_raises_where_one_may_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALRP_TRITON_DEBUG", "1")
    case = random_case(70, 7)
    with pytest.raises(ValueError, match="loc_errors: expected one for each positive label, 7, got 6"):
        alrp_loss(*case[1:3], case.loc_errors[1:], backend="triton")
    with pytest.raises(ValueError, match="num_positives: expected one for each positive label, 7, got 0"):
        ap_loss(*case[1:3], num_positives=0, backend="triton")


@pytest.mark.thinned(4)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("loc_ranking", ["sorted", "smooth"])
def test_values_of_other_dtypes_and_strides(loc_ranking: str, dtype: torch.dtype) -> None:
    case = random_case(150, 20)
    errors = torch.stack([case.loc_errors, torch.zeros(20)], dim=1).to(dtype)[:, 0]
    found = evaluate(ALRP, case.logits, case.labels, errors, "triton", loc_ranking=loc_ranking)
    expected = judge(ALRP, case._replace(loc_errors=errors.double()), loc_ranking=loc_ranking)
    assert found["loc by values"].dtype == dtype
    assert_close("loc", found["loc"], expected["loc"], 1e-6)
    margin = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float64: 1e-12}[dtype]
    assert_close("gradient", found["loc by values"], expected["loc by values"], margin)


@pytest.mark.parametrize("eps", [5.0, pytest.param(0.0, marks=pytest.mark.nightly)])
def test_few_false_positives_send_nothing(eps: float) -> None:
    case = random_case(150, 20)
    gradient = of_case(ALRP, case, "triton", eps=eps)["cls by logits"]
    assert_close("gradient", gradient, judge(ALRP, case, eps=eps)["cls by logits"], 1e-6)
    assert (0 < (gradient[case.labels == 1] == 0).sum() < 20) == (eps > 0)


@pytest.mark.nightly
@pytest.mark.parametrize("member", [ALRP, AP, RANK_SORT], ids=repr)
def test_one_graph_for_any_number_of_positives(member: Member) -> None:
    counter, counts = CompileCounterWithBackend("aot_eager"), []

    def loss(x: Tensor, y: Tensor, values: Tensor) -> Tensor:
        number: dict[str, Any] = {} if member.takes else {"num_positives": len(values)}
        found = member.loss(x, y, values, backend="triton", **number)
        return torch.stack([found[name] for name in member.components])

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend=counter, dynamic=True)
    for num_logits, num_pos in ((60, 9), (60, 7), (90, 12)):
        case, results = random_case(num_logits, num_pos), []
        for function in (compiled, loss):
            x, values = case.logits.clone().requires_grad_(), member.values(case).clone().requires_grad_()
            components = function(x, case.labels, values)
            components.sum().backward()
            results.append([components.detach(), x.grad, *([] if values.grad is None else [values.grad])])
        for one, other in zip(*results):
            assert_same_bits("compiled", one, other)
        counts.append(counter.frame_count)
    assert counts == counts[:1] * 3


@pytest.mark.parametrize("loss", [alrp_loss, rank_sort_loss])
def test_values_may_have_steps(loss):
    """Of a column of a table, say; beside them lies what must not be read."""
    logits, labels = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 4
    table = torch.full((30, 2), NAN)
    table[:, 0] = torch.linspace(0, 1, 30)
    found = []
    for values in (table[:, 0], table[:, 0].clone()):
        x, v = logits.clone().requires_grad_(), values.detach().requires_grad_(loss is alrp_loss)
        scalars = loss(x, labels, v, backend="triton")[:2]
        sum(scalars).backward()
        found.append([*scalars, x.grad, *([v.grad] if loss is alrp_loss else [])])
    for one, other in zip(*found):
        assert torch.equal(one, other)
