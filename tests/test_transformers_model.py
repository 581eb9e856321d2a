"""A DETR with a ranking loss stays an ordinary model: copies, further calls, where it lives, and mistakes."""

import copy
import importlib
import pickle
import sys

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("scipy")

from adapters import Recorder, through_pickle
from detr import RESNET, build, run, terms_of, weight_of
from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

from alrp_triton import ALRPLoss, RankSortLoss
from alrp_triton.integrations.transformers import restore, use_alrp, use_ap, use_loss, use_rank_sort


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle])
@pytest.mark.parametrize("name", ["DeformableDetr", "RTDetr", "DFine"])
def test_copies_use_their_own_criterion(name, duplicate):
    model = use_alrp(build(name))
    run(model)
    twin = duplicate(model)
    assert twin.loss_function is not model.loss_function
    assert terms_of(twin) == terms_of(model)
    twin.loss_function.step_epoch()
    assert weight_of(twin) != weight_of(model) == 50


def test_only_the_given_instance_changes_and_a_second_call_replaces_the_loss():
    untouched = build()
    focal = terms_of(untouched)
    model = use_loss(build(), ALRPLoss(self_balance=1.0))
    once = terms_of(model)
    assert terms_of(untouched) == terms_of(build()) == focal
    assert use_loss(model, ALRPLoss(self_balance=2.0)) is model
    assert terms_of(model)["loss_loc"] == pytest.approx(2 * once["loss_loc"])
    assert "loss_giou" in terms_of(use_ap(model))
    assert isinstance(use_rank_sort(model).loss_function.criterion, RankSortLoss)
    assert model.state_dict().keys() == build().state_dict().keys()  # this one has no state


def test_the_criterion_moves_with_the_model():
    model = use_loss(build(), Recorder()).double()
    assert model.loss_function.criterion.scale.dtype == torch.float64
    meta = use_loss(build().to("meta"), Recorder())
    assert {buffer.device.type for buffer in meta.loss_function.buffers()} == {"meta"}
    assert not use_alrp(build().eval()).loss_function.training


def test_wrong_arguments_are_named_and_change_nothing():
    softmax = DetrForObjectDetection(
        DetrConfig(
            use_timm_backbone=False,
            use_pretrained_backbone=False,
            backbone=None,
            backbone_config=ResNetConfig(**RESNET),
        )
    )
    model, good = build(), ALRPLoss()
    own = model.loss_function
    for given, options, error, message in [
        ((nn.Linear(1, 1), good), {}, TypeError, "model: expected one of Cond.*, not yet wrapped, got Linear"),
        ((nn.DataParallel(model), good), {}, TypeError, "model: expected .*not yet wrapped, got DataParallel"),
        ((softmax, good), {}, TypeError, "model: expected .*, got DetrForObjectDetection"),
        ((model, 0.5), {}, TypeError, "criterion: expected a torch.nn.Module, got float"),
        ((model, None), {}, TypeError, "criterion: expected a torch.nn.Module, got NoneType"),
        ((model, good), {"per_image": 1}, TypeError, "per_image: expected a bool, got int"),
        ((model, good), {"l1_weight": "5"}, TypeError, "l1_weight: expected a finite number >= 0, got str"),
        ((model, good), {"l1_weight": -1.0}, ValueError, r"l1_weight: expected .* >= 0, got -1\.0"),
        ((model, good), {"l1_weight": float("nan")}, ValueError, "l1_weight: expected .*, got nan"),
    ]:
        with pytest.raises(error, match=message):
            use_loss(*given, **options)
    assert model.loss_function is own


def test_a_class_of_ones_own_that_derives_from_a_supported_one():
    class Detector(type(build())):
        pass

    assert set(terms_of(use_alrp(Detector(build().config), l1_weight=0))) >= {"loss_cls", "loss_loc"}


@pytest.mark.parametrize("name", ["DeformableDetr", "RTDetr"])
def test_restore(name):
    own = build(name)
    model = restore(use_alrp(build(name)))
    assert model.loss_function is own.loss_function
    assert terms_of(model) == terms_of(own)
    assert model.state_dict().keys() == own.state_dict().keys()
    assert b"alrp_triton" not in pickle.dumps(model)
    assert restore(model) is model
    assert "loss_cls" in terms_of(use_alrp(model))


def test_restore_leaves_other_losses_and_refuses_wrapped_models():
    model, other = build(), nn.Identity()
    model._loss_function = other
    assert restore(model).loss_function is other
    with pytest.raises(TypeError, match="model: expected a PreTrainedModel, not yet wrapped, got DataParallel"):
        restore(nn.DataParallel(model))


def test_where_the_framework_is_missing_an_error_says_what_to_install(monkeypatch):
    for module in [module for module in sys.modules if module.startswith("alrp_triton.integrations.transformers")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'alrp-triton\[transformers\]'"):
        importlib.import_module("alrp_triton.integrations.transformers")
