"""One ranking over several processes, one of which has a NaN, a wrong argument, or other settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from dialect import NAN, random_case
from dialect.processes import BACKENDS, MARKS, SIZE, assert_as_alone, cut, group_of
from torch import Tensor, nn

from alrp_triton import ALRPLoss, RankSortLoss, alrp_loss, ap_loss
from alrp_triton.framework import ranking_loss

pytestmark = MARKS


def poisoned(rank: int, parts: list[Any], where: str) -> dict[str, Tensor]:
    logits, labels, values = (part.clone() for part in parts[rank])
    if rank == 1:
        (logits if where == "logits" else values)[0] = NAN
    logits.requires_grad_()
    values.requires_grad_()
    out = alrp_loss(logits, labels, values, process_group=True)
    (out.cls + out.loc).backward()
    return {"cls": out.cls.detach(), "loc": out.loc.detach(), "logits": logits.grad, "values": values.grad}


@pytest.mark.parametrize("where", ["logits", "values"])
def test_a_nan_in_one_process_is_seen_in_all(pool, where):
    case = random_case(300, 60, ignored=0.0, seed=8)
    for found in pool.run(poisoned, cut(case, case.loc_errors, SIZE), where):
        assert all(value.isnan().all() for value in found.values()), found


def said_by(call: Callable[[], Any]) -> str:
    """The error that a call raises."""
    try:
        call()
    except (TypeError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def mistaken(rank: int, mistake: str) -> str:
    logits, labels, errors = torch.randn(20), torch.tensor([1, 0] * 10), torch.rand(10)
    settings: dict[str, Any] = {"process_group": True}
    if mistake == "delta":
        settings["delta"] = 1.0 + rank
    elif rank == 1:
        labels[0] = 7 if mistake == "label" else 1
        errors = {"count": errors[:5], "type": errors.long()}.get(mistake, errors)
        logits = logits.double() if mistake == "dtype" else logits
        wrong = {"groups": torch.zeros(20, dtype=torch.int64), "backend": "reference", "loc_ranking": "sort"}
        settings |= {mistake: wrong[mistake]} if mistake in wrong else {}
    return said_by(lambda: alrp_loss(logits, labels, errors, **settings))


@pytest.mark.parametrize("mistake", ["label", "count", "type", "backend", "loc_ranking"])
def test_a_mistake_in_one_process_raises_in_all(pool, mistake):
    """None is left waiting for the one that raised, and the group can still be used."""
    for rank, said in enumerate(pool.run(mistaken, mistake)):
        if rank == 1:
            assert said.startswith(("ValueError", "TypeError")), said
        else:
            assert said == "RuntimeError: process_group: process 1 raised an error: there is nothing to rank with"
    assert_as_alone(pool, "two_values", 3, BACKENDS[0])


def mistaken_module(rank: int, module: type[nn.Module], mistake: str) -> str:
    labels, boxes = torch.tensor([1, 0] * 10), torch.tensor([[0.0, 0, 1, 1]] * 10)
    targets = boxes[:5] if rank == 1 and mistake == "target_boxes" else boxes
    labels[0] = 7 if rank == 1 and mistake == "labels" else 1
    return said_by(lambda: module(process_group=True)(torch.randn(20), labels, boxes, targets))


@pytest.mark.parametrize("mistake", ["target_boxes", "labels"])
@pytest.mark.parametrize("module", [ALRPLoss, RankSortLoss])
def test_what_a_module_refuses_in_one_process_raises_in_all(pool, module, mistake):
    """Boxes are looked at before the function is called."""
    for rank, said in enumerate(pool.run(mistaken_module, module, mistake)):
        expected = f"ValueError: {mistake}" if rank == 1 else "RuntimeError: process_group: process 1 raised"
        assert said.startswith(expected), said


def weighted(ranking: Any, weights: Tensor, costs: Tensor) -> Tensor:
    return weights * costs * ranking.num_false_positives / ranking.rank


def mistaken_extras(rank: int) -> str:
    extras = {"weights": torch.rand(10), "costs": torch.rand(9 if rank == 1 else 10)}
    given = torch.randn(20), torch.tensor([1, 0] * 10)
    return said_by(lambda: ranking_loss(*given, weighted, extras=extras, process_group=True))


def test_extras_that_do_not_fit_together_in_one_process_raise_in_all(pool):
    for rank, said in enumerate(pool.run(mistaken_extras)):
        assert said.startswith("ValueError: costs" if rank == 1 else "RuntimeError: process_group: process 1 raised"), (
            said
        )


@pytest.mark.parametrize(("mistake", "named"), [("delta", "delta"), ("dtype", "logits"), ("groups", "groups")])
def test_processes_that_disagree_are_told(pool, mistake, named):
    for said in pool.run(mistaken, mistake):
        assert said.startswith(f"ValueError: {named}: expected the same in every process of the group")


SCORES = torch.randn(6), torch.tensor([1, 0] * 3)


def outside(rank: int) -> str:
    return said_by(lambda: ap_loss(*SCORES, process_group=group_of(2)))


def test_a_group_is_for_its_members(pool):
    said = pool.run(outside)
    assert said[:2] == ["no error"] * 2
    assert said[2:] == ["ValueError: process_group: expected a group that this process is in"] * 2


def test_a_group_has_to_be_one():
    with pytest.raises(ValueError, match="process_group: expected torch\\.distributed to be initialised"):
        ap_loss(*SCORES, process_group=True)


def wrong_groups(rank: int) -> list[str]:
    return [said_by(lambda group=group: ap_loss(*SCORES, process_group=group)) for group in (False, "gloo", 3)]


def test_what_is_no_group_is_refused(pool):
    expected = "TypeError: process_group: expected a process group, True or None, got"
    assert pool.run(wrong_groups) == [[f"{expected} {name}" for name in ("bool", "str", "int")]] * SIZE
