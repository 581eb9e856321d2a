"""The experiments: what is run and when, what is measured, and what the tables say of it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("torchvision")
pytest.importorskip("pycocotools")
pytest.importorskip("sklearn")
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.retinanet import RetinaNetClassificationHead

from alrp_triton.metrics import evaluate
from benchmarks import digits
from benchmarks.digits import experiments as command
from benchmarks.digits import figures, report, run, tables
from benchmarks.digits.data import scenes
from benchmarks.digits.rerank import matched_ious, rerank
from benchmarks.digits.run import Run
from benchmarks.digits.schedule import MAX_EXTENSIONS, Schedule
from benchmarks.digits.settings import ALRP, LEARNING_RATES, LONGER, SETTINGS, TABLES
from benchmarks.training.contenders import EachLogit, cross_entropy, focal
from benchmarks.training.plan import Store
from benchmarks.training.tables import Table, spread

ITERATIONS = 20


def record(wanted: Run, precision: float = 0.5) -> dict:
    """What a run might have found."""
    metrics = dict.fromkeys(run.METRICS, precision + 0.01 * wanted.seed)
    history = {"iteration": [0, 5], "cls": [0.9, 0.8], "loc": [0.5, 0.4], "weight": [50.0, 9.0], "balance": [1.0, 1.0]}
    found = {of: dict(metrics) for of in ("validation", "test", "worst_order", "best_order")}
    return {**vars(wanted), **found, "history": history, "training_seconds": 1.0}


def complete(schedule: Schedule, precision=lambda wanted: 0.5, limit: int = 1000) -> list[Run]:
    """Run the schedule with made-up results; returns the runs in order."""
    done = []
    while (missing := schedule.missing()) and len(done) < limit:
        done.append(missing[0])
        schedule.store.add(record(missing[0], precision(missing[0])))
    return done


@pytest.fixture
def store(tmp_path: Path) -> Store[Run]:
    return Store(tmp_path / "results" / "runs.jsonl", Run)


def test_every_setting_stands_in_a_table_and_every_table_has_settings():
    assert {name for names in TABLES.values() for name in names} == set(SETTINGS)
    assert all(setting.learning_rate_of in (None, ALRP) for setting in SETTINGS.values())


def test_the_first_seed_searches_the_learning_rate_that_the_others_take(store):
    schedule = Schedule(store, ["focal"], range(3), ITERATIONS)
    assert schedule.learning_rate("focal") is None
    assert [r.learning_rate for r in schedule.missing()] == list(LEARNING_RATES)
    done = complete(schedule, lambda wanted: {4e-3: 0.7}.get(wanted.learning_rate, 0.5))
    assert schedule.learning_rate("focal") == 4e-3
    assert [(r.learning_rate, r.seed) for r in done[3:]] == [(4e-3, 1), (4e-3, 2)]
    assert len(done) == len(LEARNING_RATES) + 2


def test_long_runs_take_the_rate_of_the_short_ones(store):
    schedule = Schedule(store, ["ap"], range(2), ITERATIONS)
    done = complete(schedule, lambda wanted: {4e-3: 0.7}.get(wanted.learning_rate, 0.5))
    long = [r for r in done if r.iterations != ITERATIONS]
    assert [(r.learning_rate, r.seed, r.iterations) for r in long] == [(4e-3, s, LONGER * ITERATIONS) for s in (0, 1)]
    assert done[-2:] == long


@pytest.mark.parametrize(("best", "rate"), [(8e-3, 8e-3), (16e-3, 16e-3), (1e-3, 1e-3), (2e-3, 2e-3)])
def test_the_search_is_widened_until_the_best_lies_inside(store, best, rate):
    schedule = Schedule(store, ["focal"], range(1), ITERATIONS)
    done = complete(schedule, lambda wanted: 1 / (1 + abs(math.log2(wanted.learning_rate / best))))
    assert schedule.learning_rate("focal") == rate
    tried = sorted(r.learning_rate for r in done)
    assert tried[0] < rate < tried[-1]


def test_the_search_ends(store):
    schedule = Schedule(store, ["focal"], range(1), ITERATIONS)
    done = complete(schedule, lambda wanted: wanted.learning_rate)
    assert len(done) == len(LEARNING_RATES) + MAX_EXTENSIONS


def test_varied_settings_wait_for_the_rate_of_the_one_that_they_vary(store):
    schedule = Schedule(store, ["constant-5"], range(2), ITERATIONS)
    assert {r.setting for r in schedule.missing()} == {ALRP}
    complete(schedule, lambda wanted: {4e-3: 0.7}.get(wanted.learning_rate, 0.5))
    assert [(r.setting, r.learning_rate) for r in schedule.runs("constant-5")] == [("constant-5", 4e-3)] * 2


def test_an_interrupted_experiment_goes_on_where_it_was(store):
    names, seeds = TABLES[2], range(2)
    first = complete(Schedule(store, names, seeds, ITERATIONS), limit=7)
    again = Store(store.path, Run)
    assert again.records == store.records
    second = complete(Schedule(again, names, seeds, ITERATIONS))
    assert not set(first) & set(second)
    assert Schedule(Store(store.path, Run), names, seeds, ITERATIONS).missing() == []


def test_runs_of_another_length_do_not_count(store):
    complete(Schedule(store, ["focal"], range(1), ITERATIONS))
    assert len(Schedule(store, ["focal"], range(1), ITERATIONS + 1).missing()) == len(LEARNING_RATES)


def test_losses_on_scores_are_torchvisions():
    """Focal loss equals that of torchvision's head, value and gradient; cross entropy is PyTorch's mean over P."""
    torch.manual_seed(0)
    logits = torch.randn(2, 30, 4, requires_grad=True)
    matched = torch.randint(-2, 3, (2, 30))
    targets = [{"labels": torch.tensor([3, 0, 1])}, {"labels": torch.tensor([2, 2, 0])}]
    labels = torch.where(matched == -2, -1, 4)
    for i, target in enumerate(targets):
        labels[i, matched[i] >= 0] = target["labels"][matched[i][matched[i] >= 0]]
    # torchvision divides by the positives of each image and takes the mean; here one image at a time.
    head = RetinaNetClassificationHead(8, 1, 4)
    for i in range(2):
        expected = head.compute_loss([targets[i]], {"cls_logits": logits[i : i + 1]}, [matched[i]])
        found = EachLogit(focal)(logits[i], labels[i], num_positives=int((matched[i] >= 0).sum()))
        torch.testing.assert_close(found, expected)
        gradients = [torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (found, expected)]
        torch.testing.assert_close(*gradients)
    valid = labels[0] >= 0
    one_hot = F.one_hot(labels[0][valid], 5)[:, :4].float()
    expected = F.binary_cross_entropy_with_logits(logits[0][valid], one_hot, reduction="sum") / 3
    torch.testing.assert_close(EachLogit(cross_entropy)(logits[0], labels[0], num_positives=3), expected)
    assert EachLogit(focal)(logits, torch.full((2, 30), -1), num_positives=0) == 0


def test_detections_take_objects_as_cocos_evaluation_does():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 10], [50, 50, 60, 60], [0, 0, 10, 4]])
    labels = torch.tensor([1, 1, 2, 1, 1])
    truth = torch.tensor([[0.0, 0, 10, 10], [50, 50, 60, 58]])
    found = matched_ious(boxes, labels, truth, torch.tensor([1, 1]))
    # A duplicate and a wrong class are false, and so is an overlap of 0.4.
    torch.testing.assert_close(found, torch.tensor([1.0, 0, 0, 0.8, 0]))
    assert matched_ious(boxes, labels, truth[:0], torch.zeros(0, dtype=torch.int64)).tolist() == [0] * 5


def imperfect(truth) -> list[dict[str, torch.Tensor]]:
    """Each object found once, displaced at random, among as many false detections elsewhere."""
    torch.manual_seed(1)
    detections = []
    for i in range(len(truth)):
        target = truth[i][1]
        sides = (target["boxes"][:, 2:] - target["boxes"][:, :2]).repeat(1, 2)
        moved = target["boxes"] + 0.12 * sides * torch.rand(len(sides), 1)
        false = torch.tensor([[200.0, 200, 220, 220]]).expand(len(moved), 4)
        scores = torch.rand(2 * len(moved)).sort(descending=True).values
        shuffled = torch.randperm(2 * len(moved))
        detections.append(
            {
                "boxes": torch.cat([moved, false])[shuffled],
                "labels": target["labels"].repeat(2)[shuffled],
                "scores": scores,
            }
        )
    return detections


def test_reranking_keeps_ap50_and_sets_the_correlation():
    truth = scenes("test", 30)
    detections = imperfect(truth)
    before = [{name: value.clone() for name, value in found.items()} for found in detections]
    metrics = {None: run.measure(detections, truth)}
    for best_first in (False, True):
        reranked = rerank(detections, truth, best_first=best_first)
        metrics[best_first] = run.measure(reranked, truth)
        for old, new in zip(detections, reranked):
            assert sorted(map(tuple, old["boxes"].tolist())) == sorted(map(tuple, new["boxes"].tolist()))
            assert new["scores"].tolist() == sorted(new["scores"].tolist(), reverse=True)
    assert metrics[False]["ap50"] == metrics[None]["ap50"] == metrics[True]["ap50"] < 1
    assert metrics[False]["ap"] < metrics[None]["ap"] < metrics[True]["ap"]
    assert metrics[False]["rho"] == pytest.approx(-1)
    assert metrics[True]["rho"] == pytest.approx(1)
    for old, new in zip(before, detections):
        assert all(torch.equal(old[name], new[name]) for name in old)


def test_scenes_of_validation_and_test_are_not_those_of_training():
    train, validation, test = (scenes(split, 3) for split in ("train", "validation", "test"))
    assert not torch.equal(train[0][0], validation[0][0])
    assert not torch.equal(validation[0][0], test[0][0])
    assert train[0][0].min() >= 0
    assert train[0][0].max() <= 1
    with pytest.raises(IndexError):
        train[3]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that take seconds."""
    monkeypatch.setattr(run, "BATCH_SIZE", 2)
    monkeypatch.setattr(run, "NUM_VALIDATION", 4)
    monkeypatch.setattr(run, "NUM_TEST", 4)


@pytest.mark.parametrize("name", ["cross-entropy", ALRP, "alrp-giou-sb-atss", "constant-5"])
def test_a_run_says_what_the_tables_need(small, name):
    wanted = Run(name, 2e-3, 1, ITERATIONS)
    seen: list[int] = []
    found = run.perform(wanted, torch.device("cpu"), seen.append)
    assert json.loads(json.dumps(found)) == found
    assert {field: found[field] for field in vars(wanted)} == vars(wanted)
    history = found["history"]
    assert seen == history["iteration"] == list(range(0, ITERATIONS, run.RECORDED_EVERY))
    assert all(math.isfinite(value) for column in history.values() for value in column)
    for of in tables.ORDERS.values():
        assert set(found[of]) == set(run.METRICS)
    if name == "cross-entropy":
        assert history["weight"] == [1] * len(seen)
        assert history["balance"][0] > 2  # negatives outweigh positives at first
    else:
        assert history["weight"][0] == (5 if name == "constant-5" else 50)
        assert history["balance"] == pytest.approx([1] * len(seen), abs=2e-3)  # theorem 2


def test_the_same_run_gives_the_same_numbers(small):
    first, second = (run.perform(Run("ap", 2e-3, 0, ITERATIONS), torch.device("cpu"), lambda _: None) for _ in range(2))
    assert first["history"] == second["history"]
    assert first["test"] == second["test"]


def test_mean_and_spread_are_in_hundredths():
    assert spread([0.5, 0.52, 0.54]) == "52.0 ± 2.0"
    assert spread([0.5]) == "50.0"
    assert spread([0.5, None]) == "-"


def test_rows_of_which_a_run_is_missing_are_left_out(store):
    schedule = Schedule(store, [*TABLES[2], *TABLES[3]], range(2), ITERATIONS)
    assert tables.tables(schedule) == []
    complete(Schedule(store, ["ap", ALRP], range(2), ITERATIONS))
    found = {table.name: table for table in tables.tables(schedule)}
    assert [row[0] for row in found["table-2"].rows] == ["AP Loss, L1", "+ GIoU"]
    assert [row[0] for row in found["table-3"].rows] == ["self-balancing"]
    assert [row[0] for row in found["table-5"].rows] == list(tables.ORDERS)
    assert found["table-2"].rows[0][1] == "50.5 ± 0.7"


def test_the_command_reports_into_the_document_and_draws(store, tmp_path, capsys):
    schedule = Schedule(store, list(SETTINGS), range(2), ITERATIONS)
    complete(schedule)
    places = "\n".join(f"<!-- {t.name}:begin -->\nold\n<!-- {t.name}:end -->" for t in tables.tables(schedule))
    page = tmp_path / "design" / "experiments.md"
    page.parent.mkdir()
    page.write_text(f"before\n{places}\nafter\n")
    options = ["--report", "--seeds", "2", "--iterations", str(ITERATIONS)]
    assert command.main([*options, "--results", str(store.path), "--docs", str(tmp_path)]) == 0
    text = page.read_text()
    assert "old" not in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert text.count("\n| --- |") == 7
    assert {p.name for p in (tmp_path / "images").iterdir()} == {"experiments-balance.png", "experiments-weights.png"}
    assert "Table 5" in capsys.readouterr().out
    assert report.fill(text, tables.tables(schedule)) == text


def test_a_table_without_a_place_is_an_error(store):
    with pytest.raises(ValueError, match="table-2"):
        report.fill("no places", [Table("table-2", "", ["loss"], [["AP"]])])


def test_figures_wait_for_their_runs(store, tmp_path):
    schedule = Schedule(store, list(SETTINGS), range(1), ITERATIONS)
    assert figures.draw(schedule, tmp_path / "images") == []


def test_the_page_shows_the_results_that_are_committed():
    """Its tables are those of the committed runs, in every digit."""
    options = command.parse_arguments(["--report"])
    schedule = command.schedule_of(options)
    assert schedule.missing() == []
    page = (digits.ROOT / "docs" / "design" / "experiments.md").read_text(encoding="utf-8")
    assert report.fill(page, tables.tables(schedule)) == page


def test_every_setting_prepares_a_detector():
    for setting in SETTINGS.values():
        model = setting.prepare(run.build_detector(10, 128))
        assert isinstance(model, RetinaNet)
        assert hasattr(model.head, "ranking_criterion")


def test_measure_is_the_metrics_packages():
    truth = scenes("test", 30)
    detections = imperfect(truth)
    expected = evaluate(*run.to_coco(detections, truth))
    assert run.measure(detections, truth)["olrp"] == pytest.approx(expected.olrp, abs=1e-5)
