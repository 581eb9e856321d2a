"""The DETR family of transformers in training: steps, checkpoints, copies, and the framework's Trainer."""

import copy
import io
import pickle

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("scipy")

import transformers
from detr import LAYERS, batch, build, run, terms_of
from test_transformers import Recorder, every_member, every_model
from torch import nn

import alrp_triton
from alrp_triton import ALRPLoss, SelfBalance
from alrp_triton.integrations.transformers import SelfBalanceCallback, use_alrp, use_ap, use_rank_sort


def train(model, steps, seed=0, lr=3e-3):
    """Loss terms of some steps on one batch; a new optimizer, so that the state of the model is all there is."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    history = []
    for step in range(steps):
        outputs = run(model, batch(), seed=seed + step)
        optimizer.zero_grad()
        outputs.loss.backward()
        optimizer.step()
        history.append(terms_of(outputs))
    return history


def steps(model, count=16):
    """Loss and terms over some steps of AdamW on one batch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    history = []
    for step in range(count):
        outputs = run(model, batch(), seed=step)
        optimizer.zero_grad()
        outputs.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
        optimizer.step()
        history.append({"loss": outputs.loss.item(), **terms_of(outputs)})
    return history


@pytest.mark.thinned(2)
@every_model
def test_training_steps_lower_the_loss(name):
    # Not loc by itself: it is divided by ranks, which come down.
    history = steps(use_alrp(build(name), ALRPLoss(self_balance=None)))
    for term, bound in {"loss": 0.9, "loss_cls": 0.95, "loss_bbox": 0.8}.items():
        values = [step[term] for step in history]
        assert min(values[-4:]) < bound * values[0], term
    layers = sum("loss_cls" in term for term in history[0])
    assert layers == LAYERS + (name in ("RTDetr", "RTDetrV2", "DFine"))


@every_member
def test_training_steps_of_every_member(use):
    values = [step["loss_cls"] for step in steps(use(build("DeformableDetr", auxiliary_loss=False)))]
    assert min(values[-4:]) < 0.6 * values[0]


@pytest.mark.parametrize("name", ["ConditionalDetr", "RTDetr"])
def test_detections_after_training(name):
    model = use_alrp(build(name, auxiliary_loss=False, num_queries=40))
    train(model, 2)
    processor = getattr(transformers, f"{name}ImageProcessor")()
    with torch.no_grad():
        outputs = model.eval()(pixel_values=batch()["pixel_values"])
    found = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=[(64, 64), (32, 48)])
    assert len(found) == 2
    for detections in found:
        assert len(detections["scores"]) == len(detections["boxes"]) > 0
        assert set(detections["labels"].tolist()) <= {0, 1, 2}
        assert (detections["scores"].diff() <= 0).all()


@every_model
def test_each_layer_has_a_weight_of_its_own(name):
    model = use_alrp(build(name))
    run(model, batch())
    weights = [criterion.self_balance.weight.item() for criterion in model.loss_function.criteria]
    assert weights == [50.0] * (LAYERS + (name in ("RTDetr", "RTDetrV2", "DFine")))
    model.loss_function.step_epoch()
    after = [criterion.self_balance.weight.item() for criterion in model.loss_function.criteria]
    assert 50.0 not in after
    # D-FINE starts with layers that are alike.
    assert len(set(after)) >= (3 if name == "DFine" else len(after)) - (name == "DFine")

    # Nothing is counted while the model only evaluates.
    model.eval()
    run(model, batch())
    assert all(criterion.self_balance.count == 0 for criterion in model.loss_function.criteria)


def test_auxiliary_losses_can_be_switched_off_and_on():
    model = use_alrp(build(auxiliary_loss=False))
    assert set(terms_of(run(model, batch()))) == {"loss_cls", "loss_loc", "loss_bbox"}
    assert [criterion.self_balance.count.item() for criterion in model.loss_function.criteria] == [1, 0, 0]
    model.config.auxiliary_loss = True
    outputs = run(model, batch())
    assert len(outputs.loss_dict) == 3 * LAYERS
    assert len(outputs.auxiliary_outputs) == LAYERS - 1
    model.loss_function.step_epoch()


@pytest.mark.thinned(2)
@every_model
def test_a_resumed_run_gives_the_same_numbers(name):
    def fresh(seed=0):
        return use_alrp(build(name, seed=seed), ALRPLoss(self_balance=SelfBalance(10.0, period=2)))

    model, resumed = fresh(), fresh(seed=5)
    train(model, 3)
    stored = io.BytesIO()
    torch.save(model.state_dict(), stored)
    stored.seek(0)
    assert resumed.loss_function.criteria[0].self_balance.weight == 10
    resumed.load_state_dict(torch.load(stored), strict=True)
    assert resumed.loss_function.criteria[1].self_balance.count == 1  # within a period
    assert train(resumed, 2, seed=3) == train(model, 2, seed=3)

    added = model.state_dict().keys() - build(name).state_dict().keys()
    assert len(added) == 3 * len(model.loss_function.criteria)
    assert all(key.startswith("_loss_function.criteria.") for key in added)


def test_save_and_from_pretrained(tmp_path):
    model = use_alrp(build("RTDetr"))
    train(model, 2)
    model.loss_function.step_epoch()
    expected = terms_of(run(model, batch()))
    model.save_pretrained(tmp_path)

    # The framework's own loss again, and the weights of the detector.
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["unexpected_keys"]) == {key for key in model.state_dict() if key.startswith("_loss_function.")}
    assert not info["missing_keys"]
    assert "loss_vfl" in terms_of(run(loaded.train(), batch()))
    detections = [each.eval()(batch()["pixel_values"]).logits for each in (model, loaded)]
    assert detections[0].shape == detections[1].shape

    resumed = use_alrp(type(model).from_pretrained(tmp_path).train())
    safetensors = pytest.importorskip("safetensors.torch")
    resumed.load_state_dict(safetensors.load_file(tmp_path / "model.safetensors"), strict=False)
    weights = [criterion.self_balance.weight for criterion in resumed.loss_function.criteria]
    assert weights == [criterion.self_balance.weight for criterion in model.loss_function.criteria]
    assert terms_of(run(resumed, batch())) == expected


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle])
@pytest.mark.parametrize("name", ["DeformableDetr", "RTDetr"])
def test_copies_use_their_own_criteria(name, duplicate):
    model = use_alrp(build(name), ALRPLoss(self_balance=SelfBalance(10.0)))
    run(model, batch())
    twin = duplicate(model)
    assert twin.loss_function is not model.loss_function
    assert terms_of(run(twin, batch())) == terms_of(run(model, batch()))
    twin.loss_function.step_epoch()
    assert twin.loss_function.criteria[0].self_balance.weight != 10
    assert model.loss_function.criteria[0].self_balance.weight == 10


def test_only_the_given_instance_changes_and_a_second_call_replaces_the_loss():
    untouched = build()
    focal = terms_of(run(untouched, batch()))
    model = use_alrp(build(), ALRPLoss(self_balance=1.0))
    once = terms_of(run(model, batch()))
    assert terms_of(run(untouched, batch())) == terms_of(run(build(), batch())) == focal
    assert use_alrp(model, ALRPLoss(self_balance=2.0)) is model
    twice = terms_of(run(model, batch()))
    assert twice["loss_loc_1"] == pytest.approx(2 * once["loss_loc_1"])
    assert "loss_giou" in terms_of(run(use_ap(model), batch()))
    assert [type(criterion) for criterion in use_rank_sort(model).loss_function.criteria] == [
        alrp_triton.RankSortLoss
    ] * LAYERS
    assert model.state_dict().keys() == build().state_dict().keys()  # this one has no state


def test_the_criterion_moves_with_the_model():
    class Scaled(Recorder):
        def __init__(self):
            super().__init__()
            self.register_buffer("scale", torch.ones(()))

    model = use_alrp(build(), Scaled()).double()
    assert model.loss_function.criteria[1].scale.dtype == torch.float64
    meta = use_alrp(build().to("meta"), Scaled())
    assert {buffer.device.type for buffer in meta.loss_function.buffers()} == {"meta"}
    assert not use_alrp(build().eval()).loss_function.training


def test_distributed_data_parallel(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        expected = terms_of(run(use_alrp(build()), batch()))
        parallel = nn.parallel.DistributedDataParallel(use_alrp(build()), find_unused_parameters=True)
        outputs = run(parallel, batch())
        assert terms_of(outputs) == expected
        outputs.loss.backward()
        SelfBalanceCallback().on_epoch_end(None, None, None, model=parallel)
        assert parallel.module.loss_function.criteria[0].self_balance.weight != 50
    finally:
        torch.distributed.destroy_process_group()


class Scenes(torch.utils.data.Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, index):
        inputs = batch((1 + index % 2,), seed=index)
        return {"pixel_values": inputs["pixel_values"][0], "labels": inputs["labels"][0]}


def collate(items):
    return {"pixel_values": torch.stack([i["pixel_values"] for i in items]), "labels": [i["labels"] for i in items]}


def test_trainer_with_callback_and_resume(tmp_path):
    pytest.importorskip("accelerate", reason="Trainer needs it")

    def trainer():
        arguments = transformers.TrainingArguments(
            str(tmp_path),
            num_train_epochs=3,
            per_device_train_batch_size=2,
            save_strategy="epoch",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            logging_strategy="no",
            remove_unused_columns=False,
        )
        return transformers.Trainer(
            model=use_alrp(build("DabDetr")),  # of some others Trainer does not find the backbone in its checkpoint
            args=arguments,
            train_dataset=Scenes(),
            data_collator=collate,
            callbacks=[SelfBalanceCallback()],
        )

    whole = trainer()
    whole.train()
    weights = [criterion.self_balance.weight.item() for criterion in whole.model.loss_function.criteria]
    assert 50.0 not in weights
    assert all(criterion.self_balance.count == 0 for criterion in whole.model.loss_function.criteria)

    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))  # after the second epoch of three steps
    for (name, got), want in zip(resumed.model.state_dict().items(), whole.model.state_dict().values()):
        torch.testing.assert_close(got, want, msg=lambda text, name=name: f"{name}: {text}")


def test_the_callback_leaves_fixed_periods_alone():
    model = use_alrp(build(), ALRPLoss(self_balance=SelfBalance(10.0, period=100)))
    run(model, batch())
    SelfBalanceCallback().on_epoch_end(None, None, None, model=model)
    assert model.loss_function.criteria[0].self_balance.count == 1
