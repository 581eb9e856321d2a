"""What a label means, and how levels are walked in pieces of bounded size."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .inputs import Levels


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


def pieces(
    logits: Tensor, labels: Tensor, size: int, out: Tensor | None = None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Walk one level in row-major order, about ``size`` logits at a time, copying at most one piece.

    Args:
        logits: ``[..., C]`` with class labels ``[...]``, or any shape with labels of the same shape; any strides.
        labels: see ``logits``.
        size: logits in a piece, at the most (but never less than a row).
        out: a tensor of the logits' shape to be written piece by piece; the logits themselves where omitted.

    Yields:
        ``(logits [rows, columns], labels [rows], out)``, the last as a view in some shape with as many elements.
    """
    out = logits if out is None else out
    if logits.numel() == 0:
        return
    columns = logits.numel() // labels.numel()
    if logits.is_contiguous() and labels.is_contiguous() and out.is_contiguous():
        rows = max(1, size // columns)
        parts = (t.view(-1, columns).split(rows) for t in (logits, out))
        for x, o, y in zip(*parts, labels.view(-1).split(rows)):
            yield x, y, o
    elif logits.numel() <= size or labels.dim() == 0:
        yield logits.reshape(-1, columns), labels.reshape(-1), out
    else:
        step = max(1, size * len(logits) // logits.numel())
        for begin in range(0, len(logits), step):
            part = slice(begin, begin + step)
            if step == 1:
                yield from pieces(logits[begin], labels[begin], size, out[begin])
            else:
                yield logits[part].reshape(-1, columns), labels[part].reshape(-1), out[part]


def flatten_levels(levels: Levels, ignore_index: int) -> tuple[Tensor, Tensor]:
    """All logits as ``[M]`` and their labels as ``[M]`` int64: 1 positive, 0 negative, -1 ignored, -2 invalid."""
    flat_logits, flat_labels = [levels.logits[0].new_empty(0)], [levels.labels[0].new_empty(0, dtype=torch.int64)]
    for logits, labels in zip(*levels):
        per_class = logits.dim() != labels.dim()
        for x, y, _ in pieces(logits.detach(), labels, logits.numel()):
            kinds = LabelKinds(y, x.shape[1], per_class, ignore_index)
            flat = torch.where(kinds.ignored, -1, torch.where(kinds.invalid, -2, 0))[:, None].repeat(1, x.shape[1])
            rows = kinds.positive.nonzero().squeeze(1)
            flat[rows, y[rows].long() if per_class else 0] = 1
            flat_logits.append(x.reshape(-1))
            flat_labels.append(flat.reshape(-1))
    return torch.cat(flat_logits), torch.cat(flat_labels)
