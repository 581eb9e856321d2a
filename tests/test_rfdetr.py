"""RF-DETR: one ranking for each output and group of queries in one call, and what remains the framework's own."""

import copy
import importlib
import sys

import pytest
import torch
from torch import nn

pytest.importorskip("rfdetr")
pytest.importorskip("pytorch_lightning")

from adapters import assert_same_gradients, by_batch_or_image, own_loss, through_pickle
from rf_detr import GROUPS, NUM_QUERIES, batch, build, run, total
from torchvision.ops import box_convert

from alrp_triton import ALRPLoss, APLoss, NDCGLoss, RankSortLoss
from alrp_triton.integrations.rfdetr import restore, use_alrp, use_ap, use_loss, use_ndcg, use_rank_sort

MEMBERS = {"alrp": use_alrp, "rank_sort": use_rank_sort, "ap": use_ap, "ndcg": use_ndcg}
CRITERIA = [ALRPLoss(self_balance=3.0), RankSortLoss(self_balance=False), APLoss(), NDCGLoss(), own_loss()]


def by_hand(module, outputs, targets, per_image):
    """``loss_cls`` and ``loss_loc``: a call for each output and group of queries, with one-hot labels."""
    ranking = module.criterion.ranking_criterion
    groups, sums = (GROUPS if module.training else 1), [0.0, 0.0]
    for layer in [outputs, *outputs["aux_outputs"], outputs["enc_outputs"]]:
        for group in range(groups):
            mine = slice(group * NUM_QUERIES, (group + 1) * NUM_QUERIES)
            logits, boxes = layer["pred_logits"][:, mine], layer["pred_boxes"][:, mine]
            indices = module.criterion.matcher({"pred_logits": logits, "pred_boxes": boxes}, targets, group_detr=1)
            one_hot, predicted, true = torch.zeros_like(logits, dtype=torch.int64), [], []
            for image, (queries, objects) in enumerate(indices):
                for query, index in sorted(zip(queries.tolist(), objects.tolist())):
                    one_hot[image, query, targets[image]["labels"][index]] = 1
                    predicted.append(boxes[image, query])
                    true.append(targets[image]["boxes"][index])
            pairs = [box_convert(torch.stack(each), "cxcywh", "xyxy") for each in (predicted, true)]
            options = {"groups": torch.arange(len(logits))[:, None].expand(logits.shape[:2])} if per_image else {}
            if getattr(ranking, "takes_boxes", False):
                loss = ranking(logits, one_hot, *pairs, **options)
                sums[1] = sums[1] + loss.loc / groups
                sums[0] = sums[0] + loss.cls / groups
            else:
                sums[0] = sums[0] + ranking(logits, one_hot, num_positives=len(true), **options) / groups
    return sums


@pytest.mark.thinned(2)
@by_batch_or_image
@pytest.mark.parametrize("criterion", CRITERIA, ids=repr)
def test_one_call_is_the_mean_over_groups_of_a_call_for_each(criterion, per_image):
    module, data = use_loss(build(), criterion, per_image=per_image), batch((3, 0, 2))
    calls = []
    criterion.register_forward_pre_hook(lambda *_: calls.append(1))
    outputs, terms = run(module, data)
    assert len(calls) == 1
    assert outputs["pred_logits"].shape[1] == GROUPS * NUM_QUERIES
    cls, loc = by_hand(module, outputs, data[1], per_image)
    torch.testing.assert_close(terms["loss_cls"], cls, rtol=1e-4, atol=1e-6)
    inputs = [outputs["pred_logits"], outputs["aux_outputs"][0]["pred_logits"], outputs["enc_outputs"]["pred_logits"]]
    assert_same_gradients(terms["loss_cls"], cls, inputs, atol=1e-6)
    if "loss_loc" in terms:
        torch.testing.assert_close(terms["loss_loc"], loc, rtol=1e-4, atol=1e-6)
        assert_same_gradients(terms["loss_loc"], loc, [outputs["pred_boxes"]], atol=1e-5)


@pytest.mark.parametrize("use", MEMBERS.values(), ids=MEMBERS)
def test_terms_and_weights_of_boxes_remain_the_frameworks(use):
    plain, module, data = build(), use(build()), batch()
    (_, expected), (_, terms) = run(plain, data), run(module, data)
    replaced = {"loss_ce"} if use in (use_ap, use_ndcg) else {"loss_ce", "loss_giou"}
    kept = {name for name in expected if not any(name.startswith(each) for each in (*replaced, "class_error"))}
    assert kept >= {"loss_bbox", "loss_bbox_0", "loss_bbox_enc", "cardinality_error"}
    assert {name: terms[name] for name in kept} == {name: expected[name] for name in kept}
    assert terms.keys() - kept == ({"loss_cls"} if "loss_giou" in kept else {"loss_cls", "loss_loc"})
    weights = module.criterion.weight_dict
    assert {name: weights[name] for name in plain.criterion.weight_dict} == plain.criterion.weight_dict
    assert weights["loss_cls"] == weights["loss_loc"] == 1.0

    total(module, terms).backward()
    trained = [p for p in module.parameters() if p.requires_grad and p.grad is not None]
    assert all(p.grad.isfinite().all() for p in trained)
    assert any(p.grad.any() for p in trained)


def test_evaluation_has_one_group_of_queries_and_counts_nothing():
    module, data = use_alrp(build()).eval(), batch((2, 1))
    outputs, terms = run(module, data)
    assert outputs["pred_logits"].shape[1] == NUM_QUERIES
    cls, loc = by_hand(module, outputs, data[1], per_image=False)
    torch.testing.assert_close(terms["loss_cls"], cls)
    torch.testing.assert_close(terms["loss_loc"], loc / 50)  # without the weight, so that epochs compare
    assert module.criterion.ranking_criterion.self_balance.count == 0


@pytest.mark.parametrize("objects", [(0, 0), (0, 3)])
def test_images_without_objects(objects):
    module = use_alrp(build())
    outputs, terms = run(module, batch(objects))
    assert (terms["loss_cls"] == 0) == (not any(objects))
    total(module, terms).backward()
    assert outputs["pred_logits"].isfinite().all()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle])
def test_copies_have_a_loss_of_their_own_and_restore_takes_it_away(duplicate):
    plain, module, data = build(), use_alrp(build()), batch()
    twin = duplicate(module)
    expected = {name: value.item() for name, value in run(module, data)[1].items()}
    assert {name: value.item() for name, value in run(twin, data)[1].items()} == expected
    twin.criterion.step_epoch()
    weights = [each.criterion.ranking_criterion.self_balance.weight for each in (module, twin)]
    assert weights[1] != weights[0] == 50
    assert use_alrp(twin) is twin  # replaces the loss
    assert restore(twin) is twin
    assert type(twin.criterion) is type(plain.criterion)
    assert twin.criterion.weight_dict == plain.criterion.weight_dict
    assert twin.state_dict().keys() == plain.state_dict().keys()
    assert run(twin, data)[1] == run(plain, data)[1]
    assert restore(twin) is twin


def test_wrong_arguments_are_named_and_change_nothing():
    module, good = build(), ALRPLoss()
    criterion = module.criterion
    for given, options, error, message in [
        (
            (nn.Linear(1, 1), good),
            {},
            TypeError,
            "model: expected an RFDETRModelModule or its SetCriterion, got Linear",
        ),
        ((module, 0.5), {}, TypeError, "criterion: expected a torch.nn.Module, got float"),
        ((module, good), {"per_image": 1}, TypeError, "per_image: expected a bool, got int"),
    ]:
        with pytest.raises(error, match=message):
            use_loss(*given, **options)
    keypoints = copy.copy(criterion)
    keypoints.losses = [*criterion.losses, "keypoints"]
    with pytest.raises(ValueError, match="model: expected one of detection or segmentation, got one with keypoints"):
        use_loss(keypoints, good)
    assert module.criterion is criterion
    samples, targets = batch((2, 2))
    padded = [{**each, "valid": torch.ones(len(each["labels"]), dtype=torch.bool)} for each in targets]
    with pytest.raises(ValueError, match="targets: expected objects alone, got padded ones; leave pad_targets_to at"):
        run(use_ap(module), (samples, padded))


def test_where_the_framework_is_missing_an_error_says_what_to_install(monkeypatch):
    for module in [module for module in sys.modules if module.startswith("alrp_triton.integrations.rfdetr")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "pytorch_lightning", None)
    with pytest.raises(ImportError, match=r"pip install 'alrp-triton\[rfdetr\]'"):
        importlib.import_module("alrp_triton.integrations.rfdetr")
