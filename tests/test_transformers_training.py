"""The DETR family of transformers in training: steps, checkpoints, copies, and the framework's Trainer."""

import gc
import io

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("scipy")

import transformers
from adapters import monitored, one_process
from detr import LAYERS, batch, build, every_member, every_model, run, terms_of, weight_of
from torch import nn

from alrp_triton import ALRPLoss, SelfBalance
from alrp_triton.integrations.transformers import RankingTrainer, SelfBalanceCallback, use_alrp, use_loss


def train(model, steps, seed=0, optimizer=None):
    """Loss and terms of some steps on one batch; by default all state is the model's."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=3e-3)
    history = []
    for step in range(steps):
        outputs = run(model, seed=seed + step)
        optimizer.zero_grad()
        outputs.loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
        optimizer.step()
        history.append({name: value.item() for name, value in {"loss": outputs.loss, **outputs.loss_dict}.items()})
    return history


def learn(model):
    return train(model, 16, optimizer=torch.optim.AdamW(model.parameters(), lr=5e-3))


@pytest.mark.thinned(2)
@every_model
def test_training_steps_lower_the_loss(name):
    # Not loc by itself: it is divided by ranks, which come down.
    history = learn(use_loss(build(name), ALRPLoss(self_balance=None)))
    for term, bound in {"loss": 0.9, "loss_cls": 0.95, "loss_bbox": 0.8}.items():
        assert min(step[term] for step in history[-4:]) < bound * history[0][term], term


@pytest.mark.thinned(2)
@every_member
def test_training_steps_of_every_member(use):
    values = [step["loss_cls"] for step in learn(use(build("DeformableDetr", auxiliary_loss=False)))]
    assert min(values[-4:]) < 0.6 * values[0]


@every_model
def test_one_weight_for_all_layers(name):
    model = use_alrp(build(name))
    run(model)
    assert weight_of(model) == 50
    model.loss_function.step_epoch()
    assert weight_of(model) != 50
    run(model.eval())
    assert model.loss_function.criterion.self_balance.count == 0  # nothing counts while the model only evaluates


def test_evaluation_losses_of_different_epochs_compare():
    """They do not have the weight of self-balancing, which changes; the training's have it."""
    model = use_loss(build("DeformableDetr"), ALRPLoss())
    found = {}
    for weight in (50.0, 2.0):
        model.loss_function.criterion.self_balance.weight.fill_(weight)
        for training in (True, False):
            found[weight, training] = run(model.train(training)).loss_dict["loss_loc"].item()
    assert found[50.0, True] == pytest.approx(25 * found[2.0, True])
    assert found[50.0, False] == pytest.approx(found[2.0, False])
    assert found[2.0, False] == pytest.approx(found[2.0, True] / 2, rel=0.2)  # but for dropout


def test_auxiliary_losses_can_be_switched_off_and_on():
    model = use_alrp(build(auxiliary_loss=False))
    assert set(terms_of(model)) == {"loss_cls", "loss_loc", "loss_bbox"}
    model.config.auxiliary_loss = True
    outputs = run(model)
    assert len(outputs.loss_dict) == 2 + LAYERS
    assert len(outputs.auxiliary_outputs) == LAYERS - 1
    assert model.loss_function.criterion.self_balance.count == 2


@pytest.mark.thinned(2)
@every_model
def test_a_resumed_run_gives_the_same_numbers(name):
    def fresh(seed=0):
        return use_loss(build(name, seed=seed), ALRPLoss(self_balance=SelfBalance(10.0, period=2)))

    model, resumed, stored = fresh(), fresh(seed=5), io.BytesIO()
    train(model, 3)
    torch.save(model.state_dict(), stored)
    stored.seek(0)
    assert weight_of(resumed) == 10
    resumed.load_state_dict(torch.load(stored), strict=True)
    assert resumed.loss_function.criterion.self_balance.count == 1  # within a period
    assert train(resumed, 2, seed=3) == train(model, 2, seed=3)

    added = model.state_dict().keys() - build(name).state_dict().keys()
    assert len(added) == 3
    assert all(key.startswith("_loss_function.criterion.") for key in added)


def test_save_and_from_pretrained(tmp_path):
    model = use_alrp(build("RTDetr"))
    train(model, 2)
    model.loss_function.step_epoch()
    expected = terms_of(model)
    model.save_pretrained(tmp_path)

    # The framework's own loss again, and the weights of the detector.
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["unexpected_keys"]) == {key for key in model.state_dict() if key.startswith("_loss_function.")}
    assert not info["missing_keys"]
    assert "loss_vfl" in terms_of(loaded.train())

    resumed = use_alrp(type(model).from_pretrained(tmp_path).train())
    safetensors = pytest.importorskip("safetensors.torch")
    resumed.load_state_dict(safetensors.load_file(tmp_path / "model.safetensors"), strict=False)
    assert weight_of(resumed) == weight_of(model) != 50
    assert terms_of(resumed) == expected


def test_distributed_data_parallel(tmp_path):
    with one_process(tmp_path):
        parallel = nn.parallel.DistributedDataParallel(use_alrp(build()), find_unused_parameters=True)
        assert terms_of(parallel) == terms_of(use_alrp(build()))
        run(parallel).loss.backward()
        SelfBalanceCallback().on_epoch_end(None, None, None, model=parallel)
        assert weight_of(parallel.module) != 50


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
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        **{"num_train_epochs": 3, "per_device_train_batch_size": 2, "use_cpu": True, "remove_unused_columns": False},
        **{"save_strategy": "epoch", "logging_strategy": "no", "report_to": [], "disable_tqdm": True},
        **{"learning_rate": 1e-3, "lr_scheduler_type": "constant"},
    )

    def trainer():
        return transformers.Trainer(
            model=use_alrp(build("DabDetr")),  # of some others Trainer does not find the backbone in its checkpoint
            args=arguments,
            train_dataset=Scenes(),
            data_collator=collate,
            callbacks=[SelfBalanceCallback()],
        )

    whole, resumed = trainer(), trainer()
    whole.train()
    assert weight_of(whole.model) != 50
    assert whole.model.loss_function.criterion.self_balance.count == 0
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))  # after the second epoch of three steps
    for (name, got), want in zip(resumed.model.state_dict().items(), whole.model.state_dict().values()):
        torch.testing.assert_close(got, want, msg=lambda text, name=name: f"{name}: {text}")


def test_trainer_logs_statistics(tmp_path):
    pytest.importorskip("accelerate", reason="Trainer needs it")
    keep, trainer_class = monitored("StatisticsCallback", "StatisticsTrainer")
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        **{"num_train_epochs": 1, "per_device_train_batch_size": 2, "use_cpu": True, "remove_unused_columns": False},
        **{"save_strategy": "no", "logging_steps": 1, "report_to": [], "disable_tqdm": True},
    )
    callback = keep()
    model = use_loss(build("DabDetr"), ALRPLoss(monitor=True))
    trainer = trainer_class(
        model=model, args=arguments, train_dataset=Scenes(), data_collator=collate, callbacks=[callback]
    )
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in logged] == [entry["step"] for entry in callback.history[:3]] == [1, 2, 3]
    for entry, kept in zip(logged, callback.history):
        prefix = "_loss_function.criterion/"
        names = {name for name in kept if name.startswith(prefix)}
        assert {name.removeprefix(prefix) for name in names} == set(model.loss_function.criterion.stats)
        assert all(entry[name] == kept[name] for name in names)
        assert kept[f"{prefix}num_positives"] > 0


@pytest.mark.parametrize("monitor", [False, True])
def test_ranking_trainer_logs_terms_weight_and_statistics(tmp_path, monitor):
    pytest.importorskip("accelerate", reason="Trainer needs it")
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        **{"num_train_epochs": 2, "per_device_train_batch_size": 1, "use_cpu": True, "remove_unused_columns": False},
        **{"save_strategy": "no", "logging_steps": 2, "gradient_accumulation_steps": 2, "eval_strategy": "epoch"},
        **{"report_to": [], "disable_tqdm": True, "prediction_loss_only": True},
    )
    model = use_loss(build("DabDetr"), ALRPLoss(monitor=monitor))
    given = {"train_dataset": Scenes(), "eval_dataset": Scenes(), "data_collator": collate}
    trainer = RankingTrainer(model=model, args=arguments, **given)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in logged] == [2, 4, 6]
    terms = {"loss_cls", "loss_loc", *(f"loss_bbox{suffix}" for suffix in ("", "_0", "_1"))}
    for entry in logged:
        assert terms <= entry.keys()
        assert sum(entry[name] for name in terms) == pytest.approx(entry["loss"], rel=1e-3)
        assert ("ranking/precision" in entry) == monitor
    assert logged[0]["ranking/weight"] == 50 != logged[-1]["ranking/weight"]
    evaluated = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(evaluated) == 2
    assert not terms & evaluated[0].keys()


def test_ranking_trainer_keeps_sums_not_steps(tmp_path):
    """A training may never log."""
    pytest.importorskip("accelerate", reason="Trainer needs it")

    def tensors():
        gc.collect()
        return sum(type(each) is torch.Tensor for each in gc.get_objects())

    trainer = RankingTrainer(use_alrp(build("DabDetr")), transformers.TrainingArguments(str(tmp_path), use_cpu=True))
    numbers = []
    for _ in range(3):
        trainer.compute_loss(trainer.model, batch())
        numbers.append(tensors())
    assert numbers[1] == numbers[2]


def test_the_callback_leaves_fixed_periods_alone():
    model = use_loss(build(), ALRPLoss(self_balance=SelfBalance(10.0, period=100)))
    run(model)
    SelfBalanceCallback().on_epoch_end(None, None, None, model=model)
    assert model.loss_function.criterion.self_balance.count == 1
