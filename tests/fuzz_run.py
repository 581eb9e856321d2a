"""Run a problem: the call itself, and what has to hold of any call. The judge is :mod:`fuzz_judge`."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
from dialect import Results
from fuzz_cases import Problem
from fuzz_draw import FLOATS
from fuzz_judge import Wrong, judge
from torch import Tensor

from alrp_triton.engine.inputs import debug_checks


def check(problem: Problem) -> str:
    """Run one case; raise :class:`Wrong`, or say how it was judged."""
    expected = problem.expected
    if debug_checks() and problem.member.takes == "ious" and isinstance(problem.values, Tensor) and _beyond_1(problem):
        # Beside another mistake either may be found first.
        expected = (ValueError, "ious") if expected is None else (expected[0], f"({expected[1]}|ious)")
    with _unchanged(problem), _as_drawn(problem):
        if expected is None:
            found = call(problem)
        else:
            error, name = expected
            try:
                call(problem)
            except error as raised:
                if type(raised) is not error or not re.match(rf"{name}(\[\d+\])?: expected", str(raised)):
                    raise Wrong(f"expected a {error.__name__} of {name}, got {raised!r}") from raised
            else:
                raise Wrong(f"expected a {error.__name__} of {name}, nothing was raised")
    return judge(problem, found) if expected is None else "refused"


def _beyond_1(problem: Problem) -> bool:
    values = problem.values
    return values.is_floating_point() and values.device.type == "cpu" and bool((values.to_dense() > 1.01).any())


def call(problem: Problem) -> Results:
    """All that the loss gives, and the gradients that the problem asks for, those of logits flat."""
    if problem.mode == "inference":
        with torch.inference_mode():
            return _call(problem)
    with torch.set_grad_enabled(problem.mode != "no_grad"):
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
    """Raise if memory of the inputs, or what lies around and between them, is not as it was."""
    held = [*problem.logits, *problem.labels, *(problem.groups or []), problem.values]
    tensors = [t for t in held if isinstance(t, Tensor) and t.layout == torch.strided and t.device.type == "cpu"]
    before = [(_bytes(tensor), tensor.shape, tensor.stride(), tensor.requires_grad) for tensor in tensors]
    yield
    for tensor, (content, *form) in zip(tensors, before):
        if [tensor.shape, tensor.stride(), tensor.requires_grad] != form or not torch.equal(_bytes(tensor), content):
            raise Wrong("an input was changed")


def _bytes(tensor: Tensor) -> Tensor:
    """A copy of a tensor's whole memory."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.detach().untyped_storage()).clone()


@contextlib.contextmanager
def _as_drawn(problem: Problem) -> Iterator[None]:
    """With the problem's number of threads, and pieces of its size."""
    from alrp_triton.engine import pairs
    from alrp_triton.engine.passes import eager, find, numba_installed

    threads = torch.get_num_threads()
    with contextlib.ExitStack() as stack, warnings.catch_warnings():
        # Such as of a tensor that PyTorch had to resize.
        warnings.simplefilter("error", UserWarning)
        # In debug mode, of what is no mistake here.
        warnings.filterwarnings("ignore", r"(labels|logits|loc_errors): expected")
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
