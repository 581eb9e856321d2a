"""Every loss of the family in one form, so that one test can hold them all: the functions, and two formulas."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from alrp_triton import alrp_loss, ap_loss, ape_loss, ndcg_loss, rank_sort_loss, reference
from alrp_triton.framework import ranking_loss

from .cases import KERNELS, Case
from .checks import assert_close, assert_rounded, assert_same_bits, assert_split_alike

Results = dict[str, Tensor]
"""By name: components of a loss; ``"<component> by logits"`` and ``"<component> by values"``, their gradients."""


class Member(NamedTuple):
    """A loss, and the judge of it."""

    name: str
    loss: Callable[..., Results]
    """``loss(logits, labels, values, **arguments)``: components, with a graph, and what else the loss returns."""
    judge: Callable[..., Results]
    """The same from the float64 reference for ``[M]`` logits and labels, and the gradients."""
    derivatives: tuple[tuple[str, str], ...] = (("loss", "logits"),)
    """Components, and what they are differentiated by: ``"logits"`` or ``"values"``."""
    takes: str | None = None
    """What the loss calls its ``values``, one number for each positive; None where it takes none."""

    def values(self, case: Case) -> Tensor:
        """The values of a case; of IoUs, many are equal, and some 0."""
        return (2 * case.loc_errors).round() / 4 if self.takes == "ious" else case.loc_errors

    @property
    def components(self) -> tuple[str, ...]:
        """What is differentiated at all."""
        return tuple(dict.fromkeys(component for component, _ in self.derivatives))

    @property
    def by_positive(self) -> tuple[str, ...]:
        """The names of results ``[P]``."""
        return ("rank", *(f"{component} by values" for component, leaf in self.derivatives if leaf == "values"))

    def __repr__(self) -> str:
        return self.name


def _alrp(logits: Any, labels: Any, values: Tensor, **arguments: Any) -> Results:
    return alrp_loss(logits, labels, values, **arguments)._asdict()


def _judge_alrp(*case: Tensor, **arguments: Any) -> Results:
    cls, loc, rank, by_logits, by_values = reference.alrp(*case, **arguments)
    return {"cls": cls, "loc": loc, "rank": rank, "cls by logits": by_logits, "loc by values": by_values}


def _judge_score(judge: Callable[..., Any], **settings: Any) -> Callable[..., Results]:
    def judged(logits: Tensor, labels: Tensor, values: Tensor, **arguments: Any) -> Results:
        value, _, gradient = judge(logits, labels, **settings, **arguments)
        return {"loss": value, "loss by logits": gradient}

    return judged


def _score(loss: Callable[..., Tensor], **settings: Any) -> Callable[..., Results]:
    return lambda logits, labels, values, **arguments: {"loss": loss(logits, labels, **settings, **arguments)}


def _rank_sort(logits: Any, labels: Any, values: Tensor, **arguments: Any) -> Results:
    return rank_sort_loss(logits, labels, values, **arguments)._asdict()


def _judge_rank_sort(*case: Tensor, **arguments: Any) -> Results:
    ranking, sorting, by_ranking, by_sorting = reference.rank_sort(*case, **arguments)
    names = ("ranking", "sorting", "ranking by logits", "sorting by logits")
    return dict(zip(names, (ranking, sorting, by_ranking, by_sorting)))


def _ape(logits: Any, labels: Any, values: Tensor, **arguments: Any) -> Results:
    return ape_loss(logits, labels, values, **arguments)._asdict()


def _judge_ape(*case: Tensor, **arguments: Any) -> Results:
    ranking, sorting, by_ranking, by_sorting = reference.ape(*case, **arguments)
    names = ("ranking", "sorting", "ranking by logits", "sorting by logits")
    return dict(zip(names, (ranking, sorting, by_ranking, by_sorting)))


def imprecision(ranking: Any) -> Tensor:
    """l(i) of AP Loss."""
    return 1 - ranking.rank_positive / ranking.rank


def weighted_error(ranking: Any, weights: Tensor) -> Tensor:
    """l(i): a weight for each positive, times the share of false positives down to it."""
    return weights * ranking.num_false_positives / ranking.rank


def depth_error(ranking: Any, costs: Tensor) -> Tensor:
    """l(i): grows with the logarithm of the false positives, beside what positives cost down to i; with a target."""
    return ranking.num_false_positives.log1p() + ranking.sums_sorted(costs) / ranking.rank_positive


def depth_target(ranking: Any, costs: Tensor) -> Tensor:
    """l*(i): half of the costs, so that the error is not at its target where there are no false positives."""
    return ranking.sums_sorted(costs) / ranking.rank_positive / 2


def depth_normaliser(ranking: Any) -> Tensor:
    """Z: differs between groups, and is not P."""
    return ranking.num_positives + 1


def squared_ramp(x: Tensor, delta: float) -> Tensor:
    """A pair function in the place of H, for widths above 0."""
    return (x / (2 * delta) + 0.5).clamp(0, 1) ** 2


def formula(
    name: str, error: Callable[..., Tensor], takes: str | None = None, judged: dict[str, Any] | None = None, **own: Any
) -> Member:
    """A loss from a formula, in which ``values`` go by the name ``takes``; the reference may be told other things."""

    def further(values: Tensor) -> dict[str, Any]:
        return {"extras": {takes: values}} if takes else {}

    def loss(logits: Any, labels: Any, values: Tensor, **arguments: Any) -> Results:
        return {"loss": ranking_loss(logits, labels, error, **further(values), **own, **arguments)}

    def judge(logits: Tensor, labels: Tensor, values: Tensor, **arguments: Any) -> Results:
        settings = {**own, **(judged or {}), **further(values), **arguments}
        found = reference.ranking_loss(logits, labels, error, **settings)
        by_values = {"loss by values": found.grad_extras[takes]} if takes else {}
        return {"loss": found.value, "loss by logits": found.grad_logits, **by_values}

    derivatives = (("loss", "logits"), ("loss", "values")) if takes else (("loss", "logits"),)
    return Member(name, loss, judge, derivatives, takes)


ALRP = Member("alrp", _alrp, _judge_alrp, (("cls", "logits"), ("loc", "values")), "loc_errors")
AP = Member("ap", _score(ap_loss), _judge_score(reference.ap))
PLAIN_AP = Member("plain_ap", _score(ap_loss, interpolated=False), _judge_score(reference.ap, interpolated=False))
NDCG = Member("ndcg", _score(ndcg_loss), _judge_score(reference.ndcg))
RANK_SORT = Member("rank_sort", _rank_sort, _judge_rank_sort, (("ranking", "logits"), ("sorting", "logits")), "ious")
APE = Member("ape", _ape, _judge_ape, (("ranking", "logits"), ("sorting", "logits")), "ious")
WEIGHTED = formula("weighted", weighted_error, "weights", eps=0.3)
DEPTH = formula("depth", depth_error, "costs", target=depth_target, normaliser=depth_normaliser)
FAMILY = (ALRP, AP, PLAIN_AP, NDCG, RANK_SORT, WEIGHTED, DEPTH, APE)
by_member = pytest.mark.parametrize("member", FAMILY, ids=repr)
_SPARING = [ALRP, *(pytest.param(member, marks=pytest.mark.nightly) for member in (RANK_SORT, DEPTH))]
by_member_sparing = pytest.mark.parametrize("member", _SPARING if KERNELS else FAMILY, ids=repr)
"""Where kernels run, whose passes over the logits all losses share, one member for all; by night two more."""


def evaluate(
    member: Member,
    logits: Tensor | Sequence[Tensor],
    labels: Tensor | Sequence[Tensor],
    values: Tensor,
    backend: str,
    *,
    upstream: float = 1.0,
    **arguments: Any,
) -> Results:
    """All that the loss gives, without a graph; gradients times ``upstream``. Those of levels come flat, ``[M]``."""
    levels = [logits] if isinstance(logits, Tensor) else list(logits)
    leaves = [x.detach().requires_grad_() for x in levels]
    values = values.detach().requires_grad_()
    found = member.loss(
        leaves[0] if isinstance(logits, Tensor) else leaves, labels, values, backend=backend, **arguments
    )
    assert all(tensor.requires_grad == (name in member.components) for name, tensor in found.items())
    results = {name: tensor.detach() for name, tensor in found.items()}
    for component, leaf in member.derivatives:
        inputs = [values] if leaf == "values" else leaves
        of = found[component]
        gradients = torch.autograd.grad(of, inputs, torch.full_like(of, upstream), retain_graph=True)
        whole = gradients[0] if leaf == "values" or isinstance(logits, Tensor) else _flat(gradients)
        results[f"{component} by {leaf}"] = whole
    return results


def of_case(member: Member, case: Case, backend: str, **arguments: Any) -> Results:
    """:func:`evaluate` for a case."""
    return evaluate(member, case.logits, case.labels, member.values(case), backend, **arguments)


def judge(member: Member, case: Case, **arguments: Any) -> Results:
    """The same from the float64 reference, directly."""
    return member.judge(case.logits, case.labels, member.values(case), **arguments)


def assert_agree(found: Results, expected: Results, tolerance: float = 1e-6, said: object = "") -> None:
    """Compare all that ``expected`` has: tensors by their norm and their worst element, scalars by their own size or
    that of the numbers they are differences of, which is 1."""
    assert expected.keys() <= found.keys()
    for name, wanted in expected.items():
        actual = found[name]
        if wanted.dim() == 0:
            difference = (actual.double() - wanted.double()).abs()
            within = difference <= tolerance * wanted.abs() + 1e-3 * tolerance
            both_nan = actual.isnan() and wanted.isnan()
            assert both_nan or within, f"{name}, {said}: got {actual}, expected {wanted}"
        elif actual.dtype in (torch.float16, torch.bfloat16) and wanted.dtype == torch.float64:
            assert_rounded(f"{name}, {said}", actual, wanted, tolerance)
        else:
            # Of what is rounded to float32, no more can be asked.
            finest = 1e-6 if actual.dtype == torch.float32 else 0
            assert_close(f"{name}, {said}", actual, wanted, max(tolerance, finest))


def assert_right(member: Member, case: Case, backend: str, said: object = "", **arguments: Any) -> Results:
    """What the loss gives for a case, which is what the reference says. Pass 1 sums in fixed point with 36 binary
    places, whatever the dtype."""
    found = of_case(member, case, backend, **arguments)
    tolerance = 1e-9 if case.logits.dtype == torch.float64 else 1e-6
    assert_agree(found, judge(member, case, **arguments), tolerance, f"{said} {arguments}")
    return found


def assert_same_results(found: Results, expected: Results, split_by: str | None = None) -> None:
    """The same bits, in whatever shape; of logits that were split in another way, what the backend makes the same."""
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        tensor = found[name].reshape(wanted.shape)
        if split_by:
            assert_split_alike(split_by, name, tensor, wanted)
        else:
            assert_same_bits(name, tensor, wanted)


def assert_all_nan(found: Results, labels: Tensor) -> None:
    """All, but the gradients of ignored logits, which are 0."""
    for name, tensor in found.items():
        if name.endswith("by logits"):
            assert tensor[labels != -1].isnan().all(), name
            assert not tensor[labels == -1].any(), name
        else:
            assert tensor.isnan().all(), name


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])
