"""Who may be timed: a gradient is held against float64 before its time counts."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from alrp_triton import reference
from alrp_triton.verify import BOUND, relative_errors

from .peers import Contender, errors_of_boxes
from .workloads import DTYPES, HEADS, Case, Inputs, make_inputs

LARGEST_ERROR = BOUND
"""Of an exact contender's gradient, relative norm. In half precision errors count beyond the rounding of each element:
the least change of the exact value that would have been rounded to what was found."""
REFERENCE_PAIRS = {"cpu": 3e7, "cuda": 2e9}
"""P x M of the largest problem that the float64 reference is asked for, by device; a second or so."""
_IMBALANCE = {torch.float32: 1e-5, torch.bfloat16: torch.finfo(torch.bfloat16).eps / 2}
"""What the gradient's sums over positives and over negatives may differ by, of their size. In exact numbers they are
equal: a check of the full size, where the reference would take too long. Rounding that goes one way in all elements may
take half an epsilon."""


def reduced(case: Case, pairs: float) -> Case:
    """A case of the same kind with at most about so many pairs: fewer positives and logits, by the same factor unless
    there are few positives."""
    work = case.positives * case.logits
    if work <= pairs:
        return case
    positives = min(case.positives, max(4, int(case.positives * math.sqrt(pairs / work))))
    logits = pairs / positives
    if case.num_logits is not None:
        classes = HEADS[case.head].classes  # all of them, for which each positive needs a row
        positives = min(positives, int(math.sqrt(pairs / classes)))
        return case._replace(num_positives=positives, num_logits=classes * int(pairs / positives / classes))
    per_image = case.logits / case.batch
    batch = max(1, round(logits / per_image))
    side = case.image
    if HEADS[case.head].strides:
        side = min(side, max(32, int(side * math.sqrt(logits / per_image / batch)) // 32 * 32))
    small = case._replace(batch=batch, image=side)
    return small._replace(num_positives=min(positives, small.rows))


class Judge:
    """Errors of contenders on one case, or a reduced one, against one evaluation of the float64 reference."""

    def __init__(self, case: Case, device: torch.device, pairs: float | None = None) -> None:
        self.case = reduced(case, REFERENCE_PAIRS[device.type] if pairs is None else pairs)
        self.inputs = make_inputs(self.case, device)
        self._exact: dict[bool, Tensor] = {}

    def error(self, contender: Contender) -> float | None:
        """Relative norm of the error of the score gradient; None for another loss than aLRP."""
        if contender.exact is None:
            return None
        self.inputs.clear()
        contender.loss(self.inputs).backward()
        return relative_errors(self.inputs.gradient(), self._exact_gradient(contender.with_boxes))[0]

    def _exact_gradient(self, with_boxes: bool) -> Tensor:
        if with_boxes not in self._exact:
            errors = self.inputs.loc_errors
            if with_boxes:
                errors = errors_of_boxes(self.inputs.pred_boxes, self.inputs.target_boxes)
            scores = self.inputs.flat().detach().double()
            self._exact[with_boxes] = reference.alrp(scores, self.inputs.logit_labels, errors.detach()).grad_logits
        return self._exact[with_boxes]


def why_wrong(contender: Contender, inputs: Inputs, value: Tensor) -> str | None:
    """What is visibly wrong with a result at full size, after backward; None if nothing is.

    float16 sums are not compared: of millions of elements many are below what it can represent.
    """
    if not value.isfinite():
        return f"the loss is {float(value.detach())}"
    gradients = [level.grad for level in inputs.levels if level.grad is not None]
    total = sum(float(grad.sum(dtype=torch.float64)) for grad in gradients)
    if not gradients or not math.isfinite(total):
        return "the gradient is missing or not finite"
    allowed = _IMBALANCE.get(DTYPES[inputs.case.dtype])
    if contender.exact and allowed is not None:
        size = sum(float(torch.linalg.vector_norm(grad, 1, dtype=torch.float64)) for grad in gradients)
        if size == 0:
            return "the gradient is 0"
        if not abs(total) <= allowed * size:
            return f"positives and negatives differ by {abs(total) / size:.1e} of the gradient"
    return None


def why_refused(contender: Contender, error: float | None) -> str | None:
    """Why a contender's time would be that of something else than the loss; None if it may be timed."""
    if contender.exact and not (error is not None and error <= LARGEST_ERROR):
        return f"the gradient is off float64 by {error:.1e} of its norm, {LARGEST_ERROR:.0e} is allowed"
    if error is not None and not math.isfinite(error):
        return "the gradient is not finite"
    return None
