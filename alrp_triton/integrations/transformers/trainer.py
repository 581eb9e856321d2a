"""``Trainer`` with a ranking loss: periods of self-balancing that end, and a log of the terms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from .._criteria import numbers_of
from .loss import DetrRankingLoss

__all__ = ["RankingTrainer", "SelfBalanceCallback"]


class SelfBalanceCallback(TrainerCallback):  # type: ignore[misc,unused-ignore]
    """Ends the self-balancing period of a model with :func:`use_alrp` after each epoch.

        Trainer(model=model, ..., callbacks=[SelfBalanceCallback()])

    It has no state: the weights are in the model and in the trainer's checkpoints. It does not affect a criterion with
    ``SelfBalance(period=...)``, which ends its periods itself.
    """

    def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **others: Any) -> None:
        """Called by the trainer; ``model`` may be wrapped."""
        for loss in _losses_of(model):
            loss.step_epoch()


class RankingTrainer(Trainer):  # type: ignore[misc,unused-ignore]
    """``Trainer`` that also logs what the loss is made of, and has :class:`SelfBalanceCallback`.

    Beside ``loss`` its log has every term of ``loss_dict``, as a mean over the same steps; ``ranking/weight``, the
    weight of the boxes; and, if the criterion has ``monitor=True``, its statistics of the last step as ``ranking/...``.
    All are those of this process. The host waits for them where it waits for ``loss``.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.add_callback(SelfBalanceCallback())
        self._terms: dict[str, tuple[Tensor | float, int]] = {}  # sums and numbers of steps

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, *more: Any, **options: Any
    ) -> Any:
        """As ``Trainer``'s; keeps the terms."""
        loss, outputs = super().compute_loss(model, inputs, True, *more, **options)
        if model.training:
            for name, value in outputs["loss_dict"].items():
                total, number = self._terms.get(name, (0.0, 0))
                self._terms[name] = total + value.detach().float(), number + 1
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *more: Any, **options: Any) -> None:
        """As ``Trainer``'s, with further entries where the training's loss is logged."""
        if "loss" in logs:
            terms, self._terms = self._terms, {}
            found: Any = {name: total / number for name, (total, number) in terms.items()}
            for loss in _losses_of(self.model):
                found |= {f"ranking/{name}": value for name, value in numbers_of(loss.criterion).items()}
            numbers = torch.stack([value.float() for value in found.values()]).tolist() if found else []
            logs = {**logs, **dict(zip(found, numbers))}
        super().log(logs, *more, **options)


def _losses_of(model: Any) -> list[DetrRankingLoss]:
    return [part for part in model.modules() if isinstance(part, DetrRankingLoss)]
