"""aLRP Loss against its float64 reference over every hard case, and the same bits whatever runs how."""

import pytest
import torch
from dialect import KERNELS, Case, all_cases, drawn_case, random_case
from dialect.checks import (
    EXACT,
    assert_close,
    assert_rounded,
    assert_same_bits,
    assert_same_results,
    backends,
    engine_backends,
    evaluate,
    judge,
)

from alrp_triton import alrp_loss
from alrp_triton.engine.passes import eager, find
from alrp_triton.engine.scans import fraction_bits

DELTAS = [1.0, 0.1, 0.0] if KERNELS else [1.0, 0.5, 0.1, 0.0, 37.5, 1e-6]
# Pass 1 sums in fixed point with 36 binary places, whatever the dtype.
TOLERANCES = {torch.float64: 1e-9}
SPANNING = 3000 if KERNELS else 300_000  # logits; more than the torch backend reads at once


def assert_agrees(case: Case, backend: str, **arguments) -> None:
    result = evaluate(case.logits, case.labels, case.loc_errors, backend, **arguments)
    expected = judge(case, **arguments)
    tolerance = TOLERANCES.get(case.logits.dtype, 1e-6)
    for name in ("cls", "loc", "rank", "grad_logits", "grad_loc_errors"):
        actual = getattr(result, name)
        if actual.dtype in (torch.float16, torch.bfloat16):
            assert_rounded(f"{name}, {arguments}", actual, getattr(expected, name), tolerance)
        else:
            finest = max(tolerance, 1e-6 if actual.dtype == torch.float32 else 0)
            assert_close(f"{name}, {arguments}", actual, getattr(expected, name), finest)


@pytest.mark.thinned(8)
@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("delta", DELTAS)
@pytest.mark.parametrize("case", all_cases(), ids=lambda case: case.name)
def test_agrees_with_reference(case, delta, backend):
    for loc_ranking in ("sorted", "smooth"):
        assert_agrees(case, backend, delta=delta, loc_ranking=loc_ranking)


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("delta", [1e-30, 1e-12, 1e12, 1e30])
@pytest.mark.parametrize(
    "case",
    [
        random_case(200, 20, "middle", name="middle"),
        drawn_case("integers", [-1.0, 0.0, 1.0], 60, 10),
        drawn_case("subnormal", [k * 2.0**-149 for k in range(-9, 10)], 60, 10),
        drawn_case("large", [-3e38, -1e38, 0.0, 1e38, 3e38], 60, 10),
    ],
    ids=lambda case: case.name,
)
def test_deltas_up_to_the_ends_of_their_range(case, delta, backend):
    assert_agrees(case, backend, delta=delta)


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("eps", [0.0, 1e-5, 0.3, 1.0, 2.5, float("inf")])
def test_eps_gates_positives_with_few_false_positives(eps, backend):
    logits = torch.tensor([3.0, 1.0, 0.5, 0.0, 0.0, -0.75, -3.0, 0.0, 0.5, -0.5])
    labels = torch.tensor([1, 1, 1, 1, 1, 1, 1, 0, 0, 0])
    case = Case("by hand", logits, labels, torch.linspace(0, 1, 7))
    gated = evaluate(*case[1:], backend, eps=eps).grad_logits[:7] == 0
    counts = torch.tensor([0.0, 0.25, 0.75, 1.5, 1.5, 2.5, 3.0])
    assert gated.tolist() == (counts <= eps).tolist()
    assert_agrees(case, backend, eps=eps)


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("errors_dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_of_results(dtype, errors_dtype, backend):
    case = random_case(80, 9, dtype=dtype)
    result = evaluate(case.logits, case.labels, case.loc_errors.to(errors_dtype), backend)
    loss_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    assert [x.dtype for x in result] == [loss_dtype] * 3 + [dtype, errors_dtype]


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("regime", ["early", "middle", "late"])
def test_half_precision_is_float32_rounded(regime, dtype, backend):
    case = random_case(800, 25, regime, dtype=dtype)
    half = evaluate(case.logits, case.labels, case.loc_errors, backend)
    single = evaluate(case.logits.float(), case.labels, case.loc_errors, backend)
    for name in ("cls", "loc", "rank", "grad_loc_errors"):
        assert_same_bits(name, getattr(half, name), getattr(single, name))
    negatives = case.labels != 1
    # Positives may be rounded from float64, once instead of twice.
    assert_same_bits("negatives", half.grad_logits[negatives], single.grad_logits[negatives].to(dtype))
    assert_rounded("grad_logits", half.grad_logits, single.grad_logits.double(), 1e-7)


@pytest.mark.parametrize("backend", backends())
def test_upstream_gradient_scales_before_rounding(backend):
    case = random_case(800, 25, "early", dtype=torch.float16)
    expected = judge(case).grad_logits
    for upstream in (2.0**-16, 0.3, 2.0**12):
        scaled = evaluate(*case[1:], backend, upstream=upstream)
        # Rounded first, gradients of float16 would lose most bits below 2^-14, and be 0 below 2^-25.
        assert_rounded(f"upstream {upstream}", scaled.grad_logits, upstream * expected, 1e-6)
        assert scaled.grad_logits.isfinite().all()
    tiny = evaluate(*case[1:], backend, upstream=2.0**-16).grad_logits
    assert (tiny == 0).sum() > 500, "this case was to underflow"


@pytest.mark.parametrize("backend", backends())
def test_upstream_gradient_scales_exactly_by_powers_of_two(backend):
    case = random_case(300, 25)
    one = evaluate(*case[1:], backend)
    for upstream in (0.0, 2.0**-20, -1.0, 2.0**30):
        scaled = evaluate(*case[1:], backend, upstream=upstream)
        assert_same_bits("grad_logits", scaled.grad_logits, upstream * one.grad_logits)
        assert_same_bits("grad_loc_errors", scaled.grad_loc_errors, upstream * one.grad_loc_errors)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("loc_ranking", ["sorted", "smooth"])
@pytest.mark.parametrize("delta", [0.5, 0.0])
def test_gradient_of_loc_is_its_derivative(delta, loc_ranking, backend):
    case = random_case(60, 8, dtype=torch.float64)
    errors = case.loc_errors.double().requires_grad_()

    def loc(errors):
        return alrp_loss(case.logits, case.labels, errors, delta=delta, loc_ranking=loc_ranking, backend=backend).loc

    assert torch.autograd.gradcheck(loc, errors, eps=1e-3, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("backend", engine_backends())
@pytest.mark.parametrize("delta", [1.0, 0.0])
def test_same_bits_in_every_run_and_with_any_threads(delta, backend):
    case = random_case(SPANNING, 8, "middle")
    first = evaluate(*case[1:], backend, delta=delta)
    try:
        for threads in (2, 1):
            torch.set_num_threads(threads)
            assert_same_results(evaluate(*case[1:], backend, delta=delta), first)
    finally:
        torch.set_num_threads(1)
    assert_agrees(case, backend, delta=delta)


@pytest.mark.parametrize("piece", [1, 7, 64, 1000])
@pytest.mark.parametrize("delta", [1.0, 0.0])
def test_same_bits_for_any_size_of_pieces(piece, delta, monkeypatch):
    case = random_case(1200, 40, "middle", ignored=0.3)
    logits, labels = case.logits.view(4, 5, 60), case.labels.view(4, 5, 60)
    classes = torch.randint(-1, 61, (4, 5), generator=torch.Generator().manual_seed(0))
    errors = torch.rand(int(((classes >= 0) & (classes < 60)).sum()))
    problems = [
        (case.logits, case.labels, case.loc_errors),
        (logits, labels, case.loc_errors),
        (logits.permute(2, 0, 1), labels.permute(2, 0, 1), case.loc_errors),
        (logits, classes, errors),
        (logits.transpose(0, 1), classes.T, errors),
    ]
    whole = [evaluate(*problem, "torch", delta=delta, ignore_index=-1) for problem in problems]
    monkeypatch.setattr(eager, "_PIECE", piece)
    monkeypatch.setattr(find, "_PIECE", piece)
    for problem, expected in zip(problems, whole):
        assert_same_results(evaluate(*problem, "torch", delta=delta, ignore_index=-1), expected)


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("delta", [1.0, 0.5, 0.0])
def test_ranks_are_exact_where_the_ramps_values_are(delta, backend):
    # Multiples of 1/8: every H is a multiple of 1/16 that float32 and fixed point hold.
    case = drawn_case("eighths", [k / 8 for k in range(-16, 17)], 400, 30)
    result = evaluate(*case[1:], backend, delta=delta)
    assert_same_bits("rank", result.rank, judge(case, delta=delta).rank.float())


@pytest.mark.parametrize("backend", [backend for backend in backends() if backend in EXACT])
def test_fixed_point_bounds_the_error_of_tiny_ramps(backend):
    # 2000 negatives, each a false positive by less than the fixed point resolves exactly.
    count = 2000
    logits = torch.cat([torch.tensor([1.0]), torch.linspace(1e-10, 9e-9, count)])
    labels = torch.zeros(count + 1, dtype=torch.int64)
    labels[0] = 1
    case = Case("tiny ramps", logits, labels, torch.tensor([0.5]))
    result, expected = evaluate(*case[1:], backend), judge(case)
    # Each negative may be off by one unit of the fixed point.
    assert (result.cls - expected.cls).abs() <= count * 2.0 ** -fraction_bits(count + 1)
    assert expected.cls > 4e-6


@pytest.mark.parametrize("backend", engine_backends())
def test_a_false_positive_too_small_to_count_gives_no_nan(backend):
    # H is 5e-13 there, less than a unit of the fixed point; without a gate of its own nothing may be divided by it.
    case = Case("", torch.tensor([1.0, 1e-12, -5.0]), torch.tensor([1, 0, 0]), torch.tensor([0.5]))
    result = evaluate(*case[1:], backend, eps=0.0)
    assert (result.grad_logits.abs() <= 1e-10).all()
    assert result.cls <= 1e-10


def test_fixed_point_never_overflows():
    for num_logits in (1, 1000, 2**26, 2**27, 2**31, 2**40):
        assert num_logits * 2 ** fraction_bits(num_logits) <= 2**62
    assert [fraction_bits(m) for m in (1000, 67_000_000, 10**9)] == [36, 36, 32]
