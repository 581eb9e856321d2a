"""Wrong arguments: the error's type, and the name of the argument at the beginning of its text."""

import pytest
import torch
from dialect import KERNELS, NAN, random_case
from dialect.checks import assert_same_results, backends, evaluate

from alrp_triton import alrp_loss, ap_loss

LOGITS = torch.tensor([0.5, -1.0, 2.0, 0.0, 1.0, -0.5])
LABELS = torch.tensor([1, 0, 0, -1, 1, 0])
ERRORS = torch.tensor([0.25, 0.75])
META = {"device": "meta"}


def call(**changed):
    arguments = {"logits": LOGITS, "labels": LABELS, "loc_errors": ERRORS, **changed}
    return alrp_loss(arguments.pop("logits"), arguments.pop("labels"), arguments.pop("loc_errors"), **arguments)


WRONG_TYPES = [
    ("logits", {"logits": None}),
    ("logits", {"logits": 3.0}),
    ("logits", {"logits": "scores"}),
    (r"logits\[0\]", {"logits": LOGITS.numpy()}),
    (r"logits\[1\]", {"logits": [LOGITS, [0.0]], "labels": [LABELS, LABELS]}),
    ("logits", {"logits": LOGITS.long()}),
    ("logits", {"logits": LOGITS.to(torch.complex64)}),
    (r"logits\[1\]", {"logits": [LOGITS, LOGITS.double()], "labels": [LABELS, LABELS]}),
    ("logits", {"logits": LOGITS.to_sparse()}),
    (r"logits\[1\]", {"logits": [LOGITS, LOGITS.to_sparse()], "labels": [LABELS, LABELS]}),
    ("labels", {"labels": None}),
    ("labels", {"labels": LABELS.to_sparse()}),
    ("labels", {"labels": 1}),
    ("labels", {"labels": LABELS.float()}),
    ("labels", {"labels": LABELS == 1}),
    (r"labels\[1\]", {"logits": [LOGITS, LOGITS], "labels": [LABELS, LABELS.float()]}),
    (r"labels\[0\]", {"logits": [LOGITS], "labels": [[1, 0, 0, -1, 1, 0]]}),
    ("loc_errors", {"loc_errors": None}),
    ("loc_errors", {"loc_errors": [0.25, 0.75]}),
    ("loc_errors", {"loc_errors": ERRORS.to_sparse()}),
    ("groups", {"groups": LABELS.to_sparse()}),
    ("loc_errors", {"loc_errors": torch.tensor([0, 1])}),
    ("delta", {"delta": None}),
    ("delta", {"delta": "1"}),
    ("delta", {"delta": True}),
    ("delta", {"delta": torch.tensor(1.0)}),
    ("eps", {"eps": None}),
    ("eps", {"eps": False}),
    ("eps", {"eps": torch.tensor(1e-5)}),
    ("ignore_index", {"ignore_index": -1.0}),
    ("ignore_index", {"ignore_index": None}),
    ("ignore_index", {"ignore_index": True}),
]
WRONG_VALUES = [
    ("logits", {"logits": torch.tensor(1.0), "labels": torch.tensor(1)}),
    ("logits", {"logits": [], "labels": []}),
    (r"logits\[1\]", {"logits": [LOGITS, LOGITS.to(**META)], "labels": [LABELS, LABELS]}),
    ("labels", {"logits": LOGITS.view(2, 3)}),
    ("labels", {"logits": LOGITS.view(2, 3), "labels": LABELS.view(3, 2)}),
    ("labels", {"logits": LOGITS.view(2, 3), "labels": torch.tensor([1, 0, 2])}),
    ("labels", {"labels": LABELS[:5]}),
    ("labels", {"labels": [LABELS, LABELS]}),
    ("labels", {"logits": [LOGITS, LOGITS]}),
    ("labels", {"labels": LABELS.to(**META)}),
    ("labels", {"labels": LABELS.masked_fill(LABELS == 0, 2)}),
    ("labels", {"labels": LABELS.masked_fill(LABELS == -1, -2)}),
    ("labels", {"ignore_index": 255}),
    ("labels", {"ignore_index": -100}),
    ("labels", {"labels": LABELS.to(torch.uint8)}),
    ("labels", {"logits": LOGITS.view(2, 3), "labels": torch.tensor([0, 4])}),
    ("labels", {"logits": LOGITS.view(2, 3), "labels": torch.tensor([0, -2])}),
    ("labels", {"logits": LOGITS.view(2, 3), "labels": torch.tensor([0, 255], dtype=torch.uint8)}),
    ("loc_errors", {"loc_errors": ERRORS[:1]}),
    ("loc_errors", {"loc_errors": torch.ones(3)}),
    ("loc_errors", {"loc_errors": torch.ones(0)}),
    ("loc_errors", {"loc_errors": torch.tensor(0.5)}),
    ("loc_errors", {"loc_errors": ERRORS[:, None]}),
    ("loc_errors", {"loc_errors": ERRORS.to(**META)}),
    ("delta", {"delta": -1e-9}),
    ("delta", {"delta": -1}),
    ("delta", {"delta": 9e-31}),
    ("delta", {"delta": 5e-324}),
    ("delta", {"delta": 1.1e30}),
    ("delta", {"delta": 1.7e308}),
    ("delta", {"delta": NAN}),
    ("delta", {"delta": float("inf")}),
    ("eps", {"eps": -1e-9}),
    ("eps", {"eps": NAN}),
    ("eps", {"eps": 10**400}),
    ("ignore_index", {"ignore_index": 2**63}),
    ("ignore_index", {"ignore_index": -(2**63) - 1}),
    ("loc_ranking", {"loc_ranking": "hard"}),
    ("loc_ranking", {"loc_ranking": None}),
    ("backend", {"backend": "cuda"}),
    ("backend", {"backend": None}),
]


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize(("name", "changed"), WRONG_TYPES)
def test_wrong_type(name, changed, backend):
    with pytest.raises(TypeError, match=f"^{name}: expected"):
        call(**{"backend": backend, **changed})


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize(("name", "changed"), WRONG_VALUES)
def test_wrong_value(name, changed, backend):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        call(**{"backend": backend, **changed})


@pytest.mark.parametrize("backend", backends())
def test_more_positives_than_logits_are_refused_before_anything_is_allocated(backend):
    with pytest.raises(
        ValueError, match=r"^num_positives: expected at most one for each of the 6 logits, got 1000000000000"
    ):
        ap_loss(LOGITS, LABELS, num_positives=10**12, backend=backend)


@pytest.mark.parametrize("backend", ["triton", "pairwise"])
@pytest.mark.skipif(KERNELS, reason="kernels that run here take CPU tensors")
def test_a_backend_that_cannot_run_here_says_why(backend):
    with pytest.raises(ValueError, match=r"^backend: .*TRITON_INTERPRET=1|^backend: .*not installed"):
        call(backend=backend)


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64])
def test_every_integer_dtype_of_labels(dtype, backend):
    case = random_case(96, 10, ignored=0.2)
    expected = evaluate(*case[1:], backend)
    # Any value may be the one to ignore, as long as the dtype can hold it.
    for ignore_index in [255, 2] if dtype == torch.uint8 else [-1, -2, 127, 7]:
        labels = case.labels.masked_fill(case.labels == -1, ignore_index).to(dtype)
        actual = evaluate(case.logits, labels, case.loc_errors, backend, ignore_index=ignore_index)
        assert_same_results(actual, expected)


@pytest.mark.parametrize("backend", backends())
def test_an_ignore_index_that_the_dtype_cannot_hold_ignores_nothing(backend):
    case = random_case(96, 10, ignored=0)
    expected = evaluate(*case[1:], backend)
    for dtype, ignore_index in [(torch.uint8, -1), (torch.int8, 255), (torch.int8, 256), (torch.int16, 2**16)]:
        labels = case.labels.to(dtype)
        assert_same_results(
            evaluate(case.logits, labels, case.loc_errors, backend, ignore_index=ignore_index), expected
        )


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize(
    ("dtype", "columns"), [(torch.int8, 127), (torch.int8, 300), (torch.uint8, 255), (torch.uint8, 600)]
)
def test_narrow_class_labels_with_more_classes_than_they_can_name(dtype, columns, backend):
    # All rows positive, for classes that the dtype can hold; a background label would not always fit.
    logits = torch.randn(5, columns, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 44, 100, 126])
    errors = torch.linspace(0, 1, 5)
    expected = evaluate(logits, labels, errors, backend, ignore_index=-100)
    assert_same_results(evaluate(logits, labels.to(dtype), errors, backend, ignore_index=-100), expected)
    assert expected.rank.shape == (5,)


@pytest.mark.parametrize("backend", backends())
def test_labels_0_and_1_may_be_the_ones_to_ignore(backend):
    # Class labels, of which one class is not to take part.
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 1, 4, 2, 0, 4])
    errors = torch.tensor([0.5, 0.25])
    expected = evaluate(logits, labels.masked_fill(labels == 0, -1), errors, backend)
    assert_same_results(evaluate(logits, labels, errors, backend, ignore_index=0), expected)


@pytest.mark.parametrize("backend", backends())
def test_inputs_are_not_changed(backend):
    case = random_case(120, 12)
    logits, labels, errors = (tensor.clone() for tensor in case[1:])
    evaluate(logits, labels, errors, backend)
    assert torch.equal(logits, case.logits)
    assert torch.equal(labels, case.labels)
    assert torch.equal(errors, case.loc_errors)
