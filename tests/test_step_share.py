"""The loss's share of a step: what is timed is the loss that trains, and what stands in for the loop is the loop."""

import json

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("rich")

from alrp_triton.benchmarks import step_share
from detectors import BUILDERS, batch_for, criteria

from alrp_triton import ALRPLoss
from alrp_triton.integrations.torchvision import use_alrp

CPU = torch.device("cpu")


def clock():
    """Seconds that pass by being looked at."""
    clock.now += 1.0
    return clock.now


clock.now = 0.0


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("contender", [step_share.OURS, step_share.LOOP])
def test_a_timed_criterion_trains_as_the_plain_one(name, contender):
    batch = batch_for(name)
    plain = BUILDERS[name]()
    options = {"rpn_criterion": ALRPLoss(tau=0.7, self_balance=None)} if name == "faster_rcnn" else {}
    expected = use_alrp(plain, ALRPLoss(self_balance=None), **options)(*batch)
    torch.stack(list(expected.values())).sum().backward()

    model = BUILDERS[name]()
    timed, _ = step_share.step(contender, model, batch, step_share.Watch(CPU))
    assert {id(one) for one in timed} == {id(one) for one in criteria(model).values()}
    assert all(one.num_logits > one.num_positives > 0 for one in timed)
    for (where, mine), theirs in zip(model.named_parameters(), plain.parameters()):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-6, msg=where)
    before = BUILDERS[name]().state_dict()  # the learning rate is 0
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("boxes_per_image", [(2, 1), (0, 0)])
def test_seconds_are_those_between_the_marks(boxes_per_image):
    watch = step_share.Watch(CPU, clock)
    batch = batch_for("faster_rcnn", boxes_per_image)
    found = step_share.run(step_share.OURS, BUILDERS["faster_rcnn"](), batch, watch)
    assert found == step_share.Seconds(loss=2.0, step=5.0)  # two criteria, and six looks at the clock
    assert watch.read() == 0


def test_contenders_that_are_off_are_not_timed(monkeypatch):
    arguments = BUILDERS["fcos"](), batch_for("fcos")
    repeats = {step_share.OURS: 2, step_share.LOOP: 1}
    found = step_share.compare(*arguments, repeats, step_share.Watch(CPU))
    assert {name: len(seconds) for name, seconds in found["seconds"].items()} == repeats
    assert 0 < found["gradient_error"][step_share.OURS] < 1e-6
    assert found["logits"] == [2 * (64 + 16) * 4]
    for seconds in found["seconds"].values():
        share, loss, whole = step_share.shares(seconds)
        assert 0 < loss < whole
        assert 0 < share < 1

    monkeypatch.setattr(step_share, "losses_of", lambda name: (_off(name), step_share.LoopLoss(0.7)))
    with pytest.raises(ArithmeticError, match="ours: gradient off the loop's by"):
        step_share.compare(*arguments, repeats, step_share.Watch(CPU))


def _off(name):
    return step_share.LoopLoss(0.5) if name == step_share.LOOP else ALRPLoss(tau=0.51, self_balance=None)


def test_the_command(tmp_path, monkeypatch, capsys):
    """Its arguments, and where it writes to; with a small backbone, since a ResNet takes its time."""
    monkeypatch.setitem(step_share.DETECTORS, "Faster R-CNN", "fasterrcnn_mobilenet_v3_large_320_fpn")
    options = ["--detectors", "Faster R-CNN", "--images", "2", "--size", "32", "--classes", "3", "--objects", "2"]
    output = tmp_path / "shares.json"
    once = ["--repeats", "1", "--loop-repeats", "1", "--threads", "1", "--device", "cpu", "--output", str(output)]
    monkeypatch.setattr("sys.argv", ["step_share", *options, *once])
    step_share.main()
    assert "The loss's share of a training step, 2 images of 32 x 32" in capsys.readouterr().out
    results = json.loads(output.read_text())
    assert results["environment"]["torchvision"]
    assert results["settings"]["classes"] == 3
    assert {len(seconds) for seconds in results["detectors"]["Faster R-CNN"]["seconds"].values()} == {1}

    monkeypatch.setattr("sys.argv", ["step_share", "--threads", "2", "--clock", "cpu"])
    with pytest.raises(SystemExit):
        step_share.main()
    assert "--clock cpu needs --threads 1" in capsys.readouterr().err
