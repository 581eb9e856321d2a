"""Every loss of the family on every backend: against its float64 reference, in every dtype, with every setting."""

import pytest
import torch
from dialect import (
    ALRP,
    AP,
    DEPTH,
    EXACT,
    FAMILY,
    KERNELS,
    PLAIN_AP,
    RANK_SORT,
    WEIGHTED,
    Case,
    all_cases,
    assert_right,
    assert_same_bits,
    backends,
    by_backend,
    by_engine_backend,
    drawn_case,
    formula,
    imprecision,
    judge,
    of_case,
    random_case,
)

from alrp_triton import alrp_loss
from alrp_triton.engine.scans import fraction_bits

DELTAS = [1.0, 0.1, 0.0]
VARIANTS = [*((member, {}) for member in FAMILY), (ALRP, {"loc_ranking": "smooth"})]
# Passes over the logits are shared, so where kernels run not every loss has to go everywhere.
SOME = [ALRP, RANK_SORT, DEPTH] if KERNELS else FAMILY
by_some = pytest.mark.parametrize("member", SOME, ids=repr)


def combinations():
    """Of everything with everything; where kernels run each case meets some loss with some delta."""
    cases = all_cases()
    if KERNELS:
        turns = [(case, *VARIANTS[i % 8], "triton", [DELTAS[i // 8 % 3]]) for i, case in enumerate(cases)]
        turns += [
            (case, *VARIANTS[(i + 3) % 8], "pairwise", [DELTAS[i // 16 % 3]]) for i, case in enumerate(cases[::2])
        ]
        turns += [(case, ALRP, {}, backends()[i % 2], [DELTAS[i % 3]]) for i, case in enumerate(cases)]
    else:
        turns = [(case, *variant, backend, DELTAS) for case in cases for variant in VARIANTS for backend in backends()]
    return [
        pytest.param(*turn, id=f"{turn[0].name}-{turn[1]}{'-smooth' if turn[2] else ''}-{turn[3]}") for turn in turns
    ]


@pytest.mark.thinned(2 if KERNELS else 28)
@pytest.mark.parametrize(("case", "member", "option", "backend", "deltas"), combinations())
def test_agrees_with_reference(case, member, option, backend, deltas):
    for delta in deltas:
        assert_right(member, case, backend, delta=delta, **option)


@pytest.mark.thinned(1 if KERNELS else 2)
@by_backend
@by_some
@pytest.mark.parametrize("delta", [1e-30, 1e30] if KERNELS else [1e-30, 1e-12, 1e-6, 37.5, 1e12, 1e30])
def test_deltas_up_to_the_ends_of_their_range(delta, member, backend):
    names = ("integers", "subnormal") if KERNELS else ("middle", "integers", "tiny", "subnormal", "far_apart")
    for case in (case for case in all_cases() if case.name in names):
        assert_right(member, case, backend, case.name, delta=delta)


@by_backend
@pytest.mark.parametrize("eps", [0.0, 1e-5, 0.3, 1.0, 2.5, float("inf")])
@pytest.mark.parametrize("member", [ALRP, formula("own", imprecision)], ids=repr)
def test_eps_gates_positives_with_few_false_positives(member, eps, backend):
    logits = torch.tensor([3.0, 1.0, 0.5, 0.0, 0.0, -0.75, -3.0, 0.0, 0.5, -0.5])
    labels = torch.tensor([1, 1, 1, 1, 1, 1, 1, 0, 0, 0])
    case = Case("by hand", logits, labels, torch.linspace(0, 1, 7))
    found = assert_right(member, case, backend, eps=eps)
    component = member.components[0]
    counts = torch.tensor([0.0, 0.25, 0.75, 1.5, 1.5, 2.5, 3.0])
    assert (found[f"{component} by logits"][:7] == 0).tolist() == (counts <= eps).tolist()
    assert found[component] == of_case(member, case, backend)[component]


@pytest.mark.thinned(1 if KERNELS else 3)
@by_backend
@by_some
@pytest.mark.parametrize("values_dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_of_results(dtype, values_dtype, member, backend):
    """Those of the leaves for gradients; of half precision, all but the scores' gradient is what float32 gives."""
    case = random_case(80, 9, dtype=dtype)
    case = case._replace(loc_errors=case.loc_errors.to(values_dtype))
    found = of_case(member, case, backend)
    dtypes = dict.fromkeys(found, torch.float64 if dtype == torch.float64 else torch.float32)
    leaves = {"logits": dtype, "values": values_dtype}
    dtypes |= {f"{component} by {leaf}": leaves[leaf] for component, leaf in member.derivatives}
    assert {name: tensor.dtype for name, tensor in found.items()} == dtypes
    single = of_case(member, case._replace(logits=case.logits.float()), backend)
    for name in found if dtype in (torch.float16, torch.bfloat16) else ():
        if name.endswith("by logits"):
            # Positives may be rounded from float64, once instead of twice.
            negatives = case.labels != 1
            assert_same_bits(name, found[name][negatives], single[name][negatives].to(dtype))
        else:
            assert_same_bits(name, found[name], single[name])


@by_backend
@pytest.mark.parametrize("member", [ALRP, DEPTH], ids=repr)
def test_upstream_gradient_scales_exactly_by_powers_of_two(member, backend):
    case = random_case(300, 25)
    one = of_case(member, case, backend)
    for upstream in (0.0, 2.0**-20, -1.0, 2.0**30):
        for name, tensor in of_case(member, case, backend, upstream=upstream).items():
            assert_same_bits(name, tensor, upstream * one[name] if " by " in name else one[name])


@pytest.mark.thinned(2)
@by_backend
@pytest.mark.parametrize("loc_ranking", ["sorted", "smooth"])
@pytest.mark.parametrize("delta", [0.5, 0.0])
def test_gradient_of_loc_is_its_derivative(delta, loc_ranking, backend):
    case = random_case(60, 8, dtype=torch.float64)

    def loc(errors):
        return alrp_loss(case.logits, case.labels, errors, delta=delta, loc_ranking=loc_ranking, backend=backend).loc

    errors = case.loc_errors.double().requires_grad_()
    assert torch.autograd.gradcheck(loc, errors, eps=1e-3, atol=1e-9, rtol=1e-9)


@by_backend
@pytest.mark.parametrize("delta", [1.0, 0.5, 0.0])
def test_ranks_are_exact_where_the_ramps_values_are(delta, backend):
    # Multiples of 1/8: every H is a multiple of 1/16 that float32 and fixed point hold.
    case = drawn_case("eighths", [k / 8 for k in range(-16, 17)], 400, 30)
    found = of_case(ALRP, case, backend, delta=delta)
    assert_same_bits("rank", found["rank"], judge(ALRP, case, delta=delta)["rank"].float())


@pytest.mark.parametrize("backend", [backend for backend in backends() if backend in EXACT])
def test_fixed_point_bounds_the_error_of_tiny_ramps(backend):
    # 2000 negatives, each a false positive by less than the fixed point resolves exactly.
    count = 2000
    logits = torch.cat([torch.tensor([1.0]), torch.linspace(1e-10, 9e-9, count)])
    labels = torch.zeros(count + 1, dtype=torch.int64)
    labels[0] = 1
    case = Case("tiny ramps", logits, labels, torch.tensor([0.5]))
    found, expected = of_case(ALRP, case, backend)["cls"], judge(ALRP, case)["cls"]
    # Each negative may be off by one unit of the fixed point.
    assert (found - expected).abs() <= count * 2.0 ** -fraction_bits(count + 1)
    assert expected > 4e-6


@by_engine_backend
def test_a_false_positive_too_small_to_count_gives_no_nan(backend):
    # H is 5e-13 there, less than a unit of the fixed point; without a gate of its own nothing may be divided by it.
    case = Case("", torch.tensor([1.0, 1e-12, -5.0]), torch.tensor([1, 0, 0]), torch.tensor([0.5]))
    found = of_case(ALRP, case, backend, eps=0.0)
    assert (found["cls by logits"].abs() <= 1e-10).all()
    assert found["cls"] <= 1e-10


def test_fixed_point_never_overflows():
    for num_logits in (1, 1000, 2**26, 2**27, 2**31, 2**40):
        assert num_logits * 2 ** fraction_bits(num_logits) <= 2**62
    assert [fraction_bits(m) for m in (1000, 67_000_000, 10**9)] == [36, 36, 32]


@by_backend
@pytest.mark.parametrize("grouped", [False, True])
@by_some
def test_double_backward_raises(member, grouped, backend):
    """Of no component, and of no values: a gradient penalty must not train in silence on what is not there."""
    case = random_case(50, 5)
    arguments = {"groups": torch.arange(50) % 2} if grouped else {}
    for component, leaf in member.derivatives:
        if leaf == "values":
            continue
        x = case.logits.clone().requires_grad_()
        of = member.loss(x, case.labels, member.values(case), backend=backend, **arguments)[component]
        (gradient,) = torch.autograd.grad(of, x, create_graph=True)
        with pytest.raises(RuntimeError):
            (gradient.square().sum() + x.sum()).backward()


@by_backend
@pytest.mark.parametrize("delta", DELTAS)
def test_losses_that_want_only_the_ranking_are_0_without_negatives(delta, backend):
    case = random_case(30, 30, ignored=0)
    for member in (AP, PLAIN_AP, WEIGHTED):
        assert of_case(member, case, backend, delta=delta)["loss"] == 0
