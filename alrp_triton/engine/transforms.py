"""What of PyTorch's transforms a ranking loss cannot take part in, refused before it gives a wrong number.

The update rule of a ranking loss is no derivative of its value: there is no tangent to carry forward, and forward-mode
differentiation, of which operators know nothing, would drop it and give 0. Under ``torch.func`` the operators see
wrappers, in which they cannot read how many positives there are.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

_Operator = TypeVar("_Operator")
_libraries: dict[str, torch.library.Library] = {}
_INSTEAD = (
    "for gradients use backward() or torch.autograd.grad, once for each; for one ranking per image use the argument "
    "groups, which takes a whole batch in one call"
)


def refuse_transforms(name: str, tensors: Iterable[Tensor]) -> None:
    """Check that tensors are their own values, without a tangent.

    Raises:
        RuntimeError: for one within ``torch.func.vmap``, ``grad``, ``jvp`` or what is built on these, or a dual tensor
            of ``torch.autograd.forward_ad``; naming the argument, and what to use instead.
    """
    compiling = torch.compiler.is_compiling()
    # torch.compile loses tangents that come from outside, so that there a level is enough to refuse.
    if compiling and forward_ad._current_level >= 0:
        raise RuntimeError(f"{name}: expected no forward-mode differentiation around a compiled loss; {_INSTEAD}")
    for tensor in tensors:
        # torch.compile cannot look into wrappers; from within it, the operators refuse them.
        if not compiling and torch.func.debug_unwrap(tensor) is not tensor:
            raise RuntimeError(f"{name}: expected a tensor outside of torch.func's transforms; {_INSTEAD}")
        if forward_ad.unpack_dual(tensor).tangent is not None:
            raise RuntimeError(f"{name}: expected a tensor without a forward-mode tangent; {_INSTEAD}")


def refuse_vmap(operator: _Operator) -> _Operator:
    """Make vectorising an operator raise, by ``torch.func.vmap`` or by ``is_grads_batched`` in backward; returns the
    operator. Without a rule PyTorch says that it has none, or calls the operator in a loop and warns."""
    name: str = cast(Any, operator)._qualname

    def refuse(*given: Any) -> Any:
        raise RuntimeError(f"{name}: expected tensors outside of vmap; {_INSTEAD}")

    torch.library.register_vmap(cast(Any, operator), refuse)
    # is_grads_batched has a vmap of its own. What an operator of this name, reloaded, had before has to go first.
    _libraries.pop(name, None)
    _libraries[name] = torch.library.Library("alrp_triton", "FRAGMENT")
    _libraries[name].impl(name.split("::")[1], refuse, "Batched")
    return operator


class _Once(torch.autograd.Function):
    """A gradient that depends on what it is the gradient of, in a way that nobody has defined."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, of: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *given: Any) -> Any:
        raise RuntimeError("a ranking loss cannot be differentiated twice: its gradient is no derivative of its value")


def refuse_twice(gradients: Iterable[Tensor], of: Iterable[Tensor]) -> list[Tensor]:
    """The gradients of an ``autograd.Function``, made to raise where they are differentiated, instead of being taken
    for constants."""
    return [_Once.apply(gradient, tensor) for gradient, tensor in zip(gradients, of)]  # type: ignore[no-untyped-call]
