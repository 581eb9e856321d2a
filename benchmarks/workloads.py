"""Seeded inputs like those that a detector's head gives its loss, at three stages of training."""

from __future__ import annotations

import math
from functools import cache, cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

NUM_CLASSES = 80

# Mean and standard deviation of the scores of (negatives, positives).
REGIMES = {
    # The usual initial bias, a probability of 0.01 everywhere: all scores lie within a ramp of each other.
    "early": ((-4.6, 0.05), (-4.6, 0.05)),
    # Positives begin to rise; they overlap with the negatives nearly everywhere.
    "middle": ((-4.0, 1.0), (-2.5, 1.0)),
    # Well separated: few negatives reach the ramp of any positive.
    "late": ((-7.0, 2.0), (1.8, 1.5)),
}

RECORDED = Path(__file__).parent / "results" / "scores.npz"
"""Scores of a detector of photographs at the same stages; see :mod:`.training.real_scores`."""


REAL = {f"real {stage}": stage for stage in REGIMES}
"""The names of these inputs as regimes."""


@cache
def recorded_scores(regime: str) -> tuple[Tensor, Tensor]:
    """The scores of negatives in the order of memory, and those of positives, of a regime of :data:`REAL`.

    Raises:
        ValueError: where the package is installed without the repository, which has these scores.
    """
    if not RECORDED.exists():
        raise ValueError(
            f"regime: expected one of {list(REGIMES)} without a checkout of the repository, got {regime!r}"
        )
    with np.load(RECORDED) as file:
        kinds = (f"{REAL[regime]} {kind}" for kind in ("negatives", "positives"))
        negatives, positives = (torch.from_numpy(file[kind]).float() for kind in kinds)
    return unrounded(negatives, torch.Generator().manual_seed(0)), positives


def unrounded(halves: Tensor, generator: torch.Generator) -> Tensor:
    """Numbers of float16 as they may have been before they were rounded, so that few are equal."""
    noise = torch.rand(halves.shape, generator=generator, device=halves.device) - 0.5
    return halves + noise * torch.finfo(torch.float16).eps * torch.exp2(halves.abs().clamp(min=1e-3).log2().floor())


def real_negatives(regime: str, number: int, begin: int = 0) -> Tensor:
    """``[number]`` recorded scores from some place on, which are repeated."""
    found = recorded_scores(regime)[0].roll(-begin)
    return found.repeat(-(-number // len(found)))[:number]


def draw_real_positives(regime: str, number: int, generator: torch.Generator) -> Tensor:
    """``[number]`` scores like those that are recorded."""
    found = recorded_scores(regime)[1].to(generator.device)
    chosen = torch.randint(len(found), (number,), generator=generator, device=generator.device)
    return unrounded(found[chosen], generator)


class Head(NamedTuple):
    """The shape of a detector's scores."""

    classes: int
    anchors: int  # for each place of a feature map; for each image if there are no strides
    strides: tuple[int, ...]
    positives: int  # for each image, unless a case says otherwise; of a whole model objects
    model: str = ""  # a builder of torchvision's: a whole model, of whose training step the loss's share is measured


_P3_TO_P7, _P2_TO_P6 = (8, 16, 32, 64, 128), (4, 8, 16, 32, 64)
HEADS = {
    "retinanet": Head(80, 9, _P3_TO_P7, 125),
    "atss": Head(80, 1, _P3_TO_P7, 90),
    "proposals": Head(1, 3, _P2_TO_P6, 50),
    # A quarter of 512 sampled boxes.
    "second-stage": Head(80, 512, (), 128),
    # One anchor for each place: with nine, 8 images would have 473 million logits.
    "lvis": Head(1203, 1, _P3_TO_P7, 90),
    "RetinaNet": Head(91, 9, _P3_TO_P7, 10, "retinanet_resnet50_fpn"),
    "FCOS": Head(91, 1, _P3_TO_P7, 10, "fcos_resnet50_fpn"),
    "Faster R-CNN": Head(1, 3, _P2_TO_P6, 10, "fasterrcnn_resnet50_fpn"),
}
LAYOUTS = ("flat", "levels", "levels-last")
"""One ``[rows, C]`` tensor; levels of a feature pyramid ``[B, H, W, A, C]``, views of the ``[B, A C, H, W]`` that
convolutions write; or levels ``[B, H W A, C]``, views of the same in channels-last memory."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Case(NamedTuple):
    """One input: everything that decides its numbers except the device and the seed."""

    head: str
    regime: str = "middle"
    image: int = 512  # height and width in pixels; a second stage does not see it
    batch: int = 8
    num_positives: int | None = None  # P; None for what is usual for the head
    dtype: str = "float32"
    layout: str = "flat"
    num_logits: int | None = None
    """M, in place of image and batch. Such a case is flat, with as many of the head's classes as leave each positive a
    row of its own."""

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
        """``(B, H, W, A)`` of each level, or ``(rows,)`` of a flat case."""
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
        """What any ranking loss has to move: it reads each logit twice and writes its gradient once."""
        return 3 * DTYPES[self.dtype].itemsize * self.logits

    @property
    def name(self) -> str:
        """A short description."""
        size = f"M = {self.num_logits:,}" if self.num_logits else f"{self.batch} x {self.image}"
        return f"{self.head}, {size}, {self.regime}, P = {self.positives}, {self.dtype}, {self.layout}"


class Inputs:
    """What the contenders get. What only some of them need is made on first use.

    Attributes:
        case: of which these are the inputs.
        levels: the logits, leaves of the graph; one tensor for the layout ``"flat"``.
        class_labels: for each level int64 ``level.shape[:-1]``, C for background.
        loc_errors: ``[P]`` in [0, 1), a leaf.
        pred_boxes, target_boxes: ``[P, 4]``, overlapping; the first is a leaf.
    """

    def __init__(self, case: Case, levels: list[Tensor], class_labels: list[Tensor], boxes: list[Tensor]) -> None:
        self.case, self.levels, self.class_labels = case, levels, class_labels
        self.loc_errors, self.pred_boxes, self.target_boxes = boxes

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

    @cached_property
    def images(self) -> list[Tensor]:
        """For each level the image of each row; equal parts of a flat case are images."""
        rows = [torch.arange(y.numel(), device=y.device).view(y.shape) for y in self.class_labels]
        return [row * self.case.batch // row.numel() for row in rows]

    def flat(self) -> Tensor:
        """``[M]`` logits in one piece, attached to the levels; a copy if there are several."""
        return self.levels[0].view(-1) if len(self.levels) == 1 else torch.cat([x.reshape(-1) for x in self.levels])

    def clear(self) -> None:
        """Forget all gradients."""
        for leaf in (*self.levels, self.loc_errors, self.pred_boxes):
            leaf.grad = None

    def gradient(self) -> Tensor:
        """``[M]``, the gradient of the scores in their dtype."""
        gradients = [level.grad.reshape(-1) for level in self.levels if level.grad is not None]
        if len(gradients) < len(self.levels):
            raise ValueError("no gradient reached the scores of some level")
        return torch.cat(gradients)


def make_inputs(case: Case, device: torch.device | str = "cpu", seed: int = 0) -> Inputs:
    """Draw the inputs of a case on a device; the same arguments give the same numbers there.

    Raises:
        ValueError: for numbers that do not fit together.
    """
    rows, positives, classes, generator = case.rows, case.positives, case.classes, torch.Generator(device)
    if not 1 <= positives <= rows:
        raise ValueError(f"num_positives: expected 1 to {rows}, one for each anchor at most, got {positives}")
    generator.manual_seed(seed)
    with torch.device(device):
        # The first of a permutation are different anchors, without repeated draws.
        chosen = torch.randperm(rows, generator=generator)[:positives].sort().values
        chosen_classes = torch.randint(classes, (positives,), generator=generator)
        scores = _draw_positives(case.regime, positives, generator)
        levels, labels, begin = [], [], 0
        for shape in case.shapes():
            level = _empty_level(shape, case)
            # Memory is dense, whatever the order of its axes, and is filled as it lies.
            _fill(level.as_strided((level.numel(),), (1,)), case.regime, begin, generator)
            label = torch.full(level.shape[:-1], classes)
            here = (chosen >= begin) & (chosen < begin + label.numel())
            places = torch.unravel_index(chosen[here] - begin, label.shape)
            label[places] = chosen_classes[here]
            level.index_put_((*places, chosen_classes[here]), scores[here].to(level.dtype))
            levels.append(level.requires_grad_())
            labels.append(label)
            begin += label.numel()
        errors = torch.rand(positives, generator=generator)
        # Predicted and target boxes of about the same place and size.
        corner = 1000 * torch.rand(positives, 2, generator=generator)
        target = torch.cat([corner, corner + 250 * torch.rand(positives, 2, generator=generator) + 16], dim=1)
        pred = target + 4 * torch.randn(positives, 4, generator=generator)
    return Inputs(case, levels, labels, [errors.requires_grad_(), pred.requires_grad_(), target])


def _draw_positives(regime: str, number: int, generator: torch.Generator) -> Tensor:
    if regime in REAL:
        return draw_real_positives(regime, number, generator)
    mean, deviation = REGIMES[regime][1]
    return torch.randn(number, generator=generator, device=generator.device) * deviation + mean


def _fill(memory: Tensor, regime: str, begin: int, generator: torch.Generator) -> None:
    """Scores of negatives; recorded ones are repeated, from another place for each level."""
    if regime in REAL:
        memory.copy_(real_negatives(regime, len(memory), begin))
    else:
        mean, deviation = REGIMES[regime][0]
        memory.normal_(mean, deviation, generator=generator)


def _empty_level(shape: tuple[int, ...], case: Case) -> Tensor:
    """Memory as a head leaves it, seen as ``[..., C]``."""
    if case.layout == "levels":
        batch, height, width, anchors = shape
        channels_first = torch.empty(batch, anchors, case.classes, height, width, dtype=DTYPES[case.dtype])
        return channels_first.permute(0, 3, 4, 1, 2)
    rows = shape if case.layout == "flat" else (shape[0], math.prod(shape[1:]))
    return torch.empty(*rows, case.classes, dtype=DTYPES[case.dtype])
