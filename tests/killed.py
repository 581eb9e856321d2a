"""A training that is there to be killed: several small detectors side by side, one checkpoint for all. No test itself.

    python tests/killed.py FOLDER

goes on where the checkpoint in the folder ends, or begins. Neither batches nor anything else is random but by the
number of the step, so that a run that was never killed says what any other has to end with.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from alrp_triton import ALRPLoss, APLoss, RankSortLoss, SelfBalance
from alrp_triton.boxes import box_error
from alrp_triton.engine.passes import numba_installed

STEPS = 24
# Not alike, so that checkpoints are written within periods.
SAVED_EVERY, PERIOD, EPOCH = 4, 6, 9
CLASSES = 3
BACKENDS = ["torch", *(["numba"] if numba_installed() else [])]
Say = Callable[[str, int], None]


class Detector(nn.Module):
    """Scores and boxes of each pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 8, 3, padding=1)
        self.scores, self.boxes = nn.Conv2d(8, CLASSES, 1), nn.Conv2d(8, 4, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(images).relu()
        corners, sizes = self.boxes(features).float().permute(0, 2, 3, 1).split(2, -1)
        return self.scores(features).permute(0, 2, 3, 1), torch.cat([corners, corners + sizes.sigmoid() + 0.5], -1)


class APAndBoxes(nn.Module):
    """AP Loss and GIoU, weighted by a self-balancing whose periods end when they are told to."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.ap, self.self_balance = APLoss(backend=backend), SelfBalance(init=1.0, average="means")

    def forward(self, logits: Tensor, labels: Tensor, boxes: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        cls = self.ap(logits, labels, num_positives=len(targets))
        loc = box_error(boxes, targets, "giou", 0.0).sum() / max(len(targets), 1)
        return cls, self.self_balance(cls, loc, len(targets) > 0) * loc


class Training(NamedTuple):
    """A detector on its way."""

    model: nn.Module
    criterion: nn.Module
    optimizer: torch.optim.Optimizer
    autocast: bool
    saves_criterion: bool
    losses: list[float]
    """Of each step, of all processes where they rank together."""

    def step(self, number: int, rank: int) -> None:
        images, labels, targets = make_batch(number, rank)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            logits, boxes = self.model(images)
            output = self.criterion(logits, labels, boxes[labels < CLASSES], targets)
            cls, loc = output if isinstance(output, tuple) and len(output) == 2 else (output.cls, output.loc)
        self.optimizer.zero_grad()
        (cls + loc).backward()
        self.optimizer.step()
        self.losses.append((cls + loc).item())
        balance = getattr(self.criterion, "self_balance", None)
        if number % EPOCH == 0 and isinstance(balance, SelfBalance) and balance.period is None:
            balance.step_epoch()

    def parts(self) -> dict[str, Any]:
        """What has a state."""
        plain = self.model.module if isinstance(self.model, DistributedDataParallel) else self.model
        return {
            "model": plain,
            "optimizer": self.optimizer,
            **({"criterion": self.criterion} if self.saves_criterion else {}),
        }


def make_batch(number: int, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images, a class or ``CLASSES`` for each pixel, and the boxes of the positives: up to five, now and then none."""
    generator = torch.Generator().manual_seed(1000 * number + rank)
    images = torch.randn(2, 3, 6, 6, generator=generator)
    labels = torch.full((72,), CLASSES)
    num_positives = int(torch.randint(6, (), generator=generator))
    places = torch.randperm(72, generator=generator)[:num_positives]
    labels[places] = torch.randint(CLASSES, (num_positives,), generator=generator)
    corners = torch.randn(num_positives, 2, generator=generator)
    return images, labels.view(2, 6, 6), torch.cat([corners, corners + 1], 1)


CRITERIA: dict[str, Callable[..., nn.Module]] = {
    "ALRPLoss": lambda backend, group: ALRPLoss(
        self_balance=SelfBalance(period=PERIOD), backend=backend, process_group=group
    ),
    "RankSortLoss": lambda backend, group: RankSortLoss(backend=backend, process_group=group),
    # Alone: the mean of its boxes would be that of one process.
    "APLoss": lambda backend, group: APAndBoxes(backend),
}
FORMS = [(backend, half) for backend in BACKENDS for half in (False, True)]
# What costs a step, costs it in every process: the first and the last form stand for all where it is enough.
ALONE = [(name, *form) for name in ("ALRPLoss", "RankSortLoss") for form in FORMS]
ALONE += [("APLoss", *form) for form in (FORMS[0], FORMS[-1])]
TOGETHER = [("ALRPLoss", *FORMS[0]), ("ALRPLoss", *FORMS[-1]), ("RankSortLoss", *FORMS[0])]
# One that leaves its criterion out of the checkpoints, which therefore has to end elsewhere.
FORGETFUL = "ALRPLoss, forgetful"


def names(size: int) -> list[str]:
    """Of the trainings of so many processes, without the forgetful one."""
    chosen = ALONE if size == 1 else TOGETHER
    return [f"{name}, {backend}, {'bfloat16' if half else 'float32'}" for name, backend, half in chosen]


def make_trainings(size: int) -> dict[str, Training]:
    chosen = ALONE if size == 1 else TOGETHER
    trainings = {}
    for name, (criterion, backend, half) in zip([*names(size), FORGETFUL], [*chosen, ("ALRPLoss", "torch", False)]):
        torch.manual_seed(0)
        model: nn.Module = Detector()
        if size > 1:
            model = DistributedDataParallel(model)
        made = CRITERIA[criterion](backend, True if size > 1 else None)
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        trainings[name] = Training(model, made, optimizer, half, name != FORGETFUL, [])
    return trainings


def save(path: Path, trainings: dict[str, Training], step: int, say: Say) -> None:
    """So that there is always a whole checkpoint: the old one, until the new one takes its place at once."""
    states = {
        name: {"losses": training.losses, **{key: part.state_dict() for key, part in training.parts().items()}}
        for name, training in trainings.items()
    }
    buffer = io.BytesIO()
    torch.save({"step": step, "trainings": states}, buffer)
    content, part = buffer.getvalue(), path.with_suffix(".part")
    with part.open("wb") as file:
        file.write(content[: len(content) // 2])
        file.flush()
        say("writing", step)
        file.write(content[len(content) // 2 :])
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def load(path: Path, trainings: dict[str, Training]) -> int:
    """Bring the trainings to where the checkpoint is; returns the number of steps done."""
    if not path.exists():
        return 0
    checkpoint = torch.load(path, weights_only=True)
    for name, training in trainings.items():
        state = checkpoint["trainings"][name]
        training.losses[:] = state["losses"]
        for key, part in training.parts().items():
            part.load_state_dict(state[key])
    return int(checkpoint["step"])


def train(folder: Path, say: Say = lambda what, number: None, rank: int = 0, size: int = 1) -> None:
    """Go on, or begin, until the last step. ``say`` hears of ("from", steps done), in each step of ("training", number)
    when it is done for one of the trainings, of ("step", number) when for all, of ("writing", number) when half of a
    checkpoint is on disk, and of ("end", number) after the last step."""
    torch.set_num_threads(1)
    path = folder / "checkpoint.pt"
    if size > 1:
        # One that hangs ends at last; none that waits for another, on a busy machine, takes so long.
        store, timeout = f"file://{folder / 'store'}", timedelta(minutes=30)
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=timeout)
    trainings = make_trainings(size)
    done = load(path, trainings)
    say("from", done)
    for number in range(done + 1, STEPS + 1):
        for training in trainings.values():
            training.step(number, rank)
            say("training", number)
        say("step", number)
        if rank == 0 and (number % SAVED_EVERY == 0 or number == STEPS):
            save(path, trainings, number, say)
    say("end", STEPS)
    if size > 1:
        dist.destroy_process_group()


def serve(folder: str, rank: int, size: int, pipe: Connection) -> None:
    """In a process: train, and say how far it is. A checkpoint half written waits for its answer, so that a kill finds
    it so, and so does the end, so that no process leaves another alone. The rest does not wait for its own answer, but
    for that of what was said before, so that a kill finds it at work on what comes next, or before what follows that,
    however long the kill takes to arrive."""
    waiting = 0

    def say(what: str, number: int) -> None:
        nonlocal waiting
        pipe.send((what, number))
        waiting += 1
        while waiting > (what not in ("writing", "end")):
            pipe.recv()
            waiting -= 1

    train(Path(folder), say, rank, size)


if __name__ == "__main__":
    train(Path(sys.argv[1]))
