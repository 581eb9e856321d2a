"""Which contenders may be timed: a gradient is compared with float64 before its time counts."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from alrp_triton.verify import BOUND, relative_errors

from .peers import Contender, exact_gradient
from .workloads import DTYPES, HEADS, Case, Inputs, make_inputs

LARGEST_ERROR = BOUND
"""The largest relative norm of the error of an exact contender's gradient. In half precision only errors beyond the
rounding of each element count (:func:`alrp_triton.verify.relative_errors`)."""
REFERENCE_PAIRS = {"cpu": 3e7, "cuda": 2e9}
"""P x M of the largest problem for the float64 reference, by device; it takes about a second."""
_IMBALANCE = {torch.float32: 1e-5, torch.bfloat16: torch.finfo(torch.bfloat16).eps / 2}
"""By how much the sum of the gradient may differ from 0, relative to its 1-norm. The exact sum is 0, which checks the
full size, for which the reference would take too long. If all elements are rounded the same way, their sum is off by
up to half an epsilon. There is no bound for float16, which cannot represent many of millions of elements."""


def reduced(case: Case, pairs: float) -> Case:
    """A case of the same kind with about ``pairs`` pairs or fewer: fewer positives, and fewer logits by about the same
    factor."""
    work = case.positives * case.logits
    if work <= pairs:
        return case
    positives = min(case.positives, max(4, int(case.positives * math.sqrt(pairs / work))))
    if case.num_logits is not None:
        classes = HEADS[case.head].classes  # all of them, for which each positive needs a row
        positives = min(positives, int(math.sqrt(pairs / classes)))
        return case._replace(num_positives=positives, num_logits=classes * int(pairs / positives / classes))
    images = pairs / positives / (case.logits / case.batch)
    batch, side = max(1, round(images)), case.image
    if HEADS[case.head].strides:
        side = min(side, max(32, int(side * math.sqrt(images / batch)) // 32 * 32))
    small = case._replace(batch=batch, image=side)
    return small._replace(num_positives=min(positives, small.rows))


class Judge:
    """Compares contenders with the float64 reference on one case, or on a smaller case of its kind."""

    def __init__(self, case: Case, device: torch.device, pairs: float | None = None) -> None:
        self.case = reduced(case, REFERENCE_PAIRS[device.type] if pairs is None else pairs)
        self.inputs = make_inputs(self.case, device)
        self._exact: dict[str, Tensor] = {}

    def error(self, contender: Contender) -> float | None:
        """Relative norm of the error of the score gradient; None if the contender is another loss."""
        if contender.of is None:
            return None
        self.inputs.clear()
        contender.loss(self.inputs).backward()
        if contender.of not in self._exact:
            self._exact[contender.of] = exact_gradient(contender.of, self.inputs)
        return relative_errors(self.inputs.gradient(), self._exact[contender.of])[0]


def why_refused(contender: Contender, error: float | None) -> str | None:
    """Why a contender with this error may not be timed; None if it may."""
    if contender.exact and not (error is not None and error <= LARGEST_ERROR):
        return f"the gradient is off float64 by {error:.1e} of its norm, {LARGEST_ERROR:.0e} is allowed"
    if error is not None and not math.isfinite(error):
        return "the gradient is not finite"
    return None


def why_wrong(contender: Contender, inputs: Inputs, value: Tensor) -> str | None:
    """What is visibly wrong with a result at full size, after backward; None if nothing is."""
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
