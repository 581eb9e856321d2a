"""What is counted on the virtual GPU: steps of the loss on inputs that any machine draws alike."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from alrp_triton import alrp_loss

from .virtual import Result, counting_gpu
from .workloads import DTYPES, NUM_CLASSES, REGIMES

# Rows of a level, without those that are added: tiles of any block size end where they do.
_ROWS = {"linear": 1024, "pairwise": 256}
_POSITIVES = {"linear": 1000, "pairwise": 256}
_NUM_GROUPS, _ROWS_OF_A_GROUP = 8, 128
# Images, at least 2, and the height, width and anchors of each level; how their classes come to be channels, and back.
_PLACES, _INWARDS, _OUTWARDS = (-1, 32, 8, 2), (0, 3, 4, 1, 2), (0, 3, 4, 1, 2)


class Case(NamedTuple):
    """What is run."""

    form: str = "linear"
    """Or ``pairwise``."""
    levels: int = 1
    grouped: bool = False
    dtype: str = "float32"
    channels_first: bool = False
    """Views of what convolutions write: ``[B, H, W, A, C]`` of memory ``[B, A C, H, W]``."""

    @property
    def name(self) -> str:
        """A short description."""
        levels = f"{self.levels} levels" if self.levels > 1 else "1 level"
        further = ["channels first"] * self.channels_first + ["groups"] * self.grouped
        return ", ".join([self.form, levels, *further, self.dtype])

    @property
    def positives(self) -> int:
        """P."""
        return _POSITIVES[self.form]

    @property
    def rows(self) -> int:
        """Of all levels, without those that are added."""
        return _ROWS[self.form] * self.levels


_CASES = (
    Case(),
    Case(dtype="bfloat16"),
    Case(levels=5),
    Case(levels=5, channels_first=True),
    Case(grouped=True),
    Case("pairwise"),
)
CASES = {case.name: case for case in _CASES}


def make_problem(regime: str, num_rows: int, num_positives: int) -> tuple[Tensor, Tensor, Tensor]:
    """``[rows, C]`` logits, the rows' classes and the positives' errors; the first rows have one positive each.

    Fewer rows are the beginning of more. Drawn in float64: where processors differ, it is in digits beyond float32's.
    """
    (mean, deviation), (of_positives, deviation_of_positives) = REGIMES[regime]
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    classes = torch.randint(NUM_CLASSES, (num_positives,), generator=generator)
    scores = draw(num_positives) * deviation_of_positives + of_positives
    errors = torch.rand(num_positives, generator=generator)
    logits = torch.cat([draw(256, NUM_CLASSES) for _ in range(-(-num_rows // 256))])[:num_rows] * deviation + mean
    logits[torch.arange(num_positives), classes] = scores
    labels = torch.full((num_rows,), NUM_CLASSES)
    labels[:num_positives] = classes
    return logits.float(), labels, errors


def launches(case: Case, regime: str, target: int, num_rows: int, num_positives: int) -> list[Result]:
    """The launches of a step of the loss: forward and backward."""
    logits, labels, errors = make_problem(regime, num_rows, num_positives)
    x, y = list(logits.to(DTYPES[case.dtype]).tensor_split(case.levels)), list(labels.tensor_split(case.levels))
    if case.channels_first:
        x = [level.view(*_PLACES, NUM_CLASSES).permute(_INWARDS).contiguous().permute(_OUTWARDS) for level in x]
        y = [level.view(_PLACES) for level in y]
    groups = torch.arange(num_rows) // _ROWS_OF_A_GROUP % _NUM_GROUPS
    z = list(groups.tensor_split(case.levels)) if case.grouped else None
    backend = "triton" if case.form == "linear" else "pairwise"
    x = [level.detach().clone().requires_grad_() for level in x]
    with counting_gpu(target) as device:
        cls, loc, _ = alrp_loss(x, y, errors.requires_grad_(), groups=z, backend=backend)
        (cls + loc).backward()
    return list(device.results)
