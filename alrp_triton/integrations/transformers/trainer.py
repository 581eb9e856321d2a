"""A callback of ``Trainer`` that ends the period of aLRP Loss after each epoch."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from .loss import DetrRankingLoss

__all__ = ["SelfBalanceCallback"]


class SelfBalanceCallback(TrainerCallback):  # type: ignore[misc,unused-ignore]
    """Ends the self-balancing period of a model with :func:`use_alrp` after each epoch.

        Trainer(model=model, ..., callbacks=[SelfBalanceCallback()])

    It has no state: the weights are in the model and in the trainer's checkpoints. It does not affect a criterion with
    ``SelfBalance(period=...)``, which ends its periods itself.
    """

    def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **others: Any) -> None:
        """Called by the trainer; ``model`` may be wrapped."""
        for module in model.modules():
            if isinstance(module, DetrRankingLoss):
                module.step_epoch()
