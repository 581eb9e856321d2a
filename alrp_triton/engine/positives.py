"""Find the P positives: where they are, and their logits. P is known on the host, so a GPU need not be waited for."""

from __future__ import annotations

import torch
from torch import Tensor

from .inputs import Levels, debug_checks, waits_for_nothing
from .labels import LabelKinds, pieces

# Logits looked at in one step; on a GPU enough to hide the launches.
_PIECE, _PIECE_ON_DEVICE = 1 << 18, 1 << 22


def find_positives(levels: Levels, num_positives: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Flat indices (row-major, level after level) and logits of the positives.

    On the CPU a wrong number of positives or a label out of range raises ``ValueError``. Elsewhere that would make the
    host wait, so the logits come back as NaN, which makes the loss NaN; ``ALRP_TRITON_DEBUG=1`` raises there too.

    Returns:
        ``(pos_index [P] int64, pos_logits [P])``, the logits in the levels' compute dtype.
    """
    if not waits_for_nothing(levels.logits[0].device):
        pos_index, found, invalid = _collect(levels, ignore_index)
        raise_on_mistakes(found, invalid, num_positives)
        return pos_index, _gather(levels, pos_index)
    pos_index, found_, invalid_ = _collect_without_sync(levels, num_positives, ignore_index)
    if debug_checks():
        raise_on_mistakes(int(found_), bool(invalid_), num_positives)
    mistaken = (found_ != num_positives) | invalid_
    return pos_index, _gather(levels, pos_index).masked_fill(mistaken, torch.nan)


def raise_on_mistakes(found: int, invalid: bool, expected: int) -> None:
    """What a wrong number of positives or a label out of range raises."""
    if invalid:
        raise ValueError(
            "labels: expected 0, 1 or ignore_index (a label for each logit), or 0..C or ignore_index (a class index "
            "for each row, C for background); got a value outside that"
        )
    if found != expected:
        raise ValueError(f"loc_errors: expected one for each positive label, {found}, got {expected}")


def _collect(levels: Levels, ignore_index: int) -> tuple[Tensor, int, bool]:
    indices, base, invalid = [torch.empty(0, dtype=torch.int64)], 0, False
    for logits, labels in zip(*levels):
        per_class = logits.dim() != labels.dim()
        for x, y, _ in pieces(logits, labels, _PIECE):
            if not per_class and ignore_index == -1 and y.dtype != torch.uint8:
                # The usual case at the cost of two looks at the labels.
                low, high = y.aminmax()
                invalid = invalid or bool((low < -1) | (high > 1))
                if high > 0:
                    indices.append(base + (y == 1).nonzero().squeeze(1))
                base += x.numel()
                continue
            kinds = LabelKinds(y, x.shape[1], per_class, ignore_index)
            rows = kinds.positive.nonzero().squeeze(1)
            indices.append(base + rows * x.shape[1] + (y[rows].long() if per_class else 0))
            invalid = invalid or bool(kinds.invalid.any())
            base += x.numel()
    pos_index = torch.cat(indices)
    return pos_index, len(pos_index), invalid


def _collect_without_sync(levels: Levels, num_positives: int, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """A running count tells each positive its slot; whatever has none goes to a slot past the end."""
    device = levels.logits[0].device
    slots = torch.zeros(num_positives + 1, dtype=torch.int64, device=device)
    found = torch.zeros((), dtype=torch.int64, device=device)
    invalid = torch.zeros((), dtype=torch.bool, device=device)
    base = 0
    for logits, labels in zip(*levels):
        per_class = logits.dim() != labels.dim()
        for x, y, _ in pieces(logits, labels, _PIECE_ON_DEVICE):
            kinds = LabelKinds(y, x.shape[1], per_class, ignore_index)
            slot = kinds.positive.cumsum(0).add_(found - 1)
            slot = slot.masked_fill_(~kinds.positive, num_positives).clamp_(max=num_positives)
            index = torch.arange(base, base + x.numel(), x.shape[1], device=device)
            slots.scatter_(0, slot, index + y if per_class else index)
            found += kinds.positive.sum()
            invalid |= kinds.invalid.any()
            base += x.numel()
    return slots[:num_positives], found, invalid


def _gather(levels: Levels, pos_index: Tensor) -> Tensor:
    """Logits at flat indices, whatever the levels' strides; differentiably nothing, synchronising nothing."""
    values = torch.zeros(pos_index.shape, dtype=levels.compute_dtype, device=pos_index.device)
    for logits, local, inside in local_indices(levels.logits, pos_index):
        found = logits.detach()[torch.unravel_index(local, logits.shape)]
        values = torch.where(inside, found.to(values.dtype), values)
    return values


def local_indices(tensors: list[Tensor], flat: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For each non-empty level: the level, the flat indices within it (0 where elsewhere), and which lie in it."""
    result, begin = [], 0
    for tensor in tensors:
        end = begin + tensor.numel()
        if end > begin:
            inside = (flat >= begin) & (flat < end)
            result.append((tensor, torch.where(inside, flat - begin, 0), inside))
        begin = end
    return result
