"""All pairs of a positive and a score, in blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor


def differences(s_j: Tensor, s_i: Tensor) -> Tensor:
    """s_j - s_i for all pairs, ``[I, J]``, in the scores' own dtype; 0 for equal infinities."""
    above, own = s_j[None, :], s_i[:, None]
    return torch.where(above == own, 0.0, above - own)


def pair_blocks(
    function: Callable[[Tensor, Tensor, float], Tensor],
    scores: Tensor,
    groups: Tensor | None,
    pos_logits: Tensor,
    pos_groups: Tensor | None,
    delta: float,
    held: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Iterate over all pairs of a positive and a score, in blocks of positives.

    Args:
        function: takes scores ``[n]``, scores of some positives ``[I]`` and delta; returns ``[I, n]``.
        scores: ``[n]``.
        groups: ``[n]`` int64, or None.
        pos_logits: ``[P]``.
        pos_groups: ``[P]`` int64, or None.
        delta: passed to ``function``.
        held: largest number of pairs in a block; a block has at least one positive.

    Yields:
        Indices of some positives ``[I]``, and the function of their pairs with all scores, ``[I, n]`` float64; 0 across
        groups.
    """
    everyone = torch.arange(pos_logits.shape[0], device=pos_logits.device)
    for i in everyone.split(max(1, held // max(len(scores), 1))):
        pairs = function(scores, pos_logits[i], delta).double()
        if groups is not None and pos_groups is not None:
            pairs = torch.where(groups == pos_groups[i, None], pairs, 0.0)
        yield i, pairs
