"""Training steps on a GPU: without waiting for it, in CUDA graphs, on other streams and devices, in mixed precision."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from dialect import (
    CLASSES,
    MODULES,
    Criterion,
    Detector,
    assert_close,
    assert_same_bits,
    by_criterion,
    make_batch,
    step,
)
from torch import Tensor
from torch.amp import GradScaler
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from alrp_triton import alrp_loss, ap_loss
from alrp_triton.engine.passes import triton_installed
from alrp_triton.engine.placed import MOST_COMPARED

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
]
BACKENDS = ["torch", *(["triton", "pairwise"] if triton_installed() else [])]
by_backend = pytest.mark.parametrize("backend", BACKENDS)
two_devices = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")


def make_inputs(num_pos: int = 20, seed: int = 0, device: str = "cuda", images: int = 0) -> list:
    """Two levels of logits and their labels, boxes and targets of the positives, and groups."""
    generator = torch.Generator().manual_seed(seed)
    rows = max(300, 2 * num_pos)
    sizes, total = (rows, rows // 3), rows + rows // 3
    logits = torch.randn(total, CLASSES, generator=generator)
    labels = torch.full((total,), CLASSES)
    order = torch.randperm(total, generator=generator)
    labels[order[:num_pos]] = torch.randint(CLASSES, (num_pos,), generator=generator)
    labels[order[-9:]] = -1
    corners = torch.rand(2, num_pos, 2, generator=generator)
    boxes, targets = torch.cat([corners, corners + 1], dim=-1).unbind(0)
    groups = [x.to(device) for x in (torch.arange(total) % images).split(sizes)] if images else None
    levels = [[x.contiguous().to(device) for x in whole.split(sizes)] for whole in (logits, labels)]
    return [*levels, boxes.to(device), targets.to(device), groups]


def run(criterion: torch.nn.Module, inputs: list) -> list[Tensor]:
    """Losses and gradients, with nothing that reads a value."""
    logits, labels, boxes, targets, groups = inputs
    leaves = [*(x.detach().clone().requires_grad_() for x in logits), boxes.detach().clone().requires_grad_()]
    losses = criterion(leaves[:-1], labels, leaves[-1], targets, groups)
    gradients = torch.autograd.grad(sum(losses), leaves, allow_unused=True)
    return [*(loss.detach() for loss in losses), *(g for g in gradients if g is not None)]


def capture(step: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """A graph of a step, and the tensors that each replay writes; the step is warmed up on another stream first."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    return graph, captured


@contextlib.contextmanager
def not_waiting():
    """Whatever makes the host wait for the device raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def assert_same_tensors(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for i, (one, other) in enumerate(zip(found, expected)):
        assert_same_bits(f"result {i}", one, other)


def assert_near(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for i, (one, other) in enumerate(zip(found, expected)):
        assert_close(f"result {i}", one.cpu(), other.cpu(), 2e-6)


@by_criterion
@by_backend
@pytest.mark.parametrize("images", [0, 3])
@pytest.mark.parametrize("num_pos", [20, 1, 0])
def test_a_step_waits_for_nothing(num_pos, images, backend, member):
    """Forward and backward; the second step, after kernels were compiled and tuned."""
    criterion = Criterion(member, backend=backend).cuda()
    inputs = make_inputs(num_pos, images=images)
    expected = run(criterion, inputs)
    criterion = Criterion(member, backend=backend).cuda()
    with not_waiting():
        found = run(criterion, inputs)
    assert_same_tensors(found, expected)
    on_cpu = run(Criterion(member, backend="torch"), make_inputs(num_pos, images=images, device="cpu"))
    assert_near(found, on_cpu)


@by_backend
@pytest.mark.parametrize("member", MODULES)
def test_a_monitored_step_waits_for_nothing(member, backend):
    criterion = Criterion(member, backend=backend, monitor=True).cuda()
    inputs = make_inputs()
    run(criterion, inputs)
    with not_waiting():
        run(criterion, inputs)
    on_cpu = Criterion(member, backend="torch", monitor=True)
    for _ in range(2):
        run(on_cpu, make_inputs(device="cpu"))
    found, expected = criterion.module.stats, on_cpu.module.stats
    assert all(value.is_cuda for value in found.values())
    assert_near(list(found.values()), list(expected.values()))


@pytest.mark.parametrize("member", ["alrp_loss", "ap_loss", "ndcg_loss", "ranking_loss"])
@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend != "pairwise"])
def test_more_positives_than_are_compared(backend, member):
    """They are sorted instead, which must not wait either."""
    criterion, inputs = Criterion(member, backend=backend), make_inputs(MOST_COMPARED + 5)
    expected = run(criterion, inputs)
    with not_waiting():
        found = run(criterion, inputs)
    assert_same_tensors(found, expected)
    assert_near(found, run(Criterion(member, backend="torch"), make_inputs(MOST_COMPARED + 5, device="cpu")))


@by_backend
def test_wrong_numbers_of_positives_are_not_waited_for(backend, monkeypatch):
    """They make everything NaN; where asked to, the host waits and raises."""
    logits, labels, *_ = make_inputs(20)
    errors = torch.rand(19, device="cuda")

    def wrong() -> list[Tensor]:
        x = [level.clone().requires_grad_() for level in logits]
        out = alrp_loss(x, labels, errors, backend=backend)
        return [out.cls.detach(), out.loc, *torch.autograd.grad(out.cls, x)]

    wrong()
    with not_waiting():
        found = wrong()
    assert found[0].isnan()
    assert found[1].isnan()
    monkeypatch.setenv("ALRP_TRITON_DEBUG", "1")
    with pytest.raises(ValueError, match=r"^loc_errors: expected one for each positive label, 20, got 19"):
        wrong()


@by_criterion
@by_backend
@pytest.mark.parametrize("images", [0, 3])
def test_capture_and_replay_with_changing_inputs(images, backend, member):
    """A graph of forward and backward, replayed on other scores, places of positives and boxes, and with the state of
    self-balancing moving on, gives what a step outside of it gives."""
    criterion, eager = (Criterion(member, backend=backend).cuda() for _ in range(2))
    state = {name: value.clone() for name, value in criterion.state_dict().items()}
    static = make_inputs(images=images)
    logits, labels, boxes, targets, groups = static
    leaves = [*(x.requires_grad_() for x in logits), boxes.requires_grad_()]

    def forward_backward() -> list[Tensor]:
        losses = criterion(leaves[:-1], labels, leaves[-1], targets, groups)
        gradients = torch.autograd.grad(sum(losses), leaves, allow_unused=True)
        return [*(loss.detach() for loss in losses), *(g for g in gradients if g is not None)]

    graph, captured = capture(forward_backward)
    # Warming up and capturing counted iterations.
    criterion.load_state_dict(state)
    for seed in range(1, 5):
        fresh = make_inputs(seed=seed, images=images)
        with torch.no_grad():
            for name, into, given in zip(("logits", "labels"), static[:2], fresh[:2]):
                assert len(into) == len(given), name
                for one, other in zip(into, given):
                    one.copy_(other)
            boxes.copy_(fresh[2])
            targets.copy_(fresh[3])
        graph.replay()
        assert_same_tensors(captured, run(eager, fresh))
        for (name, one), other in zip(criterion.state_dict().items(), eager.state_dict().values()):
            assert_same_bits(name, one, other)


@by_backend
def test_replays_wait_for_nothing_and_take_infinities_and_nan(backend):
    """What a capture saw decides nothing: neither finite scores, nor that none were NaN."""
    logits, labels, _, _, _ = make_inputs()
    leaves = [x.requires_grad_() for x in logits]

    def forward_backward() -> list[Tensor]:
        loss = ap_loss(leaves, labels, num_positives=20, backend=backend)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    graph, captured = capture(forward_backward)
    for value in (torch.inf, -torch.inf, torch.nan, 0.0):
        with torch.no_grad():
            logits[0][:, 1] = value
        with not_waiting():
            graph.replay()
        assert_same_tensors(captured, forward_backward())
        assert captured[0].isnan() == (value != value)


@by_criterion
@by_backend
def test_on_a_side_stream(backend, member):
    """Inputs made and used on another stream than the default; backward goes to the stream of its forward."""
    criterion = Criterion(member, backend=backend).cuda()
    inputs = make_inputs(num_pos=40)
    expected = run(criterion, inputs)
    streams = [torch.cuda.Stream() for _ in range(3)]
    for stream in streams:
        criterion = Criterion(member, backend=backend).cuda()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # Long enough for a kernel on the wrong stream to come first, and find zeros.
            torch.cuda._sleep(20_000_000)
            late = [[x.clone() for x in inputs[0]], [y.clone() for y in inputs[1]], *(x.clone() for x in inputs[2:4])]
            found = run(criterion, [*late, None])
        torch.cuda.current_stream().wait_stream(stream)
        assert_same_tensors(found, expected)


@by_criterion
@by_backend
def test_threads_with_a_stream_each(backend, member):
    """As several replicas run on one device."""
    many = [make_inputs(seed=seed) for seed in range(4)]
    expected = [run(Criterion(member, backend=backend).cuda(), inputs) for inputs in many]
    torch.cuda.synchronize()

    def work(i: int) -> list[Tensor]:
        with torch.cuda.stream(torch.cuda.Stream()):
            found = run(Criterion(member, backend=backend).cuda(), many[i])
            torch.cuda.current_stream().synchronize()
        return found

    with ThreadPoolExecutor(4) as pool:
        for found, wanted in zip(pool.map(work, range(4)), expected):
            assert_same_tensors(found, wanted)


@two_devices
@by_criterion
@by_backend
def test_on_the_second_device(backend, member):
    """While the first is current, and without touching it."""
    expected = run(Criterion(member, backend=backend).cuda(), make_inputs())
    assert torch.cuda.current_device() == 0
    inputs = make_inputs(device="cuda:1")
    criterion = Criterion(member, backend=backend).to("cuda:1")
    run(criterion, inputs)
    torch.cuda.synchronize()
    taken = torch.cuda.memory_allocated(0)
    found = run(Criterion(member, backend=backend).to("cuda:1"), inputs)
    assert torch.cuda.memory_allocated(0) == taken
    assert all(tensor.device == torch.device("cuda:1") for tensor in found)
    assert_same_tensors([tensor.cpu() for tensor in found], [tensor.cpu() for tensor in expected])


@two_devices
def test_levels_on_two_devices_are_refused():
    logits, labels, _, _, _ = make_inputs()
    with pytest.raises(ValueError, match=r"^logits\[1\]: expected device cuda:0"):
        ap_loss([logits[0], logits[1].to("cuda:1")], labels)


@by_criterion
@by_backend
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_autocast_and_half_precision_scores(half, backend, member):
    """The float32 result on the same scores, bit for bit, within autocast and outside of it; gradients rounded."""
    logits, *rest = make_inputs()
    halves = [x.to(half) for x in logits]
    exact = run(Criterion(member, backend=backend).cuda(), [[x.float() for x in halves], *rest])
    plain = run(Criterion(member, backend=backend).cuda(), [halves, *rest])
    with torch.autocast("cuda", half):
        cast = run(Criterion(member, backend=backend).cuda(), [halves, *rest])
    assert_same_tensors(cast, plain)
    for one, other in zip(plain, exact):
        if one.dtype == half:
            assert_close("gradient", one, other.to(half), torch.finfo(half).eps)
        else:
            assert_same_bits("float32", one, other)


@by_criterion
def test_overflow_under_a_gradient_scaler(member):
    """A step of NaN losses is skipped, and self-balancing takes no note of it."""
    models = [Detector(member).cuda() for _ in range(2)]
    for model, bad in zip(models, (True, False)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = GradScaler("cuda", init_scale=2.0**10)
        for seed in range(4):
            batch = make_batch(seed=seed)
            features = [x.clone().cuda() for x in batch.features]
            if seed == 2 and not bad:
                scaler.update(scaler.get_scale() / 2)
                continue
            if seed == 2:
                features[0][int(batch.rows[0])] = torch.nan
            optimizer.zero_grad()
            with torch.autocast("cuda", torch.float16):
                labels = [y.cuda() for y in batch.labels]
                losses = model(features, labels, batch.rows.cuda(), batch.targets.cuda())
            scaler.scale(sum(losses)).backward()
            scaler.step(optimizer)
            scaler.update()
            assert bool(sum(losses).isfinite()) == (seed != 2)
        assert scaler.get_scale() == 512.0
    for (name, one), other in zip(models[0].state_dict().items(), models[1].state_dict().values()):
        assert_close(name, one, other, 1e-5)


@pytest.mark.parametrize("member", ["alrp_loss", "ndcg_loss", "ALRPLoss", "RankSortLoss"])
@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_by_inductor(dynamic, member):
    """One graph, as on the CPU, with the kernels as operators in it."""
    torch._dynamo.reset()
    eager, criterion = (Criterion(member).cuda() for _ in range(2))
    compiled = torch.compile(criterion, fullgraph=True, dynamic=dynamic)
    for seed, num_pos in enumerate([20, 20] if dynamic is None else [20, 30, 25]):
        assert_near(run(compiled, make_inputs(num_pos, seed)), run(eager, make_inputs(num_pos, seed)))


@pytest.mark.parametrize("member", ["ap_loss", "ALRPLoss"])
def test_compiled_with_cuda_graphs(member):
    """mode="reduce-overhead" replays what it captured, with other inputs."""
    torch._dynamo.reset()
    eager, criterion = (Criterion(member).cuda() for _ in range(2))
    compiled = torch.compile(criterion, fullgraph=True, mode="reduce-overhead")
    for seed in range(5):
        torch.compiler.cudagraph_mark_step_begin()
        found = [tensor.clone() for tensor in run(compiled, make_inputs(seed=seed))]
        assert_near(found, run(eager, make_inputs(seed=seed)))


@by_criterion
@by_backend
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant, backend, member):
    """Backward runs in a thread of the device's; there, too, a recomputation is not counted."""
    plain, saving = (Detector(member, backend=backend).cuda() for _ in range(2))
    for seed in range(3):
        batch = make_batch(seed=seed)
        features = [level.cuda().requires_grad_() for level in batch.features]
        rest = [y.cuda() for y in batch.labels], batch.rows.cuda(), batch.targets.cuda()
        sum(plain(features, *rest)).backward()
        recomputed = checkpoint(lambda *levels, rest=rest: saving(levels, *rest), *features, use_reentrant=reentrant)
        sum(recomputed).backward()
    for (name, one), other in zip(saving.named_buffers(), plain.buffers()):
        assert_same_bits(name, one, other)
    for (name, one), other in zip(saving.named_parameters(), plain.parameters()):
        if other.grad is not None:
            assert_close(name, one.grad, other.grad, 1e-5)


@by_criterion
@pytest.mark.parametrize("pinned", [False, True])
def test_saved_tensors_kept_on_the_host(pinned, member):
    inputs = make_inputs()
    expected = run(Criterion(member).cuda(), inputs)
    with save_on_cpu(pin_memory=pinned):
        found = run(Criterion(member).cuda(), inputs)
    assert_same_tensors(found, expected)


@by_backend
def test_the_same_bits_in_every_run_beside_other_work(backend):
    """Sums of many blocks, while another stream keeps the device busy."""
    inputs = make_inputs(num_pos=200, seed=3)
    inputs[0] = [torch.cat([x] * 50) for x in inputs[0]]
    inputs[1] = [torch.cat([y, *[torch.full_like(y, CLASSES)] * 49]) for y in inputs[1]]
    expected = run(Criterion("alrp_loss", backend=backend), inputs)
    busy, a = torch.cuda.Stream(), torch.randn(2048, 2048, device="cuda")
    for _ in range(3):
        with torch.cuda.stream(busy):
            for _ in range(20):
                a = (a @ a).clamp(-1, 1)
        assert_same_tensors(run(Criterion("alrp_loss", backend=backend), inputs), expected)
    torch.cuda.synchronize()


@by_criterion
def test_a_detector_trains_on_the_device(member):
    """Where backward begins is a thread of the device; its parameters get what they get on the CPU."""
    on_cpu, on_gpu = Detector(member), Detector(member).cuda()
    batch = make_batch()
    step(on_cpu, batch)
    features, labels = ([x.cuda() for x in levels] for levels in batch[:2])
    sum(on_gpu(features, labels, batch.rows.cuda(), batch.targets.cuda())).backward()
    for (name, p), q in zip(on_gpu.named_parameters(), on_cpu.parameters()):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            assert_close(name, p.grad.cpu(), q.grad, 1e-4)
