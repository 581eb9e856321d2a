"""The DETR family of transformers: the framework's matching, our terms, and what is left to the model's own loss."""

import importlib
import re
import sys

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("scipy")

from detr import FAMILY, LAYERS, NUM_CLASSES, NUM_QUERIES, batch, build, run, terms_of
from torchvision.ops import box_convert, generalized_box_iou
from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig
from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher
from transformers.loss.loss_rt_detr import RTDetrHungarianMatcher

import alrp_triton
from alrp_triton.framework import RankingLoss
from alrp_triton.integrations import transformers as integration

every_model = pytest.mark.parametrize("name", FAMILY)
denoising_models = pytest.mark.parametrize("name", [name for name in FAMILY if name in ("RTDetr", "RTDetrV2", "DFine")])


def error(ranking):
    """A formula that the package does not have."""
    return ranking.num_false_positives.log1p()


def use_custom(model, criterion=None, **options):
    return integration.use_classification_loss(model, RankingLoss(error) if criterion is None else criterion, **options)


WITH_BOXES = {"alrp": integration.use_alrp, "rank_sort": integration.use_rank_sort}
SCORES_ONLY = {"ap": integration.use_ap, "ndcg": integration.use_ndcg, "custom": use_custom}
every_member = pytest.mark.parametrize("use", {**WITH_BOXES, **SCORES_ONLY}.values(), ids=[*WITH_BOXES, *SCORES_ONLY])


def matcher_of(config):
    if hasattr(config, "matcher_class_cost"):
        return RTDetrHungarianMatcher(config)
    return DeformableDetrHungarianMatcher(config.class_cost, config.bbox_cost, config.giou_cost)


def by_hand(config, logits, boxes, targets):
    """aLRP and the mean L1 loss of one layer, image by image and query by query, with one-hot labels."""
    indices = matcher_of(config)({"logits": logits, "pred_boxes": boxes}, targets)
    one_hot, errors, distances = torch.zeros_like(logits, dtype=torch.int64), [], []
    for image, (queries, objects) in enumerate(indices):
        for query, index in sorted(zip(queries.tolist(), objects.tolist())):
            one_hot[image, query, targets[image]["class_labels"][index]] = 1
            pair = boxes[image, query][None], targets[image]["boxes"][index][None]
            errors.append(1 - generalized_box_iou(*(box_convert(box, "cxcywh", "xyxy") for box in pair))[0, 0])
            distances.append((pair[0] - pair[1]).abs().sum())
    errors = torch.stack(errors)  # (1 - GIoU) / 2 / (1 - tau) with tau = 0.5
    loss = alrp_triton.alrp_loss(logits.flatten(), one_hot.flatten(), errors)
    return loss.cls, loss.loc, torch.stack(distances).mean()


def normal_queries(name, outputs):
    """The last layer's logits and boxes, without denoising queries."""
    return outputs.logits[:, -NUM_QUERIES:], outputs.pred_boxes[:, -NUM_QUERIES:].clamp(0, 1)


@pytest.mark.parametrize("auxiliary_loss", [True, False])
@every_model
def test_terms_equal_those_computed_by_hand(name, auxiliary_loss):
    model = integration.use_alrp(build(name, auxiliary_loss), alrp_triton.ALRPLoss(self_balance=3.0), l1_weight=2.0)
    inputs = batch((3, 0, 2))
    outputs = run(model, inputs)
    layers = {"": normal_queries(name, outputs)}
    suffix = "_{}" if name in ("ConditionalDetr", "DeformableDetr", "DabDetr") else "_aux_{}"
    for i, layer in enumerate(outputs.auxiliary_outputs or []):
        layers[suffix.format(i)] = layer["logits"], layer["pred_boxes"]
    proposals = suffix == "_aux_{}"
    assert len(layers) == (LAYERS + proposals if auxiliary_loss else 1)

    expected = {}
    for key, layer in layers.items():
        cls, loc, l1 = by_hand(model.config, *layer, inputs["labels"])
        expected |= {f"loss_cls{key}": cls, f"loss_loc{key}": 3.0 * loc, f"loss_bbox{key}": 2.0 * l1}
    own = {key for key in outputs.loss_dict if "_dn_" in key or "fgl" in key or "ddf" in key}
    assert set(outputs.loss_dict) - own == set(expected)
    for key, value in expected.items():
        torch.testing.assert_close(outputs.loss_dict[key], value, msg=lambda text, key=key: f"{key}: {text}")
    torch.testing.assert_close(outputs.loss, sum(outputs.loss_dict.values()))

    # Of the last layer, whose logits reach the loss on no other way.
    (got,) = torch.autograd.grad(outputs.loss, outputs.logits, retain_graph=True)
    (want,) = torch.autograd.grad(expected["loss_cls"], outputs.logits, retain_graph=True)
    assert want.abs().sum() > 0
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-7)
    (got,) = torch.autograd.grad(outputs.loss, outputs.pred_boxes, retain_graph=True)
    (want,) = torch.autograd.grad(expected["loss_loc"] + expected["loss_bbox"], outputs.pred_boxes)
    assert want.abs().sum() > 0
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


class Recorder(nn.Module):
    """A criterion of either kind."""

    def forward(self, *arguments, **options):
        self.arguments, self.options = arguments, options
        zero = arguments[0].sum() * 0
        return alrp_triton.ALRPLossOutput(zero, zero, zero) if len(arguments) == 4 else zero


@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("use", [integration.use_alrp, integration.use_classification_loss])
def test_matched_queries_are_the_positives(use, per_image):
    """Predictions so good that anyone can tell the matching, given to the loss by hand."""
    model = use(build(auxiliary_loss=False), Recorder(), per_image=per_image)
    boxes = torch.tensor([[[0.2, 0.2, 0.2, 0.2], [0.8, 0.8, 0.2, 0.2], [0.5, 0.5, 0.1, 0.1], [0.5, 0.2, 0.1, 0.3]]])
    pred_boxes, logits = boxes.repeat(2, 1, 1), torch.zeros(2, 4, NUM_CLASSES)
    labels = [
        {"boxes": boxes[0, [3, 1]], "class_labels": torch.tensor([0, 2])},
        {"boxes": boxes[0, [2, 0, 3]] + 0.01, "class_labels": torch.tensor([1, 1, 2])},
    ]
    loss, terms, auxiliary = model.loss_function(logits, labels, "cpu", pred_boxes, model.config)
    assert auxiliary is None
    assert loss == sum(terms.values())

    (given, positives, *given_boxes), options = (
        model.loss_function.criteria[0].arguments,
        model.loss_function.criteria[0].options,
    )
    assert given is logits  # neither flattened nor copied
    assert positives.tolist() == [[3, 2, 3, 0], [1, 3, 1, 2]]
    if use is integration.use_alrp:
        predicted, true = given_boxes
        rows = [boxes[0, [1, 3]], boxes[0, [0, 2, 3]]]
        torch.testing.assert_close(predicted, box_convert(torch.cat(rows), "cxcywh", "xyxy"))
        torch.testing.assert_close(true, box_convert(torch.cat([rows[0], rows[1] + 0.01]), "cxcywh", "xyxy"))
    else:
        assert given_boxes == []
        assert type(options["num_positives"]) is int  # counted already: nothing to wait for
        assert options.pop("num_positives") == 5
    if per_image:
        groups = options.pop("groups")
        assert groups.tolist() == [[0] * 4, [1] * 4]
        assert groups.stride() == (1, 0)  # B numbers, not B Q
    assert options == {}


@pytest.mark.parametrize(
    ("use", "name"),
    [*((integration.use_ap, name) for name in FAMILY), (integration.use_ndcg, "DabDetr"), (use_custom, "RTDetr")],
)
def test_only_the_classification_is_replaced(use, name):
    inputs = batch()
    plain, outputs = run(build(name), inputs), run(use(build(name)), inputs)
    config = build(name).config
    weights, layers = {}, LAYERS + 1
    if name in ("ConditionalDetr", "DeformableDetr", "DabDetr"):  # weighted where they are added up, not in loss_dict
        weights = {"loss_bbox": config.bbox_loss_coefficient, "loss_giou": config.giou_loss_coefficient}
        layers = LAYERS
    expected, replaced = {}, 0
    for key, value in plain.loss_dict.items():
        if ("loss_ce" in key or "loss_vfl" in key) and "_dn_" not in key:
            replaced += 1
        elif "cardinality" not in key:
            expected[key] = value * weights.get(re.sub(r"_\d+$", "", key), 1)
    kept = {key: value for key, value in outputs.loss_dict.items() if "loss_cls" not in key}
    assert set(kept) == set(expected)
    for key, value in kept.items():
        torch.testing.assert_close(value, expected[key])
    assert len(outputs.loss_dict) - len(kept) == replaced == layers


@denoising_models
def test_denoising_queries_keep_the_models_own_loss(name):
    inputs = batch()
    model = integration.use_alrp(build(name), l1_weight=0)
    plain, outputs = run(build(name), inputs), run(model, inputs)
    noisy = [key for key in plain.loss_dict if "_dn_" in key]
    assert {key.split("_dn")[0] for key in noisy} >= {"loss_vfl", "loss_bbox", "loss_giou"}
    for key in noisy:
        assert outputs.loss_dict[key] == plain.loss_dict[key] > 0 or "ddf" in key
    num_noisy = outputs.logits.shape[1] - NUM_QUERIES
    assert num_noisy > 0
    (gradient,) = torch.autograd.grad(outputs.loss, outputs.logits)
    assert not gradient[:, :num_noisy].any()  # of the last layer, in whose ranking they are not
    assert gradient[:, num_noisy:].any()
    assert all(outputs.loss_dict[key] == 0 for key in outputs.loss_dict if "bbox" in key and key not in noisy)


@pytest.mark.skipif("DFine" not in FAMILY, reason="this version of transformers has no D-FINE")
def test_d_fine_clips_boxes_to_the_image():
    """In every output, as its own loss does: boxes that reach beyond are what a model that has learned gives."""
    plain, model = build("DFine"), integration.use_ap(build("DFine"))
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, LAYERS, NUM_QUERIES, NUM_CLASSES, generator=generator)
    boxes = torch.rand(2, LAYERS, NUM_QUERIES, 4, generator=generator) * 2 - 0.5
    bins = 4 * (model.config.max_num_bins + 1)
    others = {
        "enc_topk_logits": scores[:, 0],
        "enc_topk_bboxes": boxes[:, 1],
        "predicted_corners": torch.randn(2, LAYERS, NUM_QUERIES, bins, generator=generator),
        "initial_reference_points": boxes.clamp(0.1, 0.9),
    }
    arguments = scores[:, -1], batch()["labels"], "cpu", boxes[:, -1], model.config, scores, boxes
    own, terms = (each.loss_function(*arguments, **others)[1] for each in (plain, model))
    kept = {name for name in own if "vfl" not in name}
    assert {"loss_bbox", "loss_giou_aux_0", "loss_fgl_aux_1", f"loss_bbox_aux_{LAYERS - 1}"} <= kept
    for name in kept:
        assert terms[name] == own[name]


@every_model
def test_inference_is_unchanged(name):
    images = {"pixel_values": batch()["pixel_values"]}
    plain, outputs = run(build(name).eval(), images), run(integration.use_alrp(build(name)).eval(), images)
    assert outputs.loss is None
    assert torch.equal(outputs.logits, plain.logits)
    assert torch.equal(outputs.pred_boxes, plain.pred_boxes)


@every_model
@pytest.mark.parametrize("objects", [(0, 0), (0, 3)])
def test_images_without_objects(name, objects):
    model = integration.use_alrp(build(name))
    outputs = run(model, batch(objects))
    ranked = {key: value for key, value in outputs.loss_dict.items() if "_dn_" not in key}
    outputs.loss.backward()
    if objects == (0, 0):
        assert all(value == 0 for value in ranked.values())
        assert outputs.loss == 0
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert any(gradient.any() for gradient in gradients) == any(objects)


@pytest.mark.parametrize("per_image", [False, True])
@every_member
def test_every_member_under_autocast(use, per_image):
    model = use(build(), per_image=per_image)
    recorded = []
    model.loss_function.criteria[0].register_forward_pre_hook(lambda _, arguments: recorded.append(arguments))
    with torch.autocast("cpu", torch.bfloat16):
        outputs = run(model, batch())
    outputs.loss.backward()
    assert all(value.dtype == torch.float32 for value in outputs.loss_dict.values())
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    logits, _, *boxes = recorded[0]
    assert logits.dtype == torch.bfloat16  # ranked as they are
    assert all(box.dtype == torch.float32 for box in boxes)


def test_a_model_in_half_precision():
    inputs = batch()
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    model = integration.use_alrp(build()).bfloat16()
    loss = run(model, inputs).loss
    loss.backward()
    assert loss.isfinite()


@pytest.mark.parametrize("objects", [(3, 2), (4, 0, 1)])
def test_per_image_is_the_mean_over_the_images_with_objects(objects):
    inputs = batch(objects)
    criterion = alrp_triton.ALRPLoss(self_balance=2.0)
    model = integration.use_alrp(build(auxiliary_loss=False), criterion, l1_weight=0, per_image=True)
    loss = run(model, inputs).loss
    whole = integration.use_alrp(model, criterion, l1_weight=0)
    single = []
    for b, n in enumerate(objects):
        if n:
            image = {"pixel_values": inputs["pixel_values"][b : b + 1], "labels": [inputs["labels"][b]]}
            single.append(run(whole, image).loss)
    torch.testing.assert_close(loss, sum(single) / len(single), rtol=1e-4, atol=1e-5)
    assert abs(loss - run(whole, inputs).loss) > 1e-4  # the images do not just add up


@every_member
def test_wrong_arguments_are_named_and_change_nothing(use):
    resnet = ResNetConfig(embedding_size=8, hidden_sizes=[8] * 4, depths=[1] * 4, layer_type="basic")
    softmax = DetrForObjectDetection(
        DetrConfig(use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=resnet)
    )
    boxes = use in WITH_BOXES.values()
    unsuitable = alrp_triton.APLoss() if boxes else alrp_triton.RankSortLoss()
    model = build()
    wrong = [
        ((nn.Linear(1, 1), None), {}, TypeError, "model must be one of Cond.*; got Linear"),
        ((nn.DataParallel(model), None), {}, TypeError, "model must be.*not yet wrapped; got DataParallel"),
        ((softmax, None), {}, TypeError, "model must be.*; got DetrForObjectDetection"),
        ((model, 0.5), {}, TypeError, "criterion must be.*Module; got float"),
        ((model, alrp_triton.APLoss), {}, TypeError, "criterion must be.*Module; got type"),
        ((model, unsuitable), {}, TypeError, f"criterion must be a loss on.*; got {type(unsuitable).__name__}"),
        ((model, None), {"per_image": 1}, TypeError, "per_image must be a bool; got int"),
    ]
    if boxes:
        wrong += [
            ((model, None), {"l1_weight": "5"}, TypeError, "l1_weight must be a number or None; got str"),
            ((model, None), {"l1_weight": -1.0}, ValueError, r"l1_weight must be.*>= 0; got -1\.0"),
            ((model, None), {"l1_weight": float("nan")}, ValueError, "l1_weight must be.*; got nan"),
        ]
    own = model.loss_function
    for arguments, options, kind, message in wrong:
        with pytest.raises(kind, match=message):
            use(*arguments, **options)
    assert model.loss_function is own


def test_a_classification_loss_has_no_default():
    with pytest.raises(TypeError, match=r"criterion must be.*NoneType"):
        integration.use_classification_loss(build(), None)


def test_a_config_with_more_layers_than_the_loss_has_criteria():
    model = integration.use_alrp(build())
    extra = torch.zeros(LAYERS + 2, 1, NUM_QUERIES, NUM_CLASSES)
    coord = torch.full((LAYERS + 2, 1, NUM_QUERIES, 4), 0.5)
    with pytest.raises(ValueError, match=f"config: expected at most {LAYERS} supervised outputs, got {LAYERS + 2}"):
        model.loss_function(extra[-1], batch((1,))["labels"], "cpu", coord[-1], model.config, extra, coord)


def test_a_class_of_ones_own_that_derives_from_a_supported_one():
    class Detector(type(build())):
        pass

    model = integration.use_alrp(Detector(build().config), l1_weight=0)
    assert set(terms_of(run(model, batch()))) >= {"loss_cls", "loss_loc_1"}


def test_where_the_framework_is_missing_an_error_says_what_to_install(monkeypatch):
    for module in [module for module in sys.modules if module.startswith("alrp_triton.integrations.transformers")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'alrp-triton\[transformers\]'"):
        importlib.import_module("alrp_triton.integrations.transformers")
