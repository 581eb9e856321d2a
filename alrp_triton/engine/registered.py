"""Registers functions as operators of PyTorch, which torch.compile treats as opaque.

``torch.library.custom_op`` does the same, but a call of it takes the host three to ten times as long. What it adds are
checks of results, which the tests make (``torch.library.opcheck``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from .transforms import refuse_twice, refuse_vmap

# "alrp_triton", or the other name that the package is loaded under: both can then be loaded in one process.
_NAMESPACE = re.sub(r"\W", "_", __name__.rpartition(".engine.")[0])
# By operator: what a library has registered ends with it.
_libraries: dict[str, torch.library.Library] = {}
FUNCTIONS: dict[str, Callable[..., Any]] = {}
"""What the operators run, by name."""

_Function = TypeVar("_Function", bound=Callable[..., Any])


def operator(name: str, mutates_args: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Any]:
    """Register a function as ``torch.ops.alrp_triton.<name>``; it becomes the operator. Its schema follows from its
    annotations. It raises under vmap, and has no derivative unless :func:`differentiable` gives it one.

    Args:
        mutates_args: the arguments that it changes.
    """

    def register(function: Callable[..., Any]) -> Any:
        schema = torch.library.infer_schema(function, mutates_args=mutates_args)
        if name in _libraries:  # of a module that is loaded anew
            _libraries.pop(name)._destroy()
        FUNCTIONS[name] = function
        _libraries[name] = library = torch.library.Library(_NAMESPACE, "FRAGMENT")
        library.define(name + schema, tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag))
        library.impl(name, function, "CompositeExplicitAutograd")
        refuse_vmap(f"{_NAMESPACE}::{name}", library)
        return getattr(getattr(torch.ops, _NAMESPACE), name).default

    return register


def _library_of(called: Any) -> torch.library.Library:
    return _libraries[called.name().split("::")[1]]


def fake_of(called: Any) -> Callable[[_Function], _Function]:
    """Register what an operator returns for tensors without data."""

    def register(function: _Function) -> _Function:
        torch.library.register_fake(called, function, lib=_library_of(called))
        return function

    return register


class _Differentiable(torch.autograd.Function):
    """An operator; the tensors are those of its arguments that may have a gradient."""

    @staticmethod
    def forward(ctx: Any, called: Any, keep: Any, backward: Any, given: tuple[Any, ...], *tensors: Tensor) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            found = called(*given)
        ctx.backward_of, ctx.num_tensors = backward, len(tensors)
        # Do not make zeros for results that are not differentiated.
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *keep(ctx, given, found))
        return found

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> Any:
        # Checkpointing allows no second look at them.
        saved = ctx.saved_tensors
        tensors, kept = saved[: ctx.num_tensors], saved[ctx.num_tensors :]
        with torch.no_grad():
            gradients = ctx.backward_of(ctx, tensors, kept, *upstream)
        if torch.is_grad_enabled():
            gradients = [None if x is None else refuse_twice(x, *tensors, *upstream) for x in gradients]
        return None, None, None, None, *gradients


def differentiable(
    called: Any,
    tensors_of: Callable[..., list[Tensor]],
    keep: Callable[[Any, tuple[Any, ...], Any], Sequence[Tensor]],
    backward: Callable[..., list[Tensor | None]],
) -> None:
    """Give an operator a derivative, which cannot be differentiated itself.

    Args:
        tensors_of: of its arguments those that have a gradient.
        keep: ``(ctx, arguments, results)``, returns further tensors that backward needs.
        backward: ``(ctx, these tensors, further tensors, *upstream)``, their gradients.
    """

    def differentiate(*given: Any) -> Any:
        tensors = tensors_of(*given)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            return _Differentiable.apply(called, keep, backward, given, *tensors)  # type: ignore[no-untyped-call]
        with torch._C._AutoDispatchBelowAutograd():
            return called(*given)

    _library_of(called).impl(called, differentiate, "Autograd")
