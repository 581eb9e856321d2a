"""Callbacks that give a trainer's model the loss, and what a checkpoint says of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.models.yolo.obb import OBBTrainer
from ultralytics.models.yolo.segment import SegmentationTrainer
from ultralytics.utils import DEFAULT_CFG
from ultralytics.utils.torch_utils import unwrap_model

from .._criteria import name_of
from ._scores import rank

__all__ = [
    "RankedOBBTrainer",
    "RankedSegmentationTrainer",
    "RankedTrainer",
    "Ranking",
    "check_yolo",
    "no_tune",
    "ranking_of",
]

TASKS = ("detect", "segment", "obb")
# Within the name of the optimizer that a checkpoint has. The framework knows no such optimizer: it raises an error that
# shows the name if the training is resumed without the loss.
_MARK, _ADVICE = " of a training with ", "; resume it with the same use_... of alrp_triton.integrations.ultralytics"
_UNUSED = ("loc", "weight")  # of a localisation term, whose place the framework's own keeps


def check_yolo(yolo: object) -> None:
    if not isinstance(yolo, YOLO) or not isinstance(yolo.model, nn.Module):
        raise TypeError(f"yolo: expected an ultralytics.YOLO with a PyTorch model, got {type(yolo).__name__}")
    if yolo.task not in TASKS:
        raise ValueError(f"yolo: expected a task of {TASKS}, got {yolo.task!r}")


class Ranking:
    """The loss of one ``YOLO`` object, as callbacks of its trainers."""

    def __init__(self, criterion: nn.Module, cls: float, per_image: bool) -> None:
        self.criterion, self.cls, self.per_image = criterion, cls, per_image
        self.stats: list[dict[str, Tensor]] = []

    @property
    def callbacks(self) -> dict[str, Callable[[Any], None]]:
        return {
            "on_pretrain_routine_start": self.check,
            "on_pretrain_routine_end": self.attach,
            "on_train_epoch_start": self.forget,
            "on_train_batch_end": self.note,
            "on_train_epoch_end": self.log,
        }

    def __str__(self) -> str:
        return f"{name_of(self.criterion)}, cls={self.cls:g}, per_image={self.per_image}"

    def check(self, trainer: Any) -> None:
        """Before anything is loaded: whether the trainer's arguments go with the loss."""
        args = trainer.args
        args.optimizer, trained = _split(args.optimizer)
        if trainer.resume and trained != str(self):
            raise ValueError(f"resume: expected the loss of the checkpoint, {trained or 'its own'}, got {self}")
        if args.task not in TASKS:
            raise ValueError(f"task: expected one of {TASKS}, got {args.task!r}")
        if args.cls_pw:
            raise ValueError(f"cls_pw: expected 0, since a ranking has no weights of classes, got {args.cls_pw:g}")
        if args.cls not in (DEFAULT_CFG.cls, self.cls):
            raise ValueError(f"cls: expected {self.cls:g}, as use_... has it, got train(cls={args.cls:g})")
        if args.distill_model is not None:
            raise ValueError(f"distill_model: expected None with a ranking loss, got {args.distill_model!r}")

    def attach(self, trainer: Any) -> None:
        """Give the loss to the model and to its average, which is validated; mark the checkpoints."""
        args = trainer.args
        args.cls = self.cls
        for model in (unwrap_model(trainer.model), trainer.ema.ema):
            model.args = args
            # There is one already if the training of two branches is resumed.
            model.criterion = getattr(model, "criterion", None) or model.init_criterion()
            rank(model.criterion, self.criterion.to(trainer.device), self.per_image)
        args.optimizer = f"{_split(args.optimizer)[0]}{_MARK}{self}{_ADVICE}"

    def forget(self, trainer: Any) -> None:
        self.stats = []

    def note(self, trainer: Any) -> None:
        if stats := getattr(self.criterion, "stats", None):
            self.stats.append({name: value for name, value in stats.items() if name not in _UNUSED})

    def log(self, trainer: Any) -> None:
        """Add the means of ``criterion.stats`` to what the trainer writes to results.csv."""
        if self.stats:
            means = {name: torch.stack([each[name] for each in self.stats]).nanmean() for name in self.stats[0]}
            trainer.tloss = {**trainer.tloss, **means}


def _split(optimizer: str) -> tuple[str, str]:
    """The optimizer's name and the loss of a checkpoint's training, which may be empty."""
    name, _, trained = optimizer.partition(_MARK)
    return name, trained.removesuffix(_ADVICE)


def ranking_of(callbacks: Mapping[str, list[Any]]) -> Ranking | None:
    """The loss that callbacks have, if any."""
    owners = (getattr(one, "__self__", None) for one in callbacks.get("on_pretrain_routine_end", ()))
    return next((owner for owner in owners if isinstance(owner, Ranking)), None)


class _Resuming:
    """Mixin for trainers: lets every process of a resumed training read the optimizer's name."""

    def build_optimizer(self, model: Any, name: str = "auto", *rest: Any, **more: Any) -> Any:
        """As in the framework.

        Raises:
            RuntimeError: the trainer has no ranking loss.
        """
        if ranking_of(self.callbacks) is None:  # type: ignore[attr-defined]
            raise RuntimeError(f"{type(self).__name__}: expected a loss, call use_loss(yolo, ...) before yolo.train()")
        return super().build_optimizer(model, _split(name)[0], *rest, **more)  # type: ignore[misc]


class RankedTrainer(_Resuming, DetectionTrainer):  # type: ignore[misc,unused-ignore]
    """For ``yolo.train(trainer=RankedTrainer, resume=True, device=[0, 1])``: resumes on several GPUs."""


class RankedSegmentationTrainer(_Resuming, SegmentationTrainer):  # type: ignore[misc,unused-ignore]
    """As :class:`RankedTrainer`."""


class RankedOBBTrainer(_Resuming, OBBTrainer):  # type: ignore[misc,unused-ignore]
    """As :class:`RankedTrainer`."""


def no_tune(*_: Any, **__: Any) -> NoReturn:
    """Replaces ``yolo.tune``, which trains in other processes, without callbacks."""
    raise NotImplementedError("tune: expected a YOLO without a ranking loss; call restore(yolo) first")
