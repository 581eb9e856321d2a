"""Seeded inputs like those a detector's head gives its loss, at three stages of training.

:func:`make_workload` is the plain one: ``[M / 80, 80]`` float32 logits on the CPU. :func:`make_inputs` makes those of a
:class:`Case`: a head, a batch of images, a dtype, a layout, on any device.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

NUM_CLASSES = 80

# Mean and standard deviation of the scores of (negatives, positives).
REGIMES = {
    # The usual bias initialisation, a probability of 0.01 everywhere: all scores within a ramp of each other.
    "early": ((-4.6, 0.05), (-4.6, 0.05)),
    # Positives begin to rise; they overlap with the negatives nearly everywhere.
    "middle": ((-4.0, 1.0), (-2.5, 1.0)),
    # Well separated: few negatives reach the ramp of any positive.
    "late": ((-7.0, 2.0), (1.8, 1.5)),
}


class Workload(NamedTuple):
    """Inputs of a ranking loss; at most one positive in a row (an anchor)."""

    logits: Tensor
    """``[M / 80, 80]`` float32 scores, requiring a gradient."""
    class_labels: Tensor
    """``[M / 80]`` int64: the class of each anchor, 80 for background."""
    loc_errors: Tensor
    """``[P]`` in [0, 1), requiring a gradient."""

    def logit_labels(self) -> Tensor:
        """The same labels for each logit: ``[M / 80, 80]`` int8, 1 for positives."""
        labels = torch.zeros(self.logits.shape, dtype=torch.int8)
        rows = (self.class_labels < NUM_CLASSES).nonzero().squeeze(1)
        labels[rows, self.class_labels[rows]] = 1
        return labels


def make_workload(regime: str, num_logits: int, num_positives: int, seed: int = 0) -> Workload:
    """Draw a workload; the same arguments give the same numbers.

    Args:
        regime: a key of ``REGIMES``.
        num_logits: M, a multiple of 80.
        num_positives: P, at most M / 80.
        seed: of the generator.

    Raises:
        ValueError: for numbers that do not fit together.
    """
    num_anchors, rest = divmod(num_logits, NUM_CLASSES)
    if rest:
        raise ValueError(f"num_logits: expected a multiple of {NUM_CLASSES}, got {num_logits}")
    if num_positives > num_anchors:
        raise ValueError(f"num_positives: expected at most one for each of {num_anchors} anchors, got {num_positives}")
    (neg_mean, neg_std), (pos_mean, pos_std) = REGIMES[regime]
    generator = torch.Generator().manual_seed(seed)
    # In place, so that making large inputs does not raise the peak that benchmarks.memory measures.
    logits = torch.randn(num_anchors, NUM_CLASSES, generator=generator).mul_(neg_std).add_(neg_mean)
    rows = torch.randperm(num_anchors, generator=generator)[:num_positives].sort().values
    classes = torch.randint(NUM_CLASSES, (num_positives,), generator=generator)
    logits[rows, classes] = torch.randn(num_positives, generator=generator) * pos_std + pos_mean
    class_labels = torch.full((num_anchors,), NUM_CLASSES)
    class_labels[rows] = classes
    loc_errors = torch.rand(num_positives, generator=generator)
    return Workload(logits.requires_grad_(), class_labels, loc_errors.requires_grad_())


class Head(NamedTuple):
    """What decides the shape of a detector's scores."""

    classes: int
    anchors: int
    """For each place of a feature map; for each image where there are no strides."""
    strides: tuple[int, ...]
    positives: int
    """For each image: what a case takes where it does not say."""


_P3_TO_P7, _P2_TO_P6 = (8, 16, 32, 64, 128), (4, 8, 16, 32, 64)
HEADS = {
    "retinanet": Head(80, 9, _P3_TO_P7, 125),
    "atss": Head(80, 1, _P3_TO_P7, 90),
    # The same shape; every place in the middle of an object is positive.
    "foveabox": Head(80, 1, _P3_TO_P7, 300),
    "proposals": Head(1, 3, _P2_TO_P6, 50),
    # A quarter of 512 sampled boxes.
    "second-stage": Head(80, 512, (), 128),
    # One anchor for each place: with nine, 8 images would have 473 million logits.
    "lvis": Head(1203, 1, _P3_TO_P7, 90),
}
LAYOUTS = ("flat", "levels", "levels-last")
"""One ``[rows, C]`` tensor; feature-pyramid levels ``[B, H, W, A, C]``, views of what convolutions write channels first
(``[B, A C, H, W]``); or levels ``[B, H W A, C]``, views of the same in channels-last memory."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_BOX_SIDE = 1000.0


class Case(NamedTuple):
    """One input of the suite, by name: everything that decides its numbers but the device and the seed."""

    head: str
    regime: str = "middle"
    image: int = 512
    """Height and width in pixels; a second stage does not see it."""
    batch: int = 8
    num_positives: int | None = None
    """P; None for what is usual for the head."""
    dtype: str = "float32"
    layout: str = "flat"
    num_logits: int | None = None
    """M, instead of what image and batch give: a flat case with at most 80 classes, as few as leave each positive an
    anchor."""

    @property
    def classes(self) -> int:
        """C."""
        if self.num_logits is None:
            return HEADS[self.head].classes
        return max(1, min(HEADS[self.head].classes, self.num_logits // max(1, self.positives)))

    @property
    def positives(self) -> int:
        """P."""
        return HEADS[self.head].positives * self.batch if self.num_positives is None else self.num_positives

    def shapes(self) -> list[tuple[int, ...]]:
        """``(B, H, W, A)`` of each level, ``(rows,)`` where there is one piece."""
        head = HEADS[self.head]
        if self.num_logits is not None:
            rows, rest = divmod(self.num_logits, self.classes)
            if rest or self.layout != "flat":
                raise ValueError(f"num_logits: {self.num_logits} gives flat rows of {self.classes} and nothing else")
            return [(rows,)]
        if not head.strides:
            if self.layout != "flat":
                raise ValueError(f"layout: {self.head} has no levels")
            return [(self.batch * head.anchors,)]
        sides = [math.ceil(self.image / stride) for stride in head.strides]
        shapes: list[tuple[int, ...]] = [(self.batch, side, side, head.anchors) for side in sides]
        return [(sum(map(math.prod, shapes)),)] if self.layout == "flat" else shapes

    @property
    def rows(self) -> int:
        """Anchors of all levels and images."""
        return sum(math.prod(shape) for shape in self.shapes())

    @property
    def logits(self) -> int:
        """M."""
        return self.rows * self.classes

    @property
    def bytes_moved(self) -> int:
        """What any loss has to move: each logit read for the loss and for the gradient, the gradient written."""
        return 3 * DTYPES[self.dtype].itemsize * self.logits

    @property
    def name(self) -> str:
        """A short description."""
        size = f"M = {self.num_logits:,}" if self.num_logits else f"{self.batch} x {self.image}"
        return f"{self.head}, {size}, {self.regime}, P = {self.positives}, {self.dtype}, {self.layout}"


class Inputs:
    """What the contenders get. What only some of them need is made when first asked for.

    Attributes:
        case: what was asked for.
        levels: the logits, leaves of the graph; one for the layout ``"flat"``.
        class_labels: for each level int64 ``level.shape[:-1]``, C for background.
        loc_errors: ``[P]`` in [0, 1), a leaf.
        pred_boxes, target_boxes: ``[P, 4]``, overlapping; the first a leaf.
    """

    def __init__(self, case: Case, levels: list[Tensor], class_labels: list[Tensor], boxes: list[Tensor]) -> None:
        self.case, self.levels, self.class_labels = case, levels, class_labels
        self.loc_errors, self.pred_boxes, self.target_boxes = boxes

    @property
    def leaves(self) -> list[Tensor]:
        """All that may get a gradient."""
        return [*self.levels, self.loc_errors, self.pred_boxes]

    @cached_property
    def logit_labels(self) -> Tensor:
        """``[M]`` int8: 1 for positives, 0 for negatives, level after level."""
        flat = torch.cat([labels.reshape(-1) for labels in self.class_labels])
        labels = torch.zeros(len(flat), self.case.classes, dtype=torch.int8, device=flat.device)
        rows = (flat < self.case.classes).nonzero().squeeze(1)
        labels[rows, flat[rows]] = 1
        return labels.reshape(-1)

    @cached_property
    def targets(self) -> Tensor:
        """The same in the logits' dtype, as focal loss takes it."""
        return self.logit_labels.to(self.levels[0].dtype)

    def flat(self) -> Tensor:
        """``[M]`` logits in one piece, attached to the levels: copied where there is more than one."""
        return (
            torch.cat([level.reshape(-1) for level in self.levels]) if len(self.levels) > 1 else self.levels[0].view(-1)
        )

    def with_positives(self, num: int) -> Inputs:
        """The same scores with the first ``num`` positives alone; the others become background."""
        keep, labels = num, []
        for level in self.class_labels:
            flat = level.reshape(-1).clone()
            rows = (flat < self.case.classes).nonzero().squeeze(1)
            flat[rows[keep:]] = self.case.classes
            keep = max(0, keep - len(rows))
            labels.append(flat.view(level.shape))
        boxes = [tensor.detach()[:num].clone() for tensor in (self.loc_errors, self.pred_boxes, self.target_boxes)]
        for tensor in boxes[:2]:
            tensor.requires_grad_()
        return Inputs(self.case._replace(num_positives=num), self.levels, labels, boxes)

    def clear(self) -> None:
        """Forget all gradients."""
        for leaf in self.leaves:
            leaf.grad = None

    def gradient(self) -> Tensor:
        """``[M]``, the gradient of the scores in their dtype."""
        return torch.cat([_grad(level).reshape(-1) for level in self.levels])


def _grad(leaf: Tensor) -> Tensor:
    if leaf.grad is None:
        raise ValueError("no gradient reached the scores")
    return leaf.grad


def make_inputs(case: Case, device: torch.device | str = "cpu", seed: int = 0) -> Inputs:
    """Draw the inputs of a case on a device; the same arguments give the same numbers there.

    Raises:
        ValueError: for numbers that do not fit together.
    """
    rows, positives, classes = case.rows, case.positives, case.classes
    if not 1 <= positives <= rows:
        raise ValueError(f"num_positives: expected 1 to {rows}, one for each anchor at most, got {positives}")
    (neg_mean, neg_std), (pos_mean, pos_std) = REGIMES[case.regime]
    generator = torch.Generator(device).manual_seed(seed)
    # The first of a permutation: different anchors without a draw that has to be repeated.
    chosen = torch.randperm(rows, generator=generator, device=device)[:positives].sort().values
    chosen_classes = torch.randint(classes, (positives,), generator=generator, device=device)
    scores = torch.randn(positives, generator=generator, device=device) * pos_std + pos_mean
    levels, labels, begin = [], [], 0
    for shape in case.shapes():
        level = _empty_level(shape, case, torch.device(device))
        # Dense memory, whatever the order of its axes: filled as it lies.
        level.as_strided((level.numel(),), (1,)).normal_(neg_mean, neg_std, generator=generator)
        label = torch.full(level.shape[:-1], classes, device=device)
        here = (chosen >= begin) & (chosen < begin + label.numel())
        places = torch.unravel_index(chosen[here] - begin, label.shape)
        label[places] = chosen_classes[here]
        level.index_put_((*places, chosen_classes[here]), scores[here].to(level.dtype))
        levels.append(level.requires_grad_())
        labels.append(label)
        begin += label.numel()
    errors = torch.rand(positives, generator=generator, device=device).requires_grad_()
    return Inputs(case, levels, labels, [errors, *_boxes(positives, generator, torch.device(device))])


def _empty_level(shape: tuple[int, ...], case: Case, device: torch.device) -> Tensor:
    """Memory as a head leaves it, seen as ``[..., C]``."""
    dtype, classes = DTYPES[case.dtype], case.classes
    if case.layout == "flat":
        return torch.empty(math.prod(shape), classes, dtype=dtype, device=device)
    batch, height, width, anchors = shape
    if case.layout == "levels":
        channels_first = torch.empty(batch, anchors, classes, height, width, dtype=dtype, device=device)
        return channels_first.permute(0, 3, 4, 1, 2)
    return torch.empty(batch, height * width * anchors, classes, dtype=dtype, device=device)


def _boxes(num: int, generator: torch.Generator, device: torch.device) -> list[Tensor]:
    """Predicted and target boxes of about the same place and size."""
    corner = torch.rand(num, 2, generator=generator, device=device) * _BOX_SIDE
    size = torch.rand(num, 2, generator=generator, device=device) * _BOX_SIDE / 4 + 16
    target = torch.cat([corner, corner + size], dim=1)
    pred = target + torch.randn(num, 4, generator=generator, device=device) * 4
    return [pred.requires_grad_(), target]
