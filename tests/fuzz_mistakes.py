"""Wrong arguments: what is wrong with them, the exception that says so, and the argument that it names."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from dialect import ALRP, DEPTH, WEIGHTED, formula
from fuzz_cases import Problem, what_labels_mean
from fuzz_draw import Draw
from torch import Tensor


@dataclasses.dataclass
class Mistake:
    """What is to be raised, and by which argument's name its text is to begin."""

    error: type[Exception]
    name: str
    what: str


_Change = Callable[[Draw, Problem], "Mistake | None"]


def make_mistake(draw: Draw, problem: Problem) -> Mistake:
    """Spoil one argument of a problem, in place."""
    while True:
        mistake = draw.choice(_CHANGES)(draw, problem)
        if mistake is not None:
            return mistake


def _replace(tensors: list[Any], at: int, tensor: Any) -> None:
    tensors[at] = tensor


def _level(draw: Draw, problem: Problem) -> int:
    return draw.whole(0, len(problem.logits) - 1)


def _type_of_logits(draw: Draw, problem: Problem) -> Mistake | None:
    at = _level(draw, problem)
    x = problem.logits[at].detach().nan_to_num(0).contiguous().clone()
    wrong: list[Any] = [
        x.long(), x.bool(), x.to(torch.complex64), x.to(torch.float8_e5m2), x.float().numpy(), None, 3.5, "scores",
    ]  # fmt: skip
    if x.dim() >= 1:
        wrong += [x.to_sparse(), x.float().to_sparse()]
    if len(problem.logits) > 1:
        wrong += [x.to(torch.float64 if x.dtype != torch.float64 else torch.float32)] * 3
    chosen = draw.choice(wrong)
    if (
        not problem.in_a_sequence
        and not isinstance(chosen, Tensor)
        and hasattr(chosen, "__iter__")
        and not isinstance(chosen, str)
    ):
        return None  # a sequence of other things
    _replace(problem.logits, at, chosen)
    return Mistake(TypeError, "logits", f"a level is {_kind(chosen)}")


def _type_of_labels(draw: Draw, problem: Problem) -> Mistake | None:
    which = draw.choice(["labels", "groups"])
    tensors = getattr(problem, which)
    if tensors is None:
        return None
    at = _level(draw, problem)
    y = tensors[at].contiguous().clone()
    wrong = [
        y.float(),
        y == 0,
        y.to(torch.complex64),
        y.to(torch.uint16),
        None if which == "labels" else 1,
        1,
        y.to_sparse(),
    ]
    chosen = draw.choice(wrong)
    _replace(tensors, at, chosen)
    return Mistake(TypeError, which, f"a level is {_kind(chosen)}")


def _kind(value: Any) -> str:
    return f"{value.dtype}, {value.layout}" if isinstance(value, Tensor) else type(value).__name__


def _shape_of_labels(draw: Draw, problem: Problem) -> Mistake | None:
    which = draw.choice(["labels", "groups"])
    tensors = getattr(problem, which)
    if tensors is None:
        return None
    at = _level(draw, problem)
    y, shape = tensors[at], problem.logits[at].shape
    wrong = [y[None], y.new_zeros((*shape, 1)), y.new_zeros(shape[0] + 1), y.new_zeros((*shape[:-1], shape[-1] + 1))]
    wrong = [tensor for tensor in wrong if tensor.shape not in (shape, shape[:-1])]
    _replace(tensors, at, draw.choice(wrong))
    return Mistake(ValueError, which, f"shape {list(tensors[at].shape)} beside logits {list(shape)}")


def _number_of_levels(draw: Draw, problem: Problem) -> Mistake | None:
    which = draw.choice(["labels", "groups", "logits"])
    tensors = getattr(problem, which)
    if tensors is None:
        return None
    problem.in_a_sequence = True
    how = draw.choice(["none", "one more", "one less"])
    if how == "none":
        tensors.clear()
        return Mistake(ValueError, "labels" if which == "logits" else which, f"no {which}")
    if how == "one less" and len(tensors) < 2:
        return None
    tensors[:] = [*tensors, tensors[-1]] if how == "one more" else tensors[:-1]
    if which == "logits":
        problem.requires_grad = [True] * len(tensors)
    return Mistake(ValueError, "labels" if which == "logits" else which, f"{how} of {which}")


def _scalar_logits(draw: Draw, problem: Problem) -> Mistake | None:
    at = _level(draw, problem)
    _replace(problem.logits, at, problem.logits[at].new_zeros(()))
    _replace(problem.labels, at, torch.tensor(0))
    if problem.groups is not None:
        _replace(problem.groups, at, torch.tensor(0))
    return Mistake(ValueError, "logits", "a scalar")


def _device(draw: Draw, problem: Problem) -> Mistake | None:
    which = draw.choice(["logits", "labels", "groups"])
    tensors = getattr(problem, which)
    if tensors is None or (which == "logits" and len(problem.logits) < 2):
        return None
    at = draw.whole(1, len(tensors) - 1) if which == "logits" else _level(draw, problem)
    _replace(tensors, at, tensors[at].to("meta"))
    return Mistake(ValueError, which, "on another device")


def _label_out_of_range(draw: Draw, problem: Problem) -> Mistake | None:
    filled = [i for i, y in enumerate(problem.labels) if y.numel() and problem.logits[i].numel()]
    if not filled:
        return None
    at = draw.choice(filled)
    y, x = problem.labels[at].contiguous().clone(), problem.logits[at]
    limits = torch.iinfo(y.dtype)
    candidates = [
        x.shape[-1] + 1,
        -2,
        -1,
        2,
        3,
        limits.max,
        limits.min,
        limits.max - 1,
        x.shape[-1] + 256,
        2**32,
        2**32 + 1,
    ]
    label = draw.choice([c for c in candidates if limits.min <= c <= limits.max])
    place = draw.whole(0, y.numel() - 1)
    y.view(-1)[place] = label
    if not bool((what_labels_mean(x.shape, y, problem.arguments["ignore_index"]) == -2).any()):
        return None
    _replace(problem.labels, at, y)
    return Mistake(ValueError, "labels", f"label {label}, {y.dtype}")


def _values(draw: Draw, problem: Problem) -> Mistake | None:
    name = problem.member.takes
    if name is None:
        return None
    v = problem.values.detach()
    ones = torch.ones(len(v) + draw.whole(1, 3), dtype=v.dtype)
    wrong: list[tuple[type[Exception], Any, str]] = [
        (ValueError, ones, "too many"),
        (ValueError, ones, "too many"),
        (ValueError, v[:, None], "[P, 1]"),
        (ValueError, v.new_zeros(()), "a scalar"),
        (ValueError, v.to("meta"), "on another device"),
        (TypeError, torch.ones(len(v), dtype=torch.int64), "integers"),
        (TypeError, v.to(torch.complex64), "complex"),
        (TypeError, v.tolist(), "a list"),
        (TypeError, None, "None"),
        (TypeError, v.contiguous().to_sparse(), "sparse"),
    ]
    if len(v):
        wrong += [(ValueError, v[:-1], "one too few"), (ValueError, v[:0], "none")]
    error, chosen, what = draw.choice(wrong)
    problem.values = chosen
    return Mistake(error, name, what)


def _number_of_positives(draw: Draw, problem: Problem) -> Mistake | None:
    if problem.member is ALRP or problem.member.name == "rank_sort":
        return None
    num_pos = int((problem.flat_labels == 1).sum())
    wrong: list[tuple[type[Exception], Any]] = [
        (ValueError, num_pos + 1), (ValueError, -1), (ValueError, 2**62), (ValueError, 2**70), (ValueError, -(2**70)),
        (ValueError, 2**31), *((TypeError, v) for v in (float(num_pos), True, "1", torch.tensor(num_pos))),
    ]  # fmt: skip
    if num_pos:
        wrong += [(ValueError, num_pos - 1), (ValueError, 0)]
    error, chosen = draw.choice(wrong)
    problem.arguments["num_positives"] = chosen
    return Mistake(error, "num_positives", f"{chosen!r} where there are {num_pos}")


def _number(draw: Draw, problem: Problem) -> Mistake | None:
    wrong: dict[str, list[tuple[type[Exception], Any]]] = {
        "delta": [
            *((ValueError, v) for v in (-1.0, -1e-40, math.nan, math.inf, -math.inf, 9e-31, 5e-324, 1.1e30, 10**400)),
            *((TypeError, v) for v in (None, "1", True, 1j, torch.tensor(1.0), [1.0])),
        ],
        "ignore_index": [
            *((ValueError, v) for v in (2**63, -(2**63) - 1, 10**40)),
            *((TypeError, v) for v in (None, -1.0, True, "x", torch.tensor(-1))),
        ],
    }
    if problem.member in (ALRP, DEPTH):
        wrong["eps"] = [
            *((ValueError, v) for v in (-1e-9, math.nan, -math.inf, -1, 10**400)),
            *((TypeError, v) for v in (None, "0", False, torch.tensor(0.1))),
        ]
    name = draw.choice(sorted(wrong))
    error, chosen = draw.choice(wrong[name])
    problem.arguments[name] = chosen
    return Mistake(error, name, f"{chosen!r}"[:40])


def _option(draw: Draw, problem: Problem) -> Mistake | None:
    wrong: list[tuple[type[Exception], str, Any]] = [
        (ValueError, "backend", b) for b in ("cuda", "", None, 3, ["torch"])
    ]
    if problem.member is ALRP:
        wrong += [(ValueError, "loc_ranking", r) for r in ("hard", None, 0, ["sorted"], torch.tensor([1, 2]))]
    error, name, chosen = draw.choice(wrong)
    if name == "backend":
        problem.backend = chosen
    else:
        problem.arguments[name] = chosen
    return Mistake(error, name, f"{chosen!r}")


def _result_of_formula(draw: Draw, problem: Problem) -> Mistake | None:
    if problem.member not in (WEIGHTED, DEPTH) or not bool((problem.flat_labels == 1).any()):
        return None
    takes = problem.member.takes
    wrong: list[tuple[type[Exception], Any]] = [
        (TypeError, lambda ranking, **extras: 1.0),
        (TypeError, lambda ranking, **extras: None),
        (ValueError, lambda ranking, **extras: ranking.rank.sum()),
        (ValueError, lambda ranking, **extras: ranking.rank[:, None]),
        (ValueError, lambda ranking, **extras: ranking.rank[:-1]),
        (TypeError, "imprecision"),
        (TypeError, None),
    ]
    error, chosen = draw.choice(wrong)
    problem.member = formula("spoilt", chosen, takes)
    problem.arguments.pop("eps", None)
    return Mistake(error, "error", "what the formula is or returns")


_CHANGES: list[_Change] = [
    _type_of_logits, _type_of_labels, _shape_of_labels, _number_of_levels, _scalar_logits, _device, _label_out_of_range,
    _label_out_of_range, _values, _values, _number_of_positives, _number_of_positives, _number, _number, _option,
    _result_of_formula,
]  # fmt: skip
