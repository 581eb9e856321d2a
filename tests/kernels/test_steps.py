"""Steps that compare all positives, fused and one by one, against those that sort them: as operators, and within whole
losses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from alrp_triton.kernels.ranks import KINDS
from cases import random_case
from checks import assert_close, assert_same_bits
from torch import Tensor

from alrp_triton import alrp_loss, ap_loss, ndcg_loss, rank_sort_loss
from alrp_triton.engine import Ranking, operators_small, steps
from alrp_triton.framework import ranking_loss
from alrp_triton.losses import alrp, rank_sort, scores

pytestmark = pytest.mark.usefixtures("small_blocks")


def sorted_formula(ranking: object, costs: Tensor) -> Tensor:
    return (ranking.sums_sorted(costs) + ranking.sums_above(costs)) / ranking.rank + ranking.running_max(costs)


LOSSES: dict[str, Callable[..., Tensor]] = {
    "alrp": lambda x, y, v, **how: sum(alrp_loss(x, y, v, **how)[:2]),
    "alrp_smooth": lambda x, y, v, **how: sum(alrp_loss(x, y, v, loc_ranking="smooth", **how)[:2]),
    "ap": lambda x, y, v, **how: ap_loss(x, y, num_positives=len(v), **how),
    "ap_plain": lambda x, y, v, **how: ap_loss(x, y, interpolated=False, num_positives=len(v), **how),
    "ndcg": lambda x, y, v, **how: ndcg_loss(x, y, num_positives=len(v), **how),
    "rank_sort": lambda x, y, v, **how: sum(rank_sort_loss(x, y, v, **how)),
    "formula": lambda x, y, v, **how: ranking_loss(x, y, sorted_formula, extras={"costs": v}, **how),
}

FUSED = ("alrp", "alrp_smooth", "ap", "ap_plain", "ndcg", "rank_sort")


def results(name: str, delta: float, num_pos: int, dtype: torch.dtype) -> list[Tensor]:
    case = random_case(150, num_pos, dtype=dtype)
    x, values = case.logits.clone().requires_grad_(), case.loc_errors.clone().requires_grad_()
    loss = LOSSES[name](x, case.labels, values, delta=delta, backend="triton")
    loss.backward()
    return [loss.detach(), x.grad, *([] if values.grad is None else [values.grad])]


@pytest.mark.thinned(5)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("delta", [1.0, 0.0])
@pytest.mark.parametrize("name", LOSSES)
def test_all_kinds_give_one_loss(name: str, delta: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for num_pos in (0, 1, 20):
        with monkeypatch.context() as context:
            if name in FUSED:
                context.setattr(Ranking, "__init__", lambda *given, **named: pytest.fail("goes step by step"))
            kinds = [results(name, delta, num_pos, dtype)]
        with monkeypatch.context() as context:
            for module in (alrp, scores, rank_sort):
                context.setattr(module, "can_fuse", lambda *given: False)
            if name != "formula":  # of which the running maximum is differentiated by sorting
                context.setattr(steps, "SortedSteps", lambda *given: pytest.fail("sorts"))
            kinds.append(results(name, delta, num_pos, dtype))
        with monkeypatch.context() as context:
            for module in (alrp, scores, rank_sort):
                context.setattr(module, "can_fuse", lambda *given: False)
            context.setattr(steps, "ComparedSteps", lambda *given: pytest.fail("compares all positives"))
            context.setattr(steps, "MOST_COMPARED", -1)
            expected = results(name, delta, num_pos, dtype)
        for found in kinds:
            assert len(found) == len(expected)
            for one, other in zip(found, expected):
                assert_close(name, one, other, 1e-6 if dtype == torch.float32 else 1e-10)


def test_operators() -> None:
    generator = torch.Generator().manual_seed(0)
    pos_logits = torch.randn(9, generator=generator)
    rows = torch.rand(3, 9, generator=generator, dtype=torch.float64)
    poison, unit = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    table = pos_logits, *operators_small.place_knots(pos_logits, 0.5)
    totals = torch.randint(0, 9, (2, 20), generator=generator)
    # No NaN, which is never equal to itself.
    totals[0, -1] = 0
    torch.library.opcheck(operators_small.place_knots, (pos_logits, 0.5))
    torch.library.opcheck(operators_small.rank, (*table, totals, unit, rows, 0.5))
    torch.library.opcheck(operators_small.ramp_coefficients, (*table, rows, poison, 0.5))
    torch.library.opcheck(operators_small.send, (*table, *rows, poison, 0.5, 1e-5))
    for kind in KINDS:
        leaf = rows.clone().requires_grad_(kind != "running_max")
        torch.library.opcheck(operators_small.pair_sums, (pos_logits, leaf, poison, kind, 0.5))


def test_sums_are_differentiable_as_often_as_wanted() -> None:
    pos_logits = torch.randn(6, generator=torch.Generator().manual_seed(1))
    compared, poison = steps.ComparedSteps(pos_logits, 0.5), torch.zeros((), dtype=torch.float64)
    values = torch.rand(6, dtype=torch.float64, requires_grad=True)
    for sums in (compared.sums_above, compared.sums_received, compared.sums_sorted, compared.sums_sorted_received):
        assert torch.autograd.gradcheck(lambda v, sums=sums: sums(v, poison), values)
        assert torch.autograd.gradgradcheck(lambda v, sums=sums: sums(v * v, poison), values)
    assert torch.autograd.gradcheck(lambda v: compared.running_max(v, poison), values)


@pytest.mark.parametrize("name", LOSSES)
def test_the_same_bits_again(name: str) -> None:
    for one, other in zip(results(name, 0.5, 20, torch.float32), results(name, 0.5, 20, torch.float32)):
        assert_same_bits(name, one, other)
