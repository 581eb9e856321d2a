"""The loss's share of a training step: torchvision's detectors with ours, and with the published loop in its place.

    python -m benchmarks.step_share

A step is forward, loss, backward and an optimizer's step of RetinaNet, FCOS or Faster R-CNN with ResNet-50 FPN, random
weights and images of random objects. The loss is the criterion alone, forward and backward, of both stages where there
are two: neither matching nor box decoding, which every loss needs. The loop is timed in the same place with the same
errors of boxes, labels for each logit made for it as its authors do. Contenders take turns on one model, whose learning
rate is 0, so that every step has the same scores: those of the beginning of a training, when the loop is slowest.

By events on a GPU. On a CPU by the wall clock, or on one that others use, too, by ``--threads 1 --clock cpu``, which
counts only the time this process itself ran; ratios carry over to other machines, seconds do not.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from alrp_triton import ALRPLoss, ALRPLossOutput
from alrp_triton.boxes import box_error
from alrp_triton.engine.backends import numba_installed

from .baselines import per_positive_loop, with_gradient
from .cpu import CLOCKS, LARGEST_ERROR
from .report import RESULTS, environment, print_environment, print_table, write
from .timing import take_turns

DETECTORS = {
    "RetinaNet": "retinanet_resnet50_fpn",
    "FCOS": "fcos_resnet50_fpn",
    "Faster R-CNN": "fasterrcnn_resnet50_fpn",
}
OURS, NUMBA, LOOP = "ours", "ours, numba", "published loop"

Batch = tuple[list[Tensor], list[dict[str, Tensor]]]
"""What a detector is called with: images [3, H, W], and for each its boxes and labels."""


class LoopLoss(nn.Module):
    """aLRP Loss as published, by a loop over the positives, for what a detector gives to a criterion."""

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
        # As the authors sort; of equal scores the last counts as above, in ours, too.
        order = logits.detach()[targets == 1].argsort(stable=True).flip(0)
        return ALRPLossOutput(cls, (errors[order].cumsum(0) / rank[order]).mean(), rank)


class Watch:
    """Seconds between pairs of marks; on a GPU by events, for which nothing waits until they are read."""

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        self.device, self.clock, self.marks = device, clock, list[Any]()

    def mark(self) -> None:
        """Begin or end."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(self.clock())

    def read(self) -> float:
        """Seconds of all pairs since the last reading."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        pairs = list(zip(self.marks[::2], self.marks[1::2]))
        self.marks.clear()
        if self.device.type == "cuda":
            return 1e-3 * float(sum(begin.elapsed_time(end) for begin, end in pairs))
        return float(sum(end - begin for begin, end in pairs))


class Timed(nn.Module):
    """A criterion whose forward and backward are timed together, where a detector calls it.

    Its gradients are computed at once and handed on when the detector asks for them.
    """

    def __init__(self, criterion: nn.Module, watch: Watch) -> None:
        super().__init__()
        self.criterion, self.watch = criterion, watch
        self.num_logits = self.num_positives = 0
        self.gradients: tuple[Tensor, ...] = ()

    def forward(self, logits: Tensor, labels: Tensor, pred_boxes: Tensor, target_boxes: Tensor) -> ALRPLossOutput:
        """As the criterion; its two components depend on scores and boxes alone, in this order."""
        self.num_logits, self.num_positives = logits.numel(), len(pred_boxes)
        scores, boxes = logits.detach().requires_grad_(), pred_boxes.detach().requires_grad_()
        self.watch.mark()
        loss = self.criterion(scores, labels, boxes, target_boxes)
        (loss.cls + loss.loc).backward()
        self.watch.mark()
        assert scores.grad is not None
        assert boxes.grad is not None
        self.gradients = scores.grad, boxes.grad
        cls, loc = loss.cls.detach(), loss.loc.detach()
        return ALRPLossOutput(
            with_gradient(logits, cls, scores.grad), with_gradient(pred_boxes, loc, boxes.grad), loss.rank
        )


class Seconds(NamedTuple):
    """Of one step."""

    loss: float
    step: float


def make_batch(images: int, size: int, objects: int, classes: int, device: torch.device) -> Batch:
    """Images of noise and random objects, whose labels leave out 0, torchvision's background."""
    generator = torch.Generator().manual_seed(0)
    targets = []
    for _ in range(images):
        sides = size * (0.05 + 0.4 * torch.rand(objects, 2, generator=generator))
        corners = (size - sides) * torch.rand(objects, 2, generator=generator)
        labels = torch.randint(1, classes, (objects,), generator=generator)
        targets.append({"boxes": torch.cat([corners, corners + sides], 1).to(device), "labels": labels.to(device)})
    return [torch.rand(3, size, size, generator=generator).to(device) for _ in range(images)], targets


def losses_of(name: str) -> tuple[nn.Module, nn.Module]:
    """Criteria of a contender: of a head or second stage, and of a proposal network."""
    if name == LOOP:
        return LoopLoss(0.5), LoopLoss(0.7)
    backend = "numba" if name == NUMBA else "auto"
    return tuple(ALRPLoss(tau=tau, self_balance=None, backend=backend) for tau in (0.5, 0.7))  # type: ignore[return-value]


def install(model: nn.Module, name: str, watch: Watch) -> list[Timed]:
    """Make a detector train with a contender; the criteria that are timed."""
    from torchvision.models.detection import FasterRCNN

    from alrp_triton.integrations.torchvision import use_alrp

    first, second = (Timed(criterion, watch) for criterion in losses_of(name))
    if isinstance(model, FasterRCNN):
        use_alrp(model, first, rpn_criterion=second)
        return [second, first]
    use_alrp(model, first)
    return [first]


def step(name: str, model: nn.Module, batch: Batch, watch: Watch) -> tuple[list[Timed], float]:
    """One step with a contender: forward, loss, backward, optimizer. What was timed, and seconds of the step."""
    timed, whole = install(model, name, watch), Watch(watch.device, watch.clock)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    optimizer.zero_grad()
    watch.read()  # waits for what runs still
    whole.mark()
    torch.stack(list(model(*batch).values())).sum().backward()
    optimizer.step()
    whole.mark()
    return timed, whole.read()


def run(name: str, model: nn.Module, batch: Batch, watch: Watch) -> Seconds:
    """One step with a contender, timed."""
    _, whole = step(name, model, batch, watch)
    return Seconds(watch.read(), whole)


def check(model: nn.Module, batch: Batch, contenders: Sequence[str], watch: Watch) -> dict[str, Any]:
    """Numbers of logits and positives of each stage, and how far each contender's gradients of scores and boxes are
    from the loop's: of all stages the worst norm, relative. On the way, all run once.

    Raises:
        ArithmeticError: a contender is too far off.
    """
    stages, _ = step(LOOP, model, batch, watch)
    expected, errors = [one.gradients for one in stages], {}
    for name in contenders:
        pairs = zip([one.gradients for one in step(name, model, batch, watch)[0]], expected)
        off = [
            float((mine.double() - loop.double()).norm() / loop.double().norm().clamp(min=1e-30))
            for found, wanted in pairs
            for mine, loop in zip(found, wanted)
        ]
        errors[name] = max(off)
        if not errors[name] <= LARGEST_ERROR:
            raise ArithmeticError(f"{name}: gradient off the loop's by {errors[name]:.1e} of its norm")
    counts = {"logits": [one.num_logits for one in stages], "positives": [one.num_positives for one in stages]}
    return {**counts, "gradient_error": errors}


def compare(model: nn.Module, batch: Batch, repeats: Mapping[str, int], watch: Watch) -> dict[str, Any]:
    """What :func:`check` finds, and seconds of so many steps with each contender on one model, in turns."""
    found = check(model, batch, [name for name in repeats if name != LOOP], watch)
    runs: dict[str, tuple[Callable[[], Seconds], int]]
    runs = {name: (partial(run, name, model, batch, watch), number) for name, number in repeats.items()}
    seconds = {name: [one._asdict() for one in measured] for name, measured in take_turns(runs).items()}
    return {**found, "seconds": seconds}


def shares(seconds: Sequence[Mapping[str, float]]) -> tuple[float, float, float]:
    """Medians: of the loss's share of a step, of the loss and of the step in seconds."""
    loss, whole = ([one[part] for one in seconds] for part in ("loss", "step"))
    return median(a / b for a, b in zip(loss, whole)), median(loss), median(whole)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_share", description=__doc__.splitlines()[0])
    parser.add_argument("--detectors", nargs="+", choices=DETECTORS, default=list(DETECTORS))
    parser.add_argument("--images", type=int, default=2, help="in a batch (default: %(default)s)")
    parser.add_argument("--size", type=int, default=320, help="their sides in pixels (default: %(default)s)")
    parser.add_argument("--objects", type=int, default=10, help="in an image (default: %(default)s)")
    parser.add_argument("--classes", type=int, default=91, help="background included (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=7, help="steps with each contender (default: %(default)s)")
    parser.add_argument("--loop-repeats", type=int, default=3, help="steps with the loop (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="of a CPU: what to count (default: %(default)s)"
    )
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=RESULTS / "step_share.json")
    args = parser.parse_args()
    if args.clock == "cpu" and (args.threads != 1 or args.device.type != "cpu"):
        # A thread that waits for the others spins, and that would count.
        parser.error("--clock cpu needs --threads 1 on a CPU")
    torch.set_num_threads(args.threads)
    return args


def build(name: str, args: argparse.Namespace) -> nn.Module:
    """A detector with random weights, in training."""
    from torchvision.models import detection

    options = {"num_classes": args.classes, "min_size": args.size, "max_size": args.size}
    torch.manual_seed(0)
    model: nn.Module = getattr(detection, DETECTORS[name])(weights=None, weights_backbone=None, **options)
    return model.to(args.device).train()


def main() -> None:
    """Parse, check, time, print, write."""
    args = _parse()
    import torchvision

    about = environment("benchmarks.step_share") | {"torchvision": torchvision.__version__}
    about["device"] = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else "cpu"
    print_environment(about)
    contenders = [OURS, *([NUMBA] if args.device.type == "cpu" and numba_installed() else []), LOOP]
    repeats = {name: args.loop_repeats if name == LOOP else args.repeats for name in contenders}
    batch = make_batch(args.images, args.size, args.objects, args.classes, args.device)

    rows, results = [], {}
    for name in args.detectors:
        try:
            results[name] = compare(build(name, args), batch, repeats, Watch(args.device, CLOCKS[args.clock]))
        except ArithmeticError as error:
            sys.exit(f"{name}: {error}; not timing wrong results")
        middle = {contender: shares(seconds) for contender, seconds in results[name]["seconds"].items()}
        _, loss, whole = middle[OURS]
        _, loop_loss, loop_whole = middle[LOOP]
        rows.append(
            [
                name,
                " + ".join(f"{number:,}" for number in results[name]["logits"]),
                " + ".join(map(str, results[name]["positives"])),
                *(f"{100 * middle[contender][0]:.1f} %" for contender in contenders),
                f"{loop_loss / loss:.0f}",
                f"{loop_whole / whole:.2f}",
            ]
        )
    print_table(
        f"The loss's share of a training step, {args.images} images of {args.size} x {args.size}",
        ["detector", "logits", "positives", *contenders, "loop / ours", "step with loop / with ours"],
        rows,
        f"Medians of {args.clock} times. Of the proposal network + of the second stage where there are two.",
    )
    note = "seconds are machine-dependent; compare ratios within one run only"
    settings = {key: value for key, value in vars(args).items() if isinstance(value, int)}
    write(args.output, {"environment": about, "settings": settings, "note": note, "detectors": results})


if __name__ == "__main__":
    main()
