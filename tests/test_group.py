"""One ranking over several processes: what one process gives for all their logits, in each of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dialect import FAMILY, KERNELS, Case, Results, assert_agree, evaluate, imprecision, random_case, squared_ramp
from dialect.processes import BACKENDS, CASES, MARKS, SIZE, assert_as_alone, cut, group_of, together
from torch import Tensor

from alrp_triton import alrp_loss, ap_loss
from alrp_triton.framework import ranking_loss

pytestmark = MARKS
FEW = ["integers", "no_positives", "infinite", *([] if KERNELS else ["one_positive", "no_negatives", "nothing"])]
# Where kernels run, which are slow here, what they could take differently.
CHOSEN = [*FEW, "bfloat16"] if KERNELS else list(CASES)


@pytest.mark.thinned(2 if KERNELS else 8)
@pytest.mark.parametrize("name", CHOSEN)
def test_three_processes_rank_as_one(pool, name):
    assert_as_alone(pool, name, 3, BACKENDS[0])


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", FEW)
def test_three_processes_rank_as_one_by_the_other_backend(pool, name):
    assert_as_alone(pool, name, 3, BACKENDS[1])


@pytest.mark.thinned(2)
@pytest.mark.skipif(KERNELS, reason="kernels are not told how many processes there are")
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", FEW)
def test_any_number_of_processes_ranks_as_one(pool, name, size):
    assert_as_alone(pool, name, size, BACKENDS[0])


@pytest.mark.parametrize("settings", [{"delta": 0.0}, {"delta": 0.3, "upstream": 2.5}])
@pytest.mark.parametrize("name", ["two_values"] if KERNELS else ["integers", "two_values"])
def test_settings_hold_in_every_process(pool, name, settings):
    assert_as_alone(pool, name, 3, BACKENDS[0], **settings)


def half_precision(rank: int, name: str) -> list[tuple[Tensor, Tensor]]:
    found = []
    for dtype in (torch.float32, CASES[name].logits.dtype):
        logits, labels, values = cut(CASES[name], CASES[name].loc_errors, SIZE)[rank]
        logits = logits.to(dtype).requires_grad_()
        out = alrp_loss(logits, labels, values, backend=BACKENDS[0], process_group=True)
        (out.cls + out.loc).backward()
        found.append((out.cls.detach(), logits.grad))
    return found


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_half_precision_is_the_float32_of_the_same_scores_rounded(pool, name):
    for single, half in pool.run(half_precision, name):
        assert torch.equal(single[0], half[0])
        assert torch.equal(single[1].to(half[1].dtype), half[1])


def with_groups(rank: int, case: Case, groups: Tensor, size: int) -> list[Results] | None:
    if rank >= size:
        return None
    results = []
    for member in FAMILY:
        logits, labels, values = cut(case, member.values(case), size)[rank]
        begin = sum(len(part[0]) for part in cut(case, member.values(case), size)[:rank])
        own = groups[begin : begin + len(logits)]
        results.append(evaluate(member, logits, labels, values, BACKENDS[0], process_group=group_of(size), groups=own))
    return results


def test_groups_reach_over_processes(pool):
    """The same number is the same ranking, wherever its logits are."""
    case = random_case(400, 40, seed=5)
    groups = torch.randint(3, (400,), generator=torch.Generator().manual_seed(1)) - 1
    found = [one for one in pool.run(with_groups, case, groups, 3) if one is not None]
    for member, *of_member in zip(FAMILY, *found):
        expected = evaluate(member, *case[1:3], member.values(case), BACKENDS[0], groups=groups)
        assert_agree(together(of_member, 3), expected, said=member.name)


def by_name(rank: int, logits: Tensor, labels: Tensor) -> list[Tensor]:
    own = slice(2 * rank, 2 * rank + 2)
    return [ap_loss(logits[own], labels[own], groups=name, process_group=True) for name in ("image", "class")]


def test_names_mean_images_and_classes_of_all_processes(pool):
    """Each process has images of its own, and the same classes."""
    generator = torch.Generator().manual_seed(0)
    logits, labels = (
        torch.randn(2 * SIZE, 6, 3, generator=generator),
        torch.randint(4, (2 * SIZE, 6), generator=generator),
    )
    expected = [ap_loss(logits, labels, groups=name) for name in ("image", "class")]
    for found in pool.run(by_name, logits, labels):
        torch.testing.assert_close(found, expected)


def with_true_gradient(rank: int, parts: list[Any]) -> Results:
    logits, labels, _ = parts[rank]
    x = logits.clone().requires_grad_()
    loss = ranking_loss(x, labels, imprecision, gradient="true", backend=BACKENDS[0], process_group=True)
    loss.backward()
    return {"loss": loss.detach(), "loss by logits": x.grad}


def test_true_gradients_reach_over_processes(pool):
    case = random_case(400, 40, seed=5)
    found = pool.run(with_true_gradient, cut(case, case.loc_errors, SIZE))
    x = case.logits.clone().requires_grad_()
    loss = ranking_loss(x, case.labels, imprecision, gradient="true", num_positives=40, backend=BACKENDS[0])
    loss.backward()
    assert_agree(together(found, SIZE), {"loss": loss.detach(), "loss by logits": x.grad})


def with_pair_functions(rank: int, parts: list[Any]) -> list[Results]:
    logits, labels, _ = parts[rank]
    found = []
    for functions in ({"smoothing": squared_ramp}, {"distribution": squared_ramp}):
        x = logits.clone().requires_grad_()
        loss = ranking_loss(x, labels, imprecision, **functions, process_group=True)
        loss.backward()
        found.append({"loss": loss.detach(), "loss by logits": x.grad})
    return found


@pytest.mark.skipif(KERNELS, reason="pairs of one's own are PyTorch's, whatever the kernels do")
def test_pair_functions_reach_over_processes(pool):
    case = random_case(200, 20, seed=6)
    found = pool.run(with_pair_functions, cut(case, case.loc_errors, SIZE))
    for functions, *of_functions in zip(({"smoothing": squared_ramp}, {"distribution": squared_ramp}), *found):
        x = case.logits.clone().requires_grad_()
        loss = ranking_loss(x, case.labels, imprecision, **functions)
        loss.backward()
        assert_agree(together(of_functions, SIZE), {"loss": loss.detach(), "loss by logits": x.grad})


def of_levels(rank: int, logits: Tensor, labels: Tensor, errors: Tensor) -> Results:
    """A pyramid of two levels, class labels, and rows that do not lie in order."""
    x, y = logits[rank], labels[rank]
    counts = (labels < logits.shape[-1]).flatten(1).sum(1)
    first = int(counts[:rank].sum())
    levels = [x[:10].mT.contiguous().mT.requires_grad_(), x[10:].clone().requires_grad_()]
    out = alrp_loss(levels, [y[:10], y[10:]], errors[first : first + int(counts[rank])], process_group=True)
    out.cls.backward()
    return {"cls": out.cls.detach(), "cls by logits": torch.cat([level.grad for level in levels])}


def test_levels_of_every_process_are_ranked_together(pool):
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(SIZE, 30, 5, generator=generator)
    labels = torch.randint(0, 12, (SIZE, 30), generator=generator).clamp(max=5)
    errors = torch.rand(int((labels < 5).sum()), generator=generator)
    found = together(pool.run(of_levels, logits, labels, errors), SIZE)
    x = logits.flatten(0, 1).requires_grad_()
    out = alrp_loss(x, labels.flatten(), errors)
    out.cls.backward()
    assert_agree(found, {"cls": out.cls.detach(), "cls by logits": x.grad})
