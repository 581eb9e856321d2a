"""How the losses of the family are called: what they share, what they refuse, and their modules."""

import inspect

import pytest
import torch
from dialect import ALRP, FAMILY, KERNELS, NAN, assert_same_bits, backends, random_case

from alrp_triton import APLoss, NDCGLoss, RankSortOutput, alrp_loss, ap_loss, ndcg_loss, rank_sort_loss
from alrp_triton.framework import RankingLoss, ranking_loss

by_backend = pytest.mark.parametrize("backend", backends())
# aLRP has all of this in test_validation.py.
by_member = pytest.mark.parametrize("member", [member for member in FAMILY if member is not ALRP], ids=repr)


# The number of positives, where nothing else says it.


def own(ranking):
    return ranking.num_false_positives.sqrt()


UNCOUNTED = {
    "ap": ap_loss,
    "ndcg": ndcg_loss,
    "formula": lambda logits, labels, **arguments: ranking_loss(logits, labels, own, **arguments),
}
by_loss = pytest.mark.parametrize("loss", UNCOUNTED.values(), ids=UNCOUNTED)


@by_backend
@by_loss
@pytest.mark.parametrize("grouped", [False, True])
def test_number_of_positives_may_be_given(grouped, loss, backend):
    arguments = {"groups": torch.arange(150) % 4, "backend": backend} if grouped else {"backend": backend}
    for num_pos in [7] if KERNELS else [0, 1, 40, 150]:
        case = random_case(150, num_pos, ignored=0.1)
        x = case.logits.clone().requires_grad_()
        results = []
        for number in (None, num_pos):
            value = loss(x, case.labels, num_positives=number, **arguments)
            results.append((value.detach(), *torch.autograd.grad(value, x)))
        for one, other in zip(*results):
            assert_same_bits("result", one, other)


@by_backend
@by_loss
def test_wrong_numbers_of_positives(loss, backend, looking):
    case = random_case(50, 5)
    for number in (4, 6, 0, 50):
        with pytest.raises(ValueError, match=f"^num_positives: expected .* 5, got {number}$"):
            loss(*case[1:3], num_positives=number, backend=backend)
    with pytest.raises(ValueError, match=r"^num_positives: expected an int >= 0 or None, got -1$"):
        loss(*case[1:3], num_positives=-1, backend=backend)
    for number in (True, False, 5.0, "5", torch.tensor(5)):
        with pytest.raises(TypeError, match=f"^num_positives: expected an int or None, got {type(number).__name__}$"):
            loss(*case[1:3], num_positives=number, backend=backend)


# Wrong arguments.

LOGITS = torch.tensor([0.5, -1.0, 2.0, 0.0, 1.0, -0.5])
LABELS = torch.tensor([1, 0, 0, -1, 1, 0])
WRONG = [
    (TypeError, "logits", {"logits": None}),
    (TypeError, "logits", {"logits": LOGITS.long()}),
    (ValueError, "logits", {"logits": [], "labels": []}),
    (TypeError, "labels", {"labels": LABELS.float()}),
    (ValueError, "labels", {"labels": LABELS[:5]}),
    (ValueError, "labels", {"labels": LABELS.masked_fill(LABELS == 0, 2)}),
    (ValueError, "labels", {"ignore_index": -100}),
    (TypeError, "ignore_index", {"ignore_index": -1.0}),
    (TypeError, "delta", {"delta": None}),
    (TypeError, "delta", {"delta": True}),
    (ValueError, "delta", {"delta": -1.0}),
    (ValueError, "delta", {"delta": NAN}),
    (ValueError, "delta", {"delta": 1e-31}),
    (ValueError, "backend", {"backend": "cuda"}),
]
WRONG_VALUES = [
    (TypeError, {"values": None}),
    (TypeError, {"values": [0.25, 0.75]}),
    (TypeError, {"values": torch.tensor([0, 1])}),
    (ValueError, {"values": torch.rand(3)}),
    (ValueError, {"values": torch.rand(1)}),
    (ValueError, {"values": torch.rand(0)}),
    (ValueError, {"values": torch.rand(2, 1)}),
    (ValueError, {"values": torch.tensor(0.5)}),
    (ValueError, {"values": torch.rand(2, device="meta")}),
]


def call(member, backend, changed):
    arguments = {
        "logits": LOGITS,
        "labels": LABELS,
        "values": torch.tensor([0.25, 0.75]),
        "backend": backend,
        **changed,
    }
    member.loss(**arguments)


@by_backend
@by_member
def test_wrong_arguments(member, backend, looking):
    call(member, backend, {})
    for error, name, changed in WRONG:
        with pytest.raises(error, match=f"^{name}: expected"):
            call(member, backend, changed)
    for error, changed in WRONG_VALUES if member.takes else ():
        with pytest.raises(error, match=f"^{member.takes}: expected"):
            call(member, backend, changed)


@by_backend
@pytest.mark.parametrize("interpolated", [None, 1, "yes"])
def test_wrong_interpolated(interpolated, backend):
    with pytest.raises(TypeError, match=r"^interpolated: expected a bool"):
        ap_loss(LOGITS, LABELS, interpolated=interpolated, backend=backend)


# Modules.


def flipped_error(ranking):
    return 1 - ranking.rank_positive / ranking.rank


MODULES = [
    (
        APLoss(0.25, False, ignore_index=7, backend="torch"),
        {"delta": 0.25, "interpolated": False, "ignore_index": 7, "backend": "torch"},
        ap_loss,
        "APLoss(delta=0.25, interpolated=False, ignore_index=7, backend='torch')",
    ),
    (APLoss(), {}, ap_loss, "APLoss(delta=1.0, interpolated=True, ignore_index=-1, backend='auto')"),
    (
        NDCGLoss(0.0, ignore_index=7, backend="reference"),
        {"delta": 0.0, "ignore_index": 7, "backend": "reference"},
        ndcg_loss,
        "NDCGLoss(delta=0.0, ignore_index=7, backend='reference')",
    ),
    (NDCGLoss(), {}, ndcg_loss, "NDCGLoss(delta=1.0, ignore_index=-1, backend='auto')"),
    (
        RankingLoss(flipped_error, delta=0.25, eps=0.5, ignore_index=7, backend="torch"),
        {"error": flipped_error, "delta": 0.25, "eps": 0.5, "ignore_index": 7, "backend": "torch"},
        ranking_loss,
        "RankingLoss(error=flipped_error, delta=0.25, eps=0.5, ignore_index=7, backend='torch')",
    ),
]


@pytest.mark.parametrize("problem", MODULES, ids=lambda problem: problem[3].split("(")[0])
@pytest.mark.parametrize("arguments", [{}, {"num_positives": 9}, {"groups": torch.arange(90) % 2}], ids=str)
def test_modules_are_functions(arguments, problem, looking):
    module, settings, function, _ = problem
    case = random_case(90, 9)
    labels = case.labels.masked_fill(case.labels == -1, settings.get("ignore_index", -1))
    x = case.logits.clone().requires_grad_()
    found, expected = module(x, labels, **arguments), function(x, labels, **settings, **arguments)
    assert_same_bits("value", found.detach(), expected.detach())
    assert_same_bits("gradient", *(torch.autograd.grad(loss, x)[0] for loss in (found, expected)))
    with pytest.raises(ValueError, match=r"^num_positives"):
        module(x, labels, 8)
    with pytest.raises(ValueError, match=r"^groups"):
        module(x, labels, 9, torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize("problem", MODULES, ids=lambda problem: problem[3].split("(")[0])
def test_modules_say_what_they_were_made_of(problem):
    module, *_, expected = problem
    assert repr(module) == expected
    assert not list(module.parameters())
    assert not list(module.buffers())


def test_signatures_of_the_family_agree():
    """One form for all: first the tensors, then keywords, with the same names and the same defaults."""
    shared = ("groups", "ignore_index", "backend", "group")
    expected = inspect.signature(alrp_loss).parameters
    for function in (ap_loss, ndcg_loss, rank_sort_loss, ranking_loss):
        found = inspect.signature(function).parameters
        assert list(found)[:2] == ["logits", "labels"]
        assert list(found)[-4:] == list(shared)
        for name in shared:
            assert found[name].default == expected[name].default
            assert found[name].kind == inspect.Parameter.KEYWORD_ONLY
    assert inspect.signature(rank_sort_loss).parameters["delta"].default == 0.5
    assert RankSortOutput._fields == ("ranking", "sorting")
