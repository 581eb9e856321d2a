"""Self-balancing: hand-computed sequences, period semantics, checkpoints, casts, and what must not count."""

import copy
import io
import math
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from alrp_triton.losses import self_balance
from alrp_triton.losses.self_balance import SelfBalance

# (cls, loc), with ratios (cls + loc)/loc of 10, 5, 3, 2, 7.
LOSSES = [(0.9, 0.1), (0.8, 0.2), (0.5, 0.25), (0.5, 0.5), (0.75, 0.125)]


def step(balance, cls, loc, has_positives=True, dtype=torch.float64):
    """The weight of one iteration, as a Python number."""
    weight = balance(torch.tensor(cls, dtype=dtype), torch.tensor(loc, dtype=dtype), has_positives)
    assert weight.dtype == torch.float32
    assert weight.ndim == 0
    assert not weight.requires_grad
    return weight.item()


def weights(balance, losses=LOSSES):
    return [step(balance, *losses_of_one) for losses_of_one in losses]


def state(balance):
    return {name: value.clone() for name, value in balance.state_dict().items()}


def equal_states(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # The second and the fourth iteration complete a period, and use its average already.
        ({"period": 2, "average": "ratios"}, [50, 7.5, 7.5, 2.5, 2.5]),
        # (0.9 + 0.8 + 0.1 + 0.2)/(0.1 + 0.2), then (0.5 + 0.5 + 0.25 + 0.5)/(0.25 + 0.5).
        ({"period": 2}, [50, 20 / 3, 20 / 3, 7 / 3, 7 / 3]),
        ({"period": 1}, [10, 5, 3, 2, 7]),
    ],
)
def test_weights_by_hand(settings, expected):
    assert weights(SelfBalance(init=50, **settings)) == pytest.approx(expected, rel=1e-7)


def test_without_a_period_the_epoch_ends_it():
    balance = SelfBalance(init=3.5)
    assert weights(balance) == [3.5] * 5
    balance.step_epoch()
    assert weights(balance, LOSSES[:2]) == pytest.approx([4.625 / 1.175] * 2)
    balance.step_epoch()
    assert weights(balance, LOSSES[:1]) == pytest.approx([20 / 3])
    balance = SelfBalance(init=3.5, average="means")
    weights(balance, LOSSES[:2])
    balance.step_epoch()
    assert step(balance, 1.0, 1.0) == pytest.approx(20 / 3)


def warned(balance, iterations):
    """The numbers of the iterations that warn."""
    found = []
    for i in range(iterations):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step(balance, 0.5, 0.5)
        assert all("step_epoch()" in str(one.message) for one in caught)
        found += [i + 1] * len(caught)
    return found


def test_a_period_that_never_ends_is_noticed_once(monkeypatch):
    assert self_balance._FORGOTTEN == 10_000
    monkeypatch.setattr(self_balance, "_FORGOTTEN", 5)
    assert warned(SelfBalance(), 12) == [5]
    assert not warned(SelfBalance(period=3), 12)
    # Nor after an epoch has ended, however long the next.
    balance = SelfBalance()
    assert not warned(balance, 4)
    balance.step_epoch()
    assert not warned(balance, 12)
    # Nor in evaluation.
    assert not warned(SelfBalance().eval(), 12)
    # It is no part of the state; a copy goes on.
    balance = SelfBalance()
    assert not warned(balance, 3)
    assert list(balance.state_dict()) == ["weight", "sums", "count"]
    assert warned(copy.deepcopy(balance), 3) == [2]


def test_an_epoch_that_counted_nothing_keeps_the_weight():
    balance = SelfBalance(init=4)
    balance.step_epoch()
    assert step(balance, 0.0, 0.0, has_positives=False) == 4
    balance.step_epoch()
    assert step(balance, 0.5, 0.5) == 4
    balance.step_epoch()
    balance.step_epoch()
    assert balance.weight.item() == 2


def test_step_epoch_with_a_set_period_is_refused():
    with pytest.raises(RuntimeError, match=r"SelfBalance\(period=None\), got period=7"):
        SelfBalance(period=7).step_epoch()


@pytest.mark.parametrize("average", ["ratios", "means"])
@pytest.mark.parametrize(
    "spoilt",
    [
        (0.9, 0.1, False),
        (math.nan, 0.5, True),
        (0.5, math.nan, True),
        (math.inf, 0.5, True),
        (0.5, math.inf, True),
        (0.5, 0.0, True),
        (0.0, 0.0, True),
        (0.5, 1e-300, True),
    ],
)
def test_iterations_that_do_not_count_leave_no_trace(average, spoilt):
    balance, expected = SelfBalance(period=2, average=average), SelfBalance(period=2, average=average)
    for losses in LOSSES:
        before = balance.weight.item()
        assert step(balance, *spoilt) == before
        assert step(balance, *losses) == step(expected, *losses)
    assert equal_states(state(balance), state(expected))


def test_evaluation_mode_reads_only():
    balance = SelfBalance(period=2, average="ratios")
    weights(balance, LOSSES[:3])
    balance.eval()
    before = state(balance)
    assert weights(balance) == [7.5] * 5
    assert equal_states(state(balance), before)
    assert step(balance.train(), *LOSSES[3]) == 2.5


@pytest.mark.parametrize("average", ["ratios", "means"])
@pytest.mark.parametrize("seen", [0, 1, 7, 10, 13])
def test_resuming_within_a_period_gives_the_same_bits(average, seen):
    losses = torch.rand(40, 2, generator=torch.Generator().manual_seed(3)).tolist()
    uninterrupted = weights(SelfBalance(period=10, average=average), losses)
    first = SelfBalance(period=10, average=average)
    head = weights(first, losses[:seen])
    checkpoint = io.BytesIO()
    torch.save(nn.ModuleDict({"balance": first}).state_dict(), checkpoint)
    checkpoint.seek(0)
    second = SelfBalance(init=1.0, period=10, average=average)
    nn.ModuleDict({"balance": second}).load_state_dict(torch.load(checkpoint, weights_only=True))
    assert head + weights(second, losses[seen:]) == uninterrupted
    assert len(set(uninterrupted)) == 5


def test_the_state_is_in_buffers():
    balance = SelfBalance()
    assert {name: value.dtype for name, value in balance.state_dict().items()} == {
        "weight": torch.float32,
        "sums": torch.float64,
        "count": torch.int64,
    }
    assert not list(balance.parameters())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda balance: pickle.loads(pickle.dumps(balance))])
def test_copies_go_on_by_themselves(copied):
    balance = SelfBalance(period=2, average="means")
    weights(balance, LOSSES[:3])
    before = state(balance)
    clone = copied(balance)
    expected = [7 / 3, 7 / 3]
    assert weights(clone, LOSSES[3:]) == pytest.approx(expected)
    assert equal_states(state(balance), before)
    assert weights(balance, LOSSES[3:]) == pytest.approx(expected)


CASTS = {
    **{name: lambda model, name=name: getattr(model, name)() for name in ("half", "bfloat16", "float", "double")},
    "to": lambda model: model.to(torch.float16),
    "to a device": lambda model: model.to("cpu", torch.bfloat16),
    "type": lambda model: model.type(torch.float16),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_casts_of_the_model_spare_the_state(cast):
    model = nn.ModuleList([nn.Linear(2, 2), SelfBalance(period=None, init=51.3)])
    balance = model[1]
    weights(balance)
    before = state(balance)
    assert cast(model) is model
    assert model[1] is balance
    assert equal_states(state(balance), before)
    assert [value.dtype for value in state(balance).values()] == [value.dtype for value in before.values()]
    assert step(balance, 0.5, 0.5) == torch.tensor(51.3).item()


def test_moves_follow_the_model_and_the_losses():
    balance = SelfBalance(period=2)
    balance.to("meta", torch.float16)
    assert {value.device.type for value in balance.state_dict().values()} == {"meta"}
    assert balance.sums.dtype == torch.float64
    assert balance(torch.empty((), device="meta"), torch.empty((), device="meta"), True).device.type == "meta"
    # Losses on another device than a module that was never moved take it along.
    balance = SelfBalance(period=2)
    assert balance(torch.empty((), device="meta"), torch.empty((), device="meta"), True).device.type == "meta"
    assert balance.weight.device.type == "meta"


def test_an_epoch_of_a_million_iterations_averages_right():
    balance = SelfBalance(average="ratios")
    # As after 999 900 iterations with a ratio of 10.1; in float32 the sum would be off by far more than the tolerance.
    balance.sums.copy_(torch.tensor([999_900 * 10.1, 999_900], dtype=torch.float64))
    balance.count.fill_(999_900)
    for _ in range(100):
        step(balance, 0.11, 0.1)
    balance.step_epoch()
    assert balance.count.item() == 0
    expected = (999_900 * 10.1 + 100 * 2.1) / 1_000_000
    assert balance.weight.item() == torch.tensor(expected).item()


def test_losses_are_neither_changed_nor_differentiated_and_two_forwards_precede_a_backward():
    balance = SelfBalance(init=50, period=1)
    loc = torch.tensor([0.25, 0.5], requires_grad=True)
    cls = torch.tensor([0.5, 0.5], requires_grad=True)
    # Gradient accumulation: the second call rewrites the state that the first product was computed from.
    total = sum(balance(c, e, True) * e for c, e in zip(cls, loc))
    total.backward()
    assert loc.grad.tolist() == [3, 2]
    assert cls.grad is None
    assert loc.tolist() == [0.25, 0.5]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_losses_are_summed_in_float64(dtype):
    balance = SelfBalance(period=2, average="ratios")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        step(balance, 0.75, 0.125, dtype=dtype)
        weight = step(balance, 0.5, 0.1, dtype=dtype)
    rounded = torch.tensor(0.1, dtype=dtype).item()
    assert weight == torch.tensor((7 + 1 + 0.5 / rounded) / 2).item()


@pytest.mark.parametrize("period", [2, None])
@pytest.mark.parametrize("average", ["ratios", "means"])
def test_compiles_as_one_graph(period, average):
    torch._dynamo.reset()
    balance, expected = SelfBalance(period=period, average=average), SelfBalance(period=period, average=average)
    compiled = torch.compile(lambda c, e, has: balance(c, e, has) * e, backend="aot_eager", fullgraph=True)
    for cls, loc in [*LOSSES, (math.nan, 0.5), *LOSSES]:
        loss = torch.tensor(loc, requires_grad=True)
        for has_positives in (True, False):
            weighted = compiled(torch.tensor(cls), loss, has_positives)
            weight = expected(torch.tensor(cls), loss, has_positives)
            assert weighted.item() == (weight * loss).item()
            assert torch.autograd.grad(weighted, loss)[0].item() == weight.item()
    assert equal_states(state(balance), state(expected))


def test_reads_no_value_on_the_host():
    # A fake tensor has no values: whatever asks for one raises.
    with FakeTensorMode():
        for balance in (SelfBalance(period=2), SelfBalance(average="means")):
            for _ in range(3):
                balance(torch.rand(()), torch.rand(()), True)
            if balance.period is None:
                balance.step_epoch()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"init": 0}, ValueError, "init: expected a finite number > 0, got 0"),
        ({"init": -1.0}, ValueError, "init: .* got -1.0"),
        ({"init": math.inf}, ValueError, "init: .* got inf"),
        ({"init": math.nan}, ValueError, "init: .* got nan"),
        ({"init": "50"}, TypeError, "init: .* got str"),
        ({"init": True}, TypeError, "init: .* got bool"),
        ({"period": 0}, ValueError, "period: expected an int >= 1 or None, got 0"),
        ({"period": 2.0}, TypeError, "period: .* got float"),
        ({"period": True}, TypeError, "period: .* got bool"),
        ({"average": "median"}, ValueError, "average: expected 'ratios' or 'means', got 'median'"),
    ],
)
def test_wrong_settings_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        SelfBalance(**arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0.5, torch.tensor(0.5), True), TypeError, "cls: expected a 0-dimensional tensor, got float"),
        ((torch.tensor(0.5), None, True), TypeError, "loc: .* got NoneType"),
        ((torch.tensor(1), torch.tensor(0.5), True), TypeError, "cls: expected a floating-point tensor, got torch.int"),
        ((torch.tensor(0.5), torch.tensor([0.5]), True), ValueError, r"loc: .* got shape \[1\]"),
        ((torch.tensor(0.5), torch.empty((), device="meta"), True), ValueError, "loc: .* cpu, got meta"),
        ((torch.tensor(0.5), torch.tensor(0.5), torch.tensor(True)), TypeError, "has_positives: expected a bool"),
    ],
)
def test_wrong_losses_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        SelfBalance()(*arguments)


def test_repr_says_how_it_is_set():
    assert repr(SelfBalance(init=20, period=3665, average="means")) == (
        "SelfBalance(init=20.0, period=3665, average='means')"
    )
