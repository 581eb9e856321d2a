"""The ranking loss as a callback of Lightning."""

from __future__ import annotations

import copy
import warnings
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from torch import nn

from .._criteria import check_criterion, name_of, numbers_of
from .model import use_loss

__all__ = ["RankingCallback"]


class RankingCallback(Callback):  # type: ignore[misc,unused-ignore]
    """Trains an RF-DETR with a ranking loss, ends the periods of its self-balancing, and logs it.

        trainer = build_trainer(train_config, model_config)
        trainer.callbacks.append(RankingCallback(ALRPLoss()))

    The log has the weight of the boxes and, with ``monitor=True``, the statistics of the ranking as
    ``train/ranking/...``: means over the batches of an epoch, as are ``train/loss_cls`` and ``train/loss_loc``, which
    RF-DETR logs itself. Nothing waits for the device. Lightning warns if a training is resumed without the callback,
    and the callback warns if it is resumed with another loss.

    Args:
        ranking: the loss; a copy of it is made for the model. ``None`` if ``use_...`` has been called, so that the
            callback does the rest.
        per_image: as for :func:`use_loss`.

    Raises:
        TypeError: ``ranking`` is no module.
    """

    def __init__(self, ranking: nn.Module | None = None, *, per_image: bool = False) -> None:
        if ranking is not None:
            check_criterion(ranking)
        self.ranking, self.per_image = ranking, per_image
        self._saved: str | None = None
        self._given: nn.Module | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called by Lightning, before it loads a checkpoint. A second training continues with the loss of the first.

        Raises:
            TypeError: neither the callback nor the module has a loss.
        """
        if stage != "fit":
            return
        present = getattr(getattr(pl_module, "criterion", None), "ranking_criterion", None)
        if self.ranking is None and present is None:
            wanted = "one after use_..., or RankingCallback(ranking)"
            raise TypeError(f"pl_module: expected {wanted}, got {type(pl_module).__name__}")
        if self.ranking is not None and (present is None or present is not self._given):
            self._given = copy.deepcopy(self.ranking)
            use_loss(pl_module, self._given, per_image=self.per_image)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called by Lightning."""
        own = self._name(pl_module)
        if self._saved is not None and own != self._saved:
            warnings.warn(f"resumed with another loss: the checkpoint's is {self._saved}, now {own}", stacklevel=2)
        self._running = own

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called by Lightning. A period ends here, so that checkpoints of the epoch's end have it open, in whatever
        order callbacks run."""
        pl_module.criterion.step_epoch()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Called by Lightning."""
        numbers = numbers_of(pl_module.criterion.ranking_criterion)
        named = {f"train/ranking/{name}": value for name, value in numbers.items()}
        pl_module.log_dict(named, on_step=False, on_epoch=True, batch_size=1)

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint: the loss, as text."""
        return {"ranking": self._running}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From a checkpoint."""
        self._saved = state_dict["ranking"]

    _running = ""

    def _name(self, pl_module: LightningModule) -> str:
        criterion = pl_module.criterion
        return f"{name_of(criterion.ranking_criterion)}, per_image={criterion.ranking_per_image}"
