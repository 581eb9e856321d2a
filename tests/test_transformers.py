"""The DETR family of transformers: the framework's matching, our terms, and what is left to the model's own loss."""

import re

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("scipy")

from adapters import Recorder, assert_same_gradients, by_batch_or_image, heard, of_either_kind
from detr import (
    DETR,
    FAMILY,
    LAYERS,
    MEMBERS,
    NUM_CLASSES,
    NUM_QUERIES,
    WITH_PROPOSALS,
    batch,
    build,
    every_member,
    every_model,
    layers_of,
    run,
)
from torchvision.ops import box_convert, generalized_box_iou
from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher
from transformers.loss.loss_rt_detr import RTDetrHungarianMatcher

from alrp_triton import ALRPLoss, alrp_loss
from alrp_triton.integrations.transformers import use_alrp, use_ap, use_loss


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
    loss = alrp_loss(logits.flatten(), one_hot.flatten(), errors)
    return loss.cls, loss.loc, torch.stack(distances).mean()


@pytest.mark.parametrize("auxiliary_loss", [True, False])
@every_model
def test_terms_equal_those_computed_by_hand(name, auxiliary_loss):
    model = use_loss(build(name, auxiliary_loss), ALRPLoss(self_balance=3.0), l1_weight=2.0)
    inputs = batch((3, 0, 2))
    outputs = run(model, inputs)
    # Without denoising queries, which come first.
    layers = {"": (outputs.logits[:, -NUM_QUERIES:], outputs.pred_boxes[:, -NUM_QUERIES:].clamp(0, 1))}
    suffix = "_{}" if name in DETR else "_aux_{}"
    for i, layer in enumerate(outputs.auxiliary_outputs or []):
        layers[suffix.format(i)] = layer["logits"], layer["pred_boxes"]
    assert len(layers) == (layers_of(name) if auxiliary_loss else 1)

    expected, found = {}, [by_hand(model.config, *layer, inputs["labels"]) for layer in layers.values()]
    for name, factor, values in zip(("loss_cls", "loss_loc"), (1.0, 3.0), zip(*found)):
        expected[name] = factor * sum(values)
    expected |= {f"loss_bbox{key}": 2.0 * l1 for key, (_, _, l1) in zip(layers, found)}
    own = {key for key in outputs.loss_dict if "_dn_" in key or "fgl" in key or "ddf" in key}
    assert set(outputs.loss_dict) - own == set(expected)
    for key, value in expected.items():
        torch.testing.assert_close(outputs.loss_dict[key], value, msg=lambda text, key=key: f"{key}: {text}")
    torch.testing.assert_close(outputs.loss, sum(outputs.loss_dict.values()))
    # Of the last layer, whose logits reach the loss on no other way.
    assert_same_gradients(outputs.loss, found[0][0], [outputs.logits])
    assert_same_gradients(outputs.loss, 3.0 * found[0][1] + 2.0 * found[0][2], [outputs.pred_boxes], atol=1e-6)


@by_batch_or_image
@of_either_kind
def test_matched_queries_are_the_positives(takes_boxes, per_image):
    """Predictions so good that anyone can tell the matching, given to the loss by hand."""
    model = use_loss(build(auxiliary_loss=False), Recorder(takes_boxes), per_image=per_image)
    boxes = torch.tensor([[[0.2, 0.2, 0.2, 0.2], [0.8, 0.8, 0.2, 0.2], [0.5, 0.5, 0.1, 0.1], [0.5, 0.2, 0.1, 0.3]]])
    pred_boxes, logits = boxes.repeat(2, 1, 1), torch.zeros(2, 4, NUM_CLASSES)
    labels = [
        {"boxes": boxes[0, [3, 1]], "class_labels": torch.tensor([0, 2])},
        {"boxes": boxes[0, [2, 0, 3]] + 0.01, "class_labels": torch.tensor([1, 1, 2])},
    ]
    loss, terms, auxiliary = model.loss_function(logits, labels, "cpu", pred_boxes, model.config)
    assert auxiliary is None
    assert loss == sum(terms.values())

    criterion = model.loss_function.criterion
    given, positives, *given_boxes = criterion.arguments
    assert given.shape == (2 * 4, NUM_CLASSES)
    assert positives.tolist() == [3, 2, 3, 0, 1, 3, 1, 2]  # image after image
    if takes_boxes:
        predicted, true = given_boxes
        rows = [boxes[0, [1, 3]], boxes[0, [0, 2, 3]]]
        torch.testing.assert_close(predicted, box_convert(torch.cat(rows), "cxcywh", "xyxy"))
        torch.testing.assert_close(true, box_convert(torch.cat([rows[0], rows[1] + 0.01]), "cxcywh", "xyxy"))
    else:
        assert given_boxes == []
    if per_image:
        assert criterion.options.pop("groups").tolist() == [0] * 4 + [1] * 4
    criterion.assert_told(5)


@pytest.mark.parametrize(
    ("member", "name"), [*(("ap", name) for name in FAMILY), ("ndcg", "DabDetr"), ("own", "ConditionalDetr")]
)
def test_only_the_classification_is_replaced(member, name):
    plain, outputs, config = run(build(name)), run(MEMBERS[member](build(name))), build(name).config
    weights = {}
    if name in DETR:  # weighted where they are added up, not in loss_dict
        weights = {"loss_bbox": config.bbox_loss_coefficient, "loss_giou": config.giou_loss_coefficient}
    expected, replaced = {}, 0
    for key, value in plain.loss_dict.items():
        if ("loss_ce" in key or "loss_vfl" in key) and "_dn_" not in key:
            replaced += 1
        elif "cardinality" not in key:
            expected[key] = value * weights.get(re.sub(r"_\d+$", "", key), 1)
    kept = {key: value for key, value in outputs.loss_dict.items() if "loss_cls" not in key}
    torch.testing.assert_close(kept, expected)
    assert replaced == layers_of(name)
    assert len(outputs.loss_dict) - len(kept) == 1


@pytest.mark.parametrize("name", WITH_PROPOSALS)
def test_denoising_queries_keep_the_models_own_loss(name):
    plain, outputs = run(build(name)), run(use_alrp(build(name), l1_weight=0))
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
    plain, model = build("DFine"), use_ap(build("DFine"))
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
    assert all(terms[name] == own[name] for name in kept)


@every_model
def test_inference_is_unchanged(name):
    images = {"pixel_values": batch()["pixel_values"]}
    plain, outputs = run(build(name).eval(), images), run(use_alrp(build(name)).eval(), images)
    assert outputs.loss is None
    assert torch.equal(outputs.logits, plain.logits)
    assert torch.equal(outputs.pred_boxes, plain.pred_boxes)


@every_model
@pytest.mark.parametrize("objects", [(0, 0), (0, 3)])
def test_images_without_objects(name, objects):
    model = use_alrp(build(name))
    outputs = run(model, batch(objects))
    outputs.loss.backward()
    if objects == (0, 0):
        assert outputs.loss == 0
        assert all(value == 0 for key, value in outputs.loss_dict.items() if "_dn_" not in key)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert any(gradient.any() for gradient in gradients) == any(objects)


@by_batch_or_image
@every_member
def test_every_member_under_autocast(use, per_image):
    model = use(build(), per_image=per_image)
    calls = heard(model.loss_function.criterion)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = run(model)
    outputs.loss.backward()
    assert all(value.dtype == torch.float32 for value in outputs.loss_dict.values())
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    logits, _, *boxes = calls[0]
    assert logits.dtype == torch.bfloat16  # ranked as they are
    assert all(box.dtype == torch.float32 for box in boxes)


def test_a_model_in_half_precision():
    inputs = batch()
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    loss = run(use_alrp(build()).bfloat16(), inputs).loss
    loss.backward()
    assert loss.isfinite()


@pytest.mark.parametrize("objects", [(3, 2), (4, 0, 1)])
def test_per_image_is_the_mean_over_the_images_with_objects(objects):
    inputs, criterion = batch(objects), ALRPLoss(self_balance=2.0)
    model = use_loss(build(auxiliary_loss=False), criterion, l1_weight=0, per_image=True)
    loss = run(model, inputs).loss
    whole = use_loss(model, criterion, l1_weight=0)
    images = [
        {"pixel_values": inputs["pixel_values"][b, None], "labels": [inputs["labels"][b]]} for b in range(len(objects))
    ]
    single = [run(whole, image).loss for image, n in zip(images, objects) if n]
    torch.testing.assert_close(loss, sum(single) / len(single), rtol=1e-4, atol=1e-5)
    assert abs(loss - run(whole, inputs).loss) > 1e-4  # the images do not just add up
