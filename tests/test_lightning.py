"""The callback that docs/monitoring.md shows for Lightning."""

import sys
import types

import pytest
import torch
from adapters import monitored

from alrp_triton import ALRPLoss

lightning = pytest.importorskip("pytorch_lightning")


class Detector(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer, self.criterion = torch.nn.Linear(3, 4), ALRPLoss(monitor=True)

    def training_step(self, batch, batch_idx):
        logits = self.layer(batch)
        boxes = torch.tensor([[0.0, 0, 2, 2]])
        return self.criterion(logits, torch.tensor([1, 4, 4, 4]), boxes, boxes + 0.5).total

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Written(lightning.loggers.logger.Logger):
    name, version = "written", 0

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_hyperparams(self, params, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, metrics))


def test_statistics_are_written_where_lightning_writes(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "lightning", types.ModuleType("lightning"))
    monkeypatch.setitem(sys.modules, "lightning.pytorch", lightning)
    (callback,) = monitored("LightningStatistics")
    module, written = Detector(), Written()
    trainer = lightning.Trainer(
        **{"default_root_dir": tmp_path, "accelerator": "cpu", "max_epochs": 1, "logger": written},
        **{"callbacks": [callback()], "log_every_n_steps": 2, "enable_progress_bar": False},
        **{"enable_checkpointing": False, "enable_model_summary": False},
    )
    trainer.fit(module, torch.utils.data.DataLoader(torch.rand(5, 4, 3), batch_size=None))
    assert [step for step, _ in written.rows] == [1, 3]
    for _, row in written.rows:
        assert {f"criterion/{name}" for name in module.criterion.stats} <= row.keys()
        assert row["criterion/num_positives"] == 1
