"""Three processes share out a batch unevenly; they agree with one process that has all of it, and send what docs say.

``python -m pytest tests/test_processes_agree.py -rP`` prints the figures of docs/scaling.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from alrp_triton.benchmarks.workloads import REGIMES, Case, make_inputs
from dialect import KERNELS
from dialect.processes import MARKS, counting_bytes, group_of
from torch import Tensor

from alrp_triton import ALRPLoss, APLoss, NDCGLoss, RankSortLoss

pytestmark = [*MARKS, pytest.mark.skipif(KERNELS, reason="800,000 logits")]
LOSSES: dict[str, Callable[..., Any]] = {"aLRP": ALRPLoss, "Rank & Sort": RankSortLoss, "AP": APLoss, "NDCG": NDCGLoss}
NUM_LOGITS, NUM_POSITIVES = 800_000, 500
# Rows of each process: 70, 29 and 1 % of 10,000.
ENDS = [0, 7000, 9900, 10_000]
# A third of three times a float32 number is not that number.
LARGEST = 3e-7


class Found(NamedTuple):
    """Of one loss."""

    loss: Tensor
    by_logits: Tensor
    by_boxes: Tensor
    """``[0, 4]`` for a loss without boxes."""
    sent: int
    """Bytes that this process gave to collectives."""


def evaluate(regime: str, begin: int, end: int, group: Any) -> list[Found]:
    """All losses on some rows of the batch, with their gradients."""
    case = Case("retinanet", regime, num_positives=NUM_POSITIVES, num_logits=NUM_LOGITS)
    inputs, results = make_inputs(case, seed=3), []
    labels = inputs.class_labels[0]
    first, last = (int((labels[:row] < case.classes).sum()) for row in (begin, end))
    for name, criterion in LOSSES.items():
        logits = inputs.levels[0].detach()[begin:end].clone().requires_grad_()
        boxes = inputs.pred_boxes.detach()[first:last].clone().requires_grad_()
        given = (boxes, inputs.target_boxes[first:last]) if name in ("aLRP", "Rank & Sort") else ()
        with counting_bytes() as sent:
            out = criterion(process_group=group)(logits, labels[begin:end], *given)
            loss = out if isinstance(out, Tensor) else out.cls + out.loc
            loss.backward()
        by_boxes = torch.zeros(0, 4) if boxes.grad is None else boxes.grad
        results.append(Found(loss.detach(), logits.grad, by_boxes, sum(sent)))
    return results


def in_process(rank: int, regime: str) -> list[list[Found]] | None:
    """What a process finds with the others, and alone."""
    return [evaluate(regime, *ENDS[rank : rank + 2], group) for group in (group_of(3), None)] if rank < 3 else None


def off(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest element."""
    return float((found.double() - expected.double()).abs().max() / expected.abs().max()) if expected.numel() else 0.0


@pytest.mark.parametrize(
    "regime", [r if r == "middle" else pytest.param(r, marks=pytest.mark.nightly) for r in REGIMES]
)
def test_three_uneven_parts_agree_with_the_whole(pool, regime):
    of_processes = [found for found in pool.run(in_process, regime) if found is not None]
    whole = evaluate(regime, 0, ENDS[-1], None)
    for k, (name, expected) in enumerate(zip(LOSSES, whole)):
        parts, alone = ([found[which][k] for found in of_processes] for which in (0, 1))
        assert all(torch.equal(part.loss, parts[0].loss) for part in parts), name
        errors = {
            "loss": off(parts[0].loss, expected.loss),
            # DistributedDataParallel takes the mean over the processes.
            "score gradient": off(torch.cat([part.by_logits for part in parts]) / 3, expected.by_logits),
            "box gradient": off(torch.cat([part.by_boxes for part in parts]) / 3, expected.by_boxes),
        }
        apart = off(torch.stack([part.loss for part in alone]).mean(), expected.loss)
        sent = max(part.sent for part in parts)
        shown = ", ".join(f"{what} {error:.1e}" for what, error in errors.items())
        print(f"{name}: {shown}; {sent:,} bytes sent by each; ranked apart {100 * apart:.1f} % off")
        assert all(error <= LARGEST for error in errors.values()), (name, errors)
        # 16 numbers; what each positive gives, padded to the process that has most; two integers for each bucket.
        most = max(len(alrp.by_boxes) for alrp in (found[0][0] for found in of_processes))
        columns = {"aLRP": 2, "Rank & Sort": 4}.get(name, 1)
        assert sent == 8 * (16 + columns * most + 2 * (2 * NUM_POSITIVES + 2)), name
