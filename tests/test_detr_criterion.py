"""Criteria of the DETR family without their frameworks: a double that descends from SetCriterion as D-FINE's does."""

import copy

import pytest
import torch
from adapters import Recorder, through_pickle
from dialect.processes import MARKS, SIZE
from torch import nn

from alrp_triton import ALRPLoss, RankSortLoss, alrp_loss
from alrp_triton.boxes import box_error
from alrp_triton.integrations.detr import restore, use_alrp, use_ap, use_loss, use_ndcg, use_rank_sort

CLASSES = 3


class Criterion(nn.Module):
    """Objects are matched with the queries in a fixed order, which is not that of the queries."""

    def __init__(self):
        super().__init__()
        self.weight_dict = {"loss_mal": 2.0, "loss_bbox": 5.0, "loss_giou": 3.0}
        self.losses = ["mal", "boxes"]

    def match(self, outputs, targets):
        num_queries = outputs["pred_logits"].shape[1]
        return [(num_queries - 1 - torch.arange(n), torch.arange(n)) for n in (len(t["labels"]) for t in targets)]

    def get_loss(self, loss, outputs, targets, indices, num_boxes, **options):
        if loss == "mal":
            return {"loss_mal": outputs["pred_logits"].square().sum()}
        predicted = torch.cat([boxes[queries] for boxes, (queries, _) in zip(outputs["pred_boxes"], indices)])
        true = torch.cat([target["boxes"][objects] for target, (_, objects) in zip(targets, indices)])
        return {"loss_bbox": (predicted - true).abs().sum() / num_boxes, "loss_giou": predicted.sum()}

    def forward(self, outputs, targets):
        layers = {"": outputs, "_pre": outputs["pre_outputs"]}
        layers |= {f"_aux_{i}": each for i, each in enumerate(outputs["aux_outputs"])}
        layers |= {f"_dn_{i}": each for i, each in enumerate(outputs["dn_outputs"])}
        terms = {}
        for suffix, layer in layers.items():
            indices = self.match(layer, targets)
            for loss in self.losses:
                found = self.get_loss(loss, layer, targets, indices, 3.0, values=None)
                terms |= {name + suffix: self.weight_dict[name] * value for name, value in found.items()}
        return terms


def batch():
    generator = torch.Generator().manual_seed(0)

    def layer(num_queries):
        return {
            "pred_logits": torch.randn(2, num_queries, CLASSES, generator=generator).requires_grad_(),
            "pred_boxes": 0.3 + 0.3 * torch.rand(2, num_queries, 4, generator=generator),
        }

    outputs = {**layer(8), "aux_outputs": [layer(8), layer(5)], "pre_outputs": layer(8), "dn_outputs": [layer(6)]}
    labels = [torch.tensor([2, 0, 1]), torch.tensor([1])]
    return outputs, [{"labels": y, "boxes": 0.3 + 0.3 * torch.rand(len(y), 4, generator=generator)} for y in labels]


def by_hand(layer, targets):
    one_hot, predicted, true = torch.zeros_like(layer["pred_logits"], dtype=torch.int64), [], []
    for image, target in enumerate(targets):
        for i in reversed(range(len(target["labels"]))):  # in the order of the queries
            query = one_hot.shape[1] - 1 - i
            one_hot[image, query, target["labels"][i]] = 1
            predicted.append(layer["pred_boxes"][image, query])
            true.append(target["boxes"][i])
    corners = [torch.stack(each) for each in (predicted, true)]
    corners = [torch.cat([each[:, :2] - each[:, 2:] / 2, each[:, :2] + each[:, 2:] / 2], 1) for each in corners]
    return alrp_loss(layer["pred_logits"], one_hot, box_error(*corners, "giou", 0.5))


def test_outputs_of_any_size_are_ranked_and_denoising_queries_are_not():
    (outputs, targets), plain = batch(), Criterion()
    expected, criterion = plain(outputs, targets), use_loss(Criterion(), ALRPLoss(self_balance=2.0))
    terms = criterion(outputs, targets)
    ranked = [outputs, outputs["pre_outputs"], *outputs["aux_outputs"]]
    found = [by_hand(layer, targets) for layer in ranked]
    torch.testing.assert_close(terms["loss_cls"], sum(each.cls for each in found))
    torch.testing.assert_close(terms["loss_loc"], 2.0 * sum(each.loc for each in found))
    boxes = {"loss_bbox", "loss_bbox_pre", "loss_bbox_aux_0", "loss_bbox_aux_1"}
    noisy = {"loss_mal_dn_0", "loss_bbox_dn_0", "loss_giou_dn_0"}
    assert terms.keys() == boxes | noisy | {"loss_cls", "loss_loc"}
    assert all(terms[name] == expected[name] for name in boxes | noisy)
    sum(terms.values()).backward()
    assert all(layer["pred_logits"].grad.any() for layer in [*ranked, *outputs["dn_outputs"]])


class Dino(Criterion):
    """Has its denoising queries where DINO's original code has them."""

    def forward(self, outputs, targets):
        known = outputs["dn_meta"]["output_known_lbs_bboxes"]
        noisy = {**outputs, "dn_outputs": [known, *known["aux_outputs"]]}
        return super().forward(noisy, targets)


def test_denoising_queries_of_dino_are_not_ranked():
    outputs, targets = batch()
    outputs["aux_outputs"], noisy = outputs["aux_outputs"][:1], outputs["aux_outputs"][1]
    expected = use_ap(Criterion())({**outputs, "dn_outputs": [*outputs["dn_outputs"], noisy]}, targets)
    known = {**outputs.pop("dn_outputs")[0], "aux_outputs": [noisy]}
    terms = use_ap(Dino())({**outputs, "dn_meta": {"output_known_lbs_bboxes": known, "pad_size": 6}}, targets)
    assert {"loss_mal_dn_0", "loss_mal_dn_1"} <= terms.keys()
    assert terms == expected


def test_labels_of_other_integers():
    outputs, targets = batch()
    small = [{**target, "labels": target["labels"].int()} for target in targets]
    assert use_alrp(Criterion())(outputs, small) == use_alrp(Criterion())(outputs, targets)


def test_what_cannot_be_ranked_is_named():
    outputs, targets = batch()
    outputs["pre_outputs"]["pred_logits"] = outputs["pre_outputs"]["pred_logits"][..., :1]
    with pytest.raises(ValueError, match=r"outputs: expected logits of one number of classes, got \[1, 3\]"):
        use_ap(Criterion())(outputs, targets)
    outputs, targets = batch()
    for name, wrong, said in (
        ("boxes", 640.0, r"boxes: expected \(centre x, .* units of the image, .* got up to \d+.*; divide pixels by"),
        ("labels", -1, r"labels: expected classes from 0 to 2, got -\d"),
    ):
        with pytest.raises(ValueError, match=said):
            use_ap(Criterion())(outputs, [{**target, name: target[name] * wrong + wrong} for target in targets])
    criterion = use_ap(Criterion())
    criterion.losses = ["boxes"]
    wanted = r"one that asks get_loss for one of \['bce', 'focal', 'labels', 'mal', 'vfl'\] of an output, got none"
    with pytest.raises(ValueError, match=f"criterion: expected {wanted}"):
        criterion(batch()[0], targets)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle])
def test_copies_and_restore(duplicate):
    outputs, targets = batch()
    criterion = use_alrp(Criterion())
    twin = duplicate(criterion)
    assert twin(outputs, targets) == criterion(outputs, targets)
    twin.step_epoch()
    assert twin.ranking_criterion.self_balance.weight != criterion.ranking_criterion.self_balance.weight == 50
    assert list(criterion.state_dict()) == [f"ranking_criterion.self_balance.{n}" for n in ("weight", "sums", "count")]
    assert isinstance(use_rank_sort(twin).ranking_criterion, RankSortLoss)  # replaces the loss
    for use in (use_ap, use_ndcg):
        assert {"loss_cls", "loss_giou", "loss_giou_pre"} <= use(twin)(outputs, targets).keys()
    assert type(restore(twin)) is Criterion
    assert restore(twin).__dict__.keys() == Criterion().__dict__.keys()
    assert twin(outputs, targets) == Criterion()(outputs, targets)


def weight_after_an_epoch(rank):
    criterion = use_alrp(Criterion())
    balance = criterion.ranking_criterion.self_balance
    for cls in ([0.5, 1.5], [2.5], [], [])[rank]:
        balance(torch.tensor(cls), torch.tensor(0.5), True)
    criterion.step_epoch()
    return balance.weight.item(), balance.count.item()


@MARKS[0]
@MARKS[1]
def test_processes_go_on_with_one_weight(pool):
    assert pool.run(weight_after_an_epoch) == [(4.0, 0)] * SIZE  # the mean of 2, 4 and 6


def test_what_the_loss_gets():
    outputs, targets = batch()
    criterion = use_loss(Criterion(), Recorder(takes_boxes=False), per_image=True)
    criterion(outputs, targets)
    logits, labels = criterion.ranking_criterion.arguments
    assert logits.shape == (2 * (8 + 8 + 8 + 5), CLASSES)
    assert [int((labels == each).sum()) for each in range(CLASSES)] == [4, 8, 4]
    groups = criterion.ranking_criterion.options.pop("groups")
    assert groups.tolist() == [
        i for size, first in ((8, 0), (8, 2), (8, 4), (5, 6)) for i in [first] * size + [first + 1] * size
    ]
    criterion.ranking_criterion.assert_told(16)


def test_what_is_no_criterion_of_the_family_is_named():
    with pytest.raises(TypeError, match=r"criterion: expected a criterion of the DETR family, with .*, got Linear"):
        use_ap(nn.Linear(1, 1))
    with pytest.raises(TypeError, match="per_image: expected a bool, got int"):
        use_ap(Criterion(), per_image=1)
