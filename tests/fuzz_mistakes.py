"""A strategy for wrong arguments: what takes the place of what, and the exception that names the argument."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from dialect import ALRP, DEPTH, WEIGHTED, formula
from fuzz_cases import Problem
from fuzz_draw import one_of, whole
from hypothesis import strategies as st
from torch import Tensor

Wrong = tuple[type[Exception], str, dict[str, Any]]
"""What is to be raised, by which argument's name its text is to begin, and the fields of the problem to be replaced."""


@st.composite
def spoilt(draw: st.DrawFn, problem: Problem) -> Problem:
    """A problem with one wrong argument."""
    at, options = draw(whole(0, len(problem.logits) - 1)), list[Wrong]()
    while not options:
        options = list(draw(_KINDS)(problem, at))
    error, name, fields = draw(st.sampled_from(options))
    return dataclasses.replace(problem, **fields, expected=(error, name))


def _tensors(problem: Problem, *names: str) -> Iterator[tuple[str, list[Tensor]]]:
    """Those of all levels by their names, where there are any."""
    return ((name, getattr(problem, name)) for name in names if getattr(problem, name) is not None)


def _put(tensors: Sequence[Any], at: int, tensor: Any) -> list[Any]:
    return [*tensors[:at], tensor, *tensors[at + 1 :]]


def _types(problem: Problem, at: int) -> Iterator[Wrong]:
    x = problem.logits[at].nan_to_num(0).contiguous().clone()
    wrong: list[Any] = [
        x.long(),
        x.bool(),
        x.to(torch.complex64),
        x.to(torch.float8_e5m2),
        x.to_sparse(),
        None,
        3.5,
        "x",
    ]
    if problem.in_a_sequence:  # else it would be a sequence of numbers
        wrong.append(x.float().numpy())
    if len(problem.logits) > 1:
        wrong += [x.to(torch.float64 if x.dtype != torch.float64 else torch.float32)] * 3
    yield from ((TypeError, "logits", {"logits": _put(problem.logits, at, one)}) for one in wrong)
    for name, tensors in _tensors(problem, "labels", "groups"):
        y = tensors[at].contiguous().clone()
        wrong = [y.to(torch.complex64), y.to(torch.uint16), y.to_sparse(), 1]
        if name == "groups" or y.dim() < problem.logits[at].dim():  # else they say what 0 and 1 say
            wrong += [y.float(), y == 0]
        wrong.append(None if name == "labels" else 1)  # no groups are no mistake
        yield from ((TypeError, name, {name: _put(tensors, at, one)}) for one in wrong)


def _shapes(problem: Problem, at: int) -> Iterator[Wrong]:
    shape, zeros = problem.logits[at].shape, {}
    for name, tensors in _tensors(problem, "labels", "groups"):
        y = tensors[at].long()
        wrong = [y[None], *map(y.new_zeros, [(*shape, 1), shape[0] + 1, (*shape[:-1], shape[-1] + 1)])]
        fits = (shape, shape[:-1])
        yield from ((ValueError, name, {name: _put(tensors, at, one)}) for one in wrong if one.shape not in fits)
        zeros[name] = _put(tensors, at, torch.tensor(0))
    yield ValueError, "logits", {"logits": _put(problem.logits, at, problem.logits[at].new_zeros(())), **zeros}


def _numbers_of_levels(problem: Problem, at: int) -> Iterator[Wrong]:
    for name, tensors in _tensors(problem, "logits", "labels", "groups"):
        for wrong in ([], [*tensors, tensors[-1]], tensors[:-1]):
            wanted = {"requires_grad": [True] * len(wrong)} if name == "logits" else {}
            fields = {name: wrong, "in_a_sequence": True, **wanted}
            yield ValueError, "groups" if name == "groups" else "labels", fields


def _devices(problem: Problem, at: int) -> Iterator[Wrong]:
    for name, tensors in _tensors(problem, *(["logits"] if at > 0 else []), "labels", "groups"):
        yield ValueError, name, {name: _put(tensors, at, tensors[at].to("meta"))}


def _labels(problem: Problem, at: int) -> Iterator[Wrong]:
    y, x = problem.labels[at], problem.logits[at]
    if y.numel() == 0 or x.numel() == 0 or y.is_floating_point() or y.dtype == torch.bool:
        return
    limits, columns = torch.iinfo(y.dtype), x.shape[-1]
    right = {*range((columns if y.dim() < x.dim() else 1) + 1), problem.arguments["ignore_index"]}
    wrong = [columns + 1, -2, -1, 2, 3, limits.max, limits.min, limits.max - 1, columns + 256, 2**32, 2**32 + 1]
    for label in wrong:
        if limits.min <= label <= limits.max and label not in right:
            for place in sorted({0, y.numel() // 2, y.numel() - 1}):
                labels = y.contiguous().clone()
                labels.view(-1)[place] = label
                yield ValueError, "labels", {"labels": _put(problem.labels, at, labels)}


def _values(problem: Problem, at: int) -> Iterator[Wrong]:
    name, v = problem.member.takes, problem.values
    if name is None:
        return
    lengths = [torch.ones(n, dtype=v.dtype) for n in (len(v) + 1, len(v) + 2, len(v) + 3, len(v) - 1, 0) if n >= 0]
    for one in [*(ones for ones in lengths if len(ones) != len(v)), v[:, None], v.new_zeros(()), v.to("meta")]:
        yield ValueError, name, {"values": one}
    for one in [
        torch.ones_like(v, dtype=torch.int64),
        v.to(torch.complex64),
        v.tolist(),
        None,
        v.contiguous().to_sparse(),
    ]:
        yield TypeError, name, {"values": one}


def _arguments(problem: Problem, name: str, values: Sequence[Any], types: Sequence[Any] = ()) -> Iterator[Wrong]:
    for error, wrong in ((ValueError, values), (TypeError, types)):
        yield from ((error, name, {"arguments": {**problem.arguments, name: one}}) for one in wrong)


def _number_of_positives(problem: Problem, at: int) -> Iterator[Wrong]:
    if problem.member.takes not in ("loc_errors", "ious"):
        p = int((problem.flat_labels == 1).sum())
        values = {p + 1, -1, 2**31, 2**62, 2**70, -(2**70), *([p - 1, 0] if p else [])}
        yield from _arguments(problem, "num_positives", sorted(values), (float(p), True, "1", torch.tensor(p)))


def _settings(problem: Problem, at: int) -> Iterator[Wrong]:
    ends = (-1.0, -1e-40, math.nan, math.inf, -math.inf, 9e-31, 5e-324, 1.1e30, 10**400)
    yield from _arguments(problem, "delta", ends, (None, "1", True, 1j, torch.tensor(1.0), [1.0]))
    ends = (2**63, -(2**63) - 1, 10**40)
    yield from _arguments(problem, "ignore_index", ends, (None, -1.0, True, "x", torch.tensor(-1)))
    if problem.member in (ALRP, DEPTH):
        ends = (-1e-9, math.nan, -math.inf, -1, 10**400)
        yield from _arguments(problem, "eps", ends, (None, "0", False, torch.tensor(0.1)))


def _options(problem: Problem, at: int) -> Iterator[Wrong]:
    yield from ((ValueError, "backend", {"backend": one}) for one in ("cuda", "", None, 3, ["torch"]))
    if problem.member is ALRP:
        yield from _arguments(problem, "loc_ranking", ("hard", None, 0, ["sorted"], torch.tensor([1, 2])))


def _formulas(problem: Problem, at: int) -> Iterator[Wrong]:
    if problem.member not in (WEIGHTED, DEPTH) or not bool((problem.flat_labels == 1).any()):
        return
    wrong: list[tuple[type[Exception], Any]] = [
        (TypeError, lambda ranking, **extras: 1.0),
        (TypeError, lambda ranking, **extras: None),
        (ValueError, lambda ranking, **extras: ranking.rank.sum()),
        (ValueError, lambda ranking, **extras: ranking.rank[:, None]),
        (ValueError, lambda ranking, **extras: ranking.rank[:-1]),
        (TypeError, "imprecision"),
        (TypeError, None),
    ]
    arguments = {name: value for name, value in problem.arguments.items() if name != "eps"}
    for error, one in wrong:
        yield error, "error", {"member": formula("spoilt", one, problem.member.takes), "arguments": arguments}


_KINDS = one_of(
    _settings, _settings, _types, _types, _shapes, _numbers_of_levels, _devices, _labels, _labels, _values, _values,
    _number_of_positives, _number_of_positives, _options, _formulas,
)  # fmt: skip
