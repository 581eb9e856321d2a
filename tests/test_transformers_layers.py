"""All supervised layers of a DETR in one call: the loss and the gradients of a call for each, with its launches."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("scipy")

from adapters import assert_same_gradients, by_batch_or_image
from detr import DETR, FAMILY, NUM_CLASSES, batch, build
from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher
from transformers.loss.loss_rt_detr import RTDetrHungarianMatcher

from alrp_triton import ALRPLoss, APLoss, NDCGLoss, RankSortLoss
from alrp_triton.integrations.transformers import use_loss
from benchmarks.counting import counting_gpu
from benchmarks.launches import counting

LAYERS, QUERIES = 3, 12
CRITERIA = {
    "ConditionalDetr": [ALRPLoss(self_balance=3.0), NDCGLoss()],
    "RTDetr": [ALRPLoss(loc_ranking="smooth", delta=0.5), RankSortLoss(self_balance=False), APLoss()],
}


def predictions(name, num_images, seed=0):
    """Logits and boxes of all layers and, where they are supervised, proposals, float64, in the framework's form."""
    generator = torch.Generator().manual_seed(seed)
    num = LAYERS + (name not in DETR)
    logits = torch.randn(num, num_images, QUERIES, NUM_CLASSES, generator=generator, dtype=torch.float64)
    boxes = 0.2 + 0.5 * torch.rand(num, num_images, QUERIES, 4, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(), boxes.requires_grad_()


def loss_of(model, name, logits, boxes, labels):
    stacked = [each[:LAYERS] if name in DETR else each[:LAYERS].transpose(0, 1) for each in (logits, boxes)]
    others = {} if name in DETR else {"enc_topk_logits": logits[LAYERS], "enc_topk_bboxes": boxes[LAYERS]}
    last = LAYERS - 1
    return model.loss_function(logits[last], labels, "cpu", boxes[last], model.config, *stacked, **others)


def double(labels):
    return [{**each, "boxes": each["boxes"].double()} for each in labels]


@pytest.mark.thinned(3)
@by_batch_or_image
@pytest.mark.parametrize("objects", [(2, 0, 3), (0, 20), (0, 0)])
@pytest.mark.parametrize(("name", "criterion"), [(name, one) for name, some in CRITERIA.items() for one in some])
def test_one_call_is_the_sum_of_a_call_for_each_layer(name, per_image, objects, criterion):
    """Also for images without objects, and with more objects than queries."""
    labels = double(batch(objects)["labels"])
    model = use_loss(build(name), criterion, l1_weight=0, per_image=per_image)
    logits, boxes = predictions(name, len(objects))
    terms = loss_of(model, name, logits, boxes, labels)[1]
    terms = {key: terms[key] for key in ("loss_cls", "loss_loc") if key in terms}

    apart = dict.fromkeys(terms, 0.0)
    model.config.auxiliary_loss = False
    for layer in zip(logits, boxes):
        images = range(len(objects)) if per_image else [slice(None)]
        found = []
        for image in images:
            one = [each[image][None] if per_image else each for each in layer]
            if not per_image or objects[image]:
                given = [labels[image]] if per_image else labels
                found.append(model.loss_function(one[0], given, "cpu", one[1], model.config)[1])
        for key in terms:
            apart[key] = apart[key] + sum(each[key] for each in found) / max(len(found), 1)
    for key, value in terms.items():
        torch.testing.assert_close(value, torch.as_tensor(apart[key]).to(value), rtol=1e-10, atol=1e-12)
    if any(objects):
        assert_same_gradients(terms["loss_cls"], apart["loss_cls"], [logits], rtol=1e-8, atol=1e-12)
    if any(objects) and "loss_loc" in terms:
        assert_same_gradients(terms["loss_loc"], apart["loss_loc"], [boxes], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", FAMILY)
def test_every_layer_has_the_matcher_of_the_framework_and_the_weights_are_equal(name):
    """So that one term can have the weight of all layers."""
    config = build(name).config
    matcher = (
        RTDetrHungarianMatcher(config)
        if hasattr(config, "matcher_class_cost")
        else DeformableDetrHungarianMatcher(config.class_cost, config.bbox_cost, config.giou_cost)
    )
    family = use_loss(build(name), APLoss()).loss_function.family
    own = family.criterion(config)
    assert type(own.matcher) is type(matcher)
    assert not any(key[-1].isdigit() for key in own.weight_dict)


@pytest.mark.parametrize("make", [ALRPLoss, RankSortLoss, APLoss, NDCGLoss])
def test_layers_do_not_add_kernels(make):
    labels = batch((3, 1))["labels"]
    model = use_loss(build(), make(backend="triton"))
    counts = []
    for auxiliary in (False, True):
        model.config.auxiliary_loss = auxiliary
        logits, boxes = (each.detach().float().requires_grad_() for each in predictions("ConditionalDetr", 2))
        with counting_gpu(90), counting() as found:
            loss_of(model, "ConditionalDetr", logits, boxes, labels)[0].backward()
        counts.append({name: count for name, count in found.items() if name.endswith("_kernel")})
    assert sum(counts[1].values()) <= sum(counts[0].values()) + 1
    assert logits.grad.any(2).any(1).any(1).all()
