"""torch.library.opcheck of every operator, on what the losses really call them with; and what backward keeps."""

from functools import partial

import pytest
import torch
from dialect import FAMILY, KERNELS, by_engine_backend, engine_backends, random_case, squared_ramp, weighted_error
from dialect.interpreters import start_python
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from alrp_triton import ALRPLoss, RankSortLoss, alrp_loss
from alrp_triton.framework import ranking_loss

# What only kernels compute: seen where they run.
BY_KERNELS = {"place", "rank", "sums", "send", "compare_boxes", "scale_rows", "balance"}
# Where a loss meets autograd: which argument has a derivative.
DIFFERENTIABLE = {"attach": 2, "send": 0, "compare_boxes": 0}


def registered():
    """The names of all operators there are."""
    names = torch._C._dispatch_get_all_op_names()
    return {name.split("::")[1] for name in names if name.startswith("alrp_triton::")}


class Recorder(TorchDispatchMode):
    """Keeps the calls of our operators, of each the first with arguments of its form."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "alrp_triton":
            key = function._schema.name.split("::")[1], str([form(argument) for argument in args])
            self.calls.setdefault(key, (function, args))
        return function(*args, **(kwargs or {}))


def form(argument):
    """The type of an argument, and of tensors the dtype."""
    if isinstance(argument, (list, tuple)):
        return [form(each) for each in argument]
    return argument.dtype if isinstance(argument, torch.Tensor) else type(argument)


def run_everything(backend):
    """Every way through the engine: each loss, of one ranking and of groups, and what looks at pairs."""
    case = random_case(50, 6)
    groups = torch.arange(50) % 2

    def differentiate(function, *given, **arguments):
        x = case.logits.clone().requires_grad_()
        loss = function(x, case.labels, *given, backend=backend, **arguments)
        sum(loss.values() if isinstance(loss, dict) else [loss]).sum().backward()

    for member in FAMILY:
        for grouped in ({}, {"groups": groups}):

            def total(x, labels, values, member=member, **arguments):
                found = member.loss(x, labels, values, **arguments)
                return {name: found[name] for name in member.components}

            differentiate(total, member.values(case), **grouped)
    if not KERNELS and backend != "reference":
        pairs = {"smoothing": squared_ramp, "distribution": squared_ramp, "extras": {"weights": case.loc_errors}}
        differentiate(ranking_loss, weighted_error, **pairs)
    corners = torch.rand(6, 2)
    boxes = torch.cat([corners, corners + 1], 1)
    for dtype in (torch.float32, torch.bfloat16):
        x = case.logits.to(dtype, copy=True).requires_grad_()
        for criterion in (RankSortLoss(backend=backend), ALRPLoss(backend=backend)):
            output = criterion(x, case.labels, (boxes + 0.1).requires_grad_(), boxes)
            (output.cls + output.loc).backward()


def recorded(backends):
    recorder = Recorder()
    with recorder:
        for backend in backends:
            run_everything(backend)
    return recorder.calls


def with_leaves(name, args):
    """Arguments of which those that have a derivative require one, and no others."""
    args = tree_map_only(torch.Tensor, torch.Tensor.detach, args)
    if name not in DIFFERENTIABLE or (name == "compare_boxes" and not args[4]):
        return args
    at = DIFFERENTIABLE[name]
    leaves = tree_map_only(torch.Tensor, lambda x: x.clone().requires_grad_(), args[at])
    return (*args[:at], leaves, *args[at + 1 :])


def test_every_operator_is_called_and_passes(monkeypatch):
    """A new operator that no loss here calls fails, as does one without a fake, or with a wrong one."""
    backends = [*engine_backends(), *([] if KERNELS else ["reference"])]
    calls = recorded(backends)
    expected = registered() - (set() if KERNELS else BY_KERNELS)
    assert {name for name, _ in calls} == expected
    # Tables that kernels search are filled up with NaN.
    monkeypatch.setattr(torch.testing, "assert_close", partial(torch.testing.assert_close, equal_nan=True))
    for (name, _), (function, args) in calls.items():
        torch.library.opcheck(function, with_leaves(name, args))


@by_engine_backend
@pytest.mark.parametrize("class_labels", [False, True])
def test_only_tables_of_the_size_of_the_positives_are_kept(class_labels, backend):
    case = random_case(4000, 20)
    logits, labels = case.logits.view(50, 80), case.labels.view(50, 80)
    errors = case.loc_errors
    if class_labels:
        labels, errors = torch.where(torch.arange(50) < 20, torch.arange(50), 80), torch.rand(20)
    x = logits.clone().requires_grad_()
    kept = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        output = alrp_loss(x, labels, errors.clone().requires_grad_(), backend=backend)
    inputs = {x.untyped_storage().data_ptr(), labels.untyped_storage().data_ptr()}
    tables = [tensor for tensor in kept if tensor.untyped_storage().data_ptr() not in inputs]
    assert len(kept) > len(tables) > 0
    # What a tensor keeps alive is its storage.
    size = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tables}
    grid = 32 * (8 * 20 + 17) if KERNELS else 0
    assert sum(size.values()) <= 16 * 8 * (20 + 1) + grid
    (output.cls + output.loc).backward()


def test_operators_of_a_module_that_is_loaded_anew():
    code = (
        "import importlib, torch, alrp_triton\n"
        "from alrp_triton.engine import operators\n"
        "importlib.reload(operators)\n"
        "x, y = torch.zeros(4, 3, requires_grad=True), torch.tensor([0, 1, 3, 3])\n"
        "loss = alrp_triton.ap_loss(x, y, backend='torch')\n"
        "loss.backward()\n"
        "print(float(loss.detach()), float(x.grad.abs().sum()) > 0)\n"
    )
    done = start_python(code)
    assert done.returncode == 0, done.stderr
    value, has_gradient = done.stdout.split()
    assert 0 < float(value) < 1
    assert has_gradient == "True"
