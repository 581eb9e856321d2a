"""Ultralytics' training of several GPUs with a ranking loss, as two processes on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from yolo_scenes import TRAINING, write_data, write_model
from yolo_scenes import alone as alone

pytest.importorskip("ultralytics", reason="needs Ultralytics")
pytest.importorskip("cloudpickle", reason="needs cloudpickle")

from ultralytics import YOLO
from ultralytics.utils.dist import ddp_cleanup, find_free_network_port, generate_ddp_file

from alrp_triton.integrations.ultralytics import RankedTrainer, use_rank_sort

# What the framework's own file for a process does, on the CPU, without its last validation, which needs a GPU. Each
# process writes for each epoch which loss there is, and a sum of the weights. SystemExit is a machine that fails.
ON_THE_CPU = """
    import os, torch
    from ultralytics.utils.torch_utils import unwrap_model
    wrapped = torch.nn.parallel.DistributedDataParallel
    torch.nn.parallel.DistributedDataParallel = lambda model, device_ids, **more: wrapped(model, **more)
    def start():
        torch.distributed.init_process_group("gloo", rank=int(os.environ["RANK"]), world_size=2)
    def say(trainer):
        model = unwrap_model(trainer.model)
        total = sum(each.double().abs().sum().item() for each in model.parameters())
        with open(trainer.save_dir / f"rank{os.environ['RANK']}.txt", "a") as file:
            print(trainer.epoch, type(model.criterion.one2one.bce.__self__).__name__, total, file=file)
    def stop(trainer):
        if trainer.epoch == 0 and not trainer.resume:
            raise SystemExit
    trainer._setup_ddp, trainer.final_eval, trainer.world_size = start, lambda: None, 2
    trainer.add_callback("on_train_epoch_end", say)
    trainer.add_callback("on_fit_epoch_end", stop)
    trainer.train()
"""


def run(yolo: YOLO, **options: Any) -> None:
    """Train in two processes."""
    trainer = RankedTrainer(overrides={"model": yolo.overrides["model"], **options}, _callbacks=yolo.callbacks)
    file = generate_ddp_file(trainer)
    text = Path(file).read_text()
    assert text.count("    trainer.train()\n") == 1
    Path(file).write_text(text.replace("    trainer.train()\n", ON_THE_CPU))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*launcher, str(find_free_network_port()), file], capture_output=True, env=environment)
    ddp_cleanup(trainer, file)


@pytest.mark.nightly
def test_two_processes_train_and_resume(tmp_path):
    data = write_data(tmp_path, number=4)
    options = {**TRAINING, "batch": 4, "epochs": 3, "project": str(tmp_path), "name": "run"}
    run(use_rank_sort(YOLO(write_model(tmp_path, end2end=True))), data=data, task="detect", **options)
    last = tmp_path / "run" / "weights" / "last.pt"
    run(use_rank_sort(YOLO(last)), resume=str(last))
    said = [(tmp_path / "run" / f"rank{rank}.txt").read_text().splitlines() for rank in (0, 1)]
    # Both processes have the loss and, in each epoch, the same weights.
    assert said[0] == said[1]
    assert [line.split()[:2] for line in said[0]] == [[str(epoch), "RankedScores"] for epoch in range(3)]
    assert len({line.split()[2] for line in said[0]}) == 3
