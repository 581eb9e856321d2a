"""Refuses the transforms of PyTorch that a ranking loss cannot support, before they give a wrong number.

The update rule of a ranking loss is not the derivative of its value, so there is no tangent. Forward-mode
differentiation does not work with operators and would give 0. Under ``torch.func`` the operators get wrappers, in which
they cannot read the number of positives.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_INSTEAD = (
    "for gradients use backward() or torch.autograd.grad, once for each; for one ranking per image use the argument "
    "groups, which takes a whole batch in one call"
)


def refuse_transforms(name: str, tensors: Iterable[Tensor]) -> None:
    """Check that tensors are plain values without a tangent.

    Raises:
        RuntimeError: for a tensor within ``torch.func.vmap``, ``grad``, ``jvp`` or transforms built on these, or a dual
            tensor of ``torch.autograd.forward_ad``; naming the argument and what to use instead.
    """
    compiling = torch.compiler.is_compiling()
    # torch.compile loses tangents from outside its graph, so it refuses at any level.
    if compiling and forward_ad._current_level >= 0:
        raise RuntimeError(f"{name}: expected no forward-mode differentiation around a compiled loss; {_INSTEAD}")
    for tensor in tensors:
        # torch.compile cannot look into wrappers; in a graph the operators refuse them.
        if not compiling and torch.func.debug_unwrap(tensor) is not tensor:
            raise RuntimeError(f"{name}: expected a tensor outside of torch.func's transforms; {_INSTEAD}")
        if forward_ad.unpack_dual(tensor).tangent is not None:
            raise RuntimeError(f"{name}: expected a tensor without a forward-mode tangent; {_INSTEAD}")


def transformed(*tensors: Tensor) -> bool:
    """Whether a transform of ``torch.func`` or forward-mode differentiation follows one of these tensors. False within
    a graph of torch.compile, where it cannot be told."""
    if torch.compiler.is_compiling():
        return False
    return any(
        torch.func.debug_unwrap(tensor) is not tensor or forward_ad.unpack_dual(tensor).tangent is not None
        for tensor in tensors
    )


def refuse_vmap(name: str, library: torch.library.Library) -> None:
    """Make an operator raise under ``torch.func.vmap`` and ``is_grads_batched``. Without this rule PyTorch says that it
    has none, or calls the operator in a loop and warns."""

    def refuse(*given: Any) -> Any:
        raise RuntimeError(f"{name}: expected tensors outside of vmap; {_INSTEAD}")

    torch.library.register_vmap(name, refuse, lib=library)
    # is_grads_batched has its own vmap.
    library.impl(name.split("::")[1], refuse, "Batched")


class _Once(torch.autograd.Function):
    """A gradient whose own derivative is not defined."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *of: Tensor | None) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *given: Any) -> Any:
        raise RuntimeError("a ranking loss cannot be differentiated twice: its gradient is no derivative of its value")


def refuse_twice(gradient: Tensor, *of: Tensor | None) -> Tensor:
    """A gradient of an ``autograd.Function``, which raises if it is differentiated with respect to these tensors;
    otherwise it would be a constant."""
    refused: Tensor = _Once.apply(gradient, *of)  # type: ignore[no-untyped-call]
    return refused
