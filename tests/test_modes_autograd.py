"""What autograd offers around a training step: checkpointing, hooks, accumulation, several threads."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from dialect import (
    FAMILY,
    KERNELS,
    Detector,
    assert_close,
    assert_same_bits,
    by_backend,
    by_criterion,
    make_batch,
    random_case,
    step,
)
from dialect.interpreters import start_python
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from alrp_triton import ALRPLoss, SelfBalance

by_loss = pytest.mark.parametrize("loss", FAMILY, ids=repr)
REPEATS = 1 if KERNELS else 3


def assert_same_state(one, other):
    assert len(one) == len(other)
    for i, (actual, expected) in enumerate(zip(one, other)):
        assert_same_bits(f"state {i}", actual, expected)


@pytest.mark.thinned(1 if KERNELS else 2)
@by_criterion
@by_backend
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant, backend, member):
    """The head and its loss computed twice give what they give once, and are counted once."""
    plain, saving = Detector(member, backend=backend), Detector(member, backend=backend)

    def call(features, *rest):
        # The reentrant form sees tensors that are arguments, not those in a list.
        return checkpoint(lambda *levels: saving(levels, *rest), *features, use_reentrant=reentrant)

    for seed in range(REPEATS):
        batch = make_batch(seed=seed)
        batch = batch._replace(features=[level.requires_grad_() for level in batch.features])
        expected, gradients = step(plain, batch), [level.grad.clone() for level in batch.features]
        for level in batch.features:
            level.grad = None
        for one, other in zip(step(saving, batch, call), expected):
            assert_same_bits("loss", one, other)
        for level, gradient in zip(batch.features, gradients):
            assert_same_bits("features", level.grad, gradient)
    assert_same_state(saving.state(), plain.state())


def test_a_recomputation_within_a_period_gets_the_weight_of_its_loss():
    """Counted a second time, the first iteration would end the period of two, and its gradient be another's."""
    losses = torch.tensor([0.5, 0.25], requires_grad=True)
    balance = SelfBalance(period=2)
    seen = []

    def weighted(pair):
        cls, loc = pair
        weight = balance(cls, loc, True)
        seen.append(weight.item())
        # Saved for backward: without a saved tensor there would be no recomputation.
        return cls + weight * loc

    loss = checkpoint(weighted, losses, use_reentrant=False)
    loss.backward()
    assert seen == [50.0, 50.0]
    assert balance.count == 1
    assert losses.grad.tolist() == [1.0, 50.0]


@by_criterion
@by_backend
def test_accumulated_gradients_are_their_sum(backend, member):
    """Micro-batches one after the other; the sum of the losses of all, differentiated at once, is the same."""
    one, together = Detector(member, backend=backend), Detector(member, backend=backend)
    alone, total = [], torch.zeros(())
    for seed in range(3):
        batch = make_batch(seed=seed)
        step(one, batch)
        alone.append([p.grad.clone() for p in one.parameters() if p.grad is not None])
        total = sum(together(*batch), total)
    total.backward()
    assert any((second - first).abs().max() > 0 for first, second in zip(*alone[:2]))
    for actual, expected in zip(together.state(), one.state()):
        assert_close("state", actual, expected, 1e-6)


@by_criterion
@by_backend
def test_saved_tensors_may_be_packed(backend, member):
    """Kept elsewhere between forward and backward, as copies; the pair of hooks sees each once."""
    plain, model, packed = Detector(member, backend=backend), Detector(member, backend=backend), []

    def pack(tensor):
        packed.append(tensor.numel())
        return tensor.detach().clone()

    def unpack(tensor):
        return tensor.clone()

    batch = make_batch()
    step(plain, batch)
    with saved_tensors_hooks(pack, unpack):
        step(model, batch)
    assert sum(packed) > 0
    assert_same_state(model.state(), plain.state())
    model.zero_grad()
    other = Detector(member, backend=backend)
    with save_on_cpu():
        step(other, batch)
    assert_same_state(other.state(), plain.state())


@by_loss
@by_backend
def test_a_graph_kept_gives_its_gradient_again(backend, loss):
    case = random_case(60, 6)
    x = case.logits.clone().requires_grad_()
    value = loss.loss(x, case.labels, loss.values(case), backend=backend)[loss.components[0]]
    value.backward(retain_graph=True)
    first = x.grad.clone()
    x.grad = None
    value.backward(retain_graph=True)
    assert_same_bits("again", x.grad, first)
    value.backward()
    assert_same_bits("twice", x.grad, 2 * first)
    with pytest.raises(RuntimeError, match="a second time"):
        value.backward()


@by_loss
@by_backend
def test_components_alone_and_in_either_order(backend, loss):
    case = random_case(60, 6)

    def run(*orders):
        x, values = case.logits.clone().requires_grad_(), loss.values(case).clone().requires_grad_()
        found = loss.loss(x, case.labels, values, backend=backend)
        for component in orders:
            found[component].backward(retain_graph=True)
        return [None if leaf.grad is None else leaf.grad for leaf in (x, values)]

    separate = [run(component) for component in loss.components]
    for order in (loss.components, loss.components[::-1]):
        for i, found in enumerate(run(*order)):
            parts = [gradients[i] for gradients in separate if gradients[i] is not None]
            assert (found is None) == (not parts)
            if parts:
                assert_same_bits("sum", found, sum(parts[1:], parts[0]))


@by_loss
@by_backend
@pytest.mark.parametrize("upstream", [torch.float64, torch.float16])
def test_upstream_gradients_of_other_dtypes(upstream, backend, loss):
    """A loss that was cast before it was scaled; powers of two keep every bit."""
    case = random_case(60, 6)
    gradients = []
    for cast in (torch.float32, upstream):
        x = case.logits.clone().requires_grad_()
        value = loss.loss(x, case.labels, loss.values(case), backend=backend)[loss.components[0]]
        (value.to(cast) * torch.tensor(0.25, dtype=cast)).backward()
        gradients.append(x.grad)
    assert_same_bits("gradient", *gradients)


@by_loss
@by_backend
@pytest.mark.parametrize("changed", ["logits", "labels"])
def test_inputs_changed_in_place_are_noticed(changed, backend, loss):
    """What backward reads again has a version, which a write in place moves on."""
    case = random_case(60, 6)
    x, labels = case.logits.clone().requires_grad_(), case.labels.clone()
    y = x * 1
    value = loss.loss(y, labels, loss.values(case), backend=backend)[loss.components[0]]
    (expected,) = torch.autograd.grad(value, x, retain_graph=True)
    (y if changed == "logits" else labels).mul_(0)
    if backend == "reference" and changed == "labels":
        # Its gradient is there already, and labels are not read again.
        assert_same_bits("gradient", torch.autograd.grad(value, x)[0], expected)
        return
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(value, x)


@by_criterion
@by_backend
def test_evaluation_modes_and_frozen_heads(backend, member):
    batch = make_batch()
    expected = [loss.detach() for loss in Detector(member, backend=backend)(*batch)]
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = Detector(member, backend=backend)(*batch)
        assert not any(loss.requires_grad for loss in found)
        for one, other in zip(found, expected):
            assert_same_bits("loss", one.clone(), other)
    frozen = Detector(member, backend=backend).requires_grad_(False)
    assert not any(loss.requires_grad for loss in frozen(*batch))
    # The scores are frozen, the boxes are not, and the other way round.
    whole = Detector(member, backend=backend)
    step(whole, batch)
    for part in ("score", "box"):
        model = Detector(member, backend=backend)
        getattr(model, part).requires_grad_(False)
        losses = model(*batch)
        if not any(loss.requires_grad for loss in losses):
            assert part == "score"
            continue
        sum(losses).backward()
        for (name, p), q in zip(model.named_parameters(), whole.parameters()):
            if name.startswith(part):
                assert p.grad is None
            elif q.grad is not None:
                assert_same_bits(name, p.grad, q.grad)


def run_in_threads(work, number):
    """Let all begin at once; what each returns, in order."""
    barrier = threading.Barrier(number)

    def begin(i):
        barrier.wait()
        return work(i)

    with ThreadPoolExecutor(number) as pool:
        return list(pool.map(begin, range(number)))


@pytest.mark.thinned(1 if KERNELS else 2)
@by_criterion
@by_backend
def test_replicas_in_threads(backend, member):
    """As nn.DataParallel runs them: a copy of the model and a part of the batch in each thread."""
    number = 2 if KERNELS else 4
    batches = [[make_batch(seed=10 * i + k) for k in range(REPEATS)] for i in range(number)]

    def work(i):
        # Seeds of parameters are global: models are made beforehand.
        found = [loss for batch in batches[i] for loss in step(models[i], batch)]
        return [*found, *models[i].state()]

    results = []
    for run in (lambda: [work(i) for i in range(number)], lambda: run_in_threads(work, number)):
        models = [Detector(member, backend=backend) for _ in range(number)]
        results.append(run())
    for alone, beside in zip(*results):
        assert_same_state(beside, alone)


@by_backend
def test_one_criterion_shared_by_threads(backend):
    """A criterion has no state but that of self-balancing, which counts every call."""
    number = 2 if KERNELS else 4
    criterion = ALRPLoss(self_balance=SelfBalance(), backend=backend)
    case, corners = random_case(60, 6), torch.rand(6, 2)
    boxes = torch.cat([corners, corners + 1], 1)
    expected = ALRPLoss(self_balance=50.0, backend=backend)(case.logits, case.labels, boxes, boxes + 0.1)

    def work(i):
        return criterion(case.logits, case.labels, boxes, boxes + 0.1)

    for output in run_in_threads(work, number):
        for one, other in zip(output, expected):
            assert_same_bits("output", one, other)


FIRST_USE = """
import threading, torch
from alrp_triton import ap_loss
x = torch.linspace(-2, 2, 300)
labels = (torch.arange(300) % 7 == 0).long()
results, barrier = [None] * 4, threading.Barrier(4)

def work(i):
    y = x.clone().requires_grad_()
    barrier.wait()
    ap_loss(y, labels, backend={backend!r}, delta=0.5).backward()
    results[i] = y.grad

threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
expected = x.clone().requires_grad_()
ap_loss(expected, labels, backend={backend!r}, delta=0.5).backward()
assert all(torch.equal(found, expected.grad) for found in results)
print("alike")
"""


@pytest.mark.thinned(3)
@pytest.mark.skipif(KERNELS, reason="the interpreter changes Triton for all threads, the virtual GPU is of one process")
@by_backend
def test_first_use_in_several_threads_at_once(backend):
    """What is imported, registered or compiled at the first call."""
    done = start_python(FIRST_USE.format(backend=backend))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "alike"
