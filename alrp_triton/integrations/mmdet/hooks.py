"""Self-balancing by the epochs of MMEngine's training loops, and what the log gets to know of a ranking."""

from __future__ import annotations

import math
from typing import Any

import torch
from mmengine import dist
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import IterBasedTrainLoop

from ...losses.self_balance import SelfBalance
from .._criteria import end_periods, open_balances

__all__ = ["SelfBalanceHook", "StatisticsHook"]


@HOOKS.register_module()
class SelfBalanceHook(Hook):  # type: ignore[misc]
    """Ends the period of every :class:`alrp_triton.SelfBalance` in the model after each epoch.

    In training by iterations an epoch is the number of iterations that use as many images as the data set has. With
    several processes, the sums of all processes are added first, so that all continue with one weight. At its default
    priority it runs before a checkpoint is written, so a resumed run continues with the same weight.

    It does not affect a ``SelfBalance`` with a ``period``, which ends its periods itself.

    Args:
        interval: iterations in a period, >= 1; None for an epoch.

    Raises:
        TypeError, ValueError: wrong ``interval``.
    """

    def __init__(self, interval: int | None = None) -> None:
        if interval is not None:
            _check_interval(interval, "an int >= 1 or None")
        self.interval = interval
        self._iterations = interval

    def before_train(self, runner: Any) -> None:
        """Warns if there is nothing to do, and sets the length of an epoch in training by iterations."""
        if not open_balances(runner.model):
            runner.logger.warning(
                "SelfBalanceHook: the model has no SelfBalance(period=None), so that this hook does nothing"
            )
        self._iterations = self.interval
        if self.interval is None and isinstance(runner.train_loop, IterBasedTrainLoop):
            loader = runner.train_dataloader
            images = loader.batch_sampler.batch_size * dist.get_world_size()
            self._iterations = max(math.ceil(len(loader.dataset) / images), 1)

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        """Ends a period that is a number of iterations."""
        if self._iterations is not None and self.every_n_train_iters(runner, self._iterations):
            end_periods(runner.model)

    def after_train_epoch(self, runner: Any) -> None:
        """Ends a period that is an epoch."""
        if self._iterations is None:
            end_periods(runner.model)


@HOOKS.register_module()
class StatisticsHook(Hook):  # type: ignore[misc]
    """Logs the statistics of every criterion with ``monitor=True`` and the weight of every ``SelfBalance``.

    They are scalars of MMEngine's log and visualizers: ``train/bbox_head.loss_cls/precision`` and so on,
    ``train/bbox_head.loss_cls.self_balance/weight``.

    Args:
        interval: iterations from one log to the next, >= 1. To log is to wait for the device, once for all numbers.

    Raises:
        TypeError, ValueError: wrong ``interval``.
    """

    def __init__(self, interval: int = 50) -> None:
        _check_interval(interval, "an int >= 1")
        self.interval = interval

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        """Logs the numbers of this iteration."""
        if not self.every_n_train_iters(runner, self.interval):
            return
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        found: dict[str, torch.Tensor] = {}
        for name, part in model.named_modules():
            stats = part.stats if getattr(part, "monitor", False) else {}
            stats = {"weight": part.weight} if isinstance(part, SelfBalance) else stats
            found |= {f"train/{name}/{key}": value for key, value in stats.items()}
        if found:
            for name, value in zip(found, torch.stack([value.float() for value in found.values()]).tolist()):
                runner.message_hub.update_scalar(name, value)


def _check_interval(interval: object, wanted: str) -> None:
    if isinstance(interval, bool) or not isinstance(interval, int):
        raise TypeError(f"interval: expected {wanted}, got {type(interval).__name__}")
    if interval < 1:
        raise ValueError(f"interval: expected {wanted}, got {interval}")
