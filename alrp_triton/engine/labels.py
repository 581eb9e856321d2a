"""What a label means, and how levels are walked in pieces of bounded size."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .inputs import Levels

# PyTorch works without it, and so do copies of the package (tools/hub.py).
_NUMPY_INSTALLED = importlib.util.find_spec("numpy") is not None


def equals(labels: Tensor, value: int) -> Tensor:
    """``labels == value``; False where the labels' dtype cannot hold the value (a uint8 -1 is not 255)."""
    limits = torch.iinfo(labels.dtype)
    if not limits.min <= value <= limits.max:
        return torch.zeros_like(labels, dtype=torch.bool)
    return labels == value


class LabelKinds:
    """Masks over the labels of one piece: ``labels`` ``[rows]`` that belong to logits ``[rows, columns]``.

    Per-logit labels have one column and mark positives by 1; class labels mark row ``r``'s column ``labels[r]``.
    """

    def __init__(self, labels: Tensor, columns: int, per_class: bool, ignore_index: int) -> None:
        self.ignored = equals(labels, ignore_index)
        if per_class:
            # Compared with a number that it cannot hold, a narrow dtype wraps the number.
            below = labels < columns if columns <= torch.iinfo(labels.dtype).max else True
            self.positive = (labels >= 0) & below & ~self.ignored
            negative = equals(labels, columns)
        else:
            self.positive = (labels == 1) & ~self.ignored
            negative = labels == 0
        self.invalid = ~(self.positive | negative | self.ignored)


def _others(labels: Tensor, background: int) -> Tensor:
    """The places of labels other than the background, which most are; NumPy finds them fastest."""
    if _NUMPY_INSTALLED:
        return torch.from_numpy((labels.numpy() != background).nonzero()[0])
    return (~equals(labels, background)).nonzero().squeeze(1)


def positions(labels: Tensor, columns: int, per_class: bool, ignore_index: int) -> tuple[Tensor, bool]:
    """Flat positions of the positives in one piece, and whether any label is out of range; on the CPU.

    Args:
        labels, columns, per_class, ignore_index: as :class:`LabelKinds` takes them.
    """
    others = _others(labels, columns if per_class else 0)
    labels = labels[others]
    kinds = LabelKinds(labels, columns, per_class, ignore_index)
    found = labels[kinds.positive].long() if per_class else 0
    return others[kinds.positive] * columns + found, bool(kinds.invalid.any())


class Piece(NamedTuple):
    """Some consecutive rows of a level."""

    logits: Tensor
    """``[rows, columns]``"""
    labels: Tensor
    """``[rows]``, contiguous"""
    out: Tensor
    """A view of the same rows of the tensor to be written, in some shape with as many elements."""
    groups: Tensor | None
    """A view of the same rows of the groups, in some shape that :func:`group_of_each` spreads over the logits."""


def pieces(
    logits: Tensor, labels: Tensor, size: int, out: Tensor | None = None, groups: Tensor | None = None
) -> Iterator[Piece]:
    """Walk one level in row-major order, about ``size`` logits at a time, copying at most one piece.

    Args:
        logits: ``[..., C]`` with class labels ``[...]``, or any shape with labels of the same shape; any strides.
        labels: see ``logits``.
        size: logits in a piece, at the most (but never less than a row).
        out: a tensor of the logits' shape to be written piece by piece; the logits themselves where omitted.
        groups: of the logits' shape, or without the last axis.
    """
    out = logits if out is None else out
    if logits.numel() == 0:
        return
    if groups is not None and groups.dim() < labels.dim():
        groups = groups.unsqueeze(-1).expand(labels.shape)
    columns = logits.numel() // labels.numel()
    if groups is None and logits.is_contiguous() and labels.is_contiguous() and out.is_contiguous():
        rows = rows_at_once(size, columns)
        parts = (t.view(-1, columns).split(rows) for t in (logits, out))
        for x, o, y in zip(*parts, labels.view(-1).split(rows)):
            yield Piece(x, y, o, None)
    elif logits.numel() <= size or labels.dim() == 0:
        yield Piece(logits.reshape(-1, columns), _in_a_row(labels), out, groups)
    else:
        step = max(1, size * len(logits) // logits.numel())
        for begin in range(0, len(logits), step):
            part = slice(begin, begin + step)
            grouped = None if groups is None else groups[begin if step == 1 else part]
            if step == 1:
                yield from pieces(logits[begin], labels[begin], size, out[begin], grouped)
            else:
                yield Piece(logits[part].reshape(-1, columns), _in_a_row(labels[part]), out[part], grouped)


def _in_a_row(labels: Tensor) -> Tensor:
    """``[rows]``, one after the other in memory: a piece of contiguous logits can then be cut again, whatever shape it
    is to be written in."""
    return labels.reshape(-1).contiguous()


def rows_at_once(size: int, columns: int) -> int:
    """How many rows are about ``size`` logits, such that threads can share them out evenly."""
    rows = max(1, size // columns)
    # torch.compile cannot ask for the number of threads, nor would anybody share rows out.
    return rows if torch.compiler.is_compiling() else rows - rows % min(rows, torch.get_num_threads())


def group_of_each(groups: Tensor, rows: int, columns: int) -> Tensor:
    """The groups of a piece, spread over its logits: ``[rows * columns]``."""
    return groups.reshape(rows, -1).expand(rows, columns).reshape(-1)


def flatten_levels(levels: Levels) -> tuple[Tensor, Tensor, Tensor | None]:
    """All logits as ``[M]``, their labels as ``[M]`` int64 (1 positive, 0 negative, -1 ignored, -2 invalid), and their
    groups as ``[M]`` int64."""
    none = levels.labels[0].new_empty(0, dtype=torch.int64)
    flat_logits, flat_labels, flat_groups = [levels.logits[0].new_empty(0)], [none], [none]
    for logits, labels, groups in levels.each():
        per_class = logits.dim() != labels.dim()
        for x, y, _, group in pieces(logits.detach(), labels, logits.numel(), groups=groups):
            kinds = LabelKinds(y, x.shape[1], per_class, levels.ignore_index)
            flat = torch.where(kinds.ignored, -1, torch.where(kinds.invalid, -2, 0))[:, None].repeat(1, x.shape[1])
            rows = kinds.positive.nonzero().squeeze(1)
            flat[rows, y[rows].long() if per_class else 0] = 1
            flat_logits.append(x.reshape(-1))
            flat_labels.append(flat.reshape(-1))
            if group is not None:
                flat_groups.append(group_of_each(group, *x.shape).long())
    return torch.cat(flat_logits), torch.cat(flat_labels), torch.cat(flat_groups) if levels.groups else None
