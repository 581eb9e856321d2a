"""What the authors' published code returned, kept in tests/golden."""

import pytest
import torch
from cases import GOLDEN, INTERPRETED, load_golden
from checks import assert_close, backends, evaluate, judge

# The interpreter takes seconds for each vector and pass; these are the smaller ones.
SMALL = ("inverted", "separated", "one_positive", "many_positives")
PATHS = [path for path in GOLDEN if not INTERPRETED or path.stem in SMALL]


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


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_agrees_with_float64(path, backend):
    case, _ = load_golden(path)
    result, expected = evaluate(*case[1:], backend), judge(case)
    for name, actual, wanted in zip(result._fields, result, expected):
        assert_close(name, actual, wanted, 1e-6)


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_agrees_with_the_published_code(path, backend):
    case, golden = load_golden(path)
    result = evaluate(*case[1:], backend)
    for name, actual in zip(result._fields, result):
        assert_close(name, actual, golden[f"alrp_{name}"], 1e-6)


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("path", [path for path in PATHS if path.stem in SMALL], ids=lambda path: path.stem)
def test_half_precision_logits(path, dtype, backend):
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
