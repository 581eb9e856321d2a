"""One ranking over several processes: what one process gives for all their logits, in each of them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.distributed as dist
from cases import INTERPRETED, NAN, Case, all_cases, random_case
from family import ALRP, FAMILY, Results, assert_agree, evaluate
from processes import Pool, group_of
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn.parallel import DistributedDataParallel

from alrp_triton import ALRPLoss, APLoss, NDCGLoss, RankSortLoss, alrp_loss, ap_loss
from alrp_triton.framework import RankingLoss, ranking_loss

pytestmark = [
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo"),
    pytest.mark.xdist_group("processes"),  # which are then started once
]
SIZE = 4
HALF = (torch.float16, torch.bfloat16)
BACKENDS = ("triton", "pairwise") if INTERPRETED else ("torch", "numba")
CASES = {case.name: case for case in all_cases()}
FEW = ["integers", "no_positives", "one_positive", "no_negatives", "infinite", "nothing"]
# In the interpreter, which is slow, what kernels could take differently.
CHOSEN = [*FEW, "bfloat16"] if INTERPRETED else list(CASES)
# Three times a gradient, rounded, is not three times the rounded one.
ROUNDED = ["errors_bfloat16", *(name for name, case in CASES.items() if case.logits.dtype in HALF)]


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    pool = Pool(SIZE, tmp_path_factory.mktemp("store") / "store")
    yield pool
    pool.close()


def cut(case: Case, values: Tensor, size: int, seed: int = 0) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Logits, labels and values of each process: uneven parts of the case, the last of them empty."""
    generator = torch.Generator().manual_seed(seed)
    inner = torch.randint(len(case.logits) + 1, (max(size - 2, 0),), generator=generator).sort().values.tolist()
    ends = [*inner, len(case.logits), len(case.logits)][:size] if size > 1 else [len(case.logits)]
    parts, begin, first = [], 0, 0
    for end in ends:
        count = int((case.labels[begin:end] == 1).sum())
        parts.append((case.logits[begin:end], case.labels[begin:end], values[first : first + count]))
        begin, first = end, first + count
    return parts


def together(found: list[Results], size: int) -> Results:
    """Of what the processes found, scalars, which have to be the same, and the rest in a row; gradients as
    DistributedDataParallel makes them."""
    results = {}
    for name, first in found[0].items():
        parts = [one[name] for one in found]
        if first.dim() == 0:
            assert all(torch.equal(part, first) or (part.isnan() and first.isnan()) for part in parts), name
            results[name] = first
        else:
            results[name] = torch.cat(parts) / (size if " by " in name else 1)
    return results


def family_of(rank: int, name: str, size: int, backend: str, settings: dict[str, Any]) -> list[Results] | None:
    """In a process: every member for its part of a case."""
    if rank >= size:
        return None
    results = []
    for member in FAMILY:
        part = cut(CASES[name], member.values(CASES[name]), size)[rank]
        results.append(evaluate(member, *part, backend, group=group_of(size), **settings))
    return results


def assert_as_alone(pool: Pool, name: str, size: int, backend: str, **settings: Any) -> None:
    found = [one for one in pool.run(family_of, name, size, backend, settings) if one is not None]
    assert len(found) == size
    for member, *of_member in zip(FAMILY, *found):
        expected = evaluate(member, *CASES[name][1:3], member.values(CASES[name]), backend, **settings)
        said = f"{member.name}, {name}, {size} processes"
        joined = together(of_member, size)
        # Statistics are the same integers, so that what is made of them is the same, whoever counted.
        for component in member.components:
            if backend != "triton":  # which alone takes other kernels
                torch.testing.assert_close(joined[component], expected[component], rtol=0, atol=0, equal_nan=True)
        if name not in ROUNDED:
            assert_agree(joined, expected, said=said)


@pytest.mark.parametrize("name", CHOSEN)
def test_three_processes_rank_as_one(pool, name):
    assert_as_alone(pool, name, 3, BACKENDS[0])


@pytest.mark.parametrize("name", FEW)
def test_three_processes_rank_as_one_by_the_other_backend(pool, name):
    assert_as_alone(pool, name, 3, BACKENDS[1])


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", FEW)
def test_any_number_of_processes_ranks_as_one(pool, name, size):
    assert_as_alone(pool, name, size, BACKENDS[0])


@pytest.mark.parametrize("settings", [{"delta": 0.0}, {"delta": 0.3, "upstream": 2.5}])
@pytest.mark.parametrize("name", ["integers", "two_values"])
def test_settings_hold_in_every_process(pool, name, settings):
    assert_as_alone(pool, name, 3, BACKENDS[0], **settings)


def half_precision(rank: int, name: str) -> list[tuple[Tensor, Tensor]]:
    found = []
    for dtype in (torch.float32, CASES[name].logits.dtype):
        logits, labels, values = cut(CASES[name], CASES[name].loc_errors, SIZE)[rank]
        logits = logits.to(dtype).requires_grad_()
        out = alrp_loss(logits, labels, values, backend=BACKENDS[0], group=True)
        (out.cls + out.loc).backward()
        found.append((out.cls.detach(), logits.grad))
    return found


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_half_precision_is_the_float32_of_the_same_scores_rounded(pool, name):
    for single, half in pool.run(half_precision, name):
        assert torch.equal(single[0], half[0])
        assert torch.equal(single[1].to(half[1].dtype), half[1])


def with_groups(rank: int, case: Case, groups: Tensor, size: int) -> list[Results] | None:
    if rank >= size:
        return None
    results = []
    for member in FAMILY:
        logits, labels, values = cut(case, member.values(case), size)[rank]
        begin = sum(len(part[0]) for part in cut(case, member.values(case), size)[:rank])
        own = groups[begin : begin + len(logits)]
        results.append(evaluate(member, logits, labels, values, BACKENDS[0], group=group_of(size), groups=own))
    return results


def test_groups_reach_over_processes(pool):
    """The same number is the same ranking, wherever its logits are."""
    case = random_case(400, 40, seed=5)
    groups = torch.randint(3, (400,), generator=torch.Generator().manual_seed(1)) - 1
    found = [one for one in pool.run(with_groups, case, groups, 3) if one is not None]
    for member, *of_member in zip(FAMILY, *found):
        expected = evaluate(member, *case[1:3], member.values(case), BACKENDS[0], groups=groups)
        assert_agree(together(of_member, 3), expected, said=member.name)


def slow_start(differences: Tensor, delta: float) -> Tensor:
    """A smoothing of one's own."""
    return (differences / (2 * delta) + 0.5).clamp(0, 1) ** 2


def precision_error(ranking: Any) -> Tensor:
    return ranking.num_false_positives / ranking.rank


def with_pair_functions(rank: int, parts: list[Any]) -> list[Results]:
    logits, labels, _ = parts[rank]
    found = []
    for functions in ({"smoothing": slow_start}, {"distribution": slow_start}):
        x = logits.clone().requires_grad_()
        loss = ranking_loss(x, labels, precision_error, **functions, group=True)
        loss.backward()
        found.append({"loss": loss.detach(), "loss by logits": x.grad})
    return found


@pytest.mark.skipif(INTERPRETED, reason="pairs of one's own are PyTorch's, whatever the kernels do")
def test_pair_functions_reach_over_processes(pool):
    case = random_case(200, 20, seed=6)
    found = pool.run(with_pair_functions, cut(case, case.loc_errors, SIZE))
    for functions, *of_functions in zip(({"smoothing": slow_start}, {"distribution": slow_start}), *found):
        x = case.logits.clone().requires_grad_()
        loss = ranking_loss(x, case.labels, precision_error, **functions)
        loss.backward()
        assert_agree(together(of_functions, SIZE), {"loss": loss.detach(), "loss by logits": x.grad})


def of_levels(rank: int, logits: Tensor, labels: Tensor, errors: Tensor) -> Results:
    """A pyramid of two levels, class labels, and rows that do not lie in order."""
    x, y = logits[rank], labels[rank]
    counts = (labels < logits.shape[-1]).flatten(1).sum(1)
    first = int(counts[:rank].sum())
    levels = [x[:10].mT.contiguous().mT.requires_grad_(), x[10:].clone().requires_grad_()]
    out = alrp_loss(levels, [y[:10], y[10:]], errors[first : first + int(counts[rank])], group=True)
    out.cls.backward()
    return {"cls": out.cls.detach(), "cls by logits": torch.cat([level.grad for level in levels])}


def test_levels_of_every_process_are_ranked_together(pool):
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(SIZE, 30, 5, generator=generator)
    labels = torch.randint(0, 12, (SIZE, 30), generator=generator).clamp(max=5)
    errors = torch.rand(int((labels < 5).sum()), generator=generator)
    found = together(pool.run(of_levels, logits, labels, errors), SIZE)
    x = logits.flatten(0, 1).requires_grad_()
    out = alrp_loss(x, labels.flatten(), errors)
    out.cls.backward()
    assert_agree(found, {"cls": out.cls.detach(), "cls by logits": x.grad})


def poisoned(rank: int, parts: list[Any], where: str) -> dict[str, Tensor]:
    logits, labels, values = (part.clone() for part in parts[rank])
    if rank == 1:
        (logits if where == "logits" else values)[0] = NAN
    logits.requires_grad_()
    values.requires_grad_()
    out = alrp_loss(logits, labels, values, group=True)
    (out.cls + out.loc).backward()
    return {"cls": out.cls.detach(), "loc": out.loc.detach(), "logits": logits.grad, "values": values.grad}


@pytest.mark.parametrize("where", ["logits", "values"])
def test_a_nan_in_one_process_is_seen_in_all(pool, where):
    case = random_case(300, 60, ignored=0.0, seed=8)
    for found in pool.run(poisoned, cut(case, case.loc_errors, SIZE), where):
        assert all(value.isnan().all() for value in found.values()), found


def mistaken(rank: int, mistake: str) -> str:
    logits, labels, errors = torch.randn(20), torch.tensor([1, 0] * 10), torch.rand(10)
    settings: dict[str, Any] = {"group": True}
    if rank == 1 and mistake == "label":
        labels[0] = 7
    elif rank == 1 and mistake == "count":
        errors = errors[:5]
    elif rank == 1 and mistake == "type":
        errors = errors.long()
    elif mistake == "delta":
        settings["delta"] = 1.0 + rank
    elif rank == 1 and mistake == "dtype":
        logits = logits.double()
    elif rank == 1 and mistake == "groups":
        settings["groups"] = torch.zeros(20, dtype=torch.int64)
    elif rank == 1 and mistake == "backend":
        settings["backend"] = "reference"
    try:
        alrp_loss(logits, labels, errors, **settings)
    except (TypeError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@pytest.mark.parametrize("mistake", ["label", "count", "type", "backend"])
def test_a_mistake_in_one_process_raises_in_all(pool, mistake):
    """None is left waiting for the one that raised, and the group can still be used."""
    for rank, said in enumerate(pool.run(mistaken, mistake)):
        if rank == 1:
            assert said.startswith(("ValueError", "TypeError")), said
        else:
            assert said == "RuntimeError: group: process 1 raised an error, so that there is nothing to rank with"
    assert_as_alone(pool, "integers", 3, BACKENDS[0])


def mistaken_boxes(rank: int, module: type[nn.Module]) -> str:
    boxes = torch.tensor([[0.0, 0, 1, 1]] * 10)
    try:
        module(group=True)(torch.randn(20), torch.tensor([1, 0] * 10), boxes, boxes[:5] if rank == 1 else boxes)
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@pytest.mark.parametrize("module", [ALRPLoss, RankSortLoss])
def test_boxes_that_do_not_fit_in_one_process_raise_in_all(pool, module):
    """They are looked at before the processes meet."""
    for rank, said in enumerate(pool.run(mistaken_boxes, module)):
        assert said.startswith("ValueError: target_boxes" if rank == 1 else "RuntimeError: group: process 1 raised"), (
            said
        )


@pytest.mark.parametrize(("mistake", "named"), [("delta", "delta"), ("dtype", "logits"), ("groups", "groups")])
def test_processes_that_disagree_are_told(pool, mistake, named):
    for said in pool.run(mistaken, mistake):
        assert said.startswith(f"ValueError: {named}: expected the same in every process of the group")


def outside(rank: int) -> str:
    group = group_of(2)
    try:
        ap_loss(torch.randn(6), torch.tensor([1, 0] * 3), group=group)
    except ValueError as error:
        return str(error)
    return "ranked"


def test_a_group_is_for_its_members(pool):
    said = pool.run(outside)
    assert said[:2] == ["ranked"] * 2
    assert said[2:] == ["group: expected a group that this process is in"] * 2


def test_a_group_has_to_be_one():
    arguments = torch.randn(6), torch.tensor([1, 0] * 3)
    with pytest.raises(ValueError, match="group: expected torch\\.distributed to be initialised"):
        ap_loss(*arguments, group=True)


def wrong_groups(rank: int) -> list[str]:
    said = []
    for group in (False, "gloo", 3):
        try:
            ap_loss(torch.randn(6), torch.tensor([1, 0] * 3), group=group)
        except TypeError as error:
            said.append(str(error))
    return said


def test_what_is_no_group_is_refused(pool):
    for said in pool.run(wrong_groups):
        assert said == [f"group: expected a process group, True or None, got {name}" for name in ("bool", "str", "int")]


def modules_for(group: Any) -> list[nn.Module]:
    scores = [APLoss(group=group), NDCGLoss(group=group), RankingLoss(precision_error, group=group)]
    return [ALRPLoss(group=group), RankSortLoss(group=group), *scores]


def copies(rank: int) -> list[str]:
    def group(module: nn.Module) -> Any:
        return module.group

    kept = [group(copy.deepcopy(module)) is True for module in modules_for(True)]
    kept += [group(pickle.loads(pickle.dumps(module))) is True for module in modules_for(True)]
    return [str(all(kept)), *(repr(module) for module in modules_for(True))]


def test_modules_with_the_default_group_can_be_copied(pool):
    for kept, *_ in pool.run(copies):
        assert kept == "True"


class Detector(nn.Module):
    """Scores and boxes of each row; boxes of positives are compared with targets."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 16)
        self.scores, self.boxes = nn.Linear(16, 3), nn.Linear(16, 4)

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(rows).tanh()
        corners = self.boxes(features)
        return self.scores(features), torch.cat([corners[:, :2], corners[:, :2] + corners[:, 2:].exp()], 1)


CRITERIA = {"alrp": ALRPLoss, "rank_sort": RankSortLoss}


def train(
    model: nn.Module, criterion: nn.Module, rows: Tensor, labels: Tensor, targets: Tensor
) -> tuple[list[float], dict[str, Tensor]]:
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    losses = []
    for step in range(6):
        # Each step other rows, so that the number of positives changes.
        x, y, t = rows[step::6], labels[step::6], targets[step::6]
        scores, boxes = model(x)
        out = criterion(scores, y, boxes[y < 3], t[y < 3])
        optimizer.zero_grad()
        (out.cls + out.loc).backward()
        optimizer.step()
        losses.append(float(out.cls + out.loc))
        if step % 2 and hasattr(criterion.self_balance, "step_epoch"):
            criterion.self_balance.step_epoch()
    plain = model.module if isinstance(model, DistributedDataParallel) else model
    return losses, {**plain.state_dict(), **criterion.state_dict()}


def train_together(rank: int, name: str, rows: Tensor, labels: Tensor, targets: Tensor, ends: list[int]) -> Any:
    torch.manual_seed(0)
    model = DistributedDataParallel(Detector())
    part = slice(ends[rank], ends[rank + 1])
    return train(model, CRITERIA[name](group=True), rows[part], labels[part], targets[part])


@pytest.mark.parametrize("name", list(CRITERIA))
def test_data_parallel_training_is_that_of_one_process(pool, name):
    """DistributedDataParallel takes the mean of gradients; losses, weights and self-balancing are those of one process
    with all rows. One process has no positives, another a single row in each step."""
    generator = torch.Generator().manual_seed(4)
    ends = [0, 60, 66, 96, 192]
    rows = torch.randn(192, 6, generator=generator)
    labels = torch.randint(0, 9, (192,), generator=generator).clamp(max=3)
    labels[66:96] = 3
    corners = torch.randn(192, 2, generator=generator)
    targets = torch.cat([corners, corners + 1], 1)

    found = pool.run(train_together, name, rows, labels, targets, ends)
    # Step by step each process takes every sixth of its rows, and so does one with all of them.
    torch.manual_seed(0)
    losses, state = train(Detector(), CRITERIA[name](), rows, labels, targets)
    for theirs, their_state in found:
        assert theirs == found[0][0]
        assert theirs == pytest.approx(losses, rel=1e-5)
        assert their_state.keys() == state.keys()
        for key, value in state.items():
            torch.testing.assert_close(their_state[key], value, rtol=1e-4, atol=1e-6)
            assert torch.equal(their_state[key], found[0][1][key])


class Scaled(nn.Module):
    """Something to compile before the loss, and after it."""

    def __init__(self, criterion: nn.Module) -> None:
        super().__init__()
        self.criterion = criterion

    def forward(self, logits: Tensor, *rest: Tensor) -> Tensor:
        out = self.criterion(logits * 2, *rest)
        return (out if isinstance(out, Tensor) else out.cls + out.loc) * 3


def compiled(rank: int, whole: bool) -> dict[str, Any]:
    """Steps with other numbers of positives each, compiled and not; and how many graphs there were after each, and
    functions that were compiled."""
    same, graphs = [], []
    for criterion in [*modules_for(True)[:2], APLoss(group=True)]:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        counter, plain = CompileCounter(), Scaled(criterion)
        graphs.append([])
        fast = torch.compile(plain, backend=counter, fullgraph=whole)
        for seed in range(5):
            given = small_batch(criterion, 10 * seed + rank)
            try:
                found = [run_small(module, given) for module in (fast, plain)]
            except torch._dynamo.exc.Unsupported as error:
                return {"refused": str(error)}
            same += [torch.equal(one, other) for one, other in zip(*found)]
            graphs[-1].append((counter.frame_count, torch._dynamo.utils.counters["frames"]["total"]))
    return {"same": same, "graphs": graphs}


def small_batch(module: nn.Module, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits, corners = (torch.randn(20, 3, generator=generator), torch.rand(4 + seed % 7, 2, generator=generator))
    labels = torch.full((20,), 3)
    labels[: len(corners)] = 1
    boxes = torch.cat([corners, corners + 1], 1)
    return [logits, labels] if isinstance(module, APLoss) else [logits, labels, boxes + 0.1, boxes]


def run_small(module: Any, given: list[Tensor]) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() if x.is_floating_point() else x for x in given[:3]]
    loss = module(*leaves, *given[3:])
    loss.backward()
    return [loss.detach(), *(x.grad for x in leaves if x.grad is not None)]


@pytest.mark.skipif(INTERPRETED, reason="the compiler is the same, whatever the kernels do")
def test_compiled_the_loss_stays_outside_of_the_graph(pool):
    for found in pool.run(compiled, False):
        assert found["same"] == [True] * (3 + 3 + 2) * 5
        for counts in found["graphs"]:
            # One before the loss and one after it, which are made once more when the way around the loss is known; then
            # nothing is compiled anew, whatever the number of positives.
            assert counts[0][0] == 2
            assert counts[2:] == [counts[2]] * 3
            assert counts[2][0] <= 4


@pytest.mark.skipif(INTERPRETED, reason="the compiler is the same, whatever the kernels do")
def test_one_whole_graph_is_refused(pool):
    for found in pool.run(compiled, True):
        assert "ALRPLoss.forward" in found["refused"]


def traffic(rank: int, sizes: list[int], num_positives: int) -> list[int]:
    """Bytes that this process gives to collectives, for each number of logits."""
    sent = []
    all_gather, all_reduce = dist.all_gather, dist.all_reduce
    try:
        dist.all_gather = lambda out, x, **rest: sent.append(x.nbytes) or all_gather(out, x, **rest)
        dist.all_reduce = lambda x, **rest: sent.append(x.nbytes) or all_reduce(x, **rest)
        found = []
        for size in sizes:
            sent.clear()
            labels = (torch.arange(size) < num_positives).long()
            logits = torch.randn(size, requires_grad=True)
            out = alrp_loss(logits, labels, torch.rand(num_positives), group=True)
            (out.cls + out.loc).backward()
            found.append(sum(sent))
    finally:
        dist.all_gather, dist.all_reduce = all_gather, all_reduce
    return found


def test_traffic_does_not_grow_with_the_logits(pool):
    """16 numbers; score and error of each positive here; and two integers for each bucket of all positives."""
    num_positives = 20
    sizes = [100, 1000] if INTERPRETED else [100, 100_000]
    for found in pool.run(traffic, sizes, num_positives):
        total = SIZE * num_positives
        assert found == [8 * (16 + 2 * num_positives + 2 * (2 * total + 2))] * len(sizes)


def backward_alone(rank: int, case: Case) -> tuple[float, bool]:
    """Nobody waits for another in backward: process 0 differentiates, the others do not."""
    logits, labels, values = cut(case, case.loc_errors, SIZE)[rank]
    logits = logits.clone().requires_grad_()
    out = alrp_loss(logits, labels, values, group=True)
    if rank == 0:
        out.cls.backward()
    return out.cls.item(), logits.grad is not None


def test_backward_needs_no_communication(pool):
    found = pool.run(backward_alone, random_case(200, 20, seed=9))
    assert [done for _, done in found] == [True, False, False, False]


def test_errors_of_the_whole_are_those_of_the_reference(pool):
    """Against float64, not against this package's own single process."""
    case = random_case(500, 60, seed=11)
    found = together(pool.run(_alrp_of, case), SIZE)
    assert_agree(found, ALRP.judge(*case[1:]), said="reference")


def _alrp_of(rank: int, case: Case) -> Results:
    return evaluate(ALRP, *cut(case, case.loc_errors, SIZE)[rank], BACKENDS[0], group=True)
