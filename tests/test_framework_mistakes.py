"""Formulas that return what they should not, or nothing; and wrong arguments."""

import pytest
import torch
from dialect import (
    NAN,
    assert_agree,
    assert_all_nan,
    by_backend,
    formula,
    imprecision,
    judge,
    of_case,
    random_case,
)

from alrp_triton.framework import RankingLoss, ranking_loss

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
    assert_all_nan(found, case.labels)


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


def test_wrong_arguments(looking):
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
        with pytest.raises(TypeError, match=f"^{name}: expected a function, got str$"):
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
