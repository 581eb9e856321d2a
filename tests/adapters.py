"""What the tests of all integrations share: a criterion that notes what it is given, copies, gradients, processes."""

import copy
import io
import pickle
import re
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from alrp_triton import ALRPLossOutput, SelfBalance
from alrp_triton.framework import RankingLoss


def monitored(*names):
    """These functions and classes as docs/monitoring.md shows them."""
    page = (Path(__file__).parents[1] / "docs" / "monitoring.md").read_text(encoding="utf-8")
    found = {"torch": torch}
    for block in re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        if any(re.search(rf"^(def|class) {name}\(", block, re.MULTILINE) for name in ("numbers_of", *names)):
            exec(block.partition("\nassert ")[0], found)
    return [found[name] for name in names]


class Recorder(nn.Module):
    """A criterion of either kind, which notes what it is given and returns nothing but zeros."""

    ignore_index = -7

    def __init__(self, takes_boxes=True):
        super().__init__()
        self.takes_boxes = takes_boxes
        self.register_buffer("scale", torch.zeros(()))

    def forward(self, *arguments, **options):
        self.arguments, self.options = arguments, options
        levels = arguments[0] if isinstance(arguments[0], list) else arguments[:1]
        zero = self.scale * sum(each.sum() for each in [*levels, *arguments[2:]])
        return ALRPLossOutput(zero, zero, zero) if self.takes_boxes else zero

    def assert_told(self, num_positives, groups=None):
        """Beside logits, labels and boxes nothing but the number of positives, if it takes no boxes, and in lists, of
        levels if there are several, the images of rows."""
        if not self.takes_boxes:
            assert type(self.options["num_positives"]) is int  # counted already: nothing to wait for
            assert self.options.pop("num_positives") == num_positives
        if groups is not None:
            found = self.options.pop("groups")
            levels = found if isinstance(found, list) else [found]
            assert [level.tolist() for level in levels] == groups
            assert {level.stride() for level in levels} == {(1, 0)}  # B numbers, not B A
        assert self.options == {}


def false_alarm_error(ranking):
    """A formula that the package does not have."""
    return ranking.num_false_positives.log1p()


def own_loss():
    return RankingLoss(false_alarm_error, delta=0.5)


def balances(model):
    return [part for part in model.modules() if isinstance(part, SelfBalance)]


def weigh(model, weight):
    """The model with this weight of the boxes in aLRP Loss, until a period ends."""
    for balance in balances(model):
        balance.weight.fill_(weight)
    return model


def heard(module):
    """A list that gets the arguments of each of its calls from here on."""
    calls = []
    module.register_forward_pre_hook(lambda _, arguments: calls.append(arguments))
    return calls


def assert_trained(model):
    """Every parameter that is not frozen has a gradient; these parameters."""
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
    return trained


def assert_nothing_to_learn(model, losses):
    """Of a batch without objects: each loss is 0, and attached to every parameter."""
    assert all(loss == 0 for loss in losses.values())
    sum(losses.values()).backward()
    assert not any(p.grad.any() for p in assert_trained(model))


def assert_same_gradients(got, want, inputs, rtol=1e-4, atol=1e-7):
    """Of two losses; none of them all 0."""
    for one, other in zip(*(torch.autograd.grad(loss, inputs, retain_graph=True) for loss in (got, want))):
        assert other.abs().sum() > 0
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol)


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@contextmanager
def one_process(folder):
    """A process group of this process, which suffices to see whether a parameter is left without a gradient."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


by_batch_or_image = pytest.mark.parametrize("per_image", [False, True])
of_either_kind = pytest.mark.parametrize("takes_boxes", [True, False])
every_copy = pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle, through_torch_save])
