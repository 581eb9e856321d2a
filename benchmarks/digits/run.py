"""One run: train a detector with one setting, evaluate it, and say all that the tables and figures need."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from detector import build_detector
from report import Detections, detect, to_coco
from scenes import NUM_CLASSES, SIZE
from torch import Tensor
from torchvision.models.detection import RetinaNet

from alrp_triton import SelfBalance
from alrp_triton.metrics import evaluate

from ..training.run import circumstances
from .data import Scenes, scenes
from .rerank import rerank
from .settings import SETTINGS

BATCH_SIZE = 16
NUM_VALIDATION, NUM_TEST = 200, 400
RECORDED_EVERY = 5  # iterations
METRICS = ("ap", "ap50", "ap75", "ap90", "olrp", "olrp_loc", "olrp_fp", "olrp_fn", "rho")


@dataclass(frozen=True)
class Run:
    """What tells a run from every other: the name of its setting, its learning rate, its seed and its length."""

    setting: str
    learning_rate: float
    seed: int
    iterations: int

    @property
    def key(self) -> str:
        return f"{self.setting}, rate {self.learning_rate:g}, seed {self.seed}, {self.iterations} iterations"


class History:
    """Loss components, weight and balance of the classification's gradient, every few iterations.

    The balance is the sum of absolute gradients of the negative logits over that of the positive ones (figure 4a of
    the paper).
    """

    def __init__(self, model: RetinaNet) -> None:
        self._criterion = model.head.ranking_criterion
        self._criterion.register_forward_pre_hook(self._watch, with_kwargs=True)
        self.active = False
        self._balance: Tensor | None = None
        self._values: list[Tensor] = []
        self._iterations: list[int] = []

    def _watch(self, _: object, arguments: tuple[Any, ...], __: dict[str, Any]) -> None:
        if not self.active:
            return
        logits, labels = arguments[:2]
        positive = torch.zeros_like(logits, dtype=torch.bool)
        found = torch.nonzero((labels >= 0) & (labels < logits.shape[-1]), as_tuple=True)
        positive[found + (labels[found],)] = True  # noqa: RUF005, since Python 3.10 unpacks no tuple in an index

        def note(gradient: Tensor) -> None:
            # Ignored logits have no gradient.
            sizes = gradient.abs().double()
            total = sizes.sum()
            of_positives = sizes[positive].sum()
            self._balance = (total - of_positives) / of_positives

        logits.register_hook(note)

    def add(self, iteration: int, losses: dict[str, Tensor]) -> None:
        """Take note of an iteration whose backward pass has been run."""
        balancer = getattr(self._criterion, "self_balance", None)
        weight = balancer.weight if isinstance(balancer, SelfBalance) else torch.tensor(float(balancer or 1))
        assert self._balance is not None
        values = (losses["classification"], losses["bbox_regression"], weight, self._balance)
        self._values.append(torch.stack([value.detach().cpu().double() for value in values]))
        self._iterations.append(iteration)

    def to_dict(self) -> dict[str, list[float]]:
        """``cls``, ``loc`` (weighted), ``weight`` and ``balance`` at each ``iteration``; four digits."""
        columns = torch.stack(self._values, 1).tolist()
        rounded = [[float(f"{value:.4g}") for value in column] for column in columns]
        return {"iteration": self._iterations, **dict(zip(("cls", "loc", "weight", "balance"), rounded))}  # type: ignore[dict-item]


def train(run: Run, device: torch.device, progress: Callable[[int], None]) -> tuple[RetinaNet, History]:
    """The trained model and what was noted on the way; ``progress`` is called with the iterations done so far."""
    data = scenes("train", run.iterations * BATCH_SIZE)  # each is seen once
    torch.manual_seed(run.seed)
    model = SETTINGS[run.setting].prepare(build_detector(NUM_CLASSES, SIZE).to(device)).train()
    history = History(model)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(run.seed))
    optimizer = torch.optim.AdamW(model.parameters(), run.learning_rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, run.learning_rate, run.iterations, pct_start=0.1)
    for iteration, batch in enumerate(data.batches(BATCH_SIZE, order, device)):
        history.active = iteration % RECORDED_EVERY == 0
        losses = model(*batch)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        schedule.step()
        if history.active:
            history.add(iteration, losses)
            progress(iteration)
    return model, history


def measure(detections: Detections, truth: Scenes) -> dict[str, float | None]:
    """The metrics of the tables; None where one is undefined, such as rho without true positives."""
    found = evaluate(*to_coco(detections, truth), area_ranges={})
    values = {name: float(getattr(found, name)) for name in METRICS}
    return {name: None if math.isnan(value) else round(value, 5) for name, value in values.items()}


def perform(run: Run, device: torch.device, progress: Callable[[int], None]) -> dict[str, Any]:
    """Train and evaluate; returns the record of the run, of plain numbers and strings."""
    scenes("train", run.iterations * BATCH_SIZE)  # composed before the clock starts
    start = time.perf_counter()
    model, history = train(run, device, progress)
    seconds = time.perf_counter() - start
    validation, test = scenes("validation", NUM_VALIDATION), scenes("test", NUM_TEST)
    detections = detect(model, test, device)
    return {
        **vars(run),
        "validation": measure(detect(model, validation, device), validation),
        "test": measure(detections, test),
        # Table 5: the same detections with their true positives in another order.
        "worst_order": measure(rerank(detections, test, best_first=False), test),
        "best_order": measure(rerank(detections, test, best_first=True), test),
        "history": history.to_dict(),
        "training_seconds": round(seconds, 1),
        "batch_size": BATCH_SIZE,
        **circumstances(device),
    }
