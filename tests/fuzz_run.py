"""Run one drawn case: the call itself, and what has to hold of any call. The judge is :mod:`fuzz_judge`."""

from __future__ import annotations

import contextlib
import re
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple
from unittest.mock import patch

import fuzz_mistakes
import torch
from dialect import KERNELS, Results
from fuzz_cases import Problem, bytes_of, draw_problem
from fuzz_draw import FLOATS, Draw
from fuzz_judge import Wrong, judge
from torch import Tensor

OUTCOMES = ("agreed", "NaN", "extreme", "at eps", "refused", "FAILED")
"""How a case may be judged; see :mod:`fuzz_judge`. Refused: by the error that was to be raised."""
MISTAKEN = 0.2
"""Share of cases with a wrong argument."""


class Outcome(NamedTuple):
    """Of one case."""

    index: int
    member: str
    backend: str
    outcome: str
    """One of :data:`OUTCOMES`."""
    text: str = ""


def run_case(seed: int, index: int, of: Sequence[str]) -> Outcome:
    """Draw one case, run it and judge it; whatever goes wrong is told in the outcome."""
    problem = draw_problem(seed, index, of, small=KERNELS)
    member, backend = name_of(problem), problem.backend
    try:
        outcome = _check(problem, Draw(seed, -1 - index))
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
        if not isinstance(error, Wrong):
            told += "\n" + "".join(traceback.format_tb(error.__traceback__)[-6:])
        return Outcome(index, member, backend, "FAILED", f"{told}\n{describe(problem)}")
    return Outcome(index, member, backend, outcome)


def name_of(problem: Problem) -> str:
    return " ".join([problem.member.name, *[problem.arguments[k] for k in ("loc_ranking",) if k in problem.arguments]])


def _check(problem: Problem, draw: Draw) -> str:
    if not draw.chance(MISTAKEN):
        with _unchanged(problem), _as_drawn(problem):
            found = call(problem)
        return judge(problem, found)
    mistake = fuzz_mistakes.make_mistake(draw, problem)
    with _unchanged(problem), _as_drawn(problem):
        try:
            call(problem)
        except mistake.error as error:
            if type(error) is not mistake.error or not re.match(rf"{mistake.name}(\[\d+\])?: expected", str(error)):
                raise Wrong(f"{mistake}: {type(error).__name__}: {error}") from error
        else:
            raise Wrong(f"{mistake}: nothing was raised")
    return "refused"


def call(problem: Problem) -> Results:
    """All that the loss gives, and the gradients that the problem asks for, those of logits flat."""
    if problem.mode == "inference":
        with torch.inference_mode():
            return _call(problem)
    if problem.mode == "no_grad":
        with torch.no_grad():
            return _call(problem)
    return _call(problem)


def _call(problem: Problem) -> Results:
    recorded = problem.mode in ("grad", "backward")
    logits, values = list(problem.logits), problem.values
    if problem.mode != "frozen":
        wanted = [True] * len(logits) if problem.mode == "backward" else problem.requires_grad
        logits = [_leaf(x) if want else x for x, want in zip(logits, wanted)]
        values = _leaf(values)
    # What comes from a network is no leaf.
    inner = problem.mode == "backward"
    given = [1 * x if inner and isinstance(x, Tensor) and x.requires_grad else x for x in logits]
    single = not problem.in_a_sequence
    found = problem.member.loss(
        given[0] if single else given,
        problem.labels[0] if single else problem.labels,
        values,
        groups=problem.groups[0] if problem.groups is not None and single else problem.groups,
        backend=problem.backend,
        **problem.arguments,
    )
    results = {name: tensor.detach() for name, tensor in found.items()}
    for name, tensor in found.items():
        if tensor.requires_grad and (not recorded or name == "rank"):
            raise Wrong(f"{name} requires a gradient")
    if problem.mode == "backward":
        total = sum(found[component] for component in problem.member.components)
        total.backward(torch.full_like(total, problem.upstream))
        results["all by logits"] = torch.cat([x.grad.reshape(-1) for x in logits])
        if any(leaf == "values" for _, leaf in problem.member.derivatives):
            results["all by values"] = values.grad
    elif recorded:
        for component, leaf in problem.member.derivatives:
            inputs = [values] if leaf == "values" else [x for x in logits if x.requires_grad]
            of = found[component]
            gradients = torch.autograd.grad(of, inputs, torch.full_like(of, problem.upstream), retain_graph=True)
            for gradient, tensor in zip(gradients, inputs):
                if (gradient.shape, gradient.dtype) != (tensor.shape, tensor.dtype):
                    got = f"{gradient.dtype}, {list(gradient.shape)}"
                    raise Wrong(f"{component}: gradient {got} of {tensor.dtype}, {list(tensor.shape)}")
            if leaf == "logits":
                rest = iter(gradients)
                gradients = [next(rest) if x.requires_grad else torch.full_like(x, torch.nan) for x in logits]
            results[f"{component} by {leaf}"] = torch.cat([gradient.reshape(-1) for gradient in gradients])
    return results


def _leaf(tensor: Any) -> Any:
    """A view with the same strides that requires a gradient; what is no tensor of numbers stays."""
    if not isinstance(tensor, Tensor) or tensor.dtype not in FLOATS or torch.is_inference_mode_enabled():
        return tensor
    return tensor.detach().requires_grad_()


@contextlib.contextmanager
def _unchanged(problem: Problem) -> Iterator[None]:
    """Raise if memory of the inputs is not as it was."""
    held = [*problem.logits, *problem.labels, *(problem.groups or []), problem.values]
    tensors = [t for t in held if isinstance(t, Tensor) and t.layout == torch.strided and t.device.type == "cpu"]
    before = [(bytes_of(tensor), tensor.shape, tensor.stride(), tensor.requires_grad) for tensor in tensors]
    yield
    for tensor, (content, *form) in zip(tensors, before):
        if [tensor.shape, tensor.stride(), tensor.requires_grad] != form or not torch.equal(bytes_of(tensor), content):
            raise Wrong("an input was changed")


@contextlib.contextmanager
def _as_drawn(problem: Problem) -> Iterator[None]:
    """With the problem's number of threads, and pieces of its size."""
    from alrp_triton.engine import pairs
    from alrp_triton.engine.passes import eager, find, numba_installed

    threads = torch.get_num_threads()
    with contextlib.ExitStack() as stack, warnings.catch_warnings():
        # Such as of a tensor that PyTorch had to resize.
        warnings.simplefilter("error", UserWarning)
        if problem.piece is not None:
            for module in (find, eager, pairs):
                stack.enter_context(patch.object(module, "_PIECE", problem.piece))
            if numba_installed():
                from alrp_triton.engine.passes import numba as by_numba

                for name in ("_PIECE", "_COPIED_PIECE", "_PER_THREAD"):
                    stack.enter_context(patch.object(by_numba, name, problem.piece))
        try:
            torch.set_num_threads(problem.threads)
            yield
        finally:
            torch.set_num_threads(threads)


def describe(problem: Problem) -> str:
    """A problem in a few lines."""

    def form(tensor: Any) -> str:
        if not isinstance(tensor, Tensor):
            return repr(tensor)
        if tensor.layout != torch.strided:
            return f"{tensor.layout} {tensor.dtype}"
        negated = " negated" if tensor.is_neg() else ""
        return f"{str(tensor.dtype)[6:]}{list(tensor.shape)} by {list(tensor.stride())}{negated}"

    lines = [
        f"{name}: {'; '.join(form(t) for t in getattr(problem, name) or [])}" for name in ("logits", "labels", "groups")
    ]
    counts = Counter(problem.flat_labels.tolist())
    lines.append(f"values: {form(problem.values)}; {counts[1]} positives, {counts[0]} negatives, {counts[-1]} ignored")
    settings = f"{problem.arguments}, mode {problem.mode}, upstream {problem.upstream}, piece {problem.piece}"
    return "\n".join([*lines, f"{settings}, threads {problem.threads}, sequence {problem.in_a_sequence}"])
