"""One ranking over several GPUs: by NCCL alone, and beside gloo, where the host waits for no device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from dialect import FAMILY, Case, Results, assert_agree, random_case
from dialect.processes import Pool, cut, together
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from alrp_triton import ALRPLoss, RankSortLoss, alrp_loss
from alrp_triton.engine.passes import triton_installed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or not dist.is_nccl_available(), reason="needs GPUs and NCCL"),
    pytest.mark.xdist_group("processes on GPUs"),
]
BACKENDS = ["torch", *(["triton", "pairwise"] if triton_installed() else [])]
# One GPU is enough for one process, which gathers from itself alone.
SIZE = max(1, min(4, torch.cuda.device_count()))


@pytest.fixture(scope="module", params=["nccl", "cpu:gloo,cuda:nccl"])
def gpus(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    pool = Pool(SIZE, tmp_path_factory.mktemp("store") / "store", request.param)
    yield pool
    pool.close()


def evaluate(member: Any, part: tuple[Tensor, ...], backend: str, group: bool | None) -> Results:
    logits, labels, values = (x.to("cuda", copy=True) for x in part)
    logits.requires_grad_()
    values.requires_grad_()
    found = member.loss(logits, labels, values, backend=backend, process_group=group)
    results = {name: result.detach().cpu() for name, result in found.items()}
    for component, leaf in member.derivatives:
        of = {"logits": logits, "values": values}[leaf]
        results[f"{component} by {leaf}"] = torch.autograd.grad(found[component], of, retain_graph=True)[0].cpu()
    return results


def family_of(rank: int, case: Case, backend: str) -> list[Results]:
    return [evaluate(member, cut(case, member.values(case), SIZE)[rank], backend, True) for member in FAMILY]


@pytest.mark.parametrize("backend", BACKENDS)
def test_gpus_rank_as_one(gpus, backend):
    case = random_case(5000, 120, seed=3)
    for member, *of_member in zip(FAMILY, *gpus.run(family_of, case, backend)):
        expected = evaluate(member, (*case[1:3], member.values(case)), backend, None)
        assert_agree(together(of_member, SIZE), expected, said=f"{member.name}, {backend}")


def step_without_waiting(rank: int, case: Case, backend: str) -> bool:
    """One step to compile and to connect, one in which whatever waits for the device raises."""
    logits, labels, values = (x.to("cuda") for x in cut(case, case.loc_errors, SIZE)[rank])
    x = logits.requires_grad_()
    if dist.get_backend() == "nccl":
        return True
    for mode in ("default", "error"):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(mode)
        try:
            out = alrp_loss(x, labels, values, backend=backend, process_group=True)
            torch.autograd.grad(out.cls + out.loc, x)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return True


@pytest.mark.parametrize("backend", BACKENDS)
def test_beside_gloo_nothing_waits_for_the_device(gpus, backend):
    assert all(gpus.run(step_without_waiting, random_case(5000, 120, seed=3), backend))


def train(rank: int, criterion: nn.Module, rows: Tensor, labels: Tensor, targets: Tensor, whole: bool) -> list[Tensor]:
    torch.manual_seed(0)
    model: nn.Module = nn.Linear(6, 7).cuda()
    if not whole:
        model = DistributedDataParallel(model, device_ids=[rank])
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    part = slice(None) if whole else slice(rank, None, SIZE)
    x, y, t = rows[part].cuda(), labels[part].cuda(), targets[part].cuda()
    for _ in range(4):
        scores, boxes = model(x).split([3, 4], 1)
        boxes = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:].exp()], 1)
        out = criterion(scores, y, boxes[y < 3], t[y < 3])
        optimizer.zero_grad()
        (out.cls + out.loc).backward()
        optimizer.step()
    return [*(parameter.detach().cpu() for parameter in model.parameters()), (out.cls + out.loc).detach().cpu()]


def train_together(rank: int, name: str, *batch: Tensor) -> list[Tensor]:
    return train(rank, {"alrp": ALRPLoss, "rank_sort": RankSortLoss}[name](process_group=True), *batch, False)


@pytest.mark.parametrize("name", ["alrp", "rank_sort"])
def test_data_parallel_training_is_that_of_one_process(gpus, name):
    generator = torch.Generator().manual_seed(4)
    rows = torch.randn(90, 6, generator=generator)
    labels = torch.randint(0, 9, (90,), generator=generator).clamp(max=3)
    corners = torch.randn(90, 2, generator=generator)
    batch = rows, labels, torch.cat([corners, corners + 1], 1)
    expected = train(0, {"alrp": ALRPLoss, "rank_sort": RankSortLoss}[name](), *batch, True)
    for found in gpus.run(train_together, name, *batch):
        for one, other in zip(found, expected):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
