"""When self-balancing's periods end: by epochs and iterations, in one process and in several."""

from __future__ import annotations

import multiprocessing
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from torch import nn

pytest.importorskip("mmdet", reason="needs MMDetection: pip install '.[frameworks]'")
pytest.importorskip("torchvision", reason="needs torchvision: pip install '.[frameworks]'")

from mmengine.hooks import CheckpointHook
from mmengine.model import MMDistributedDataParallel
from mmengine.registry import HOOKS
from mmengine.runner import IterBasedTrainLoop, get_priority

import alrp_triton.integrations.mmdet  # noqa: F401  (registers the hook)
from alrp_triton import ALRPLoss, SelfBalance


def runner_of(model, *, images=10, batch_size=3, by_iterations=False):
    """What the hook asks of a runner."""
    loop = object.__new__(IterBasedTrainLoop) if by_iterations else object()
    sampler = SimpleNamespace(batch_size=batch_size)
    loader = SimpleNamespace(batch_sampler=sampler, dataset=range(images))
    return SimpleNamespace(model=model, train_loop=loop, train_dataloader=loader, iter=0, logger=Mock())


def note(balance, cls, loc=0.5):
    return balance(torch.tensor(cls), torch.tensor(loc), True)


def hook_of(**settings):
    return HOOKS.build({"type": "SelfBalanceHook", **settings})


def test_epochs():
    # In wrapped models, in criteria and elsewhere, once also where it is used twice; not where it has its own period.
    shared, own = SelfBalance(), SelfBalance(period=100)
    model = nn.DataParallel(nn.ModuleList([ALRPLoss(self_balance=shared), nn.Sequential(shared), own]))
    runner, hook = runner_of(model), hook_of()
    hook.before_train(runner)
    assert not runner.logger.warning.called
    for cls in (0.5, 1.5):
        note(shared, cls)
        hook.after_train_iter(runner, runner.iter)
        runner.iter += 1
    note(own, 0.5)
    assert shared.weight == 50
    hook.after_train_epoch(runner)
    assert shared.weight == 3  # the mean of 2 and 4
    assert shared.count == 0
    assert own.weight == 50
    assert own.count == 1


@pytest.mark.parametrize(("settings", "period"), [({}, 4), ({"interval": 2}, 2)])
def test_iterations(settings, period):
    """Ten images in batches of three take four iterations."""
    model = nn.Sequential(SelfBalance())
    runner, hook = runner_of(model, by_iterations=True), hook_of(**settings)
    hook.before_train(runner)
    for iteration in range(1, 2 * period):
        note(model[0], 0.5 * iteration)
        hook.after_train_iter(runner, runner.iter)
        runner.iter += 1
        assert (model[0].weight == 50) == (iteration < period)
        assert model[0].count == iteration % period
    weight = model[0].weight.clone()
    hook.after_train_epoch(runner)  # MMEngine takes all of training for one
    assert model[0].weight == weight


def test_one_hook_may_serve_several_runs():
    hook = hook_of()
    hook.before_train(runner_of(nn.Sequential(SelfBalance()), by_iterations=True))
    model = nn.Sequential(SelfBalance())
    runner = runner_of(model)
    hook.before_train(runner)
    note(model[0], 0.5)
    hook.after_train_epoch(runner)
    assert model[0].weight == 2


def test_it_says_when_it_has_nothing_to_do():
    runner = runner_of(nn.Sequential(SelfBalance(period=2)))
    hook_of().before_train(runner)
    assert "no SelfBalance(period=None)" in runner.logger.warning.call_args.args[0]


def test_it_comes_before_the_checkpoint():
    assert get_priority(hook_of().priority) < get_priority(CheckpointHook.priority)


def _process(rank, store, results):
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model = nn.Sequential(SelfBalance(), SelfBalance(average="means"))
    for cls in ((0.5, 1.5), (2.5,))[rank]:
        note(model[0], cls)
        note(model[1], cls, loc=0.25)
    runner, hook = runner_of(model, by_iterations=True), hook_of()
    hook.before_train(runner)
    # Ten images by two processes with three each: two iterations.
    runner.iter = 1
    hook.after_train_iter(runner, runner.iter)
    results.put((rank, [balance.weight.item() for balance in model], [int(balance.count) for balance in model]))
    torch.distributed.destroy_process_group()


def test_processes_go_on_with_one_weight(tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_process, args=(rank, tmp_path / "store", results)) for rank in (0, 1)]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(timeout=60)
    assert sorted(rank for rank, *_ in found) == [0, 1]
    for _, weights, counts in found:
        # The means over the three iterations of both.
        assert weights == [pytest.approx((2 + 4 + 6) / 3), pytest.approx((0.5 + 1.5 + 2.5 + 0.75) / 0.75)]
        assert counts == [0, 0]


@pytest.mark.parametrize(
    ("interval", "error"), [(0, ValueError), (-1, ValueError), (2.0, TypeError), (True, TypeError)]
)
def test_wrong_intervals_are_named(interval, error):
    with pytest.raises(error, match="interval"):
        hook_of(interval=interval)


@pytest.mark.parametrize(("interval", "error"), [(0, ValueError), (2.0, TypeError), (None, TypeError)])
def test_wrong_intervals_of_statistics_are_named(interval, error):
    with pytest.raises(error, match="interval: expected an int >= 1, got"):
        HOOKS.build({"type": "StatisticsHook", "interval": interval})


def test_statistics_of_a_model_without_any():
    runner = runner_of(nn.Linear(2, 2))  # without a message hub, too
    HOOKS.build({"type": "StatisticsHook", "interval": 1}).after_train_iter(runner, 0)


def test_statistics_have_the_same_names_in_several_processes(tmp_path):
    model = nn.ModuleDict({"backbone": nn.Linear(2, 2), "bbox_head": nn.Sequential(SelfBalance())})
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        for one in (model, nn.DataParallel(model), MMDistributedDataParallel(model)):
            runner = runner_of(one)
            runner.message_hub = Mock()
            HOOKS.build({"type": "StatisticsHook", "interval": 1}).after_train_iter(runner, 0)
            runner.message_hub.update_scalar.assert_called_once_with("train/bbox_head.0/weight", 50.0)
    finally:
        torch.distributed.destroy_process_group()
