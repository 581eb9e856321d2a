"""RF-DETR's life with a ranking loss: trained by its trainer, resumed, calibrated, shown at its own threshold."""

import copy
import warnings

import pytest
import torch
from torch import nn

pytest.importorskip("rfdetr")
pytest.importorskip("pytorch_lightning")
pytest.importorskip("pycocotools")
pytest.importorskip("faster_coco_eval", reason="RF-DETR's trainer evaluates by it")

import pytorch_lightning as lightning
import rfdetr
from rf_detr import NUM_CLASSES, NUM_QUERIES, SMALL, batch, build, images_of, model_config, run, total, train_config
from rfdetr.training import build_trainer
from torchvision.ops import box_convert, box_iou

from alrp_triton import ALRPLoss, APLoss, RankSortLoss
from alrp_triton.integrations.rfdetr import (
    RankingCallback,
    calibrate,
    collect,
    restore,
    thresholds,
    use_alrp,
    use_loss,
    use_rank_sort,
)
from alrp_triton.metrics import evaluate

OBJECTS = (2, 1, 2, 1)


def fit(folder, epochs, callback, resume=None, trainer_of=build_trainer, **settings):
    """A training of two steps an epoch, as RF-DETR does it; its module and trainer."""
    module, config = build(), train_config(folder, epochs=epochs, use_ema=False, **settings)
    trainer = trainer_of(
        config, model_config(), accelerator="cpu", limit_val_batches=0, log_every_n_steps=1, enable_model_summary=False
    )
    trainer.callbacks.append(callback)
    module.train_config = config
    data = [batch((2, 1), seed) for seed in (1, 2)]
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=None), ckpt_path=resume)
    return module, trainer


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """A training of two epochs, and one that was stopped after one and resumed; the folder of the latter."""
    first, second = (tmp_path_factory.mktemp(name) for name in ("whole", "stopped"))
    whole = fit(first, 2, RankingCallback(ALRPLoss(monitor=True)), lr_scheduler="step")
    fit(second, 1, RankingCallback(ALRPLoss(monitor=True)), lr_scheduler="step")
    again = fit(second, 2, RankingCallback(ALRPLoss(monitor=True)), second / "last.ckpt", lr_scheduler="step")
    return whole, again, second


def test_a_resumed_training_gives_the_same_numbers(resumed):
    (whole, trainer), (again, _), _ = resumed
    balance = whole.criterion.ranking_criterion.self_balance
    assert balance.weight != 50
    assert balance.count == 2  # of the last epoch
    for (name, got), want in zip(again.state_dict().items(), whole.state_dict().values()):
        torch.testing.assert_close(got, want, msg=lambda text, name=name: f"{name}: {text}")
    logged = trainer.logged_metrics
    assert logged["train/ranking/weight"] == balance.weight
    assert {"train/loss_cls", "train/loss_loc", "train/loss_bbox", "train/ranking/precision"} <= logged.keys()
    assert not any("loss_ce" in name or "loss_giou" in name for name in logged)


def test_resuming_with_another_loss_warns_and_so_does_resuming_without(resumed, tmp_path):
    *_, folder = resumed
    with pytest.warns(UserWarning, match=r"the checkpoint's is ALRPLoss\(.*, now APLoss\(\), per"):
        fit(tmp_path, 3, RankingCallback(APLoss()), folder / "last.ckpt")
    with pytest.warns(UserWarning, match="add the following callbacks: .*RankingCallback"):
        fit(tmp_path, 3, lightning.Callback(), folder / "last.ckpt")


def test_what_is_another_loss():
    def resume(ranking, per_image=False):
        callback = RankingCallback()
        callback.load_state_dict(saved)
        callback.on_train_start(None, use_loss(module, ranking, per_image=per_image))
        return callback.state_dict()

    module, saved = build(), {"ranking": None}
    saved = resume(ALRPLoss())
    for other, per_image, name in (
        (ALRPLoss(tau=0.7), False, r"ALRPLoss\(tau=0.7, .*"),
        (ALRPLoss(self_balance=2.0), False, r"ALRPLoss\(self_balance=2.0\), .*"),
        (ALRPLoss(), True, r"ALRPLoss\(.*\), per_image=True"),
    ):
        with pytest.warns(UserWarning, match=rf"the checkpoint's is ALRPLoss\(.*\), per_image=False, now {name}$"):
            resume(other, per_image)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resume(ALRPLoss(backend="torch", monitor=True))


def test_checkpoints_are_stock_models(resumed):
    (_, _), (again, _), folder = resumed
    loaded = rfdetr.RFDETR.from_checkpoint(folder / "last.ckpt", device="cpu")
    for (name, got), want in zip(loaded.model.model.state_dict().items(), again.model.state_dict().values()):
        assert torch.equal(got, want), name
    module = build()
    module.load_state_dict(restore(again).state_dict(), strict=True)


def test_the_callback_needs_a_module_or_a_model_that_ranks():
    with pytest.raises(TypeError, match=r"criterion: expected a torch\.nn\.Module, got str"):
        RankingCallback("ap")
    callback, module = RankingCallback(), use_alrp(build())
    callback.setup(None, module, "fit")
    run(module, batch())
    callback.on_train_epoch_start(None, module)
    assert module.criterion.ranking_criterion.self_balance.weight != 50


def test_the_callback_gives_the_loss_once_and_says_if_there_is_none():
    module, callback = build(), RankingCallback(ALRPLoss())
    with pytest.raises(TypeError, match=r"pl_module: expected one after use_..., or RankingCallback\(ranking\), got R"):
        RankingCallback().setup(None, module, "fit")
    RankingCallback().setup(None, module, "validate")
    callback.setup(None, module, "fit")
    run(module, batch())
    callback.on_train_epoch_start(None, module)
    balance = module.criterion.ranking_criterion.self_balance
    callback.setup(None, module, "fit")  # of a second training
    assert module.criterion.ranking_criterion.self_balance is balance
    assert balance.weight != 50
    callback.setup(None, restore(module), "fit")
    callback.setup(None, another := build(), "fit")
    weights = [each.criterion.ranking_criterion.self_balance.weight for each in (module, another)]
    assert weights == [50, 50]
    assert weights[0] is not weights[1]


def shown(model, data):
    """The detections of ``predict`` at its default threshold, and how many objects they find."""
    number = hits = 0
    for image, target in zip(images_of(len(OBJECTS), 3), data[1]):
        found = model.predict(image, include_source_image=False)
        true = box_convert(target["boxes"], "cxcywh", "xyxy") * image.shape[-1]
        overlap = box_iou(true, torch.from_numpy(found.xyxy).float()) > 0.5
        right = target["labels"][:, None] == torch.from_numpy(found.class_id)
        number, hits = number + len(found), hits + int((overlap & right).any(1).sum())
    return number, hits


def test_a_calibrated_detector_shows_what_it_finds():
    module, data = use_rank_sort(build()), batch(OBJECTS, seed=3)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=2e-3)
    for step in range(60):
        optimizer.zero_grad()
        total(module, run(module, data, seed=step)[1]).backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of weights that are not pretrained
        model = rfdetr.RFDETRNano(**SMALL)
    model.model.model = module.model.eval()
    before, number = evaluate(*collect(model, [data])), shown(model, data)
    report = calibrate(model, [data])
    after, at_default = evaluate(*collect(model, [data])), shown(model, data)
    assert before.ap == after.ap > 0.5
    assert number == (0, 0)
    assert at_default == (6, 6)  # every object, and nothing else
    assert thresholds(module, [data]) == pytest.approx(report.thresholds, rel=1e-3, nan_ok=True)


@pytest.mark.parametrize("per_class", [False, True])
def test_scores_are_the_calibrated_ones(per_class):
    module, data = build(), batch((5, 5), seed=4)
    nn.init.normal_(module.model.class_embed.weight, std=0.3)
    module.model.backbone.eval()
    modes, start = [part.training for part in module.modules()], copy.deepcopy(module.state_dict())
    truth, found = collect(module, [data])
    assert [part.training for part in module.modules()] == modes
    assert len(found) == 2 * NUM_QUERIES
    assert [one["category_id"] for one in truth["annotations"]] == torch.cat([t["labels"] for t in data[1]]).tolist()
    module.eval()
    before = run(module, data)[0]["pred_logits"].detach().double().sigmoid()
    calibration = calibrate(module, [data], per_class=per_class, min_per_class=1, iou=0.01).calibration
    assert bool(calibration.per_class) == per_class
    outputs = run(module, data)[0]
    expected = calibration(before, torch.arange(NUM_CLASSES).expand_as(before))
    torch.testing.assert_close(outputs["pred_logits"].sigmoid(), expected.float(), rtol=1e-3, atol=1e-6)
    changed = {name for name, value in module.state_dict().items() if not torch.equal(value, start[name])}
    assert changed == {"model.class_embed.weight", "model.class_embed.bias"}  # not the choice of proposals


def test_wrong_models_and_data_are_named():
    samples, targets = batch((1,))
    with pytest.raises(TypeError, match="model: expected an RFDETR or an RFDETRModelModule, got RankSortLoss"):
        calibrate(RankSortLoss(), [(samples, targets)])
    with pytest.raises(ValueError, match="data: expected batches of images and labels, got none"):
        collect(build(), [])
    targets[0]["labels"] += NUM_CLASSES
    module = build()
    with pytest.raises(ValueError, match=f"labels of image 0: [4567], expected below {NUM_CLASSES}") as kept:
        thresholds(module, [(samples, targets)])
    # Also while the error lives, as in a notebook.
    assert torch.is_grad_enabled()
    assert module.training
    assert module.model.training
    assert kept.traceback
