"""The recipe for LibreYOLO, as its page has it: what it replaces, and what it leaves alone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("libreyolo", reason="needs LibreYOLO: pip install libreyolo")
pytest.importorskip("pycocotools", reason="needs pycocotools: pip install '.[metrics]'")

from libreyolo import LibreYOLO, LibreYOLO9
from libreyolo.models.yolo9.loss import BCELoss

from alrp_triton import rank_sort_loss
from alrp_triton.calibration import Affine, Calibration, fold

PAGE = Path(__file__).parents[1] / "docs" / "integrations" / "libreyolo.md"


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """The names of the page, after all of its blocks have run."""
    names = {"__name__": "libreyolo_recipe"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("libreyolo"))
        for block in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S):
            exec(compile(block, PAGE.name, "exec"), names)
        names["folder"] = Path.cwd()
    return names


def test_the_scores_are_ranked(shown):
    """Of every head that is trained, with LibreYOLO's own targets; nothing else of the loss changes."""
    network = shown["model"].model
    for head in (network.head, network.aux_head):
        assert type(head._get_loss_fn("cpu").cls_loss) is shown["RankedScores"]
    loss, given = network.head._get_loss_fn("cpu"), []
    ranked = loss.cls_loss
    ranked.register_forward_pre_hook(lambda _, arguments: given.append(arguments))
    images, targets = torch.rand(2, 3, 64, 64), torch.zeros(2, 3, 5)
    targets[0, 0] = torch.tensor([1, 0.1, 0.2, 0.6, 0.7])
    try:
        network.train()
        found = network(images, targets)
        logits, wanted, _ = given[0]
        assert (wanted > 0).sum() >= 1
        expected = rank_sort_loss(logits, wanted > 0, wanted[wanted > 0]).total
        own = network.head(network.neck(*network.backbone(images)), targets, (64, 64))
        torch.testing.assert_close(own["cls_loss"], 2 * expected, rtol=0.01, atol=1e-3)
        found["total_loss"].backward()
        assert all(tower[-1].weight.grad.any() for tower in network.head.cv3)
        assert network(images, torch.zeros(2, 0, 5))["cls_loss"] == 0  # without objects
    finally:
        network.eval()


def test_the_stock_model_is_left_alone(shown):
    stock = LibreYOLO9(None, size="t", nb_classes=2, device="cpu")
    assert type(stock.model.head._get_loss_fn("cpu").cls_loss) is BCELoss
    for path in (shown["trained"]["last_checkpoint"], shown["folder"] / "calibrated.pt"):
        assert type(LibreYOLO(str(path), device="cpu")) is LibreYOLO9


def test_a_map_folds_into_the_layers_of_the_page(shown):
    model = LibreYOLO9(str(shown["folder"] / "calibrated.pt"), size="t", device="cpu").model.eval()

    @torch.no_grad()
    def scores():
        return model(torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)))["predictions"][:, 4:]

    calibration, before = Calibration(Affine(0.5, 3.0)), scores()
    for tower in model.head.cv3:
        fold(calibration, tower[-1], num_classes=2)
    torch.testing.assert_close(scores(), calibration(before), rtol=1e-4, atol=1e-7)
