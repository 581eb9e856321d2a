"""What the authors' published code returned, kept in tests/golden."""

import pytest
import torch
from dialect import (
    ALRP,
    AP,
    GOLDEN,
    INTERPRETED,
    KERNELS,
    RANK_SORT,
    assert_agree,
    assert_close,
    backends,
    evaluate,
    load_golden,
)

SMALL = ("inverted", "separated", "one_positive")
# All pairs take kernels half a minute where there are 20 000 logits.
PROBLEMS = [
    pytest.param(path, backend, id=f"{path.stem}-{backend}")
    for path in GOLDEN
    for backend in backends()
    if backend != "pairwise" or path.stem in (*SMALL, "many_positives")
]
# What the file has of each loss, by the name of the result; and the values that it takes.
VECTORS = {
    ALRP: {
        **{"cls": "alrp_cls", "loc": "alrp_loc", "rank": "alrp_rank"},
        **{"cls by logits": "alrp_grad_logits", "loc by values": "alrp_grad_loc_errors"},
    },
    AP: {"loss": "ap", "loss by logits": "ap_grad_logits"},
    RANK_SORT: {"ranking": "rs_rank", "sorting": "rs_sort"},
}
VALUES = {RANK_SORT: "rs_ious"}
MEMBERS = [m if m is ALRP or not KERNELS else pytest.param(m, marks=pytest.mark.nightly) for m in VECTORS]


def test_all_vectors_are_there():
    names = "early early_wide inverted late many_positives middle one_positive separated"
    assert [path.stem for path in GOLDEN] == names.split()


@pytest.mark.thinned(3 if INTERPRETED else 1)
@pytest.mark.parametrize("member", MEMBERS, ids=repr)
@pytest.mark.parametrize(("path", "backend"), PROBLEMS)
def test_agrees_with_float64_and_with_the_published_code(path, backend, member):
    """AP Loss with the precision interpolated; of Rank & Sort Loss the gradient of both components."""
    case, golden = load_golden(path)
    given = case.logits, case.labels, golden[VALUES.get(member, "loc_errors")]
    found = evaluate(member, *given, backend)
    assert_agree(found, member.judge(*given), 1e-6 if member is ALRP else 2e-6)
    for name, key in VECTORS[member].items():
        assert_close(name, found[name], golden[key], 1e-6 if member is ALRP else 2e-6)
    if member is RANK_SORT:
        whole = found["ranking by logits"].double() + found["sorting by logits"].double()
        assert_close("gradient", whole, golden["rs_grad_logits"], 2e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("path", "backend"), [problem for problem in PROBLEMS if problem.values[0].stem in SMALL])
def test_half_precision_logits(path, backend, dtype):
    """The loss of the rounded scores, as exact as any."""
    case, _ = load_golden(path)
    given = case.logits.to(dtype), case.labels, case.loc_errors
    assert_agree(evaluate(ALRP, *given, backend), ALRP.judge(*given))


def test_some_vectors_are_worth_it():
    """One has no false positives, and in another interpolation matters."""
    case, golden = load_golden(next(path for path in GOLDEN if path.stem == "separated"))
    assert golden["alrp_cls"] == 0
    assert not golden["alrp_grad_logits"].any()
    case, golden = load_golden(next(path for path in GOLDEN if path.stem == "inverted"))
    value, *_ = AP.judge(case.logits, case.labels, case.loc_errors, interpolated=False).values()
    assert abs(value - golden["ap"]) > 1e-3 * value
