"""How losses of the family are called: what they refuse, naming the argument first; labels; modules."""

import inspect

import pytest
import torch
from dialect import (
    ALRP,
    KERNELS,
    NAN,
    assert_same_bits,
    assert_same_results,
    by_backend,
    by_member,
    evaluate,
    imprecision,
    of_case,
    random_case,
)

from alrp_triton import APLoss, NDCGLoss, RankSortOutput, alrp_loss, ap_loss, ndcg_loss, rank_sort_loss
from alrp_triton.framework import RankingLoss, ranking_loss

# Wrong arguments.

LOGITS = torch.tensor([0.5, -1.0, 2.0, 0.0, 1.0, -0.5])
LABELS = torch.tensor([1, 0, 0, -1, 1, 0])
VALUES = torch.tensor([0.25, 0.75])
ROWS, GROUPS = LOGITS.view(2, 3), torch.tensor([0, 1])
TYPES = [
    ("logits", {"logits": None}),
    ("logits", {"logits": 3.0}),
    ("logits", {"logits": "scores"}),
    ("logits", {"logits": LOGITS.numpy()}),
    (r"logits\[1\]", {"logits": [LOGITS, [0.0]], "labels": [LABELS, LABELS]}),
    ("logits", {"logits": LOGITS.long()}),
    ("logits", {"logits": LOGITS.to(torch.complex64)}),
    (r"logits\[1\]", {"logits": [LOGITS, LOGITS.double()], "labels": [LABELS, LABELS]}),
    ("logits", {"logits": LOGITS.to_sparse()}),
    (r"logits\[1\]", {"logits": [LOGITS, LOGITS.to_sparse()], "labels": [LABELS, LABELS]}),
    *(("labels", {"labels": labels}) for labels in (None, 1, LABELS.to_sparse(), LABELS.to(torch.complex64))),
    # Class indices are integers.
    *(("labels", {"logits": ROWS, "labels": labels}) for labels in (GROUPS.float(), GROUPS.half(), GROUPS == 1)),
    (r"labels\[1\]", {"logits": [ROWS, ROWS], "labels": [GROUPS, GROUPS.float()]}),
    *(("labels", {"labels": (LABELS == 1)[:, None].to(dtype)}) for dtype in (torch.bool, torch.float32)),
    (r"labels\[0\]", {"logits": [LOGITS], "labels": [[1, 0, 0, -1, 1, 0]]}),
    *(("values", {"values": values}) for values in (None, [0.25, 0.75], VALUES.to_sparse(), torch.tensor([0, 1]))),
    *(("groups", {"groups": groups}) for groups in (LABELS.to_sparse(), LABELS.float(), LABELS == 1, 0)),
    *((r"groups\[0\]", {"groups": groups}) for groups in ([[0, 1]], [0, 1])),
    *(("delta", {"delta": delta}) for delta in (None, "1", True, torch.tensor(1.0))),
    *(("ignore_index", {"ignore_index": index}) for index in (-1.0, None, True)),
]
NUMBERS = [
    ("logits", {"logits": torch.tensor(1.0), "labels": torch.tensor(1)}),
    ("logits", {"logits": [], "labels": []}),
    (r"logits\[1\]", {"logits": [LOGITS, LOGITS.to("meta")], "labels": [LABELS, LABELS]}),
    ("labels", {"logits": [LOGITS, LOGITS]}),
    *(("labels", {"labels": labels}) for labels in (LABELS[:5], [LABELS, LABELS], LABELS.to("meta"), LABELS.byte())),
    *(("labels", {"labels": LABELS.masked_fill(old == LABELS, new)}) for old, new in ((0, 2), (-1, -2))),
    *(("labels", {"ignore_index": index}) for index in (255, -100)),
    *(("labels", {"labels": LABELS.float().masked_fill(LABELS == 0, value)}) for value in (0.5, 2.0, NAN, 1e-30, 1e30)),
    ("labels", {"labels": LABELS.float(), "ignore_index": 255}),
    ("labels", {"labels": LABELS.half().masked_fill(LABELS == -1, 1e4), "ignore_index": 10**4}),
    *(
        ("labels", {"logits": ROWS, "labels": labels})
        for labels in (LABELS, LABELS.view(3, 2), torch.tensor([1, 0, 2]))
    ),
    *(("labels", {"logits": ROWS, "labels": torch.tensor(pair)}) for pair in ([0, 4], [0, -2])),
    ("labels", {"logits": ROWS, "labels": torch.tensor([0, 255], dtype=torch.uint8)}),
    *(("values", {"values": torch.ones(shape)}) for shape in ((1,), (3,), (0,), (), (2, 1))),
    ("values", {"values": VALUES.to("meta")}),
    *(("delta", {"delta": delta}) for delta in (-1e-9, -1, 9e-31, 5e-324, 1.1e30, 1.7e308, NAN, float("inf"))),
    *(("ignore_index", {"ignore_index": index}) for index in (2**63, -(2**63) - 1)),
    *(("backend", {"backend": backend}) for backend in ("cuda", None)),
    *(
        ("groups", {"logits": ROWS, "labels": torch.tensor([0, 3]), "values": VALUES[:1], "groups": groups})
        for groups in (
            *(torch.tensor(0), torch.tensor([0, 1, 2]), GROUPS[:, None], GROUPS.to("meta"), [GROUPS, GROUPS], [], ()),
            *(torch.zeros(shape, dtype=torch.int64) for shape in ((3, 2), (2, 3, 1))),
        )
    ),
]
LEVELS = {"logits": [ROWS, ROWS], "labels": [torch.tensor([0, 3])] * 2}
OWN = {
    ALRP: [
        *((TypeError, "eps", {"eps": eps}) for eps in (None, False, torch.tensor(1e-5))),
        *((ValueError, "eps", {"eps": eps}) for eps in (-1e-9, NAN, 10**400)),
        *((ValueError, "loc_ranking", {"loc_ranking": form}) for form in ("hard", None)),
    ],
}


@by_backend
@by_member
def test_wrong_arguments(member, backend, looking):
    def call(**changed):
        member.loss(**{"logits": LOGITS, "labels": LABELS, "values": VALUES, "backend": backend, **changed})

    call()
    wrong = [*((TypeError, *one) for one in TYPES), *((ValueError, *one) for one in NUMBERS), *OWN.get(member, ())]
    for error, name, changed in wrong:
        if name == "values" and member.takes is None:
            continue
        with pytest.raises(error, match=f"^{member.takes if name == 'values' else name}: expected"):
            call(**changed)
    for groups in ([GROUPS], [GROUPS, GROUPS[:1]], GROUPS, [GROUPS, None]):
        with pytest.raises((TypeError, ValueError), match=r"^groups.*: expected"):
            call(**LEVELS, groups=groups)


@by_backend
@pytest.mark.parametrize("interpolated", [None, 1, "yes"])
def test_wrong_interpolated(interpolated, backend):
    with pytest.raises(TypeError, match=r"^interpolated: expected a bool"):
        ap_loss(LOGITS, LABELS, interpolated=interpolated, backend=backend)


@pytest.mark.parametrize("backend", ["triton", "pairwise"])
@pytest.mark.skipif(KERNELS, reason="kernels that run here take CPU tensors")
def test_a_backend_that_cannot_run_here_says_why(backend):
    with pytest.raises(ValueError, match=r"^backend: .*TRITON_INTERPRET=1|^backend: .*not installed"):
        ap_loss(LOGITS, LABELS, backend=backend)


# The number of positives, where nothing else says it.

UNCOUNTED = {
    "ap": ap_loss,
    "ndcg": ndcg_loss,
    "formula": lambda logits, labels, **arguments: ranking_loss(logits, labels, imprecision, **arguments),
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
    # Before anything is allocated.
    with pytest.raises(ValueError, match=r"^num_positives: expected at most one for each of the 50 logits, got 10+$"):
        loss(*case[1:3], num_positives=10**12, backend=backend)
    for number in (True, False, 5.0, "5", torch.tensor(5)):
        with pytest.raises(TypeError, match=f"^num_positives: expected an int or None, got {type(number).__name__}$"):
            loss(*case[1:3], num_positives=number, backend=backend)


# Labels.


@by_backend
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64])
def test_every_integer_dtype_of_labels(dtype, backend):
    case = random_case(96, 10, ignored=0.2)
    expected = of_case(ALRP, case, backend)
    # Any value may be the one to ignore, as long as the dtype can hold it.
    for index in [255, 2] if dtype == torch.uint8 else [-1, -2, 127, 7]:
        labels = case.labels.masked_fill(case.labels == -1, index).to(dtype)
        assert_same_results(of_case(ALRP, case._replace(labels=labels), backend, ignore_index=index), expected)


@by_backend
@pytest.mark.parametrize("dtype", [torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_labels_of_logits_may_be_bools_or_floats(dtype, backend):
    case = random_case(96, 10, ignored=0 if dtype == torch.bool else 0.2)
    expected = of_case(ALRP, case, backend)
    for index in [-1] if dtype == torch.bool else [-1, 255, 2, -2]:
        labels = case.labels.masked_fill(case.labels == -1, index).to(dtype)
        kept = labels.clone()
        assert_same_results(of_case(ALRP, case._replace(labels=labels), backend, ignore_index=index), expected)
        assert torch.equal(labels, kept)
    # In any strides; a level of one dtype beside a level of another.
    scores, labels = case.logits.view(8, 12), case.labels.view(8, 12)
    strided = labels.t().contiguous().to(dtype).t()
    levels = [scores[:3], scores[3:]], [strided[:3], labels[3:]]
    expected = evaluate(ALRP, levels[0], [labels[:3], labels[3:]], case.loc_errors, backend)
    assert_same_results(evaluate(ALRP, *levels, case.loc_errors, backend), expected)


@by_backend
def test_an_ignore_index_that_the_dtype_cannot_hold_ignores_nothing(backend):
    case = random_case(96, 10, ignored=0)
    expected = of_case(ALRP, case, backend)
    for dtype, index in [(torch.uint8, -1), (torch.int8, 255), (torch.int8, 256), (torch.int16, 2**16)]:
        same = case._replace(labels=case.labels.to(dtype))
        assert_same_results(of_case(ALRP, same, backend, ignore_index=index), expected)


@by_backend
@pytest.mark.parametrize(
    ("dtype", "columns"), [(torch.int8, 127), (torch.int8, 300), (torch.uint8, 255), (torch.uint8, 600)]
)
def test_narrow_class_labels_with_more_classes_than_they_can_name(dtype, columns, backend):
    # All rows positive, for classes that the dtype can hold; a background label would not always fit.
    logits = torch.randn(5, columns, generator=torch.Generator().manual_seed(0))
    labels, errors = torch.tensor([0, 1, 44, 100, 126]), torch.linspace(0, 1, 5)
    expected = evaluate(ALRP, logits, labels, errors, backend, ignore_index=-100)
    assert_same_results(evaluate(ALRP, logits, labels.to(dtype), errors, backend, ignore_index=-100), expected)
    assert expected["rank"].shape == (5,)


@by_backend
def test_a_class_may_be_the_one_to_ignore(backend):
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    labels, errors = torch.tensor([0, 1, 4, 2, 0, 4]), torch.tensor([0.5, 0.25])
    expected = evaluate(ALRP, logits, labels.masked_fill(labels == 0, -1), errors, backend)
    assert_same_results(evaluate(ALRP, logits, labels, errors, backend, ignore_index=0), expected)


# Modules.

FURTHER = {"ignore_index": 7, "backend": "torch"}
MODULES = [
    (APLoss, ap_loss, {"delta": 0.25, "interpolated": False, **FURTHER}),
    (NDCGLoss, ndcg_loss, {"delta": 0.0, **FURTHER}),
    (
        RankingLoss,
        ranking_loss,
        {"error": imprecision, "delta": 0.25, "eps": 0.5, "gradient": "error-driven", **FURTHER},
    ),
]
by_module = pytest.mark.parametrize(("module", "function", "settings"), MODULES)


@by_module
@pytest.mark.parametrize("arguments", [{}, {"num_positives": 9}, {"groups": torch.arange(90) % 2}], ids=str)
def test_modules_are_functions(arguments, module, function, settings, looking):
    case = random_case(90, 9)
    labels = case.labels.masked_fill(case.labels == -1, 7)
    x = case.logits.clone().requires_grad_()
    found, expected = module(**settings)(x, labels, **arguments), function(x, labels, **settings, **arguments)
    assert_same_bits("value", found.detach(), expected.detach())
    assert_same_bits("gradient", *(torch.autograd.grad(loss, x)[0] for loss in (found, expected)))
    with pytest.raises(ValueError, match=r"^num_positives"):
        module(**settings)(x, labels, 8)
    with pytest.raises(ValueError, match=r"^groups"):
        module(**settings)(x, labels, 9, torch.zeros(3, dtype=torch.int64))


@by_module
def test_modules_say_what_they_were_made_of(module, function, settings):
    shown = ", ".join(
        f"{name}={value.__name__ if callable(value) else repr(value)}" for name, value in settings.items()
    )
    made = module(**settings)
    assert repr(made) == f"{module.__name__}({shown})"
    assert not made.state_dict()
    assert repr(APLoss()) == "APLoss(delta=1.0, interpolated=True, ignore_index=-1, backend='auto')"
    assert repr(NDCGLoss()) == "NDCGLoss(delta=1.0, ignore_index=-1, backend='auto')"


def test_signatures_of_the_family_agree():
    """One form for all: first the tensors, then keywords, with the same names and the same defaults."""
    shared = ("groups", "ignore_index", "backend", "process_group")
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
