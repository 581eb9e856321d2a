"""Device code of the kernels that look at every pair: H, or a function of one's own, of two scores' difference."""

from __future__ import annotations

import types
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


def pair_constants(pos_logits: Tensor, inverse_width: float) -> dict[str, Any]:
    """The kernels' arguments that say what H is."""
    on_nvidia = pos_logits.is_cuda and torch.version.hip is None
    return {
        "INVERSE_WIDTH": inverse_width,
        "SATURATE": on_nvidia and pos_logits.dtype == torch.float32,
    }


@cache
def with_function(kernel: Any, function: Any) -> Any:
    """The kernel with a device function in the place of the ramp; itself for None.

    It becomes the global ``pair_function`` of a copy of the kernel. So Triton finds it as it finds all that kernels
    call, and caches what it compiles by the function's source; as an argument, older releases refuse it.
    """
    if function is None:
        return kernel
    original = kernel.fn
    copy = types.FunctionType(original.__code__, original.__globals__ | {"pair_function": function})
    copy.__annotations__ = original.__annotations__
    return triton.jit(copy, do_not_specialize=["ignore_index"])


@triton.jit
def pair_function(x, delta):
    """Stands where :func:`with_function` puts a function of one's own."""
    return x


@triton.jit
def ramp(x, INVERSE_WIDTH: tl.constexpr, SATURATE: tl.constexpr):
    """H(x); 0 where x is NaN."""
    if INVERSE_WIDTH == 0:
        return tl.where(x >= 0, 1.0, 0.0).to(x.dtype)
    elif SATURATE:
        # One instruction for multiply, add and clamp; of NaN it makes 0.
        return tl.inline_asm_elementwise(
            "fma.rn.sat.f32 $0, $1, $2, 0f3F000000;",
            "=f,f,f",
            [x, tl.zeros_like(x) + INVERSE_WIDTH],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        h = x * INVERSE_WIDTH + 0.5
        return tl.where(h > 0, tl.where(h < 1, h, 1.0), 0.0)


@triton.jit
def clamped(x, FUNCTION: tl.constexpr, DELTA: tl.constexpr):
    """A function of one's own in [0, 1]; 0 where x is NaN, but NaN where the function makes one of a number."""
    # Constants, truth values and other types become numbers of the type of x.
    h = (tl.full(x.shape, 1, x.dtype) * FUNCTION(x, DELTA)).to(x.dtype)
    h = tl.where(h < 0, 0.0, tl.where(h > 1, 1.0, h))
    return tl.where(x == x, h, 0.0)


@triton.jit
def differences(above, below):
    """above - below for all pairs, ``[below, above]``; 0 for equal infinities."""
    return tl.where(above[None, :] == below[:, None], 0.0, above[None, :] - below[:, None])


@triton.jit
def load_positives(positives, i, num_positives, CUSTOM: tl.constexpr):
    """Load positives; past the last a number or, since a function may make anything of a number, NaN."""
    if CUSTOM:
        return tl.load(positives + i, mask=i < num_positives, other=float("nan"))
    else:
        return tl.load(positives + i, mask=i < num_positives, other=0)


@triton.jit
def pairs(
    score,
    positive,
    group,
    pos_group,
    INVERSE_WIDTH: tl.constexpr,
    SATURATE: tl.constexpr,
    GROUPED: tl.constexpr,
    CUSTOM: tl.constexpr,
    FUNCTION: tl.constexpr,
    DELTA: tl.constexpr,
):
    """What each score counts for each positive, ``[positives, scores]``: H(score - positive), or the function; 0 where
    either is NaN, and for pairs of different groups. The plain ramp leaves equal infinities at 0."""
    if CUSTOM:
        h = clamped(differences(score, positive), FUNCTION, DELTA)
    elif GROUPED:
        h = ramp(differences(score, positive), INVERSE_WIDTH, SATURATE)
    else:
        h = ramp(score[None, :] - positive[:, None], INVERSE_WIDTH, SATURATE)
    if GROUPED:
        h = tl.where(group[None, :] == pos_group[:, None], h, 0.0)
    return h
