"""What can be written into configurations: the published settings, and mistakes."""

from __future__ import annotations

import re

import pytest
import torch
from dialect.interpreters import start_python

pytest.importorskip("mmdet", reason="needs MMDetection: pip install '.[frameworks]'")
pytest.importorskip("torchvision", reason="needs torchvision: pip install '.[frameworks]'")

from mmdet.registry import MODELS, TASK_UTILS
from mmdet_setup import EXAMPLES, example
from mmengine.config import Config

import alrp_triton
from alrp_triton.framework import RankingLoss
from alrp_triton.integrations import mmdet as integration

# Learning rate, epochs at which it falls, images per GPU, shortest side of test images.
PUBLISHED = {
    "alrp_retinanet_r50_fpn_100e_coco500": (0.008, [60, 80], 8, 500),
    "alrp_retinanet_r50_fpn_atss_100e_coco500": (0.008, [75, 95], 8, 500),
    "alrp_retinanet_r101_fpn_atss_100e_coco500": (0.008, [75, 95], 8, 500),
    "alrp_retinanet_r101_fpn_atss_100e_coco800": (0.004, [60, 80], 4, 800),
    "alrp_retinanet_x101_64x4d_fpn_atss_100e_coco500": (0.008, [75, 95], 8, 500),
    "alrp_retinanet_x101_64x4d_fpn_atss_100e_coco800": (0.004, [60, 80], 4, 800),
    "alrp_retinanet_x101_64x4d_fpn_dcn_atss_100e_coco800": (0.004, [60, 80], 4, 800),
    "alrp_fovea_r50_fpn_100e_coco500": (0.008, [75, 95], 8, 500),
    "alrp_faster_rcnn_r50_fpn_100e_coco500": (0.012, [75, 95], 8, 500),
}
OWN = {"alrp_atss_r50_fpn_100e_coco500": (0.008, [75, 95], 8, 500)}
every_example = pytest.mark.parametrize("name", PUBLISHED | OWN)


def heads(model):
    return [model.rpn_head, model.roi_head.bbox_head] if "roi_head" in model else [model.bbox_head]


def test_every_example_is_listed():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(PUBLISHED | OWN)


@pytest.mark.thinned(2)
@every_example
def test_settings_are_the_published_ones(name):
    config = example(name)
    rate, milestones, images, side = (PUBLISHED | OWN)[name]
    optimizer = config.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.momentum, optimizer.weight_decay) == ("SGD", rate, 0.9, 0.0001)
    warmup, steps = config.param_scheduler
    assert (warmup.start_factor, warmup.end, warmup.by_epoch) == (0.001, 500, False)
    assert (steps.milestones, steps.gamma, steps.end, config.train_cfg.max_epochs) == (milestones, 0.1, 100, 100)
    assert config.train_dataloader.batch_size == images
    assert config.auto_scale_lr.base_batch_size == 4 * images
    long_side = {500: 833, 800: 1333}[side]
    square = {500: 512, 800: 800}[side]
    resized = [step.scale for step in config.test_dataloader.dataset.pipeline if step.type == "Resize"]
    assert resized == [(long_side, side)]
    assert config.val_dataloader == config.test_dataloader
    steps = config.train_dataloader.dataset.pipeline
    assert [step.scale for step in steps if step.type == "Resize"] == [(square, square)]
    augmentations = ["Expand", "MinIoURandomCrop"]
    assert [step.type for step in steps if step.type in augmentations] == augmentations
    assert config.custom_hooks == [{"type": "SelfBalanceHook"}]
    assert config.custom_imports.imports == ["alrp_triton.integrations.mmdet"]

    for head in heads(config.model):
        criterion = MODELS.build(head.loss_cls)
        proposals = head is config.model.get("rpn_head")
        assert isinstance(criterion, alrp_triton.ALRPLoss)
        assert (criterion.delta, criterion.tau, criterion.box_error) == (1.0, 0.7 if proposals else 0.5, "giou")
        assert criterion.loss_weight == (0.2 if proposals else 1.0)
        balance = criterion.self_balance
        assert (balance.init, balance.period, balance.average) == (50.0, None, "means")
        assert head.loss_bbox is None
        if "bbox_coder" in head:
            assert tuple(head.bbox_coder.target_stds) == (0.1, 0.1, 0.2, 0.2)
    if "atss" in name:
        assert dict(config.model.train_cfg.assigner) == {"type": "ATSSAssigner", "topk": 9}
        anchors = TASK_UTILS.build(config.model.bbox_head.anchor_generator)
        scales = {"alrp_atss": 1, "500": 2, "800": 3}
        assert anchors.num_base_priors == [scales[next(key for key in scales if key in name)]] * 5
    if "faster" in name:
        assert [config.model.train_cfg[stage].sampler.type for stage in ("rpn", "rcnn")] == ["PseudoSampler"] * 2


@pytest.mark.thinned(2)
@every_example
def test_heads_can_be_built(name):
    model = example(name).model
    dense = model.get("rpn_head") or model.bbox_head
    train_cfg = model.train_cfg.rpn if "rpn_head" in model else model.train_cfg
    head = MODELS.build(dense | {"train_cfg": train_cfg or None})
    assert isinstance(head.loss_cls, integration.ALRPLoss)


def test_names_are_those_of_the_package():
    """In each registry under its own name, and nothing of MMDetection's replaced."""
    for name in integration.__all__:
        thing = getattr(integration, name)
        if name.endswith(("Head", "Loss")):
            assert MODELS.get(name) is thing
    assert MODELS.get("RetinaHead").__module__.startswith("mmdet.")


HEAD = {"type": "RankingRetinaHead", "num_classes": 3, "in_channels": 8, "feat_channels": 8, "stacked_convs": 1}
STAGE = {"type": "RankingShared2FCBBoxHead", "num_classes": 3, "in_channels": 8, "fc_out_channels": 8}
L1 = {"type": "L1Loss"}


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"loss_cls": {"type": "FocalLoss"}}, TypeError, "loss_cls: expected a ranking loss.*FocalLoss"),
        ({"loss_cls": "ALRPLoss"}, TypeError, "loss_cls: expected a dict.*str"),
        ({"loss_bbox": L1}, ValueError, "loss_bbox: expected None.*ALRPLoss.*L1Loss"),
        ({"loss_cls": {"type": "RankSortLoss"}, "loss_bbox": L1}, ValueError, "loss_bbox: expected None.*RankSortLoss"),
        ({"loss_cls": {"type": "APLoss"}}, ValueError, "loss_bbox: expected a loss.*APLoss.*None"),
        ({"loss_cls": {"type": "ALRPLoss", "loss_weight": -1.0}}, ValueError, "loss_weight.*-1.0"),
        ({"loss_cls": {"type": "ALRPLoss", "loss_weight": "1"}}, TypeError, "loss_weight.*str"),
        ({"loss_cls": {"type": "ALRPLoss", "loss_weight": True}}, TypeError, "loss_weight.*bool"),
        ({"loss_cls": {"type": "ALRPLoss", "per_image": 1}}, TypeError, "per_image.*int"),
        ({"loss_cls": {"type": "ALRPLoss", "use_sigmoid": False}}, ValueError, "use_sigmoid.*False"),
        ({"loss_cls": {"type": "ALRPLoss", "tau": 1.0}}, ValueError, "tau.*1.0"),
        ({"loss_cls": {"type": "ALRPLoss", "self_balance": {"init": 0}}}, ValueError, "init.*0"),
        ({"loss_cls": {"type": "ALRPLoss", "self_balance": "yes"}}, TypeError, "self_balance.*str"),
    ],
)
@pytest.mark.parametrize("head", [HEAD, STAGE], ids=["dense", "second stage"])
def test_mistakes_are_named(head, settings, error, message):
    with pytest.raises(error, match=message):
        MODELS.build(head | settings)


@pytest.mark.parametrize("branch", ["with_cls", "with_reg"])
def test_a_second_stage_has_both_branches(branch):
    with pytest.raises(ValueError, match=branch):
        MODELS.build(STAGE | {branch: False})


def test_a_ranking_has_no_other_reduction():
    head = MODELS.build(STAGE)
    zeros = torch.zeros(2, 4)
    with pytest.raises(ValueError, match=r"reduction_override.*ALRPLoss.*'none'"):
        head.loss(torch.zeros(2, 3), torch.zeros(2, 12), torch.zeros(2, 5), torch.zeros(2).long(), *[zeros] * 3, "none")


def test_self_balance_may_be_what_alrp_loss_takes():
    for value, expected in ((None, None), (2.0, 2.0)):
        assert MODELS.build({"type": "ALRPLoss", "self_balance": value}).self_balance is expected or expected == 2.0
    default, other = (MODELS.build({"type": "ALRPLoss"}) for _ in range(2))
    assert default.self_balance is not other.self_balance
    assert (default.self_balance.init, default.self_balance.average) == (50.0, "means")
    assert "loss_weight=1.0, per_image=False" in repr(default)


DOCS = (EXAMPLES.parents[1] / "docs" / "integrations" / "mmdetection.md").read_text(encoding="utf-8")


def documented(kind, name):
    """The block of the documentation in which this stands."""
    (block,) = [block for block in re.findall(rf"^```{kind}\n(.*?)^```", DOCS, re.M | re.S) if name in block]
    return block


def test_the_documented_configurations_are_valid():
    config = Config.fromstring(documented("python", "_base_"), ".py")
    head = MODELS.build(config.model.bbox_head)
    assert isinstance(head, integration.RankingRetinaHead)
    assert isinstance(head.loss_cls, integration.ALRPLoss)
    for name, loss in (("rank_sort", integration.RankSortLoss), ("average_precision", integration.APLoss)):
        block = documented("python", "average_precision =").replace("bbox_head=average_precision", f"bbox_head={name}")
        base = '_base_ = "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py"\n'
        head = MODELS.build(Config.fromstring(base + block, ".py").model.bbox_head)
        assert isinstance(head.loss_cls, loss)
        assert (head.loss_bbox is None) == (name == "rank_sort")


def test_the_documented_configurations_are_those_there_are():
    table = dict(re.findall(r"^\| `(alrp_\w+)\.py`.*\| ([\d.]+) \|$", DOCS, re.M))
    assert table == {name: str(settings[0]) for name, settings in (PUBLISHED | OWN).items()}
    for name in re.findall(r"^\| `(Ranking\w+Head)` \|", DOCS, re.M):
        assert name in integration.__all__


def test_the_documented_head_of_your_own():
    names = {}
    exec(documented("py", "RankingShared4Conv1FCBBoxHead"), names)
    head = MODELS.build(
        {"type": "RankingShared4Conv1FCBBoxHead", "num_classes": 3, "in_channels": 4, "roi_feat_size": 2}
    )
    scores, deltas = head(torch.randn(4, 4, 2, 2))
    assert scores.shape == (4, 3)
    rois = torch.tensor([[0.0, 4, 4, 20, 24]]).repeat(4, 1)
    labels, weights = torch.tensor([1, 3, 3, 0]), torch.ones(4)
    losses = head.loss(scores, deltas, rois, labels, weights, rois[:, 1:], torch.ones(4, 4))
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in head.parameters())


def test_the_documented_loss_of_your_own():
    exec(documented("py", "LogRankLoss"), {})
    head = MODELS.build(HEAD | {"loss_cls": {"type": "LogRankLoss", "delta": 0.5}, "loss_bbox": L1})
    logits, labels = torch.randn(5, 3), torch.tensor([0, 3, 3, 2, 3])
    losses = head.ranking_losses(
        logits, labels, torch.zeros(5).long(), (torch.zeros(2, 4),) * 2, lambda: torch.ones(())
    )
    plain = RankingLoss(lambda ranking: (ranking.rank / ranking.rank_positive).log(), delta=0.5)
    assert losses["loss_bbox"] == 1
    assert losses["loss_cls"] == plain(logits, labels)


def test_what_is_missing_is_named():
    done = start_python("import sys; sys.modules['mmdet'] = None; import alrp_triton.integrations.mmdet")
    assert "pip install 'alrp-triton[mmdet]'" in done.stderr
