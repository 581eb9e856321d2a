"""Every loss of the family on every backend: against its float64 reference, and what holds of each of them alike."""

import pytest
import torch
from dialect import (
    ALRP,
    AP,
    DEPTH,
    FAMILY,
    GOLDEN,
    INF,
    KERNELS,
    NAN,
    NDCG,
    PLAIN_AP,
    RANK_SORT,
    WEIGHTED,
    all_cases,
    assert_agree,
    assert_close,
    assert_same_bits,
    assert_split_alike,
    backends,
    evaluate,
    judge,
    load_golden,
    of_case,
    random_case,
)

DELTAS = [1.0, 0.1, 0.0]
# aLRP has all of this in test_alrp.py.
OTHERS = [member for member in FAMILY if member is not ALRP]
by_backend = pytest.mark.parametrize("backend", backends())
by_member = pytest.mark.parametrize("member", OTHERS, ids=repr)
# Passes over the logits are shared, so where kernels run not every loss has to go everywhere.
by_some = pytest.mark.parametrize("member", [RANK_SORT, DEPTH] if KERNELS else OTHERS, ids=repr)
# Pass 1 sums in fixed point with 36 binary places, whatever the dtype.
TOLERANCES = {torch.float64: 1e-9}


def combinations():
    """Of everything with everything; where kernels run each case meets some loss with some delta."""
    cases = all_cases()
    turns = [(case, member, backend, DELTAS) for case in cases for member in OTHERS for backend in backends()]
    if KERNELS:
        turns = [(case, OTHERS[i % 6], "triton", [DELTAS[i // 6 % 3]]) for i, case in enumerate(cases)]
        turns += [(case, OTHERS[(i + 3) % 6], "pairwise", [DELTAS[i // 12 % 3]]) for i, case in enumerate(cases[::2])]
    return [pytest.param(*turn, id=f"{turn[0].name}-{turn[1]}-{turn[2]}") for turn in turns]


@pytest.mark.thinned(2 if KERNELS else 14)
@pytest.mark.parametrize(("case", "member", "backend", "deltas"), combinations())
def test_agrees_with_reference(case, member, backend, deltas):
    for delta in deltas:
        expected = judge(member, case, delta=delta)
        found = of_case(member, case, backend, delta=delta)
        assert_agree(found, expected, TOLERANCES.get(case.logits.dtype, 1e-6), f"delta {delta}")


@pytest.mark.thinned(1 if KERNELS else 2)
@by_backend
@by_some
@pytest.mark.parametrize("delta", [1e-30, 1e30] if KERNELS else [1e-30, 1e-12, 37.5, 1e12, 1e30])
def test_deltas_up_to_the_ends_of_their_range(delta, member, backend):
    names = ("integers",) if KERNELS else ("middle", "integers", "tiny", "far_apart")
    for case in (case for case in all_cases() if case.name in names):
        assert_agree(of_case(member, case, backend, delta=delta), judge(member, case, delta=delta), said=case.name)


# All pairs take kernels half a minute where there are 20 000 logits.
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
    case = random_case(300 if KERNELS else 800, 25, "early", dtype=torch.float16)
    expected = judge(member, case)
    for upstream in [2.0**-13] if KERNELS else [2.0**-16, 0.3, 2.0**12]:
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
    for logits, labels in problems[: 1 if KERNELS else None]:
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
    for regime in ["late"] if KERNELS else ["middle", "late"]:
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
    for value in [NAN] if KERNELS else [NAN, INF, -INF, 1e30]:
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


@pytest.mark.thinned(2 if KERNELS else 1)
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
@pytest.mark.parametrize("delta", [1.0] if KERNELS else [1.0, 0.0])
@by_some
def test_same_bits_in_every_run_and_with_any_threads(member, delta, backend):
    case = random_case(600 if KERNELS else 20_000, 40)
    threads, expected = torch.get_num_threads(), of_case(member, case, backend, delta=delta)
    try:
        for number in [2] if KERNELS else [1, 3]:
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
@pytest.mark.parametrize("member", [RANK_SORT, DEPTH] if KERNELS else FAMILY, ids=repr)
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
