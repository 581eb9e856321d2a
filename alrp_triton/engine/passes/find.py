"""Find the P positives: where they are, and their logits. A GPU that is told P need not be waited for."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..devices import is_asynchronous
from ..inputs import Levels, debug_checks
from ..labels import LabelKinds, equals, pieces, positions
from .protocol import Found

Place = tuple[Tensor, ...]

# Logits looked at in one step; on a GPU enough to hide the launches.
_PIECE, _PIECE_ON_DEVICE = 1 << 18, 1 << 22


def find(levels: Levels, num_positives: int | None, name: str) -> Found:
    """See :meth:`.protocol.Passes.find`.

    On the CPU a wrong number of positives or a label out of range raises ``ValueError``. Elsewhere that would make the
    host wait, so the logits come back as NaN, which makes the loss NaN; ``ALRP_TRITON_DEBUG=1`` raises there too.
    """
    if not is_asynchronous(levels.logits[0].device):
        index, invalid = _collect(levels)
        expected = len(index) if num_positives is None else num_positives
        raise_on_mistakes(levels, len(index), invalid, expected, name)
        return Found(index, _gather_logits(levels, index), _gather_groups(levels, index))
    if num_positives is None:
        num_positives = int(_collect_without_sync(levels, 0)[1])
    index, found, invalid_ = _collect_without_sync(levels, num_positives)
    if debug_checks():
        raise_on_mistakes(levels, int(found), bool(invalid_), num_positives, name)
    mistaken = (found != num_positives) | invalid_
    logits = _gather_logits(levels, index).masked_fill(mistaken, torch.nan)
    return Found(index, logits, _gather_groups(levels, index))


def raise_on_mistakes(levels: Levels, found: int, invalid: bool, expected: int, name: str) -> None:
    """What a wrong number of positives or a label out of range raises."""
    if invalid:
        raise ValueError(f"labels{_wrong_label(levels)}")
    if found != expected:
        hint = _hint_of_number(levels, found, expected, name)
        raise ValueError(f"{name}: expected one for each positive label, {found}, got {expected}{hint}")


def _hint_of_number(levels: Levels, found: int, given: int, name: str) -> str:
    """What to write instead, where ``given`` values stand for the ``found`` positives."""
    of_classes = all(x.dim() > labels.dim() for x, labels in zip(levels.logits, levels.labels))
    columns, rows = {x.shape[-1] for x in levels.logits}, sum(labels.numel() for labels in levels.labels)
    if of_classes and len(columns) == 1 and 2 * found > rows > 0:
        (background,) = columns
        return f"; {found} of {rows} labels are positive: the background is C, {background}, and classes are below it"
    if not found:
        return "; no label is positive: class indices begin with 0, and C is the background"
    if name == "num_positives":
        return ""
    if name == "pred_boxes" and given < found:
        return "; an object counts once for each of its positives: objects[matched]"
    return "; alrp_triton.at_positives picks them from values of all labels"


def _wrong_label(levels: Levels) -> str:
    """What was expected, and the first label that is none of it."""
    for i, (logits, labels, _) in enumerate(levels.each()):
        columns, per_class = logits.shape[-1], logits.dim() != labels.dim()
        flat = labels.reshape(-1)
        wrong = flat[LabelKinds(flat, columns, per_class, levels.ignore_index).invalid]
        if not wrong.numel() or not logits.numel():
            continue
        at = f"[{i}]" if len(levels.logits) > 1 else ""
        ignored = f"ignore_index, {levels.ignore_index}"
        if not per_class:
            # Floats that are none of them have become a number that is none of them.
            hint = "qualities are the ious of rank_sort_loss"
            return f"{at}: expected 1 (positive), 0 (negative) or {ignored}, got {wrong.numel()} others; {hint}"
        value = int(wrong[0])
        from_1 = value == columns + 1
        hint = "are classes counted from 1?" if from_1 else f"ignore_index={value} ignores it"
        classes = "0 (the class)" if columns == 1 else f"0 to {columns - 1} (a class)"
        return f"{at}: expected {classes}, {columns} (background) or {ignored}, got {value}; {hint}"
    return f": expected class indices up to C, the background, or ignore_index, {levels.ignore_index}; got another"


def _collect(levels: Levels) -> tuple[Tensor, bool]:
    # Numbers, not small tensors, which would lie about the heap between the large temporaries.
    index, base, invalid = array("q"), 0, False
    for logits, labels, _ in levels.each():
        if logits.numel() == 0:
            continue
        per_class = logits.dim() != labels.dim()
        columns = logits.shape[-1] if per_class else 1
        # The labels alone: logits that do not lie in order would be copied.
        for _, y, *_ in pieces(labels, labels, _PIECE):
            found, mistaken = positions(y, columns, per_class, levels.ignore_index)
            index.extend((found + base).tolist())
            invalid |= mistaken
            base += len(y) * columns
    return torch.tensor(index, dtype=torch.int64), invalid


def _collect_without_sync(levels: Levels, num_positives: int) -> tuple[Tensor, Tensor, Tensor]:
    """A running count tells each positive its slot; whatever has none goes to a slot past the end."""
    device = levels.logits[0].device
    slots = torch.zeros(num_positives + 1, dtype=torch.int64, device=device)
    found = torch.zeros((), dtype=torch.int64, device=device)
    invalid = torch.zeros((), dtype=torch.bool, device=device)
    base = 0
    for logits, labels, _ in levels.each():
        per_class = logits.dim() != labels.dim()
        for x, y, *_ in pieces(logits, labels, _PIECE_ON_DEVICE):
            kinds = LabelKinds(y, x.shape[1], per_class, levels.ignore_index)
            slot = kinds.positive.cumsum(0).add_(found - 1)
            slot = slot.masked_fill_(~kinds.positive, num_positives).clamp_(max=num_positives)
            index = torch.arange(base, base + x.numel(), x.shape[1], device=device)
            slots.scatter_(0, slot, index + y if per_class else index)
            found += kinds.positive.sum()
            invalid |= kinds.invalid.any()
            base += x.numel()
    return slots[:num_positives], found, invalid


def _gather_logits(levels: Levels, pos_index: Tensor) -> Tensor:
    return _gather(levels, pos_index, levels.compute_dtype(), lambda x, y, groups, place: x[place])


def _gather_groups(levels: Levels, pos_index: Tensor) -> Tensor | None:
    if not levels.groups:
        return None
    return _gather(levels, pos_index, torch.int64, lambda x, y, groups, place: groups[place[: groups.dim()]])


def highest_in_row(levels: Levels, pos_index: Tensor) -> Tensor:
    """For each positive the highest logit along the last axis that is not ignored: ``[P]`` in the compute dtype; of
    logits ``[M]`` its own. Synchronises nothing."""

    def highest(x: Tensor, y: Tensor, groups: Tensor, place: Place) -> Tensor:
        row = place if x.dim() == 1 else place[:-1]
        found = x[row]
        if y.dim() == x.dim():
            found = found.masked_fill(equals(y[row], levels.ignore_index), -torch.inf)
        return found if x.dim() == 1 else found.amax(-1)

    return _gather(levels, pos_index, levels.compute_dtype(), highest)


def _gather(levels: Levels, pos_index: Tensor, dtype: torch.dtype, pick: Callable[..., Tensor]) -> Tensor:
    """``pick(logits, labels, groups, place)`` of the level that each flat index lies in, ``[P]``; ``place`` holds
    indices along each axis. Whatever the levels' strides; synchronises nothing."""
    values = torch.zeros(pos_index.shape, dtype=dtype, device=pos_index.device)
    filled = [level for level in levels.each() if level[0].numel()]
    for level, (logits, local, inside) in zip(filled, local_indices(levels.logits, pos_index)):
        found = pick(*level, place_of(local, logits.shape)).detach()
        values = torch.where(inside, found.to(dtype), values)
    return values


def place_of(index: Tensor, shape: Sequence[int]) -> Place:
    """Indices along each axis from flat ones. ``torch.unravel_index`` copies the sizes to the device, and waits."""
    place: Place = ()
    for size in reversed(shape[1:]):
        place, index = (index % size, *place), index // size
    return index, *place


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
