"""Every loss of the family on every backend: against its float64 reference, and what holds of each of them alike."""

import inspect

import pytest
import torch
from cases import GOLDEN, INF, INTERPRETED, NAN, all_cases, load_golden, random_case
from checks import assert_close, assert_same_bits, assert_split_alike, backends
from family import (
    ALRP,
    AP,
    DEPTH,
    FAMILY,
    NDCG,
    PLAIN_AP,
    RANK_SORT,
    WEIGHTED,
    assert_agree,
    evaluate,
    judge,
    of_case,
)

from alrp_triton import APLoss, NDCGLoss, RankSortOutput, alrp_loss, ap_loss, ndcg_loss, rank_sort_loss
from alrp_triton.framework import RankingLoss, ranking_loss

DELTAS = [1.0, 0.1, 0.0]
# aLRP has all of this in test_alrp.py.
OTHERS = [member for member in FAMILY if member is not ALRP]
by_backend = pytest.mark.parametrize("backend", backends())
by_member = pytest.mark.parametrize("member", OTHERS, ids=repr)
# Passes over the logits are shared, so in the interpreter not every loss has to go everywhere.
by_some = pytest.mark.parametrize("member", [RANK_SORT, DEPTH] if INTERPRETED else OTHERS, ids=repr)
# Pass 1 sums in fixed point with 36 binary places, whatever the dtype.
TOLERANCES = {torch.float64: 1e-9}


def combinations():
    """Of everything with everything; in the interpreter each case meets some loss with some delta."""
    cases = all_cases()
    turns = [(case, member, backend, DELTAS) for case in cases for member in OTHERS for backend in backends()]
    if INTERPRETED:
        turns = [(case, OTHERS[i % 6], "triton", [DELTAS[i // 6 % 3]]) for i, case in enumerate(cases)]
        turns += [(case, OTHERS[(i + 3) % 6], "pairwise", [DELTAS[i // 12 % 3]]) for i, case in enumerate(cases[::2])]
    return [pytest.param(*turn, id=f"{turn[0].name}-{turn[1]}-{turn[2]}") for turn in turns]


@pytest.mark.parametrize(("case", "member", "backend", "deltas"), combinations())
def test_agrees_with_reference(case, member, backend, deltas):
    for delta in deltas:
        expected = judge(member, case, delta=delta)
        found = of_case(member, case, backend, delta=delta)
        assert_agree(found, expected, TOLERANCES.get(case.logits.dtype, 1e-6), f"delta {delta}")


@by_backend
@by_some
@pytest.mark.parametrize("delta", [1e-30, 1e30] if INTERPRETED else [1e-30, 1e-12, 37.5, 1e12, 1e30])
def test_deltas_up_to_the_ends_of_their_range(delta, member, backend):
    names = ("integers",) if INTERPRETED else ("middle", "integers", "tiny", "far_apart")
    for case in (case for case in all_cases() if case.name in names):
        assert_agree(of_case(member, case, backend, delta=delta), judge(member, case, delta=delta), said=case.name)


# All pairs take the interpreter half a minute where there are 20 000 logits.
VECTORS = [
    pytest.param(path, backend, id=f"{path.stem}-{backend}")
    for path in GOLDEN
    for backend in backends()
    if backend != "pairwise" or path.stem == "inverted"
]


@pytest.mark.parametrize(("path", "backend"), VECTORS)
def test_golden_vectors(path, backend):
    """Of AP Loss with the precision interpolated, and of Rank & Sort Loss, as their authors' code has them."""
    case, golden = load_golden(path)
    found = evaluate(AP, case.logits, case.labels, case.loc_errors, backend)
    assert_agree(found, judge(AP, case), 2e-6)
    published = {"loss": golden["ap"], "loss by logits": golden["ap_grad_logits"]}
    assert_agree(found, {name: tensor.double() for name, tensor in published.items()}, 2e-6)

    found = evaluate(RANK_SORT, case.logits, case.labels, golden["rs_ious"], backend)
    assert_agree(found, RANK_SORT.judge(case.logits, case.labels, golden["rs_ious"]), 2e-6)
    whole = found["ranking by logits"].double() + found["sorting by logits"].double()
    assert_close("gradient", whole, golden["rs_grad_logits"], 2e-6)
    published = {"ranking": golden["rs_rank"], "sorting": golden["rs_sort"]}
    assert_agree(found, {name: tensor.double() for name, tensor in published.items()}, 2e-6)


@by_backend
@by_some
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_of_results(dtype, member, backend):
    case = random_case(80, 9, dtype=dtype)
    found = of_case(member, case, backend)
    loss_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = {"logits": dtype, "values": torch.float32}
    for component, leaf in member.derivatives:
        assert found[component].dtype == loss_dtype
        assert found[component].shape == ()
        assert found[f"{component} by {leaf}"].dtype == leaves[leaf]
    if dtype in (torch.float16, torch.bfloat16):
        single = of_case(member, case._replace(logits=case.logits.float()), backend)
        for component in member.components:
            assert_same_bits(component, found[component], single[component])


@by_backend
@pytest.mark.parametrize("member", [AP, NDCG, RANK_SORT, WEIGHTED], ids=repr)
def test_upstream_gradient_scales_before_rounding(member, backend):
    case = random_case(300 if INTERPRETED else 800, 25, "early", dtype=torch.float16)
    expected = judge(member, case)
    for upstream in [2.0**-13] if INTERPRETED else [2.0**-16, 0.3, 2.0**12]:
        found = of_case(member, case, backend, upstream=upstream)
        for component, leaf in member.derivatives:
            name = f"{component} by {leaf}"
            assert_agree({name: found[name]}, {name: upstream * expected[name]}, 1e-6, upstream)


@by_backend
@pytest.mark.parametrize("delta", [1.0, 0.0])
@by_member
def test_no_positives(member, delta, backend):
    """0, attached to the graph, with gradients that are there and 0."""
    problems = [
        ([torch.tensor([[1.0, -INF, INF], [-3.0, 0.0, 5.0]])], [torch.tensor([3, 3])]),
        ([torch.tensor([1.0, -INF]), torch.tensor([[0.0, 2.0]])], [torch.tensor([0, -1]), torch.tensor([2])]),
        ([torch.empty(0, 4)], [torch.empty(0, dtype=torch.int64)]),
        ([torch.full((3, 2), NAN)], [torch.full((3, 2), -1)]),
    ]
    for logits, labels in problems[: 1 if INTERPRETED else None]:
        for levels in (False, True) if len(logits) == 1 else (True,):
            arguments = (logits, labels) if levels else (logits[0], labels[0])
            found = evaluate(member, *arguments, torch.empty(0), backend, delta=delta)
            assert all(found[component] == 0 for component in member.components)
            assert not any(tensor.any() for tensor in found.values())


@by_backend
@by_member
@pytest.mark.parametrize("where", ["a negative", "a positive", "a value"])
def test_nan_that_takes_part_is_never_hidden(where, member, backend):
    if where == "a value" and not member.takes:
        return
    for regime in ["late"] if INTERPRETED else ["middle", "late"]:
        case = random_case(200, 10, regime)
        logits, values = case.logits.clone(), member.values(case).clone()
        if where == "a value":
            values[3] = NAN
        else:
            logits[(case.labels == (where == "a positive")).nonzero()[-1]] = NAN
        found = evaluate(member, logits, case.labels, values, backend)
        for name, tensor in found.items():
            taking_part = tensor[case.labels != -1] if name.endswith("by logits") else tensor
            assert taking_part.isnan().all(), name
        ignored = {tensor[case.labels == -1] for name, tensor in found.items() if name.endswith("by logits")}
        assert not any(tensor.any() for tensor in ignored)


@by_backend
@by_member
def test_nan_is_not_hidden_where_a_part_is_missing(member, backend):
    for labels in [[0, 0, -1], [1, 1, -1], [1, -1, -1]]:
        logits, values = torch.tensor([NAN, 1.0, 2.0]), torch.full((labels.count(1),), 0.5)
        found = evaluate(member, logits, torch.tensor(labels), values, backend)
        for component, leaf in member.derivatives:
            assert found[component].isnan()
            if leaf == "logits":
                assert found[f"{component} by logits"][torch.tensor(labels) != -1].isnan().all()


@by_backend
@by_member
def test_ignored_logits_have_no_effect(member, backend):
    case = random_case(200, 12, ignored=0.5)
    expected = of_case(member, case, backend, delta=0.5)
    for value in [NAN] if INTERPRETED else [NAN, INF, -INF, 1e30]:
        changed = case._replace(logits=case.logits.masked_fill(case.labels == -1, value))
        found = of_case(member, changed, backend, delta=0.5)
        for name, tensor in found.items():
            assert_same_bits(name, tensor, expected[name])
            assert not name.endswith("by logits") or not tensor[case.labels == -1].any()


@by_backend
@by_member
@pytest.mark.parametrize("delta", [1.0, 0.0])
def test_no_negatives(delta, member, backend):
    """No false positives, so no gradient but that of values, and of the order of positives among themselves."""
    case = random_case(30, 30, ignored=0)
    found = of_case(member, case, backend, delta=delta)
    assert_agree(found, judge(member, case, delta=delta))
    if member is RANK_SORT:
        assert found["ranking"] == 0
        assert not found["ranking by logits"].any()
        assert found["sorting by logits"].any()
    else:
        assert not found["loss by logits"].any()
    if member in (AP, PLAIN_AP, WEIGHTED):
        assert found["loss"] == 0


@by_backend
@by_some
def test_layouts_levels_and_class_labels(member, backend):
    """The same problem with a label for each logit, by classes, strided, in levels, with another ignore_index."""
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(24, 5, generator=generator)
    classes = torch.randint(-1, 6, (24,), generator=generator)
    is_pos = (classes >= 0) & (classes < 5)
    labels = torch.zeros(24, 5, dtype=torch.int64)
    labels[is_pos, classes[is_pos]] = 1
    labels[classes == -1] = -1
    values = (4 * torch.rand(int(is_pos.sum()), generator=generator)).round() / 4
    expected = evaluate(member, logits, labels, values, backend)
    assert_agree(
        {name: x.flatten() if "logits" in name else x for name, x in expected.items()},
        member.judge(logits.flatten(), labels.flatten(), values),
    )

    def check(*arguments, **further):
        found = evaluate(member, *arguments, values, backend, **further)
        for name, tensor in found.items():
            assert_split_alike(backend, name, tensor.reshape(expected[name].shape), expected[name])

    check(logits, classes.to(torch.int8))
    check(logits.T.contiguous().T, labels)
    check(
        [logits[:7].view(7, 1, 5), logits[7:7], logits[7:].reshape(-1)],
        (classes[:7, None], classes[7:7], labels[7:].reshape(-1)),
    )
    check(logits, classes.masked_fill(classes == -1, 200).to(torch.uint8), ignore_index=200)


@by_backend
@pytest.mark.parametrize("delta", [1.0] if INTERPRETED else [1.0, 0.0])
@by_some
def test_same_bits_in_every_run_and_with_any_threads(member, delta, backend):
    case = random_case(600 if INTERPRETED else 20_000, 40)
    threads, expected = torch.get_num_threads(), of_case(member, case, backend, delta=delta)
    try:
        for number in [2] if INTERPRETED else [1, 3]:
            torch.set_num_threads(number)
            for name, tensor in of_case(member, case, backend, delta=delta).items():
                assert_same_bits(name, tensor, expected[name])
    finally:
        torch.set_num_threads(threads)


@by_backend
@by_member
def test_inputs_are_not_changed(member, backend):
    case = random_case(120, 12)
    values, groups = member.values(case), torch.arange(120) % 3
    before = [tensor.clone() for tensor in (case.logits, case.labels, values, groups)]
    evaluate(member, case.logits, case.labels, values, backend, groups=groups)
    evaluate(member, case.logits, case.labels, values, backend)
    for tensor, copy in zip((case.logits, case.labels, values, groups), before):
        assert torch.equal(tensor, copy)


@by_backend
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("member", [RANK_SORT, DEPTH] if INTERPRETED else FAMILY, ids=repr)
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
@pytest.mark.parametrize("member", OTHERS, ids=repr)
def test_without_gradients(member, backend):
    case = random_case(60, 6)
    values = member.values(case)
    x = case.logits.clone().requires_grad_()
    expected = member.loss(x, case.labels, values, backend=backend)
    assert all(expected[component].requires_grad for component in member.components)
    with torch.no_grad():
        found = member.loss(x, case.labels, values, backend=backend)
    frozen = member.loss(case.logits, case.labels, values, backend=backend)
    for name, tensor in found.items():
        assert not tensor.requires_grad
        assert not frozen[name].requires_grad
        assert_same_bits(name, tensor, expected[name].detach())
        assert_same_bits(name, frozen[name], tensor)


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
    for num_pos in [7] if INTERPRETED else [0, 1, 40, 150]:
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
def test_wrong_numbers_of_positives(loss, backend):
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
def test_wrong_arguments(member, backend):
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
        "RankingLoss(error=flipped_error, delta=0.25, eps=0.5, smoothing=None, distribution=None, ignore_index=7, "
        "backend='torch')",
    ),
]


@pytest.mark.parametrize("problem", MODULES, ids=lambda problem: problem[3].split("(")[0])
@pytest.mark.parametrize("arguments", [{}, {"num_positives": 9}, {"groups": torch.arange(90) % 2}], ids=str)
def test_modules_are_functions(arguments, problem):
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
    shared = ("groups", "ignore_index", "backend")
    expected = inspect.signature(alrp_loss).parameters
    for function in (ap_loss, ndcg_loss, rank_sort_loss, ranking_loss):
        found = inspect.signature(function).parameters
        assert list(found)[:2] == ["logits", "labels"]
        assert list(found)[-3:] == list(shared)
        for name in shared:
            assert found[name].default == expected[name].default
            assert found[name].kind == inspect.Parameter.KEYWORD_ONLY
    assert inspect.signature(rank_sort_loss).parameters["delta"].default == 0.5
    assert RankSortOutput._fields == ("ranking", "sorting")
