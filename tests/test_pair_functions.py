"""Functions of differences in the place of the ramp, and as distributions of what a positive sends."""

from functools import partial

import pytest
import torch
from dialect import (
    INF,
    KERNELS,
    NAN,
    all_cases,
    assert_all_nan,
    assert_close,
    assert_right,
    assert_same_bits,
    by_backend,
    by_engine_backend,
    depth_error,
    depth_normaliser,
    depth_target,
    draw_groups,
    evaluate,
    formula,
    imprecision,
    of_case,
    problem_of_images,
    problems,
    random_case,
    repeatable,
)
from hypothesis import given
from hypothesis import strategies as st

from alrp_triton.engine import pairs
from alrp_triton.framework import RankingLoss, ranking_loss

if KERNELS:
    pytest.skip("pair functions are PyTorch's", allow_module_level=True)


def sigmoid(x, delta):
    return torch.sigmoid(x + delta)


def squared_ramp(x, delta):
    return (x / (2 * delta + 0.5) + 0.5).clamp(0, 1) ** 2


def exponential(x, delta):
    """Harder and harder examples, up to 1; all have a share, but those at -inf."""
    return torch.exp(x.clamp(max=8) / 4 - 2)


def beyond(x, delta):
    """From -inf to inf, of which [0, 1] is left."""
    return 3 * x + 0.25


def quarters(x, delta):
    return torch.where(x >= 0, 0.25 + x / 2, 0.0)


FUNCTIONS = {
    "smooth": {"smoothing": sigmoid},
    "steep": {"distribution": squared_ramp},
    "everyone": {"distribution": exponential},
    "clamped": {"smoothing": beyond, "distribution": beyond},
    "both": {"smoothing": exponential, "distribution": sigmoid},
}
# Pass 1 adds up multiples of 2^-36, to which functions that are nowhere 0 may come down; so eps is more than a few.
EPS = 0.01


def with_functions(name, error=depth_error, takes="costs", **own):
    """A loss with the functions of that name."""
    return formula(name, error, takes, FUNCTIONS[name], eps=EPS, **FUNCTIONS[name], **own)


SHAPED = [with_functions(name, target=depth_target, normaliser=depth_normaliser) for name in FUNCTIONS]
by_functions = pytest.mark.parametrize("member", SHAPED, ids=repr)


def small_cases():
    cases = [case for case in all_cases() if len(case.logits) <= 700]
    turns = [(case, SHAPED[(i + j) % 5]) for i, case in enumerate(cases) for j in range(5)]
    return [pytest.param(*turn, id=f"{turn[0].name}-{turn[1]}") for turn in turns]


@pytest.mark.thinned(14)
@by_engine_backend
@pytest.mark.parametrize(("case", "member"), small_cases())
def test_pair_functions_on_every_case(case, member, backend):
    odd = bool(case.num_positives % 2)
    for delta, grouped in [(1.0, False), (0.1, True), (0.0, odd)]:
        arguments = {"delta": delta, **({"groups": draw_groups(case)} if grouped else {})}
        assert_right(member, case, backend, **arguments)


@by_backend
@by_functions
@repeatable(max_examples=25)
@given(case=problems(), delta=st.sampled_from([1.0, 0.1, 0.0]), grouped=st.booleans())
def test_pair_functions_on_drawn_cases(case, delta, grouped, member, backend):
    arguments = {"delta": delta, **({"groups": draw_groups(case)} if grouped else {})}
    assert_right(member, case, backend, **arguments)


@by_backend
def test_a_distribution_by_hand(backend):
    """Positive at 0; false positives at 1 and 0; the step counts both, the function gives them 3/4 and 1/4."""
    x = torch.tensor([0.0, 1.0, 0.0, -1.0, NAN], requires_grad=True)
    labels = torch.tensor([1, 0, 0, 0, -1])
    value = ranking_loss(x, labels, imprecision, delta=0.0, distribution=quarters, backend=backend)
    (gradient,) = torch.autograd.grad(value, x)
    assert_close("value", value, torch.tensor(2 / 3), 1e-7)
    assert_close("gradient", gradient, torch.tensor([-2 / 3, 1 / 2, 1 / 6, 0.0, 0.0]), 1e-7)


@by_backend
@by_functions
def test_pair_functions_take_any_layout(member, backend):
    logits, classes, labels, values = problem_of_images(3, 8)
    groups = torch.arange(3)[:, None].expand(3, 8)
    expected = evaluate(member, logits, labels, values, backend, groups=groups)
    strided = logits.mT.contiguous().mT, classes.to(torch.int8), groups[..., None].expand(3, 8, 5)
    levels = (
        [logits[:1], logits[1:1], logits[1:].reshape(-1)],
        [classes[:1], classes[1:1], labels[1:].reshape(-1)],
        [groups[:1], groups[1:1], groups[1:, :, None].expand(2, 8, 5).reshape(-1)],
    )
    for x, y, ids in (strided, levels):
        for name, tensor in evaluate(member, x, y, values, backend, groups=ids).items():
            # The last digit of what PyTorch makes of a number may depend on its place.
            assert_close(name, tensor.reshape(expected[name].shape), expected[name], 1e-6)


@pytest.mark.thinned(2)
@by_functions
@pytest.mark.parametrize("grouped", [False, True])
def test_any_pieces_give_the_same(grouped, member, monkeypatch):
    case = random_case(70, 12, dtype=torch.float64)
    arguments = {"groups": draw_groups(case)} if grouped else {}
    expected = of_case(member, case, "torch", **arguments)
    for piece, held in [(1, 1), (13, 50), (70, 1)]:
        monkeypatch.setattr(pairs, "_PIECE", piece)
        monkeypatch.setattr(pairs, "_PAIRS", held)
        for name, tensor in of_case(member, case, "torch", **arguments).items():
            assert_close(name, tensor, expected[name], 1e-14)


@by_backend
@by_functions
@pytest.mark.parametrize("where", ["a positive", "a negative", "a value"])
def test_nan_is_not_hidden_by_pair_functions(where, member, backend):
    case = random_case(60, 8)
    if where == "a value":
        case.loc_errors[3] = NAN
    else:
        case.logits[(case.labels == (where == "a positive")).nonzero()[-1]] = NAN
    for arguments in ({}, {"groups": draw_groups(case)}):
        assert_all_nan(of_case(member, case, backend, **arguments), case.labels)


@by_backend
@by_functions
def test_without_positives_pair_functions_give_0(member, backend):
    for logits, labels in [
        (torch.tensor([1.0, -INF, 3.0]), torch.tensor([0, 0, -1])),
        (torch.empty(0, 4), torch.empty(0, dtype=torch.int64)),
    ]:
        found = evaluate(member, logits, labels, torch.empty(0), backend)
        assert not any(tensor.any() for tensor in found.values())


@by_engine_backend
@by_functions
def test_the_same_bits_twice(member, backend):
    case = random_case(3000, 50)
    one, other = (of_case(member, case, backend) for _ in range(2))
    for name, tensor in one.items():
        assert_same_bits(name, other[name], tensor)


@by_backend
def test_two_losses_share_no_state(backend):
    """Functions of one name, called in turns, with backward after both."""
    case = random_case(60, 8)

    def made(power):
        def function(x, delta):
            return torch.sigmoid(x) ** power

        return function

    criteria = [RankingLoss(imprecision, distribution=made(power), backend=backend) for power in (1, 3)]
    alone = []
    for criterion in criteria:
        x = case.logits.clone().requires_grad_()
        value = criterion(x, case.labels)
        alone.append((value.detach(), *torch.autograd.grad(value, x)))
    x = case.logits.clone().requires_grad_()
    values = [criterion(x, case.labels) for criterion in criteria]
    for value, (expected, gradient) in reversed(list(zip(values, alone))):
        assert_same_bits("value", value.detach(), expected)
        assert_same_bits("gradient", torch.autograd.grad(value, x)[0], gradient)
    assert not torch.equal(alone[0][1], alone[1][1])
    assert torch.equal(alone[0][0], alone[1][0])


class Callable:
    """A function with a state, equal to its like, and so without a hash."""

    def __init__(self, power):
        self.power = power

    def __call__(self, x, delta):
        return torch.sigmoid(x) ** self.power

    def __eq__(self, other):
        return isinstance(other, Callable)


@by_backend
def test_any_callable_will_do(backend):
    case = random_case(60, 8)
    functions = [partial(lambda power, x, delta: torch.sigmoid(x) ** power, 3), Callable(3), Callable(3).__call__]
    results = [of_case(formula("", imprecision, distribution=f), case, backend) for f in functions]
    other = of_case(formula("", imprecision, distribution=Callable(1)), case, backend)
    for result in results[1:]:
        assert_same_bits("gradient", result["loss by logits"], results[0]["loss by logits"])
    assert not torch.equal(other["loss by logits"], results[0]["loss by logits"])


@pytest.mark.parametrize("backend", ["triton", "pairwise"])
@pytest.mark.parametrize("name", ["smoothing", "distribution"])
def test_kernels_know_no_functions(name, backend):
    case = random_case(30, 4)
    with pytest.raises(ValueError, match=rf"^backend: expected .* with smoothing or distribution, got '{backend}'"):
        ranking_loss(*case[1:3], imprecision, backend=backend, **{name: sigmoid})
    # By itself the package finds a way.
    value = ranking_loss(*case[1:3], imprecision, **{name: sigmoid})
    assert_close("value", value, ranking_loss(*case[1:3], imprecision, backend="torch", **{name: sigmoid}), 1e-12)


@by_backend
def test_differentiating_twice_raises(backend):
    case = random_case(60, 8)
    x = case.logits.clone().requires_grad_()
    value = ranking_loss(x, case.labels, imprecision, smoothing=sigmoid, backend=backend)
    (gradient,) = torch.autograd.grad(value, x, create_graph=True)
    with pytest.raises(RuntimeError):
        (gradient.square().sum() + x.sum()).backward()


def test_pair_functions_must_be_functions():
    case = random_case(30, 4)
    for wrong in (lambda x, delta: 0.5, lambda x, delta: x.sum(), lambda x, delta: x[:1], lambda x, delta: None):
        for name in ("smoothing", "distribution"):
            with pytest.raises(ValueError, match=r"expected a tensor of the differences' shape"):
                ranking_loss(*case[1:3], imprecision, backend="torch", **{name: wrong})


def test_pair_functions_get_scores_and_delta():
    """Differences in the scores' compute dtype, 0 for equal infinities, never NaN; and delta as it was given."""
    seen = []

    def watched(x, delta):
        seen.append((x.dtype, delta, bool(x.isnan().any()), x.requires_grad))
        return (x >= 0).to(torch.float16)

    logits = torch.tensor([INF, 0.0, -INF, INF, -INF, 0.5, NAN])
    labels = torch.tensor([1, 1, 1, 0, 0, 0, 0])
    for dtype, wanted in [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float64,) * 2]:
        for num in (6, 7):
            seen.clear()
            x = logits[:num].to(dtype).requires_grad_()
            value = ranking_loss(x, labels[:num], imprecision, smoothing=watched, delta=0.125, backend="torch")
            value.backward()
            assert set(seen) == {(wanted, 0.125, False, False)}
            assert value.isnan() == (num == 7)
            assert value.dtype == wanted
    # As steps: 1, 2 and 3 negatives at or above, with 0, 1 and 2 positives.
    value = ranking_loss(logits[:6], labels[:6], imprecision, smoothing=watched)
    assert value == pytest.approx((1 / 2 + 2 / 4 + 3 / 6) / 3)
