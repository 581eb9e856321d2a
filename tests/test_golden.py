"""What the authors' published code returned, kept in tests/golden."""

import pytest
import torch
from dialect import GOLDEN, load_golden
from dialect.checks import assert_close, backends, evaluate, judge

SMALL = ("inverted", "separated", "one_positive")
# All pairs take kernels half a minute where there are 20 000 logits.
PROBLEMS = [
    pytest.param(path, backend, id=f"{path.stem}-{backend}")
    for path in GOLDEN
    for backend in backends()
    if backend != "pairwise" or path.stem in (*SMALL, "many_positives")
]


def test_all_vectors_are_there():
    assert [path.stem for path in GOLDEN] == [
        "early",
        "early_wide",
        "inverted",
        "late",
        "many_positives",
        "middle",
        "one_positive",
        "separated",
    ]


@pytest.mark.parametrize(("path", "backend"), PROBLEMS)
def test_agrees_with_float64_and_with_the_published_code(path, backend):
    case, golden = load_golden(path)
    result, expected = evaluate(*case[1:], backend), judge(case)
    for name, actual, wanted in zip(result._fields, result, expected):
        assert_close(name, actual, wanted, 1e-6)
        assert_close(name, actual, golden[f"alrp_{name}"], 1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("path", "backend"), [problem for problem in PROBLEMS if problem.values[0].stem in SMALL])
def test_half_precision_logits(path, backend, dtype):
    """The loss of the rounded scores, as exact as any."""
    case, _ = load_golden(path)
    case = case._replace(logits=case.logits.to(dtype))
    result, expected = evaluate(*case[1:], backend), judge(case)
    for name in ("cls", "loc", "rank", "grad_loc_errors"):
        assert_close(name, getattr(result, name), getattr(expected, name), 1e-6)
    assert_close("grad_logits", result.grad_logits, expected.grad_logits, torch.finfo(dtype).eps / 2)


def test_one_vector_has_no_false_positives():
    case, golden = load_golden(next(path for path in GOLDEN if path.stem == "separated"))
    result = evaluate(*case[1:], "torch")
    assert golden["alrp_cls"] == result.cls == 0
    assert not result.grad_logits.any()
