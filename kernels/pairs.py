"""Device code of the kernels that look at every pair: H, or a function of one's own, of two scores' difference.

With positives in ascending order a block of them mostly lies close together, and a score s then meets each of them, p,
by one addition with saturation: H(s - p) = sat(t - q), with t = (s - base) / (2 delta) + 1/2 and
q = (p - base) / (2 delta), for a base amid the block. What t and q round off is that of numbers near 1. Where positives
of one block lie further apart, the difference s - p itself is scaled, by one instruction more.
"""

from __future__ import annotations

import types
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .configurations import architecture_of

# Widths 2 delta that a block of positives may extend over to count as close: t and q are then below 3 where H is
# neither 0 nor 1, and H is right to 3e-7.
_CLOSE = 2.0


class Blocks(NamedTuple):
    """Positives in ascending order, in blocks of one size, the last filled up with NaN."""

    positives: Tensor
    """``[blocks * size]``"""
    scaled: Tensor
    """``[blocks * size]``: (p - base) / (2 delta)."""
    bases: Tensor
    """``[blocks]``: NaN where the positives of a block are not close together."""


def make_blocks(positives: Tensor, inverse_width: float, size: int) -> Blocks:
    """Cut positives into blocks.

    Args:
        positives: ``[P]`` float32 or float64, ascending.
        inverse_width: 1 / (2 delta); 0 where no block is to count as close.
        size: of a block.
    """
    num_blocks = max(1, triton.cdiv(len(positives), size))
    padded = F.pad(positives, (0, num_blocks * size - len(positives)), value=torch.nan).view(num_blocks, size)
    # What fills up the last block does not widen it; a positive that is NaN does.
    highest = padded[:, -1].clone()
    highest[-1:] = positives[-1:] if len(positives) else torch.nan
    lowest, highest = padded[:, 0].double(), highest.double()
    close = (
        (highest - lowest) * inverse_width <= _CLOSE if inverse_width else torch.zeros_like(lowest, dtype=torch.bool)
    )
    bases = torch.where(close, (lowest + highest) / 2, torch.nan).to(positives.dtype)
    scaled = ((padded.double() - bases.double()[:, None]) * inverse_width).to(positives.dtype)
    return Blocks(padded.view(-1), scaled.view(-1), bases)


def is_plain(pos_logits: Tensor, pos_groups: Tensor | None, function: Any) -> bool:
    """Whether pairs are of the cheap kind: the ramp or the step, in float32, of all with all."""
    return pos_logits.dtype == torch.float32 and pos_groups is None and function is None


def pair_constants(pos_logits: Tensor, inverse_width: float) -> dict[str, Any]:
    """The kernels' arguments that say what H is."""
    on_nvidia = architecture_of(pos_logits.device).startswith("sm_")
    return {"INVERSE_WIDTH": inverse_width, "SATURATE": on_nvidia and pos_logits.dtype == torch.float32}


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
def saturated_difference(x, y, SATURATE: tl.constexpr):
    """x - y, clamped into [0, 1]; 0 where it is NaN."""
    if SATURATE:
        return tl.inline_asm_elementwise(
            "sub.sat.f32 $0, $1, $2;", "=f,f,f", [x, y], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        h = x - y
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
    """above - below; 0 for equal infinities."""
    return tl.where(above == below, 0.0, above - below)


@triton.jit
def pairs(
    score,
    positive,
    group,
    pos_group,
    CLOSE: tl.constexpr,
    INVERSE_WIDTH: tl.constexpr,
    SATURATE: tl.constexpr,
    GROUPED: tl.constexpr,
    CUSTOM: tl.constexpr,
    FUNCTION: tl.constexpr,
    DELTA: tl.constexpr,
):
    """What each score counts for each positive: H(score - positive), or the function; 0 where either is NaN, and for
    pairs of different groups. The plain ramp leaves equal infinities at 0.

    Scores and positives have shapes that broadcast against each other. Those of a close block come as t and q.
    """
    if CLOSE:
        h = saturated_difference(score, positive, SATURATE)
    elif CUSTOM:
        h = clamped(differences(score, positive), FUNCTION, DELTA)
    elif GROUPED:
        h = ramp(differences(score, positive), INVERSE_WIDTH, SATURATE)
    else:
        h = ramp(score - positive, INVERSE_WIDTH, SATURATE)
    if GROUPED:
        h = tl.where(group == pos_group, h, 0.0)
    return h


@triton.jit
def in_close_block(score, base, INVERSE_WIDTH: tl.constexpr):
    """t = (score - base) / (2 delta) + 1/2."""
    return (score - base) * INVERSE_WIDTH + 0.5
