"""Whole detectors from the example configurations, trained and tested by MMEngine's runner on a small data set."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

pytest.importorskip("mmdet", reason="needs MMDetection: pip install '.[frameworks]'")
pytest.importorskip("torchvision", reason="needs torchvision: pip install '.[frameworks]'")

import mmengine.config.config
from adapters import balances, heard, one_process
from mmdet.registry import MODELS
from mmdet_setup import CLASSES, NUM_IMAGES, drawn_batch, logged, small_config, write_coco
from mmengine.hooks import Hook
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.runner import Runner
from yapf.yapflib import yapf_api

import alrp_triton

CONFIGS = [
    "alrp_retinanet_r50_fpn_100e_coco500",
    "alrp_retinanet_r50_fpn_atss_100e_coco500",
    "alrp_atss_r50_fpn_100e_coco500",
    "alrp_fovea_r50_fpn_100e_coco500",
    "alrp_faster_rcnn_r50_fpn_100e_coco500",
]
every_config = pytest.mark.parametrize("name", CONFIGS)
STEPS = NUM_IMAGES // 2


@pytest.fixture(autouse=True)
def unformatted(monkeypatch):
    """MMEngine writes configurations many times, and spends most of a short run on laying out their text."""
    for place in (mmengine.config.config, yapf_api):  # MMEngine's, and that of the fork
        monkeypatch.setattr(place, "FormatCode", lambda text, **_: (text, True), raising=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coco")
    write_coco(folder)
    return folder


def config_of(name, data, folder, work="work", **settings):
    (folder / work).mkdir(exist_ok=True)
    config = small_config(name, data, folder / work, **settings)
    config.experiment_name = f"{folder.name}-{work}"
    return config


def build(name, data, folder, **changes):
    """The detector alone, with initialised weights."""
    config = config_of(name, data, folder, epochs=1)
    for path, value in changes.items():
        config.merge_from_dict({path: value})
    torch.manual_seed(0)
    model = MODELS.build(config.model)
    model.init_weights()
    return model.train()  # which sets its normalisation to evaluation


class Watch(Hook):
    """Keeps the parameters that training starts from, and what the detector returns in tests."""

    def before_train(self, runner):
        self.parameters = {name: p.detach().clone() for name, p in runner.model.named_parameters() if p.requires_grad}

    def before_test(self, runner):
        self.outputs = []

    def after_test_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.outputs += outputs


@pytest.mark.thinned(3)
@every_config
def test_trains_and_predicts(name, data, tmp_path):
    runner = Runner.from_cfg(config_of(name, data, tmp_path, epochs=2))
    watch = Watch()
    runner.register_hook(watch)
    runner.train()

    losses = logged(runner, "loss")
    assert len(losses) == 2 * STEPS
    assert all(0 <= loss < float("inf") for loss in losses)
    parameters = dict(runner.model.named_parameters())
    assert not [n for n, before in watch.parameters.items() if torch.equal(before, parameters[n])]
    assert len(balances(runner.model)) == (2 if "faster" in name else 1)
    for balance in balances(runner.model):
        # The hook has ended the periods.
        assert balance.weight not in (50.0, 1.0)
        assert balance.count == 0

    runner.test()
    assert len(watch.outputs) == NUM_IMAGES
    for output in watch.outputs:
        found = output.pred_instances
        assert len(found.bboxes) == len(found.scores) == len(found.labels) <= 100
        assert found.bboxes.isfinite().all()
        assert ((found.scores > 0.05) & (found.scores <= 1)).all()
        assert ((found.labels >= 0) & (found.labels < len(CLASSES))).all()


@pytest.mark.parametrize(
    ("name", "heads"), [(CONFIGS[0], ["bbox_head"]), (CONFIGS[-1], ["rpn_head", "roi_head.bbox_head"])]
)
def test_statistics_are_logged(name, heads, data, tmp_path):
    config = config_of(name, data, tmp_path, epochs=1)
    config.merge_from_dict({f"model.{head}.loss_cls.monitor": True for head in heads})
    config.custom_hooks.append({"type": "StatisticsHook", "interval": 1})
    runner = Runner.from_cfg(config)
    runner.train()
    for head in heads:
        criterion = runner.model.get_submodule(head).loss_cls
        assert criterion.stats
        for key, value in criterion.stats.items():
            values = logged(runner, f"{head}.loss_cls/{key}")
            assert len(values) == STEPS
            assert values[-1] == value.item()
        # After the epoch it is another one.
        assert logged(runner, f"{head}.loss_cls.self_balance/weight") == [50.0] * STEPS


def by_epochs(config, length):
    config.train_cfg.update(max_epochs=length)


def by_iterations(config, length):
    """With a checkpoint within a period."""
    config.train_cfg = {"type": "IterBasedTrainLoop", "max_iters": length, "val_interval": 1000}
    config.train_dataloader.sampler = {"type": "InfiniteSampler", "shuffle": True}
    config.param_scheduler = config.param_scheduler[:1]
    config.default_hooks.checkpoint.update(by_epoch=False, interval=4)
    config.log_processor.by_epoch = False


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    ("name", "loop", "until", "length", "file", "steps"),
    [
        ("alrp_faster_rcnn_r50_fpn_100e_coco500", by_epochs, 2, 3, "epoch_2.pth", 3 * STEPS),
        ("alrp_retinanet_r50_fpn_atss_100e_coco500", by_iterations, 4, 7, "iter_4.pth", 7),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(name, loop, until, length, file, steps, data, tmp_path, monkeypatch):
    # MMEngine's checkpoints hold its own classes, which PyTorch does not load by default.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    runs = {}
    for work, end, resume in (("whole", length, None), ("first", until, None), ("second", length, "first")):
        config = config_of(name, data, tmp_path, work, epochs=length, augment=False)
        loop(config, end)
        config.train_cfg.val_interval = 1000
        if resume:
            config.update(resume=True, load_from=str(tmp_path / resume / file))
        runs[work] = Runner.from_cfg(config)
        runs[work].train()

    whole, second = logged(runs["whole"], "loss"), logged(runs["second"], "loss")
    assert len(whole) == len(second) == steps
    assert whole == second
    assert len(set(whole)) == steps
    expected, found = runs["whole"].model.state_dict(), runs["second"].model.state_dict()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert all(balance.weight != 50.0 for balance in balances(runs["second"].model))
    if loop is by_iterations:  # 3 iterations see all images once, so that 7 end two periods
        assert balances(runs["second"].model)[0].count == 1


@pytest.mark.thinned(2)
@every_config
def test_training_steps_lower_the_loss(name, data, tmp_path):
    """With constant weights, since otherwise what is minimised changes."""
    model = build(name, data, tmp_path)
    for module in model.modules():
        if isinstance(module, alrp_triton.ALRPLoss):
            module.self_balance = None
    optimizer = OptimWrapper(torch.optim.Adam((p for p in model.parameters() if p.requires_grad), 3e-3))
    values = [float(model.train_step(drawn_batch(), optimizer)["loss"]) for _ in range(25)]
    assert min(values[-3:]) < 0.8 * values[0]


@every_config
def test_mixed_precision(name, data, tmp_path, monkeypatch):
    """MMEngine's own wrapper; without a GPU it refuses, though all that it does works there in bfloat16, too."""
    monkeypatch.setattr("mmengine.optim.optimizer.amp_optimizer_wrapper.is_cuda_available", lambda: True)
    model = build(name, data, tmp_path)
    parameters = [p for p in model.parameters() if p.requires_grad]
    # Not representable in bfloat16. PyTorch's (2.12) convolutions of a single cell give any gradient in it, hence 128.
    objects, size = ((10.3, 8.2, 40.4, 44.7), (30.1, 40.6, 70.9, 62.3)), 128
    expected = model(**model.data_preprocessor(drawn_batch(objects, size), True), mode="loss")
    exact = torch.autograd.grad(sum(expected.values()), parameters)
    calls = [heard(module) for module in model.modules() if isinstance(module, alrp_triton.ALRPLoss)]
    optimizer = torch.optim.SGD(parameters, 1e-3)
    gradients = []
    optimizer.register_step_pre_hook(lambda *_: gradients.extend(p.grad.clone() for p in parameters))
    found = model.train_step(drawn_batch(objects, size), AmpOptimWrapper(dtype="bfloat16", optimizer=optimizer))

    for key, loss in expected.items():
        torch.testing.assert_close(float(found[key]), float(loss), rtol=0.1, atol=0.02)
    assert len(gradients) == len(parameters)
    flat, flat_exact = (torch.cat([gradient.flatten() for gradient in some]) for some in (gradients, exact))
    assert torch.cosine_similarity(flat, flat_exact, dim=0) > 0.95
    assert calls
    for ((logits, _, pred_boxes, true_boxes),) in calls:
        assert (logits if isinstance(logits, torch.Tensor) else logits[0]).dtype == torch.bfloat16
        assert pred_boxes.dtype == true_boxes.dtype == torch.float32
        assert "fovea" in name or set(map(tuple, true_boxes.tolist())) <= set(
            map(tuple, torch.tensor(objects).tolist())
        )


@every_config
def test_distributed_training_finds_a_gradient_for_every_parameter(name, data, tmp_path):
    """Also where no image has an object: the next forward would raise otherwise."""
    with one_process(tmp_path):
        model = MMDistributedDataParallel(build(name, data, tmp_path), find_unused_parameters=False)
        optimizer = OptimWrapper(torch.optim.SGD((p for p in model.parameters() if p.requires_grad), 1e-3))
        for objects, lowest in (((), 0.0), ((), 0.0), (((10, 8, 40, 44),), 1e-3)):
            loss = model.train_step(drawn_batch(objects), optimizer)["loss"]
            assert lowest <= loss < float("inf")
            assert (loss == 0) == (not objects)


def test_copies_have_criteria_of_their_own(data, tmp_path):
    model = build("alrp_faster_rcnn_r50_fpn_100e_coco500", data, tmp_path)

    def losses(model):
        return {key: float(value) for key, value in model.train_step(drawn_batch(), Untouched()).items()}

    expected = losses(model)
    assert set(expected) == {"loss", "loss_rpn_cls", "loss_rpn_bbox", "loss_cls", "loss_bbox"}
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), build(CONFIGS[-1], data, tmp_path)]
    twins[2].load_state_dict(model.state_dict(), strict=True)
    for balance in balances(model):
        balance.step_epoch()
    assert losses(model)["loss_bbox"] != expected["loss_bbox"]
    for twin in twins:
        assert [balance.weight for balance in balances(twin)] == [50.0, 50.0]
        assert losses(twin) == expected
    restored = build(CONFIGS[-1], data, tmp_path)
    restored.load_state_dict(model.state_dict(), strict=True)
    assert [b.weight for b in balances(restored)] == [b.weight for b in balances(model)]


class Untouched(OptimWrapper):
    """Takes no step."""

    def __init__(self):
        super().__init__(torch.optim.SGD([torch.zeros(1)], 0.0))

    def update_params(self, loss, step_kwargs=None, zero_kwargs=None):
        pass
