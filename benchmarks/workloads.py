"""Seeded inputs like those a dense detector's head gives its loss, at three stages of training."""

from __future__ import annotations

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
