"""How positives are ordered among themselves by their scores, against an order that a second value prescribes.

Ramps alone do not decide here but also which of two values is larger, so these sums are over pairs: O(P^2) work, in
blocks. Registered operators, so that torch.compile sees them whole.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from . import lexicographic
from .backends import TRITON_BACKENDS
from .devices import is_asynchronous
from .knots import inverse_width
from .pairs import differences, pair_blocks
from .transforms import refuse_vmap

# Pairs held at once: on the CPU they and their temporaries stay in the cache, on a GPU they hide the launches.
_PAIRS_PER_BLOCK, _PAIRS_PER_BLOCK_ON_DEVICE = 1 << 16, 1 << 22

_POSITIVES = "Tensor pos_logits, Tensor values, Tensor? pos_groups"
_SETTINGS = "float delta, str backend"


def sorting_order(pos_logits: Tensor, values: Tensor, pos_groups: Tensor | None) -> Tensor:
    """``[P]`` int64: the positives by group, score and value. What is summed over them in this order has the same bits
    whatever their flat order."""
    by_value = values.argsort(stable=True)
    groups = None if pos_groups is None else pos_groups[by_value]
    return by_value[lexicographic.sort(pos_logits[by_value], groups)[1]]


@refuse_vmap
@torch.library.custom_op("alrp_triton::sorting_sums", mutates_args=(), schema=f"({_POSITIVES}, {_SETTINGS}) -> Tensor")
def sorting_sums(pos_logits: Tensor, values: Tensor, pos_groups: Tensor | None, delta: float, backend: str) -> Tensor:
    """Sums over what stands above each positive, itself included with H(0): ``[5, P]`` float64.

    With h = H(p_k - p_i): the sums of h and of h (1 - v_k) over all k; the same over the k whose value is at least v_i;
    and the sum of h over the others, which stand above i but should not.

    Args:
        pos_logits: ``[P]``.
        values: ``[P]``, of the dtype of ``pos_logits``.
        pos_groups: ``[P]`` int64, or None.
        delta: half width of the ramp H.
        backend: a Triton backend for the Triton kernel.
    """
    if backend in TRITON_BACKENDS:
        from ..kernels.sorting import sorting_errors

        sums: Tensor = sorting_errors(pos_logits, values, inverse_width(delta), pos_groups)
        return sums
    columns = []
    below_1 = 1 - values.double()
    for i, ramps in _blocks(pos_logits, pos_groups, delta):
        proper = torch.where(values >= values[i, None], ramps, 0.0)
        rows = [ramps.sum(1), (ramps * below_1).sum(1), proper.sum(1), (proper * below_1).sum(1)]
        columns.append(torch.stack([*rows, torch.where(values < values[i, None], ramps, 0.0).sum(1)]))
    return torch.cat(columns, dim=1)


@sorting_sums.register_fake
def _(pos_logits: Tensor, values: Tensor, pos_groups: Tensor | None, delta: float, backend: str) -> Tensor:
    return pos_logits.new_empty((5, pos_logits.shape[0]), dtype=torch.float64)


@refuse_vmap
@torch.library.custom_op(
    "alrp_triton::sorting_received",
    mutates_args=(),
    schema=f"({_POSITIVES}, Tensor weights, {_SETTINGS}) -> Tensor",
)
def sorting_received(
    pos_logits: Tensor, values: Tensor, pos_groups: Tensor | None, weights: Tensor, delta: float, backend: str
) -> Tensor:
    """For each k the sum of w_i H(p_k - p_i) over the i whose value is above v_k: ``[P]`` float64, for ``weights``
    ``[P]`` float64 and otherwise the arguments of :func:`sorting_sums`."""
    if backend in TRITON_BACKENDS:
        from ..kernels.sorting import sorting_received as by_kernel

        received: Tensor = by_kernel(pos_logits, values, weights, inverse_width(delta), pos_groups)
        return received
    received = torch.zeros(pos_logits.shape, dtype=torch.float64, device=pos_logits.device)
    for i, ramps in _blocks(pos_logits, pos_groups, delta):
        received += torch.where(values < values[i, None], ramps * weights[i, None], 0.0).sum(0)
    return received


@sorting_received.register_fake
def _(
    pos_logits: Tensor, values: Tensor, pos_groups: Tensor | None, weights: Tensor, delta: float, backend: str
) -> Tensor:
    return pos_logits.new_empty(pos_logits.shape, dtype=torch.float64)


def _blocks(pos_logits: Tensor, pos_groups: Tensor | None, delta: float) -> Iterator[tuple[Tensor, Tensor]]:
    """Some positives i, and H(p_k - p_i) for them and all k: ``[I, P]`` float64."""
    held = _PAIRS_PER_BLOCK_ON_DEVICE if is_asynchronous(pos_logits.device) else _PAIRS_PER_BLOCK
    return pair_blocks(_ramps, pos_logits, pos_groups, pos_logits, pos_groups, delta, held)


def _ramps(s_j: Tensor, s_i: Tensor, delta: float) -> Tensor:
    """H(s_j - s_i), ``[I, J]`` float64. Differences in the scores' own dtype, as the kernels have them."""
    x = differences(s_j, s_i).double()
    return (x * inverse_width(delta) + 0.5).clamp(0, 1) if delta else (x >= 0).double()
