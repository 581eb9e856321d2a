"""Losses from formulas: the family's own, pair functions in the place of the ramp, further numbers, and mistakes."""

import math
from collections import Counter
from functools import partial

import pytest
import torch
from cases import INF, INTERPRETED, NAN, Case, all_cases, problems, random_case
from checks import assert_close, assert_same_bits, backends, engine_backends
from family import (
    ALRP,
    AP,
    DEPTH,
    NDCG,
    PLAIN_AP,
    RANK_SORT,
    assert_agree,
    depth_error,
    depth_normaliser,
    depth_target,
    evaluate,
    formula,
    judge,
    of_case,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from alrp_triton import framework, reference
from alrp_triton.engine import pairs
from alrp_triton.engine.backends import direct
from alrp_triton.framework import PairFunction, RankingLoss, ranking_loss

by_backend = pytest.mark.parametrize("backend", backends())
GROUPS = torch.tensor([2**40, -3, 5])


def groups_of(case: Case) -> torch.Tensor:
    return GROUPS[torch.randint(3, case.labels.shape, generator=torch.Generator().manual_seed(0))]


# The family, as users would write it.


def lrp(ranking, loc_errors):
    return (ranking.num_false_positives + loc_errors + ranking.sums_above(loc_errors)) / ranking.rank


def lrp_target(ranking, loc_errors):
    return loc_errors / ranking.rank


def imprecision(ranking):
    return 1 - ranking.rank_positive / ranking.rank


def interpolated(ranking):
    return 1 - ranking.running_max(ranking.rank_positive / ranking.rank)


def best_gain(ranking):
    places = torch.arange(2.0, 2 + float(ranking.num_positives.max()), dtype=torch.float64)
    return (1 / places.log2()).cumsum(0)[ranking.num_positives.long() - 1]


def missing_gain(ranking):
    return best_gain(ranking) / ranking.num_positives - 1 / (1 + ranking.rank).log2()


def missing_gain_target(ranking):
    return best_gain(ranking) / ranking.num_positives - 1 / (1 + ranking.rank_positive).log2()


def share_of_negatives(at_0, ranking):
    return ranking.num_false_positives / (ranking.rank - 1 + at_0)


def written(member, delta):
    """A loss of the family from a formula."""
    name = f"own_{member}"
    if member is ALRP:
        return formula(name, lrp, "loc_errors", target=lrp_target, eps=1e-5)
    if member is NDCG:
        return formula(name, missing_gain, target=missing_gain_target, normaliser=best_gain)
    if member is RANK_SORT:
        return formula(name, partial(share_of_negatives, 0.5 if delta else 1.0), eps=1e-10)
    return formula(name, interpolated if member is AP else imprecision)


@by_backend
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("delta", [0.5] if INTERPRETED else [1.0, 0.5, 0.0])
@pytest.mark.parametrize("member", [ALRP, AP, PLAIN_AP, NDCG, RANK_SORT], ids=repr)
def test_the_family_in_formulas(member, delta, grouped, backend):
    for dtype in [torch.float32] if INTERPRETED else [torch.float32, torch.float64, torch.bfloat16]:
        case = random_case(200 if INTERPRETED else 600, 30, dtype=dtype)
        arguments = {"delta": delta, **({"groups": groups_of(case)} if grouped else {})}
        found = of_case(written(member, delta), case, backend, **arguments)
        if member is ALRP:
            of = of_case(member, case, backend, loc_ranking="smooth", **arguments)
            expected = {
                "loss": of["cls"] + of["loc"],
                "loss by logits": of["cls by logits"],
                "loss by values": of["loc by values"],
            }
        elif member is RANK_SORT:
            of = of_case(member, case, backend, **arguments)
            expected = {"loss": of["ranking"], "loss by logits": of["ranking by logits"]}
        else:
            expected = of_case(member, case, backend, **arguments)
        for name, tensor in expected.items():
            finest = {torch.float64: 1e-12, torch.bfloat16: torch.finfo(dtype).eps}.get(tensor.dtype, 1e-6)
            assert_close(name, found[name], tensor, finest)


@by_backend
@settings(max_examples=4 if INTERPRETED else 60, deadline=None, derandomize=True)
@given(case=problems(), delta=st.sampled_from([1.0, 0.5, 0.1, 0.0]), member=st.sampled_from([ALRP, AP, NDCG]))
def test_the_family_in_formulas_on_drawn_cases(case, delta, member, backend):
    found = of_case(written(member, delta), case, backend, delta=delta)
    settings = {"loc_ranking": "smooth"} if member is ALRP else {}
    expected = judge(member, case, delta=delta, **settings)
    value = expected["cls"] + expected["loc"] if member is ALRP else expected["loss"]
    assert_agree({"loss": found["loss"]}, {"loss": value})
    gradient = expected[f"{member.components[0]} by logits"]
    assert_close("gradient", found["loss by logits"], gradient, 1e-6)


# Further numbers of the positives.


def tangled(ranking, numbers, others):
    """Uses all that a formula is offered; the largest and the numbers by order are no linear functions."""
    above = ranking.sums_above(numbers * others) / ranking.rank
    before = ranking.sums_sorted(numbers.square()) / ranking.rank_positive
    largest = ranking.running_max(numbers + others) * ranking.num_false_positives.log1p()
    return (above + before).sqrt() + largest * numbers / ranking.num_positives


@by_backend
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("delta", [0.5, 0.0])
def test_gradients_of_extras(delta, grouped, backend):
    """Those of the reference, which are what finite differences of its values are."""
    case = random_case(80, 12, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    numbers, others = torch.rand(2, 12, generator=generator, dtype=torch.float64) + 0.1
    arguments = {"delta": delta, "groups": groups_of(case) if grouped else None, "normaliser": depth_normaliser}

    def expected(one, other):
        extras = {"numbers": one, "others": other}
        return reference.ranking_loss(case.logits, case.labels, tangled, extras=extras, **arguments)

    leaves = numbers.clone().requires_grad_(), others.clone().requires_grad_()
    x = case.logits.clone().requires_grad_()
    extras = {"numbers": leaves[0], "others": leaves[1]}
    value = ranking_loss(x, case.labels, tangled, extras=extras, backend=backend, **arguments)
    by_logits, *by_extras = torch.autograd.grad(value, (x, *leaves))
    exact = expected(numbers, others)
    assert_close("value", value, exact.value, 1e-9)
    assert_close("by logits", by_logits, exact.grad_logits, 1e-9)
    for name, gradient in zip(extras, by_extras):
        assert_close(name, gradient, exact.grad_extras[name], 1e-9)
    step = 1e-5
    for k in range(12):
        move = torch.zeros(12, dtype=torch.float64).index_fill(0, torch.tensor(k), step)
        for gradient, moves in zip(by_extras, ((move, 0), (0, move))):
            up, down = (expected(numbers + s * moves[0], others + s * moves[1]).value for s in (1, -1))
            assert abs((up - down) / (2 * step) - gradient[k]) < 1e-7


@by_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_extras_of_any_dtype(dtype, backend):
    case = random_case(80, 12)
    case = case._replace(loc_errors=case.loc_errors.to(dtype))
    found, expected = of_case(DEPTH, case, backend), judge(DEPTH, case)
    assert found["loss by values"].dtype == dtype
    assert found["loss"].dtype == torch.float32
    assert_agree(found, expected)


@by_backend
def test_extras_may_come_from_anywhere(backend):
    """From a graph, without a graph, twice the same, strided, expanded."""
    case = random_case(80, 12, dtype=torch.float64)

    def product(ranking, one, other):
        return one.square() * other * ranking.num_false_positives / ranking.rank

    def run(one, other):
        x = case.logits.clone().requires_grad_()
        return ranking_loss(x, case.labels, product, extras={"one": one, "other": other}, backend=backend)

    leaf = torch.linspace(0.1, 1, 12, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(run(leaf, leaf.detach()), leaf)
    (other,) = torch.autograd.grad(run(leaf.detach(), leaf), leaf)
    (both,) = torch.autograd.grad(run(leaf, leaf), leaf)
    assert_close("the same twice", both, expected + other, 1e-12)
    (derived,) = torch.autograd.grad(run(3 * leaf, leaf.detach()), leaf)
    assert_close("derived", derived, 9 * expected, 1e-12)
    row = torch.full((1,), 0.5, dtype=torch.float64, requires_grad=True)
    (expanded,) = torch.autograd.grad(run(row.expand(12), leaf.detach()), row)
    (repeated,) = torch.autograd.grad(run(row.repeat(12), leaf.detach()), row)
    assert_close("expanded", expanded, repeated, 1e-12)
    pairs = torch.stack([leaf, leaf], dim=1)
    (strided,) = torch.autograd.grad(run(pairs[:, 0], pairs[:, 1].detach()), leaf)
    assert_close("strided", strided, expected, 1e-12)


@by_backend
def test_numbers_alone_may_need_a_gradient(backend):
    case = random_case(80, 12)
    leaf = case.loc_errors.clone().requires_grad_()
    value = ranking_loss(case.logits, case.labels, depth_error, extras={"costs": leaf}, backend=backend)
    (gradient,) = torch.autograd.grad(value, leaf)
    exact = reference.ranking_loss(case.logits, case.labels, depth_error, extras={"costs": case.loc_errors})
    assert_close("gradient", gradient, exact.grad_extras["costs"], 1e-6)


@by_backend
def test_extras_that_the_formula_leaves_out(backend):
    """Have a say in P all the same, and a gradient of 0 or none."""
    case = random_case(80, 12)
    leaf = case.loc_errors.clone().requires_grad_()
    x = case.logits.clone().requires_grad_()
    value = ranking_loss(x, case.labels, lambda ranking, **_: imprecision(ranking), extras={"n": leaf}, backend=backend)
    value.backward()
    assert_same_bits("value", value.detach(), of_case(formula("", imprecision), case, backend)["loss"])
    assert leaf.grad is None or not leaf.grad.any()
    with pytest.raises(ValueError, match=r"^n: expected one for each positive label, 12, got 11$"):
        ranking_loss(*case[1:3], lambda ranking, n: ranking.rank, extras={"n": leaf[:11]}, backend=backend)


# Target, normaliser, eps.


@by_backend
@pytest.mark.parametrize("grouped", [False, True])
def test_normalisers(grouped, backend):
    case = random_case(100, 20, dtype=torch.float64)
    arguments = {"groups": groups_of(case)} if grouped else {}
    of_one = of_case(formula("", imprecision), case, backend, **arguments)
    p = 20
    if not grouped:
        for given, factor in [
            (lambda ranking: 7, p / 7),
            (lambda ranking: 0.5, 2 * p),
            (lambda ranking: torch.tensor(4.0), p / 4),
            (lambda ranking: torch.tensor(4), p / 4),
            (lambda ranking: ranking.num_positives, 1),
            (lambda ranking: ranking.num_positives.sqrt(), math.sqrt(p)),
        ]:
            found = of_case(formula("", imprecision, normaliser=given), case, backend)
            for name, tensor in found.items():
                assert_close(name, tensor, factor * of_one[name], 1e-12)
    for given in (lambda ranking: 7, lambda ranking: ranking.num_positives**2, lambda ranking: ranking.rank):
        own = formula("", depth_error, "costs", target=depth_target, normaliser=given)
        assert_agree(of_case(own, case, backend, **arguments), judge(own, case, **arguments), 1e-9)


@by_backend
def test_targets(backend):
    """A target of its own error leaves a value and no gradient; twice the error turns the gradient around."""
    case = random_case(100, 20)
    plain = of_case(formula("", imprecision), case, backend)
    content = of_case(formula("", imprecision, target=imprecision), case, backend)
    assert content["loss"] == plain["loss"]
    assert not content["loss by logits"].any()
    missed = of_case(formula("", imprecision, target=lambda ranking: 2 * imprecision(ranking)), case, backend)
    assert missed["loss"] == plain["loss"]
    assert_same_bits("gradient", missed["loss by logits"], -plain["loss by logits"])
    # An extra in the target moves the gradient of scores, and gets none itself.
    own = formula("", lambda ranking, t: imprecision(ranking) + 0 * t, "t", target=lambda ranking, t: t)
    found = of_case(own, case, backend)
    assert_agree(found, judge(own, case))
    assert not found["loss by values"].any()


@by_backend
@pytest.mark.parametrize("eps", [0, 1e-5, 0.3, 1.0, 2.5, INF])
def test_eps_gates_positives_with_few_false_positives(eps, backend):
    logits = torch.tensor([3.0, 1.0, 0.5, 0.0, 0.0, -0.75, -3.0, 0.0, 0.5, -0.5])
    labels = torch.tensor([1, 1, 1, 1, 1, 1, 1, 0, 0, 0])
    case = Case("by hand", logits, labels, torch.linspace(0, 1, 7))
    own = formula("", imprecision, eps=eps)
    found = of_case(own, case, backend)
    counts = torch.tensor([0.0, 0.25, 0.75, 1.5, 1.5, 2.5, 3.0])
    assert (found["loss by logits"][:7] == 0).tolist() == (counts <= eps).tolist()
    assert_agree(found, judge(own, case))
    assert found["loss"] == of_case(formula("", imprecision), case, backend)["loss"]


@by_backend
def test_upstream_gradients_scale(backend):
    case = random_case(200, 20)
    one, other = (of_case(DEPTH, case, backend, upstream=upstream) for upstream in (1.0, -(2.0**-9)))
    for name in ("loss by logits", "loss by values"):
        assert_same_bits(name, other[name], one[name] * -(2.0**-9))
    half = case._replace(logits=case.logits.half())
    expected = judge(DEPTH, half)["loss by logits"]
    for upstream in (2.0**-12, 0.3, 1000.0):
        gradient = of_case(DEPTH, half, backend, upstream=upstream)["loss by logits"]
        assert_agree({"gradient": gradient}, {"gradient": upstream * expected}, 1e-6, upstream)


# Functions of differences in the place of the ramp.


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


FUNCTIONS = {
    "smooth": {"smoothing": sigmoid},
    "steep": {"distribution": squared_ramp},
    "everyone": {"distribution": exponential},
    "clamped": {"smoothing": beyond, "distribution": beyond},
    "both": {"smoothing": exponential, "distribution": sigmoid},
}
if INTERPRETED:
    import triton
    import triton.language as tl

    @triton.jit
    def triton_sigmoid(x, delta):
        return 1 / (1 + tl.exp(-x - delta))

    @triton.jit
    def triton_squared_ramp(x, delta):
        h = tl.minimum(tl.maximum(x / (2 * delta + 0.5) + 0.5, 0.0), 1.0)
        return h * h

    @triton.jit
    def triton_exponential(x, delta):
        return tl.exp(tl.minimum(x, 8) / 4 - 2)

    @triton.jit
    def triton_beyond(x, delta):
        return 3 * x + 0.25

    DEVICE = {
        sigmoid: triton_sigmoid,
        squared_ramp: triton_squared_ramp,
        exponential: triton_exponential,
        beyond: triton_beyond,
    }
else:
    DEVICE = {}
ALL = (sigmoid, squared_ramp, exponential, beyond)
PAIRS = {function: PairFunction(function, DEVICE.get(function)) for function in ALL}
# Pass 1 adds up multiples of 2^-36, to which functions that are nowhere 0 may come down; so eps is more than a few.
EPS = 0.01


def with_functions(name, error=depth_error, takes="costs", **own):
    """A loss with the functions of that name."""
    functions = FUNCTIONS[name]
    return formula(name, error, takes, functions, eps=EPS, **{key: PAIRS[f] for key, f in functions.items()}, **own)


SHAPED = [with_functions(name, target=depth_target, normaliser=depth_normaliser) for name in FUNCTIONS]
by_functions = pytest.mark.parametrize("member", [SHAPED[0], SHAPED[3]] if INTERPRETED else SHAPED, ids=repr)


def small_cases():
    cases = [case for case in all_cases() if len(case.logits) <= 700]
    turns = [(case, SHAPED[(i + j) % 5]) for i, case in enumerate(cases) for j in range(5)]
    return [pytest.param(*turn, id=f"{turn[0].name}-{turn[1]}") for turn in (turns[::22] if INTERPRETED else turns)]


@pytest.mark.parametrize("backend", engine_backends())
@pytest.mark.parametrize(("case", "member"), small_cases())
def test_pair_functions_on_every_case(case, member, backend):
    odd = bool(case.num_positives % 2)
    for delta, grouped in [(0.5, odd)] if INTERPRETED else [(1.0, False), (0.1, True), (0.0, odd)]:
        arguments = {"delta": delta, **({"groups": groups_of(case)} if grouped else {})}
        tolerance = 1e-9 if case.logits.dtype == torch.float64 else 1e-6
        found = of_case(member, case, backend, **arguments)
        assert_agree(found, judge(member, case, **arguments), tolerance, (delta, grouped))


@by_backend
@by_functions
@settings(max_examples=2 if INTERPRETED else 25, deadline=None, derandomize=True)
@given(case=problems(), delta=st.sampled_from([1.0, 0.1, 0.0]), grouped=st.booleans())
def test_pair_functions_on_drawn_cases(case, delta, grouped, member, backend):
    arguments = {"delta": delta, **({"groups": groups_of(case)} if grouped else {})}
    assert_agree(of_case(member, case, backend, **arguments), judge(member, case, **arguments))


@pytest.mark.skipif(INTERPRETED, reason="has no Triton form")
@by_backend
def test_a_distribution_by_hand(backend):
    """Positive at 0; false positives at 1 and 0; the step counts both, the function gives them 3/4 and 1/4."""
    x = torch.tensor([0.0, 1.0, 0.0, -1.0, NAN], requires_grad=True)
    labels = torch.tensor([1, 0, 0, 0, -1])
    distribution = PairFunction(lambda x, delta: torch.where(x >= 0, 0.25 + x / 2, 0.0))
    value = ranking_loss(x, labels, imprecision, delta=0.0, distribution=distribution, backend=backend)
    (gradient,) = torch.autograd.grad(value, x)
    assert_close("value", value, torch.tensor(2 / 3), 1e-7)
    assert_close("gradient", gradient, torch.tensor([-2 / 3, 1 / 2, 1 / 6, 0.0, 0.0]), 1e-7)


@by_backend
@by_functions
def test_pair_functions_take_any_layout(member, backend):
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(24, 5, generator=generator)
    classes = torch.randint(-1, 8, (24,), generator=generator).clamp(max=5)
    is_pos = (classes >= 0) & (classes < 5)
    labels = torch.zeros(24, 5, dtype=torch.int64)
    labels[is_pos, classes[is_pos]] = 1
    labels[classes == -1] = -1
    values = torch.rand(int(is_pos.sum()), generator=generator)
    groups = torch.arange(24) // 9
    expected = evaluate(member, logits, labels, values, backend, groups=groups)
    strided = logits.T.contiguous().T, classes.to(torch.int8), groups[:, None].expand(24, 5)
    levels = (
        [logits[:7].view(7, 1, 5), logits[7:7], logits[7:].reshape(-1)],
        [classes[:7, None], classes[7:7], labels[7:].reshape(-1)],
        [groups[:7, None], groups[7:7], groups[7:, None].expand(17, 5).reshape(-1)],
    )
    for x, y, ids in (strided, levels):
        for name, tensor in evaluate(member, x, y, values, backend, groups=ids).items():
            # The last digit of what PyTorch makes of a number may depend on its place.
            assert_close(name, tensor.reshape(expected[name].shape), expected[name], 1e-6)


@pytest.mark.skipif(INTERPRETED, reason="of the torch backend")
@by_functions
@pytest.mark.parametrize("grouped", [False, True])
def test_any_pieces_give_the_same(grouped, member, monkeypatch):
    case = random_case(70, 12, dtype=torch.float64)
    arguments = {"groups": groups_of(case)} if grouped else {}
    expected = of_case(member, case, "torch", **arguments)
    for piece, held in [(1, 1), (13, 50), (70, 1)]:
        monkeypatch.setattr(direct, "_PIECE", piece)
        monkeypatch.setattr(direct, "_PAIRS", held)
        monkeypatch.setattr(pairs, "_PAIRS_PER_BLOCK", held)
        for name, tensor in of_case(member, case, "torch", **arguments).items():
            assert_close(name, tensor, expected[name], 1e-14)


@by_backend
@by_functions
@pytest.mark.parametrize("where", ["a positive", "a negative", "a value"])
def test_nan_is_not_hidden_by_pair_functions(where, member, backend):
    for grouped in [True] if INTERPRETED else [False, True]:
        case = random_case(60, 8)
        groups = groups_of(case)
        logits, values = case.logits.clone(), case.loc_errors.clone()
        if where == "a value":
            values[3] = NAN
        else:
            logits[(case.labels == (where == "a positive")).nonzero()[-1]] = NAN
        arguments = {"groups": groups} if grouped else {}
        found = evaluate(member, logits, case.labels, values, backend, **arguments)
        assert found["loss"].isnan()
        assert found["loss by values"].isnan().all()
        assert found["loss by logits"][case.labels != -1].isnan().all()
        assert not found["loss by logits"][case.labels == -1].any()


@by_backend
@by_functions
def test_without_positives_pair_functions_give_0(member, backend):
    for logits, labels in [
        (torch.tensor([1.0, -INF, 3.0]), torch.tensor([0, 0, -1])),
        (torch.empty(0, 4), torch.empty(0, dtype=torch.int64)),
    ]:
        found = evaluate(member, logits, labels, torch.empty(0), backend)
        assert not any(tensor.any() for tensor in found.values())


@pytest.mark.parametrize("backend", engine_backends())
@by_functions
def test_the_same_bits_twice(member, backend):
    case = random_case(200 if INTERPRETED else 3000, 50)
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

    functions = [PAIRS[sigmoid], PAIRS[exponential]] if INTERPRETED else [made(1), made(3)]
    criteria = [RankingLoss(imprecision, distribution=f, backend=backend) for f in functions]
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


@pytest.mark.skipif(INTERPRETED, reason="has no Triton form")
@by_backend
def test_any_callable_will_do(backend):
    case = random_case(60, 8)
    functions = [partial(lambda power, x, delta: torch.sigmoid(x) ** power, 3), Callable(3), Callable(3).__call__]
    results = [of_case(formula("", imprecision, distribution=f), case, backend) for f in functions]
    other = of_case(formula("", imprecision, distribution=Callable(1)), case, backend)
    for result in results[1:]:
        assert_same_bits("gradient", result["loss by logits"], results[0]["loss by logits"])
    assert not torch.equal(other["loss by logits"], results[0]["loss by logits"])


@pytest.mark.skipif(not INTERPRETED, reason="elsewhere the backend itself cannot run on the CPU")
@pytest.mark.parametrize("backend", ["triton", "pairwise"])
@pytest.mark.parametrize("name", ["smoothing", "distribution"])
def test_functions_without_a_triton_form(name, backend):
    case = random_case(30, 4)
    for function in (sigmoid, PairFunction(sigmoid)):
        with pytest.raises(ValueError, match=rf"^{name}: expected a PairFunction with a Triton form.*'{backend}'"):
            ranking_loss(*case[1:3], imprecision, backend=backend, **{name: function})
        # By itself the package finds a way.
        value = ranking_loss(*case[1:3], imprecision, **{name: function})
        assert_close("value", value, ranking_loss(*case[1:3], imprecision, backend="torch", **{name: function}), 1e-12)


def test_auto_finds_a_backend_for_functions_of_torch_alone():
    case = random_case(30, 4)
    for function in (sigmoid, PAIRS[sigmoid], PairFunction(sigmoid)):
        value = ranking_loss(*case[1:3], imprecision, smoothing=function)
        assert_close("value", value, judge(formula("", imprecision, None, {"smoothing": sigmoid}), case)["loss"], 1e-6)


# Mistakes.


WRONG_FORMULAS = {
    "list": (TypeError, lambda ranking: ranking.rank.tolist()),
    "float": (TypeError, lambda ranking: 0.5),
    "none": (TypeError, lambda ranking: None),
    "scalar": (ValueError, lambda ranking: ranking.rank.mean()),
    "one": (ValueError, lambda ranking: ranking.rank[:1]),
    "column": (ValueError, lambda ranking: ranking.rank[:, None]),
    "matrix": (ValueError, lambda ranking: ranking.rank[:, None] * ranking.rank),
}
WRONG_NORMALISERS = {
    "none": (TypeError, lambda ranking: None),
    "text": (TypeError, lambda ranking: "7"),
    "list": (TypeError, lambda ranking: [1.0]),
    "three": (ValueError, lambda ranking: ranking.rank[:3]),
    "column": (ValueError, lambda ranking: ranking.rank[:, None]),
}


@by_backend
@pytest.mark.parametrize(("error", "wrong"), WRONG_FORMULAS.values(), ids=WRONG_FORMULAS)
@pytest.mark.parametrize("name", ["error", "target"])
def test_formulas_that_return_something_else(name, error, wrong, backend):
    case = random_case(30, 4)
    formulas = {"error": imprecision, name: wrong}
    with pytest.raises(error, match=f"^{name}: expected it to return"):
        ranking_loss(case.logits, case.labels, backend=backend, **formulas)


@by_backend
@pytest.mark.parametrize(("error", "wrong"), WRONG_NORMALISERS.values(), ids=WRONG_NORMALISERS)
def test_normalisers_that_return_something_else(error, wrong, backend):
    case = random_case(30, 4)
    with pytest.raises(error, match=r"^normaliser: expected"):
        ranking_loss(case.logits, case.labels, imprecision, normaliser=wrong, backend=backend)


@by_backend
def test_formulas_may_return_other_dtypes(backend):
    case = random_case(30, 4, dtype=torch.float64)
    own = formula("", lambda ranking: (4 * imprecision(ranking)).round().long(), target=lambda r: (r.rank > 4).int())
    expected = judge(formula("", lambda r: (4 * imprecision(r)).round(), target=lambda r: (r.rank > 4).double()), case)
    assert_agree(of_case(own, case, backend), expected, 1e-9)


@by_backend
def test_what_a_formula_makes_nan_is_not_hidden(backend):
    """Even if of one positive alone, which has nothing to send."""
    case = random_case(40, 6, "late")

    def broken(ranking):
        return torch.where(ranking.num_false_positives > 0, 1.0, torch.nan)

    found = of_case(formula("", broken), case, backend)
    assert found["loss"].isnan()
    assert found["loss by logits"][case.labels != -1].isnan().all()
    assert not found["loss by logits"][case.labels == -1].any()


@by_backend
def test_formulas_are_not_asked_about_nothing(backend):
    def demanding(ranking, *_):
        return ranking.rank / ranking.rank.max() / ranking.rank[0]

    for extras in (None, {"n": torch.empty(0)}):
        own = {"target": demanding, "normaliser": lambda ranking: ranking.rank.max(), "extras": extras}
        x = torch.tensor([0.5, 1.0], requires_grad=True)
        value = ranking_loss(x, torch.tensor([0, -1]), demanding, backend=backend, **own)
        assert value == 0
        assert not torch.autograd.grad(value, x)[0].any()


def test_wrong_arguments():
    case = random_case(30, 4)

    def call(error=imprecision, **arguments):
        return ranking_loss(case.logits, case.labels, error, **arguments)

    for name in ("error", "target", "normaliser"):
        with pytest.raises(TypeError, match=f"^{name}: expected a function, got float$"):
            call(**{name: 0.5})
        with pytest.raises(TypeError, match=f"^{name}: expected a function, got float$"):
            RankingLoss(**{"error": imprecision, name: 0.5})
    with pytest.raises(TypeError, match=r"^error: expected a function, got NoneType$"):
        call(None)
    for name in ("smoothing", "distribution"):
        with pytest.raises(TypeError, match=f"^{name}: expected a PairFunction or a function, got str$"):
            call(**{name: "sigmoid"})
        with pytest.raises(TypeError, match=f"^{name}: expected"):
            RankingLoss(imprecision, **{name: 1.0})
    for eps in (-1e-9, NAN):
        with pytest.raises(ValueError, match=r"^eps: expected a number >= 0"):
            call(eps=eps)
    for eps in (None, True, "0", torch.tensor(0.0)):
        with pytest.raises((TypeError, ValueError), match=r"^eps: expected a number"):
            call(eps=eps)
    for extras, name in [
        ({"a": None}, "a"),
        ({"a": [0.0] * 4}, "a"),
        ({"a": torch.ones(4, dtype=torch.int64)}, "a"),
        ({"a": torch.ones(4), "b": torch.ones(4, 1)}, "b"),
        ({"a": torch.ones(4), "b": torch.ones(4, device="meta")}, "b"),
        ({"a": torch.ones(4), "b": torch.ones(3)}, "b"),
        ({"a": torch.ones(4), "b": torch.ones(0)}, "b"),
        ({"a": torch.ones(5), "b": torch.ones(5)}, "a"),
    ]:
        with pytest.raises((TypeError, ValueError), match=f"^{name}: expected"):
            call(lambda ranking, **_: ranking.rank, extras=extras)
    with pytest.raises(ValueError, match=r"^num_positives: expected .*4, got 5$"):
        call(lambda ranking, a: a, extras={"a": torch.ones(4)}, num_positives=5)
    # Both may be given.
    assert call(lambda ranking, a: a, extras={"a": torch.ones(4)}, num_positives=4) == 1


def test_pair_functions_must_be_functions():
    with pytest.raises(TypeError, match=r"^torch: expected a function of differences and delta, got float$"):
        PairFunction(0.5)
    assert repr(PairFunction(sigmoid)).startswith("PairFunction(sigmoid")
    names = Counter(repr(PairFunction(lambda x, delta: x)) for _ in range(3))
    assert len(names) == 3
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


# The module.


def test_module_shows_its_formulas():
    module = RankingLoss(imprecision, lrp_target, best_gain, smoothing=PAIRS[sigmoid], distribution=beyond, eps=1)
    text = repr(module)
    for part in ("RankingLoss(error=imprecision", "target=lrp_target", "normaliser=best_gain", "delta=1.0", "eps=1"):
        assert part in text
    assert f"smoothing={PAIRS[sigmoid]!r}" in text
    assert "distribution=PairFunction(beyond" in text
    assert "target" not in repr(RankingLoss(imprecision))
    assert "error=functools.partial" in repr(RankingLoss(partial(share_of_negatives, 0.5)))


@by_backend
def test_module_takes_extras_by_their_names(backend):
    case = random_case(60, 8)
    settings = {"target": depth_target, "normaliser": depth_normaliser, "delta": 0.25, "eps": 0.1, "backend": backend}
    module = RankingLoss(depth_error, **settings)
    groups = groups_of(case)
    for arguments in ({}, {"groups": groups}, {"num_positives": 8}):
        x, costs = case.logits.clone().requires_grad_(), case.loc_errors.clone().requires_grad_()
        found = module(x, case.labels, costs=costs, **arguments)
        expected = ranking_loss(x, case.labels, depth_error, extras={"costs": costs}, **settings, **arguments)
        assert_same_bits("value", found.detach(), expected.detach())
        for one, other in zip(*(torch.autograd.grad(value, (x, costs)) for value in (found, expected))):
            assert_same_bits("gradient", one, other)


def test_what_the_module_offers():
    assert set(framework.__all__) >= {"PairFunction", "RankingLoss", "Statistics", "ranking_loss"}
