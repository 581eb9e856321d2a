"""The examples beyond detection: each of their losses trains, and their measures are what they claim to be."""

import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import normalize, one_hot

pytest.importorskip("sklearn")
sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "beyond_detection"))

import multi_label
import retrieval
import segmentation
import trials
from sklearn.metrics import average_precision_score

GAINS = {"multi_label": 0.1, "segmentation": 0.1, "retrieval": 0.15}
"""What each loss adds at least to the first measure of an untrained network in a quick run."""


@pytest.fixture
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("name", GAINS)
def test_every_loss_trains(name, capsys, monkeypatch):
    if name == "segmentation":
        pytest.importorskip("PIL")
    monkeypatch.setattr(sys, "argv", [name, "--quick"])
    runpy.run_path(str(Path(trials.__file__).with_name(f"{name}.py")), run_name="__main__")
    printed = capsys.readouterr().out
    reached = {row: float(score) for row, score in re.findall(r"^\| ([\w ]+) \| [\d.]* \| ([\d.]+) ±", printed, re.M)}
    untrained = reached.pop("untrained")
    assert len(reached) >= 2
    assert min(reached.values()) > untrained + GAINS[name], printed
    assert "no difference seen" in printed  # one seed shows none


def test_multi_label_measures_the_mean_over_classes():
    labels = torch.randint(0, 2, (40, multi_label.CLASSES))
    given = nn.Flatten(1)
    assert multi_label.scores(given, labels.float(), labels) == {"macro mAP": 1.0}
    noise = torch.randn(labels.shape)
    each = [average_precision_score(labels[:, k], noise[:, k]) for k in range(multi_label.CLASSES)]
    assert multi_label.scores(given, noise, labels)["macro mAP"] == pytest.approx(np.mean(each))


def test_segmentation_measures_every_certainty():
    certainty = torch.randint(0, 6, (2, 1, 8, 8)) / 5
    perfect = segmentation.scores(nn.Identity(), certainty, certainty)
    assert perfect == pytest.approx({"AP": 1.0, "mean AP over certainty": 1.0})
    # Any annotator's pixels are found, but not in the order of their certainty.
    found = segmentation.scores(nn.Identity(), (certainty > 0) * (2 - certainty), certainty)
    assert found["AP"] == pytest.approx(1)
    assert found["mean AP over certainty"] < 0.8


def test_edges_are_rare_and_graded():
    pytest.importorskip("PIL")
    images, certainty = segmentation.photographs()
    assert images.shape == (2, 3, 427, 640)
    for level in range(1, 6):
        share = (certainty > level / 5 - 0.1).float().mean((1, 2, 3))
        torch.testing.assert_close(share, torch.full((2,), 0.06 - level / 100), rtol=0.01, atol=0)


def test_retrieval_leaves_the_query_out():
    classes = torch.arange(60) % 5
    assert retrieval.scores(nn.Identity(), one_hot(classes).float(), classes) == {"mAP": 1.0, "recall@1": 1.0}
    embedded = torch.randn(60, 4)
    cosines = normalize(embedded, dim=1) @ normalize(embedded, dim=1).T
    others = ~torch.eye(60, dtype=torch.bool)
    each = [
        average_precision_score(classes[rest] == classes[query], cosines[query, rest])
        for query, rest in enumerate(others)
    ]
    assert retrieval.scores(nn.Identity(), embedded, classes)["mAP"] == pytest.approx(np.mean(each))


@pytest.mark.parametrize("loss", ["AP Loss", "SmoothAP"])
def test_retrieval_ranks_for_each_query(loss):
    embedded, classes = torch.randn(12, 3), torch.arange(12) % 3
    cosines, labels = retrieval.pairs(embedded, classes)
    assert (labels.diagonal() == -1).all()
    together = retrieval.loss_of(loss, cosines * 10, labels)
    each = [retrieval.loss_of(loss, cosines[i : i + 1] * 10, labels[i : i + 1]) for i in range(12)]
    torch.testing.assert_close(together, torch.stack(each).mean())


def test_the_verdict_asks_for_two_standard_errors_from_the_better_usual_loss():
    results = {"a": {"AP": [0.5, 0.6, 0.7]}, "b": {"AP": [0.1, 0.2, 0.3]}}
    results |= {"c": {"AP": [0.6, 0.71, 0.8]}, "d": {"AP": [0.9, 0.6, 0.6]}, "e": {"AP": [0.4, 0.49, 0.6]}}
    assert trials.verdict(results, ["a", "b"], ["c", "d", "e"]) == (
        "c: ahead of a in AP (+0.103 ± 0.003); d: no difference seen from a in AP (+0.100 ± 0.153); "
        "e: behind a in AP (-0.103 ± 0.003)."
    )
