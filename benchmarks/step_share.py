"""The loss's share of a training step of torchvision's detectors, with our loss or the published loop in its place.

A step is forward, loss, backward and an optimizer's step of a detector with random weights, on images of random
objects. The loss is the criterion alone, forward and backward, of both stages if there are two; it leaves out matching
and box decoding, which every loss needs. The loop runs in the same place with the same errors of boxes, and makes
labels for each logit as its authors do. Contenders take turns on one model, whose learning rate is 0, so that every
step has the scores of the beginning of a training, when the loop is slowest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from alrp_triton import ALRPLoss, ALRPLossOutput
from alrp_triton.boxes import box_error

from .accuracy import LARGEST_ERROR
from .baselines import per_positive_loop, with_gradient
from .peers import LOOP, Contender, of_set
from .rows import Row
from .timing import Stopwatch, middle, repeats_for, take_turns
from .workloads import HEADS, Case

if TYPE_CHECKING:
    from .measure import Setting

Batch = tuple[list[Tensor], list[dict[str, Tensor]]]
"""What a detector is called with: images ``[3, H, W]``, and for each its boxes and labels."""


class LoopLoss(nn.Module):
    """aLRP Loss as published, by a loop over the positives, with the signature of :class:`alrp_triton.ALRPLoss`."""

    def __init__(self, tau: float) -> None:
        super().__init__()
        self.tau = tau

    def forward(self, logits: Tensor, labels: Tensor, pred_boxes: Tensor, target_boxes: Tensor) -> ALRPLossOutput:
        """As ``ALRPLoss`` without self-balancing."""
        classes = torch.arange(logits.shape[-1], device=logits.device)
        targets = torch.where(labels[..., None] < 0, -1, (labels[..., None] == classes).to(torch.int8))
        errors = box_error(pred_boxes, target_boxes, "giou", self.tau)
        cls, rank = per_positive_loop(logits, targets, errors)
        if len(errors) == 0:
            return ALRPLossOutput(cls, errors.sum(), rank)
        # Sorted as its authors do; of equal scores the last counts as above, as in ours.
        order = logits.detach()[targets == 1].argsort(stable=True).flip(0)
        return ALRPLossOutput(cls, (errors[order].cumsum(0) / rank[order]).mean(), rank)


class Timed(nn.Module):
    """A criterion whose forward and backward are timed together at the place where a detector calls it.

    It computes its gradients at once and hands them on when the detector asks for them.
    """

    takes_boxes = True

    def __init__(self, criterion: nn.Module, watch: Stopwatch) -> None:
        super().__init__()
        self.criterion, self.watch = criterion, watch
        self.num_logits = self.num_positives = 0
        self.gradients: tuple[Tensor, ...] = ()

    def forward(self, logits: Tensor, labels: Tensor, pred_boxes: Tensor, target_boxes: Tensor) -> ALRPLossOutput:
        """As the criterion, whose two components depend on scores and boxes alone, in this order."""
        self.num_logits, self.num_positives = logits.numel(), len(pred_boxes)
        scores, boxes = logits.detach().requires_grad_(), pred_boxes.detach().requires_grad_()
        self.watch.mark()
        loss = self.criterion(scores, labels, boxes, target_boxes)
        (loss.cls + loss.loc).backward()
        self.watch.mark()
        assert scores.grad is not None
        assert boxes.grad is not None
        self.gradients = scores.grad, boxes.grad
        cls = with_gradient(logits, loss.cls.detach(), scores.grad)
        return ALRPLossOutput(cls, with_gradient(pred_boxes, loss.loc.detach(), boxes.grad), loss.rank)


class Step(NamedTuple):
    """One training step."""

    loss: float  # milliseconds
    whole: float
    stages: list[Timed]  # the criteria: of the head; or of the proposal network and the second stage


def criterion(contender: str, tau: float) -> nn.Module:
    """What a contender trains with."""
    backend = contender.partition(", ")[2]
    return LoopLoss(tau) if contender == LOOP else ALRPLoss(tau=tau, self_balance=None, backend=backend)


def step(name: str, model: nn.Module, batch: Batch, clock: str = "wall") -> Step:
    """Forward, loss, backward and optimizer's step with a contender."""
    from torchvision.models.detection import FasterRCNN

    from alrp_triton.integrations.torchvision import use_loss

    device = batch[0][0].device
    inner, outer = Stopwatch(device, clock), Stopwatch(device, clock)
    first = Timed(criterion(name, 0.5), inner)
    stages = [first]
    if isinstance(model, FasterRCNN):
        stages = [Timed(criterion(name, 0.7), inner), first]
        use_loss(model, first, rpn_criterion=stages[0])
    else:
        use_loss(model, first)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    optimizer.zero_grad()
    inner.read()  # waits for what the device still does
    outer.mark()
    torch.stack(list(model(*batch).values())).sum().backward()
    optimizer.step()
    outer.mark()
    (whole,) = outer.read()
    return Step(sum(inner.read()[::2]), whole, stages)


def gradient_error(mine: Step, loop: Step) -> float:
    """How far gradients of scores and boxes are from the loop's: of all stages the worst norm, relative."""
    pairs = [
        (a.double(), b.double())
        for one, other in zip(mine.stages, loop.stages, strict=True)
        for a, b in zip(one.gradients, other.gradients, strict=True)
    ]
    return max(float((a - b).norm() / b.norm().clamp(min=1e-30)) for a, b in pairs)


def make_batch(case: Case, device: torch.device) -> Batch:
    """Images of noise and random objects, whose labels leave out 0, torchvision's background."""
    generator, objects = torch.Generator().manual_seed(0), case.positives // case.batch
    targets = []
    for _ in range(case.batch):
        sides = case.image * (0.05 + 0.4 * torch.rand(objects, 2, generator=generator))
        corners = (case.image - sides) * torch.rand(objects, 2, generator=generator)
        labels = torch.randint(1, 91, (objects,), generator=generator)
        targets.append({"boxes": torch.cat([corners, corners + sides], 1).to(device), "labels": labels.to(device)})
    images = torch.rand(case.batch, 3, case.image, case.image, generator=generator)
    return list(images.to(device)), targets


def build(case: Case, device: torch.device) -> nn.Module:
    """A detector for 91 classes with random weights, in training."""
    from torchvision.models import detection

    torch.manual_seed(0)
    builder: Callable[..., nn.Module] = getattr(detection, HEADS[case.head].model)
    options = {"num_classes": 91, "min_size": case.image, "max_size": case.image}
    return builder(weights=None, weights_backbone=None, **options).to(device).train()


def measure(case: Case, chosen: Sequence[Contender], setting: Setting) -> Iterator[Row]:
    """A row for each contender: the loss in ``both_ms``, the whole step in ``wall_ms``."""
    model, batch = build(case, setting.device), make_batch(case, setting.device)
    loop = step(LOOP, model, batch)
    shapes = [" + ".join(f"{getattr(s, what):,}" for s in loop.stages) for what in ("num_logits", "num_positives")]
    note, runs, errors = f"{shapes[0]} logits, {shapes[1]} positives", {}, {}

    def timed(name: str) -> tuple[float, float]:
        return step(name, model, batch, setting.clock)[:2]

    chosen = [contender for contender in chosen if contender.name in of_set("step", setting.device)]
    for contender in chosen:
        errors[contender.name] = error = gradient_error(step(contender.name, model, batch), loop)
        if not error <= LARGEST_ERROR:
            why = f"the gradient is off the loop's by {error:.1e} of its norm"
            yield setting.row(case, contender, status="refused", note=why, error=error)
            continue
        _, whole = timed(contender.name)
        repeats = repeats_for(whole / 1e3, setting.seconds, setting.repeats)
        runs[contender.name] = partial(timed, contender.name), repeats
    by_name = {contender.name: contender for contender in chosen}
    for name, steps in take_turns(runs).items():
        losses, wholes = zip(*steps)
        columns = dict(zip(("both_ms", "both_iqr"), middle(losses)))
        columns |= {"wall_ms": middle(wholes)[0], "error": errors[name]}
        yield setting.row(case, by_name[name], status="ok", note=note, repeats=len(steps), **columns)
