"""Ultralytics YOLO trained with ranking losses: what is ranked, checkpoints, resuming, and options that do not fit."""

from __future__ import annotations

import csv
import pickletools
import zipfile
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from yolo_scenes import TRAINING, write_data, write_model
from yolo_scenes import alone as alone

from alrp_triton import ALRPLoss, APLoss, RankSortLoss
from alrp_triton.boxes import iou

pytest.importorskip("ultralytics", reason="needs Ultralytics")

from ultralytics import YOLO
from ultralytics.cfg import get_cfg
from ultralytics.utils.loss import E2ELoss
from ultralytics.utils.metrics import probiou

from alrp_triton.integrations.ultralytics import RankedTrainer, restore, use_ap, use_loss, use_ndcg, use_rank_sort
from alrp_triton.integrations.ultralytics._scores import RankedScores, rank
from alrp_triton.integrations.ultralytics._training import Ranking

TASKS = ("detect", "segment", "obb")
KINDS = [(task, end2end) for task in TASKS for end2end in (False, True)]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, str]:
    return {task: write_data(tmp_path_factory.mktemp(task), task, number=4) for task in TASKS}


class Recorded(nn.Module):
    """A criterion of one value that keeps what it is called with."""

    def __init__(self, takes_boxes: bool = True) -> None:
        super().__init__()
        self.takes_boxes, self.calls = takes_boxes, []

    def forward(self, logits: Tensor, labels: Tensor, *boxes: Tensor, **options: Any) -> Any:
        self.calls.append((logits.detach(), labels, boxes, options))
        loss = logits.sum() * 0 + 3
        return SimpleNamespace(cls=loss, loc=torch.nan) if self.takes_boxes else loss


def batch_for(task: str) -> dict[str, Tensor]:
    """Two images with an object each, of class 1 and 0, and one image without."""
    boxes = torch.tensor([[0.4, 0.5, 0.3, 0.25], [0.5, 0.5, 0.5, 0.5]])
    batch = {
        "img": torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)),
        "batch_idx": torch.tensor([0.0, 2.0]),
        "cls": torch.tensor([[1.0], [0.0]]),
        "bboxes": boxes if task != "obb" else torch.cat([boxes, torch.tensor([[0.3], [0.0]])], 1),
        "masks": torch.zeros(3, 16, 16),
        "sem_masks": torch.zeros(3, 16, 16),
    }
    batch["masks"][0, 6:10, 4:9] = batch["masks"][2, 4:12, 4:12] = 1
    return batch


def build(folder: Path, task: str, end2end: bool) -> nn.Module:
    torch.manual_seed(0)
    model = YOLO(write_model(folder, task, end2end)).model.train()
    model.args = get_cfg(overrides={"cls": 5.0, "epochs": 3})
    return model


@pytest.mark.parametrize(("task", "end2end"), KINDS)
def test_what_is_ranked(tmp_path, task, end2end):
    model, batch = build(tmp_path, task, end2end), batch_for(task)
    own = model.loss(batch)
    criterion = Recorded()
    rank(model.criterion, criterion, per_image=False)
    total, terms = model.loss(batch)
    assert float(terms["cls_loss"]) == pytest.approx(5 * 3)
    # The others remain; losses of the batch are those of an image times their number.
    assert {name: float(value) for name, value in terms.items() if name != "cls_loss"} == pytest.approx(
        {name: float(value) for name, value in own[1].items() if name != "cls_loss"}
    )
    index = list(terms).index("cls_loss")
    assert total[index].item() == pytest.approx(3 * 5 * 3)
    assert len(criterion.calls) == 1 + end2end  # with weights 0.8 and 0.2
    for (logits, labels, (pred, target), options), most in zip(criterion.calls, (10, 1)):
        assert logits.shape == (3, 64 + 16, 2)
        assert labels.shape == (3, 64 + 16)
        assert not options
        places = (labels < 2).nonzero()[:, 0].tolist()
        assert set(places) == {0, 2}
        assert [labels[i].min().item() for i in range(3)] == [1, 2, 0]
        assert all(1 <= places.count(image) <= most for image in (0, 2))
        assert pred.shape == target.shape == (len(places), 4)
        if task != "obb":
            expected = {0: [16.0, 24.0, 35.2, 40.0], 2: [16.0, 16.0, 48.0, 48.0]}
            assert target.flatten().tolist() == pytest.approx([x for image in places for x in expected[image]])


@pytest.mark.parametrize("name", ["yolov8n", "yolov9t", "yolov10n", "yolo12n", "yolo26n"])
def test_models_of_the_framework(name):
    model, batch = YOLO(f"{name}.yaml").model.train(), batch_for("detect")
    model.args = get_cfg(overrides={"cls": 1.0})
    model.criterion = model.init_criterion()
    rank(model.criterion, RankSortLoss(), per_image=False)
    total, terms = model.loss(batch)
    # Scores are the same for all anchors of a level at first, and nearly all of them are negative.
    assert 0.9 < float(terms["cls_loss"]) < 1.3
    total.sum().backward()
    assert model.model[-1].cv3[0][-1].weight.grad.any()


def test_oriented_boxes_are_ranked_by_their_own_iou(tmp_path):
    """Upright boxes stand for them; the sorting of Rank & Sort Loss needs only their IoU."""
    model, criterion = build(tmp_path, "obb", False), Recorded()
    loss = model.init_criterion()
    seen = {}
    assigner = loss.assigner

    def spy(scores: Tensor, boxes: Tensor, *rest: Tensor) -> Any:
        found = assigner(scores, boxes, *rest)
        seen.update(boxes=boxes[found[3]], true=found[1][found[3]].clone())
        return found

    loss.assigner = spy
    rank(loss, criterion, per_image=False)
    model.criterion = loss
    model.loss(batch_for("obb"))
    ((_, _, (pred, target), _),) = criterion.calls
    expected = probiou(seen["boxes"], seen["true"]).flatten()
    assert expected.max() > 0
    torch.testing.assert_close(iou(pred, target), expected.clamp(0, 1))


def test_one_ranking_for_each_image(tmp_path):
    model, criterion = build(tmp_path, "detect", False), Recorded(takes_boxes=False)
    model.criterion = model.init_criterion()
    rank(model.criterion, criterion, per_image=True)
    model.loss(batch_for("detect"))
    ((_, labels, boxes, options),) = criterion.calls
    assert boxes == ()
    assert options["num_positives"] == int((labels < 2).sum())
    assert options["groups"].tolist() == [[image] * 80 for image in range(3)]


def test_images_without_objects(tmp_path):
    model, batch = build(tmp_path, "detect", True), batch_for("detect")
    batch |= {"batch_idx": torch.zeros(0), "cls": torch.zeros(0, 1), "bboxes": torch.zeros(0, 4)}
    model.criterion = model.init_criterion()
    rank(model.criterion, RankSortLoss(), per_image=False)
    total, terms = model.loss(batch)
    assert float(terms["cls_loss"]) == 0
    total.sum().backward()
    assert all(torch.isfinite(each.grad).all() for each in model.parameters() if each.grad is not None)


def train(yolo: YOLO, data: str, folder: Path, **options: Any) -> Path:
    """Returns the folder of the training."""
    name = options.pop("name", "run")
    yolo.train(data=data, project=str(folder), name=name, **{**TRAINING, **options})
    return folder / name


def rows_of(run: Path) -> list[dict[str, float]]:
    with open(run / "results.csv") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def globals_of(checkpoint: Path) -> set[str]:
    """The modules of all classes and functions that a checkpoint needs."""
    with zipfile.ZipFile(checkpoint) as archive:
        (name,) = (each for each in archive.namelist() if each.endswith("data.pkl"))
        opcodes = pickletools.genops(archive.read(name))
        return {str(argument).split(" ")[0] for code, argument, _ in opcodes if code.name == "GLOBAL"}


@pytest.mark.parametrize(("task", "end2end"), KINDS)
def test_training(tmp_path, data, task, end2end):
    seen = []
    yolo = use_rank_sort(YOLO(write_model(tmp_path, task, end2end)), cls=3.0)
    for event in ("on_train_epoch_end", "on_fit_epoch_end"):
        yolo.add_callback(event, lambda trainer: seen.extend([trainer.model.criterion, trainer.ema.ema.criterion]))
    run = train(yolo, data[task], tmp_path, epochs=1)
    for criterion in seen:
        for part in (criterion.one2many, criterion.one2one) if isinstance(criterion, E2ELoss) else (criterion,):
            assert isinstance(part.bce.__self__, RankedScores)
            assert part.hyp.cls == 3
    assert len({id(criterion) for criterion in seen}) == 2
    (row,) = rows_of(run)
    # A ranking and a sorting error, below 1 each; binary cross entropy of 80 anchors is far above at the start.
    assert all(0 < row[f"{part}/cls_loss"] < 6 for part in ("train", "val"))
    for name in ("last.pt", "best.pt"):
        modules = globals_of(run / "weights" / name)
        assert any(each.startswith("ultralytics.") for each in modules)
        assert not [each for each in modules if each.startswith("alrp_triton")]
    assert type(yolo.model).__module__ == "ultralytics.nn.tasks"


def interrupt(yolo: YOLO) -> YOLO:
    """Stop its training after the first epoch."""

    def stop(trainer: Any) -> None:
        if trainer.epoch == 0:
            raise KeyboardInterrupt

    yolo.add_callback("on_fit_epoch_end", stop)
    return yolo


def interrupted(yolo: YOLO, data: str, folder: Path, **options: Any) -> Path:
    """The checkpoint of a training of three epochs after one of them."""
    with pytest.raises(KeyboardInterrupt):
        train(interrupt(yolo), data, folder, epochs=3, **options)
    return folder / "run" / "weights" / "last.pt"


def error_of(pred: Tensor, target: Tensor) -> Tensor:
    return 1 - iou(pred, target)


def test_resuming_with_what_does_not_change_the_loss(tmp_path, data):
    def use(yolo: YOLO, **options: Any) -> YOLO:
        box_error = FunctionType(error_of.__code__, globals())  # as in another process
        return use_loss(yolo, RankSortLoss(box_error=box_error, **options))

    last = interrupted(use(YOLO(write_model(tmp_path))), data["detect"], tmp_path)
    yolo = use(YOLO(last), monitor=True, backend="torch")
    yolo.train(resume=True)
    assert yolo.trainer.epoch == 2


@pytest.mark.parametrize("end2end", [False, True])
def test_resuming(tmp_path, data, end2end):
    last = interrupted(use_rank_sort(YOLO(write_model(tmp_path, end2end=end2end))), data["detect"], tmp_path)
    assert not [each for each in globals_of(last) if each.startswith("alrp_triton")]
    # Without the loss; nothing of this package takes part.
    with pytest.raises(NotImplementedError, match=r"AdamW of a training with RankSortLoss.*resume it with"):
        YOLO(last).train(resume=True)
    for other in (use_ap, lambda yolo: use_rank_sort(yolo, cls=1.0), lambda yolo: use_rank_sort(yolo, per_image=True)):
        with pytest.raises(ValueError, match=r"resume: expected the loss of the checkpoint, RankSortLoss\(.*cls=2"):
            other(YOLO(last)).train(resume=True)
    seen = []
    yolo = use_rank_sort(YOLO(last))
    yolo.add_callback("on_train_epoch_end", lambda trainer: seen.append((trainer.epoch, trainer.model.criterion)))
    yolo.train(resume=True)
    assert [epoch for epoch, _ in seen] == [1, 2]
    criterion = seen[-1][1]
    if end2end:  # the weight of the branch goes on from where it was
        assert (criterion.updates, criterion.o2m) == (3, pytest.approx(0.1))
        criterion = criterion.one2one
    assert isinstance(criterion.bce.__self__, RankedScores)
    assert len(rows_of(last.parents[1])) == 3
    assert type(yolo.trainer.optimizer) is torch.optim.AdamW


def test_a_training_with_the_frameworks_loss_is_not_resumed_with_another(tmp_path, data):
    last = interrupted(YOLO(write_model(tmp_path)), data["detect"], tmp_path)
    with pytest.raises(ValueError, match="resume: expected the loss of the checkpoint, its own, got RankSortLoss"):
        use_rank_sort(YOLO(last)).train(resume=True)
    YOLO(last).train(resume=True)


def test_trainers_of_several_gpus(tmp_path, data):
    """Each process gets the trainer's class and the callbacks as pickles, and reads a checkpoint itself. Only the first
    one calls the callbacks of the start."""
    cloudpickle = pytest.importorskip(
        "cloudpickle", reason="needs cloudpickle, as Ultralytics' trainers of several GPUs"
    )
    yolo = use_rank_sort(YOLO(write_model(tmp_path)))
    last = interrupted(yolo, data["detect"], tmp_path)
    sent = cloudpickle.dumps((RankedTrainer, use_rank_sort(YOLO(last)).callbacks))
    kind, callbacks = cloudpickle.loads(sent)
    del callbacks["on_pretrain_routine_start"]
    trainer = kind(overrides={"model": str(last), "resume": str(last)}, _callbacks=callbacks)
    seen = []
    trainer.add_callback("on_train_epoch_end", lambda trainer: seen.append(trainer.model.criterion.bce.__self__))
    trainer.train()
    assert all(isinstance(one, RankedScores) for one in seen)
    assert type(trainer.optimizer) is torch.optim.AdamW
    with pytest.raises(RuntimeError, match="RankedTrainer: expected a loss"):
        train(YOLO(write_model(tmp_path)), data["detect"], tmp_path, trainer=RankedTrainer)


def test_fine_tuning_and_one_class(tmp_path, data):
    stock = train(YOLO(write_model(tmp_path, end2end=True)), data["detect"], tmp_path, name="stock", epochs=1)
    yolo = use_ap(YOLO(stock / "weights" / "best.pt"), per_image=True)
    run = train(yolo, data["detect"], tmp_path, single_cls=True, epochs=1)
    assert yolo.model.model[-1].nc == 1
    assert 0 < rows_of(run)[0]["train/cls_loss"] < 2


def test_half_precision(tmp_path):
    """Ultralytics' trainer has it on GPUs alone."""
    model, batch = build(tmp_path, "detect", True), batch_for("detect")
    model.criterion = model.init_criterion()
    rank(model.criterion, RankSortLoss(), per_image=False)
    full = model.loss(batch)[1]
    with torch.autocast("cpu", torch.bfloat16):
        total, half = model.loss(batch)
    assert float(half["cls_loss"]) == pytest.approx(float(full["cls_loss"]), rel=0.05)
    total.sum().backward()
    assert all(torch.isfinite(each.grad).all() for each in model.parameters() if each.grad is not None)


def test_a_second_training_has_the_loss_and_restore_takes_it(tmp_path, data):
    def train_again() -> tuple[Any, float]:
        train(yolo, data["detect"], tmp_path, epochs=1, val=False)
        return yolo.trainer.model.criterion.bce, yolo.trainer.args.cls

    yolo = use_ndcg(use_ap(YOLO(write_model(tmp_path))), cls=4.0)
    owners = [getattr(one, "__self__", None) for each in yolo.callbacks.values() for one in each]
    assert len({owner for owner in owners if isinstance(owner, Ranking)}) == 1
    assert train_again()[1] == 4
    bce, cls = train_again()
    assert isinstance(bce.__self__, RankedScores)
    assert cls == 4
    with pytest.raises(NotImplementedError, match="tune: expected a YOLO without a ranking loss"):
        yolo.tune(data=data["detect"])
    bce, cls = (restore(yolo), train_again())[1]
    assert type(bce) is nn.BCEWithLogitsLoss
    assert cls == 0.5
    assert "tune" not in vars(yolo)


def test_statistics_in_the_log(tmp_path, data):
    yolo = use_loss(YOLO(write_model(tmp_path)), APLoss(monitor=True), cls=1.0)
    kept = []
    yolo.add_callback("on_train_batch_end", lambda trainer: kept.append(float(trainer.loss_items["cls_loss"])))
    for row, losses in zip(rows_of(train(yolo, data["detect"], tmp_path)), (kept[:2], kept[2:])):
        assert row["train/cls"] == pytest.approx(sum(losses) / 2, abs=1e-4)
        assert row["train/num_positives"] > 1
        assert 0 <= row["train/precision"] <= 1
        assert "train/weight" not in row


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cls_pw": 0.5}, "cls_pw: expected 0, since a ranking has no weights of classes, got 0.5"),
        ({"cls": 1.0}, r"cls: expected 2, as use_... has it, got train\(cls=1\)"),
        ({"distill_model": "yolo26n.pt"}, "distill_model: expected None with a ranking loss, got 'yolo26n.pt'"),
    ],
)
def test_options_that_a_ranking_does_not_have(tmp_path, data, options, message):
    with pytest.raises(ValueError, match=message):
        train(use_rank_sort(YOLO(write_model(tmp_path))), data["detect"], tmp_path, **options)


def test_mistakes(tmp_path):
    yolo = YOLO(write_model(tmp_path))
    for call, error, message in (
        (lambda: use_rank_sort(yolo.model), TypeError, "yolo: expected an ultralytics.YOLO .*, got DetectionModel"),
        (lambda: use_rank_sort(YOLO("yolo11n-cls.yaml")), ValueError, "yolo: expected a task of .*, got 'classify'"),
        (lambda: use_rank_sort(YOLO("yolo11n-pose.yaml")), ValueError, "yolo: expected a task of .*, got 'pose'"),
        (lambda: use_loss(yolo, APLoss), TypeError, "criterion: expected a torch.nn.Module, got the class APLoss"),
        (lambda: use_loss(yolo, ALRPLoss()), TypeError, "criterion: expected one without state.*self_balance=None"),
        (lambda: use_ap(yolo, cls=-1), ValueError, "cls: expected a finite number >= 0, got -1"),
        (lambda: use_ap(yolo, per_image=1), TypeError, "per_image: expected a bool, got int"),
    ):
        with pytest.raises(error, match=message):
            call()
    assert not [one for each in yolo.callbacks.values() for one in each if hasattr(one, "__self__")]
    use_loss(yolo, ALRPLoss(self_balance=None))
