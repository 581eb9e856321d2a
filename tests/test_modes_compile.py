"""Each loss of the family, and a detector with it, in one graph of torch.compile, for any sizes; and exported."""

import functools
import io
import warnings

import pytest
import torch
from dialect import (
    CRITERIA,
    KERNELS,
    MODULES,
    Detector,
    assert_close,
    assert_same_bits,
    depth_error,
    depth_normaliser,
    depth_target,
    imprecision,
    make_batch,
    random_case,
    squared_ramp,
    step,
    weighted_error,
)
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim

from alrp_triton import APLoss, NDCGLoss, alrp_loss, ap_loss, ndcg_loss, rank_sort_loss
from alrp_triton.engine.passes import choose
from alrp_triton.framework import RankingLoss, ranking_loss

# Compiling takes seconds; where kernels run the operators are seen in other tests.
pytestmark = pytest.mark.skipif(KERNELS, reason="needs no kernel")


def own_loss(logits, labels, **arguments):
    return ranking_loss(logits, labels, imprecision, **arguments)


# Each as a scalar of logits, labels, numbers of the positives, and how many these are.
LOSSES = {
    "alrp": lambda x, y, v, p, **a: sum(alrp_loss(x, y, v, backend="torch", **a)[:2]),
    "smooth": lambda x, y, v, p, **a: sum(alrp_loss(x, y, v, delta=0, loc_ranking="smooth", backend="torch", **a)[:2]),
    "ap": lambda x, y, v, p, **a: ap_loss(x, y, num_positives=p, **a),
    "ndcg": lambda x, y, v, p, **a: ndcg_loss(x, y, num_positives=p, **a),
    "rank_sort": lambda x, y, v, p, **a: sum(rank_sort_loss(x, y, v, **a)),
    "formula": lambda x, y, v, p, **a: own_loss(x, y, num_positives=p, **a),
    "depth": lambda x, y, v, p, **a: ranking_loss(
        x, y, depth_error, target=depth_target, normaliser=depth_normaliser, extras={"costs": v}, **a
    ),
    "pairs": lambda x, y, v, p, **a: ranking_loss(
        x, y, weighted_error, extras={"weights": v}, smoothing=squared_ramp, distribution=squared_ramp, **a
    ),
}


def compile_whole(function, backend="aot_eager", dynamic=None):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend=backend, dynamic=dynamic)


def results(function, case, **arguments):
    x, values = case.logits.clone().requires_grad_(), case.loc_errors.clone().requires_grad_()
    loss = function(x, case.labels, values, case.num_positives, **arguments)
    loss.backward()
    return [loss.detach(), x.grad, *([] if values.grad is None else [values.grad])]


def check(name, sizes, dynamic, groups=0):
    """Compiled once, the same bits as eager for cases of these sizes."""
    counter, counts = CompileCounterWithBackend("aot_eager"), []
    one = compile_whole(LOSSES[name], counter, dynamic)
    for num_logits, num_pos in sizes:
        case = random_case(num_logits, num_pos, ignored=0.3)
        arguments = {"groups": torch.arange(num_logits) % groups} if groups else {}
        found, expected = (results(f, case, **arguments) for f in (one, LOSSES[name]))
        assert len(found) == len(expected)
        for actual, wanted in zip(found, expected):
            assert_same_bits(f"{num_logits}, {num_pos}", actual, wanted)
        counts.append(counter.frame_count)
    assert counts == counts[:1] * len(sizes)


@pytest.mark.thinned(6)
@pytest.mark.parametrize("name", ["ap", "alrp", "smooth", "rank_sort", "depth", "pairs"])
def test_one_graph_serves_any_number_of_positives_and_logits(name):
    """Else torch.compile would give up after some eight batches or image sizes."""
    check(name, [(90, 9), (90, 7), (130, 30)], dynamic=True)


@pytest.mark.nightly
def test_graphs_of_groups():
    """The scans of groups take as many steps as 2P has binary digits, for which there is a graph each."""
    check("ndcg", [(90, 12), (90, 15), (130, 10)], dynamic=True, groups=3)


@pytest.mark.parametrize(
    ("name", "sizes", "dynamic"),
    [
        ("rank_sort", [(90, 0)], True),
        *(pytest.param(name, [(90, 9)], None, marks=pytest.mark.nightly) for name in ("rank_sort", "alrp")),
    ],
)
def test_by_default_and_without_positives(name, sizes, dynamic):
    check(name, sizes, dynamic)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_labels_of_logits_that_are_no_integers(dtype):
    case = random_case(90, 9, ignored=0)
    case = case._replace(labels=case.labels.to(dtype))
    for actual, wanted in zip(*(results(f, case) for f in (compile_whole(LOSSES["ap"]), LOSSES["ap"]))):
        assert_same_bits("result", actual, wanted)


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_choosing_a_backend_breaks_no_graph(device, backend):
    """Also for tensors of a GPU, which this machine need not have."""

    def function(x):
        return x + len(choose(backend, torch.device(device)))

    assert compile_whole(function)(torch.zeros(())) == function(torch.zeros(()))


@pytest.mark.thinned(9)
@pytest.mark.parametrize(
    ("member", "backend", "images"),
    [*((member, "eager", 0) for member in CRITERIA), ("RankSortLoss", "aot_eager", 0), ("ALRPLoss", "eager", 2)],
)
def test_one_graph_serves_levels_of_any_size(member, backend, images):
    """Logits and positives of each level change, and the self-balancing state with them; the graph does not. Scans of
    groups take as many steps as 2P has binary digits."""
    counter, eager, model = CompileCounterWithBackend(backend), Detector(member), Detector(member)
    compiled, counts = compile_whole(model, counter, dynamic=True), []
    for i, (sizes, num_pos) in enumerate([((20, 13), 9), ((31, 9), 13), ((20, 15), 12)]):
        batch = make_batch(sizes, num_pos, seed=i, images=images)
        for one, other in zip(step(model, batch, compiled), step(eager, batch)):
            assert_close(f"loss of {sizes}", one, other, 2e-7)
        for one, other in zip(model.state(), eager.state()):
            assert_close("state", one, other, 1e-6)
        counts.append(counter.frame_count)
    assert counts == counts[:1] * 3


@pytest.mark.parametrize(
    "criterion", [APLoss(), RankingLoss(imprecision, distribution=squared_ramp)], ids=["ap", "pairs"]
)
def test_compiled_modules_on_levels(criterion):
    generator, outcomes = torch.Generator().manual_seed(0), []
    logits = [torch.randn(8, 5, generator=generator), torch.randn(2, 3, 5, generator=generator)]
    labels = [torch.tensor([0, 5, 5, 1, -1, 5, 4, 5]), torch.tensor([[5, 2, -1], [5, 5, 0]])]
    groups = [torch.arange(8) % 2, torch.arange(2)[:, None].expand(2, 3)]
    for function in (compile_whole(criterion), criterion):
        leaves = [x.clone().requires_grad_() for x in logits]
        loss = function(leaves, labels, 5, groups)
        outcomes.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for actual, expected in zip(*outcomes):
        assert_same_bits("compiled", actual, expected)


@pytest.mark.nightly
def test_by_inductor():
    """Fused by the compiler that torch.compile uses by default, with the state of self-balancing."""
    eager, model = Detector("ALRPLoss"), Detector("ALRPLoss")
    compiled = compile_whole(model, "inductor")
    for seed in range(3):
        batch = make_batch(seed=seed)
        for one, other in zip(step(model, batch, compiled), step(eager, batch)):
            assert_close("loss", one, other, 1e-6)
    for one, other in zip(model.state(), eager.state()):
        assert_close("state", one, other, 1e-6)
    assert len(eager.state()) == 4 + 4 + 3


NOT_COUNTED = "num_positives: expected an int where a whole graph is compiled or exported, got None"
UNCOUNTED = {"ap": ap_loss, "ndcg": ndcg_loss, "own": own_loss}
by_uncounted = pytest.mark.parametrize("loss", UNCOUNTED.values(), ids=UNCOUNTED)


@by_uncounted
def test_a_whole_graph_says_that_it_needs_the_number_of_positives(loss):
    case = random_case(60, 6)
    with pytest.raises(torch._dynamo.exc.TorchDynamoException, match=NOT_COUNTED):
        compile_whole(loss, "eager")(*case[1:3])


@pytest.mark.thinned(3)
@by_uncounted
def test_where_a_graph_may_break_they_are_counted(loss):
    case = random_case(60, 6)
    torch._dynamo.reset()
    found = torch.compile(lambda x, y: 2 * loss(x, y), backend="eager")(*case[1:3])
    assert_same_bits("value", found, 2 * loss(*case[1:3]))


def exported(model, batch, strict):
    # Before 2.7 twice as many positives have to be a number, too, and that PyTorch does not find out.
    rows, positives = Dim("rows", min=2), Dim("positives", min=2, max=1 << 40)
    others = [Dim("others", min=2)]
    first, second = {0: rows}, {0: others[0]}
    shapes = ([first, second], [first, second], {0: positives}, {0: positives}, None)
    with warnings.catch_warnings():
        # That the state of self-balancing is written to, which is meant.
        warnings.simplefilter("ignore")
        return torch.export.export(model, tuple(batch), dynamic_shapes=shapes, strict=strict)


@functools.cache
def exported_and_saved(member):
    """Exported strictly, once for the tests below, and what is saved of that."""
    buffer = io.BytesIO()
    program = exported(Detector(member), make_batch(), True)
    torch.export.save(program, buffer)
    return program, buffer.getvalue()


by_one_worker = pytest.mark.xdist_group("exports")


@by_one_worker
@pytest.mark.nightly
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
@pytest.mark.parametrize("member", MODULES)
def test_an_exported_detector_trains_alike(member, strict):
    """One program for any number of anchors and positives: the same losses, gradients and self-balancing state."""
    if torch.__version__ < "2.12" and member == "RankSortLoss" and strict:
        pytest.skip("PyTorch 2.9 does not export Rank & Sort strictly: it makes two graphs of it")
    program = exported_and_saved(member)[0] if strict else exported(Detector(member), make_batch(), strict)
    assert "alrp_triton.attach" in program.graph_module.code
    model, eager = program.module(), Detector(member)
    for seed, (sizes, num_pos) in enumerate([((20, 13), 5), ((40, 11), 9), ((17, 30), 2)]):
        batch = make_batch(sizes, num_pos, seed)
        found, expected = model(*batch), eager(*batch)
        for one, other in zip(found, expected):
            assert_same_bits(f"loss of {sizes}", one.detach(), other.detach())
        sum(found).backward()
        sum(expected).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(gradients) == 4
    for name, gradient in gradients.items():
        assert_close(name, gradient, dict(eager.named_parameters())[name].grad, 1e-6)
    for name, buffer in eager.named_buffers():
        assert_same_bits(name, dict(model.named_buffers())[name], buffer)


@by_one_worker
def test_an_exported_detector_is_saved_and_loaded():
    model = torch.export.load(io.BytesIO(exported_and_saved("ALRPLoss")[1])).module()
    batch = make_batch((25, 8), 7, seed=4)
    for one, other in zip(model(*batch), Detector("ALRPLoss")(*batch)):
        assert_same_bits("loss", one.detach(), other.detach())


@pytest.mark.thinned(4)
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
@pytest.mark.parametrize("criterion", [APLoss(), NDCGLoss(), RankingLoss(imprecision)], ids=lambda c: type(c).__name__)
def test_export_says_that_it_needs_the_number_of_positives(criterion, strict):
    case = random_case(30, 3)
    with pytest.raises(RuntimeError, match=NOT_COUNTED):
        torch.export.export(criterion, case[1:3], strict=strict)
    program = torch.export.export(criterion, (*case[1:3], 3), strict=strict)
    found, expected = program.module()(*case[1:3], 3), criterion(*case[1:3], 3)
    assert_same_bits("value", found, expected)
