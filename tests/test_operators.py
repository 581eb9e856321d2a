"""The loss as PyTorch's machinery sees it: operators, autograd, torch.compile, memory kept for backward."""

import pytest
import torch
from dialect import Case, random_case
from dialect.checks import assert_same_bits, assert_same_results, backends, engine_backends, evaluate
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd.graph import saved_tensors_hooks

from alrp_triton import ALRPLoss, alrp_loss
from alrp_triton.engine.passes import choose


@pytest.mark.parametrize("backend", backends())
def test_double_backward_raises(backend):
    case = random_case(50, 5)
    x = case.logits.clone().requires_grad_()
    cls, loc, _ = alrp_loss(x, *case[2:], backend=backend)
    (gradient,) = torch.autograd.grad(cls + loc, x, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(gradient.square().sum(), x)
    y = case.logits.clone().requires_grad_()
    with pytest.raises(RuntimeError):
        torch.autograd.functional.hessian(lambda z: alrp_loss(z, *case[2:], backend=backend).cls, y, strict=True)


@pytest.mark.parametrize("backend", backends())
def test_backward_twice_over_one_graph(backend):
    case = random_case(50, 5)
    x = case.logits.clone().requires_grad_()
    cls = alrp_loss(x, *case[2:], backend=backend).cls
    cls.backward(retain_graph=True)
    once = x.grad.clone()
    cls.backward()
    assert_same_bits("accumulated", x.grad, 2 * once)
    with pytest.raises(RuntimeError):
        cls.backward()


@pytest.mark.parametrize("backend", backends())
def test_logits_changed_before_backward_are_noticed(backend):
    """Backward reads the logits again, so that it must not find others."""
    case = random_case(50, 5)
    x = case.logits.clone().requires_grad_()
    y = x * 1
    cls = alrp_loss(y, *case[2:], backend=backend).cls
    expected = evaluate(*case[1:], backend).grad_logits
    y.detach().add_(1.0)
    try:
        (gradient,) = torch.autograd.grad(cls, x)
    except RuntimeError:
        return
    assert_same_bits("gradient", gradient, expected)


@pytest.mark.parametrize("backend", engine_backends())
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
    assert sum(size.values()) <= 16 * 8 * (20 + 1)
    (output.cls + output.loc).backward()


@pytest.mark.parametrize("backend", backends())
def test_without_gradients(backend):
    case = random_case(60, 6)
    expected = alrp_loss(*case[1:], backend=backend)
    x = case.logits.clone().requires_grad_()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            for logits in (x, case.logits.clone()):
                output = alrp_loss(logits, *case[2:], backend=backend)
                assert not output.cls.requires_grad
                for one, other in zip(output, expected):
                    assert_same_bits("output", one.clone(), other)
    assert not expected.cls.requires_grad
    # The localisation component alone may need a gradient.
    errors = case.loc_errors.clone().requires_grad_()
    output = alrp_loss(case.logits, case.labels, errors, backend=backend)
    assert output.loc.requires_grad
    assert not output.rank.requires_grad


@pytest.mark.parametrize("backend", backends())
def test_hooks_of_the_leaf_see_the_gradient(backend):
    case = random_case(60, 6)
    x = case.logits.clone().requires_grad_()
    seen = []
    x.register_hook(lambda gradient: seen.append(gradient.clone()))
    alrp_loss(x, *case[2:], backend=backend).cls.backward()
    assert_same_bits("hooked", seen[0], evaluate(*case[1:], backend).grad_logits)


def compiled(function, dynamic=None):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)


def loss_and_gradients(function, case: Case):
    x = case.logits.clone().requires_grad_()
    errors = case.loc_errors.clone().requires_grad_()
    cls, loc, rank = function(x, case.labels, errors)
    (cls + loc).backward()
    return [cls.detach(), loc.detach(), rank, x.grad, errors.grad]


SIZES = [(90, 9), (90, 7), (90, 30), (120, 11), (90, 1), (90, 0)]


@pytest.mark.thinned(4)
@pytest.mark.parametrize("backend", engine_backends())
@pytest.mark.parametrize(
    ("dynamic", "arguments", "sizes"),
    [(None, {}, SIZES[:2]), (True, {"delta": 0.0, "loc_ranking": "smooth"}, SIZES)],
    ids=["by default", "dynamic"],
)
def test_compiled_function(dynamic, arguments, sizes, backend):
    def function(x, labels, errors):
        return alrp_loss(x, labels, errors, backend=backend, **arguments)

    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    one, graphs = torch.compile(function, fullgraph=True, backend=counter, dynamic=dynamic), []
    for num_logits, num_pos in sizes:
        case = random_case(num_logits, num_pos, ignored=0.3)
        for actual, expected in zip(loss_and_gradients(one, case), loss_and_gradients(function, case)):
            assert_same_bits(f"{num_logits}, {num_pos}", actual, expected)
        graphs.append(counter.frame_count)
    if dynamic:
        # One for all that have several positives.
        assert graphs[:4] == graphs[:1] * 4


@pytest.mark.nightly
@pytest.mark.parametrize(
    "sizes", [[(90, 9), (90, 7), (90, 30)], [(90, 9), (130, 9), (70, 9)]], ids=["positives", "logits"]
)
def test_one_graph_serves_any_number_of(sizes):
    """Else torch.compile would give up after some eight batches or image sizes."""
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    one = torch.compile(alrp_loss, fullgraph=True, backend=counter, dynamic=True)
    counts = []
    for num_logits, num_pos in sizes:
        one(*random_case(num_logits, num_pos)[1:])
        counts.append(counter.frame_count)
    assert counts == counts[:1] * len(sizes)


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_choosing_a_backend_breaks_no_graph(device, backend):
    """Also for tensors of a GPU, which this machine need not have."""

    def function(x):
        return x + len(choose(backend, torch.device(device)))

    assert compiled(function)(torch.zeros(())) == function(torch.zeros(()))


def boxes(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(2, count, 2, generator=generator)
    return torch.cat([corner, corner + 1], dim=-1).unbind(0)


def test_compiled_module_on_levels():
    torch.manual_seed(0)
    logits = [torch.randn(8, 5), torch.randn(2, 3, 5)]
    labels = [torch.tensor([0, 5, 5, 1, -1, 5, 4, 5]), torch.tensor([[5, 2, -1], [5, 5, 0]])]
    pred, target = boxes(5)

    def run(criterion, function):
        leaves = [x.clone().requires_grad_() for x in logits]
        pred_boxes = pred.clone().requires_grad_()
        results = []
        for _ in range(3):
            cls, loc, rank = function(leaves, labels, pred_boxes, target)
            (cls + loc).backward()
            results += [cls.detach(), loc.detach(), rank]
        return results + [x.grad for x in leaves] + [pred_boxes.grad] + list(criterion.state_dict().values())

    eager, other = ALRPLoss(), ALRPLoss()
    for actual, expected in zip(run(other, compiled(other)), run(eager, eager)):
        assert_same_bits("compiled", actual, expected)


def test_results_of_the_engine_do_not_alias_inputs():
    case = random_case(60, 6, dtype=torch.float64)
    first = evaluate(*case[1:], "torch")
    second = evaluate(*case[1:], "torch")
    first.grad_logits.fill_(9.0)
    first.rank.fill_(9.0)
    assert_same_results(second, evaluate(*case[1:], "torch"))
