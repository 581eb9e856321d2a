"""The two commands about many processes: docs/scaling.md has what they print, and they find what is wrong."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from alrp_triton.benchmarks import processes, scaling
from cases import NAN
from interpreters import new_processes

ROOT = Path(__file__).resolve().parent.parent


def test_the_page_has_the_table_of_the_arithmetic(capsys):
    assert scaling.main([]) == 0
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) == 7
    assert printed in (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")


def test_arithmetic_by_hand():
    sent = scaling.traffic(num_positives=10, of_all=30)
    # 16 numbers; scores and errors of 10 positives; two integers for each of 62 buckets.
    assert sent == (128, 160, 992)
    assert scaling.milliseconds(1, sent, 1e9, 1.0, rings=True) == pytest.approx(1e3 * 0 / 1e9)
    # Twice the others' 288 bytes, and 4/3 of the buckets; 8 messages in rings, 3 collectives of 2 x 2 along trees.
    size = 2 * 288 + 4 / 3 * 992
    assert scaling.milliseconds(3, sent, 1e6, 0.25, rings=True) == pytest.approx(1e3 * (size / 1e6 + 8 * 0.25))
    assert scaling.milliseconds(3, sent, 1e6, 0.25, rings=False) == pytest.approx(1e3 * (size / 1e6 + 12 * 0.25))


@pytest.mark.parametrize("shares", [[1], [70, 29, 1], [0, 1, 0]])
def test_parts_make_up_the_batch(shares):
    batch = processes.make_batch("middle", 8000, 40, seed=1)
    parts = processes.cut(batch, shares)
    assert len(parts) == len(shares)
    for whole, of_parts in zip(batch, zip(*parts)):
        assert torch.equal(torch.cat(of_parts), whole)
    for part in parts:
        assert len(part.boxes) == int((part.class_labels < 80).sum())
    assert torch.equal(processes.make_batch("middle", 8000, 40, seed=1).boxes, batch.boxes)


def found(loss: float = 0.5, by_logits: float = 2.0, by_boxes: float = 3.0) -> processes.Found:
    return processes.Found(torch.tensor(loss), torch.tensor([by_logits, 4.0]), torch.tensor([[by_boxes] * 4]), 7)


def test_differences():
    whole = processes.Found(torch.tensor(0.5), torch.tensor([1.0, 2, 1, 2]), torch.full((2, 4), 1.5), 0)
    # Gradients of two processes are twice those of one.
    assert processes.compare([found(), found()], whole) == (0.0, 0.0, 0.0, True)
    assert processes.compare([found(), found(loss=0.75)], whole) == (0.5, 0.0, 0.0, False)
    assert processes.compare([found(), found(by_logits=3.0)], whole) == (0.0, 0.25, 0.0, True)
    assert processes.compare([found(), found(by_boxes=6.0)], whole) == (0.0, 0.0, 1.0, True)


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
@pytest.mark.xdist_group("processes")
def test_the_command(monkeypatch, capsys):
    context = new_processes()
    monkeypatch.setattr(processes.multiprocessing, "get_context", lambda method: context)
    arguments = ["--logits", "8000", "--positives", "40", "--shares", "2", "1"]
    assert processes.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "2 processes" in printed
    # 16 numbers, the scores of the positives of the process that has more, and two integers for each of 82 buckets.
    most = max(len(part.boxes) for part in processes.cut(processes.make_batch("middle", 8000, 40, 0), [2, 1]))
    assert f"{8 * (16 + most + 2 * 82):,}" in printed
    assert f"{8 * (16 + 2 * most + 2 * 82):,}" in printed
    # One process with another batch is told apart.
    evaluate = processes.evaluate

    def of_others(name, part, *rest):
        return evaluate(name, part._replace(logits=-part.logits), *rest)

    monkeypatch.setattr(processes, "evaluate", of_others)
    assert processes.main(arguments) == 1
    assert "NO" in capsys.readouterr().out


def test_a_nan_is_no_small_difference():
    whole = processes.Found(torch.tensor(0.5), torch.tensor([1.0, 2, 1, 2]), torch.full((2, 4), 1.5), 0)
    assert processes.compare([found(), found(by_logits=NAN)], whole)[1] == math.inf
