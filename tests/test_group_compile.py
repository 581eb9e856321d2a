"""A compiled model whose loss ranks with other processes: the graph breaks around the loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo
from dialect import KERNELS
from dialect.processes import MARKS
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from alrp_triton import ALRPLoss, APLoss, RankSortLoss

pytestmark = [*MARKS, pytest.mark.skipif(KERNELS, reason="the compiler is the same, whatever the kernels do")]


class Scaled(nn.Module):
    """Something to compile before the loss, and after it."""

    def __init__(self, criterion: nn.Module) -> None:
        super().__init__()
        self.criterion = criterion

    def forward(self, logits: Tensor, *rest: Tensor) -> Tensor:
        out = self.criterion(logits * 2, *rest)
        return (out if isinstance(out, Tensor) else out.cls + out.loc) * 3


def compiled(rank: int, criterion: nn.Module, whole: bool) -> dict[str, Any]:
    """Steps with other numbers of positives each, compiled and not; and how many graphs there were after each, and
    functions that were compiled."""
    same, graphs = [], []
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    counter, plain = CompileCounter(), Scaled(criterion)
    fast = torch.compile(plain, backend=counter, fullgraph=whole)
    for seed in range(5):
        given = small_batch(criterion, 10 * seed + rank)
        try:
            found = [run_small(module, given) for module in (fast, plain)]
        except torch._dynamo.exc.Unsupported as error:
            return {"refused": str(error)}
        same += [torch.equal(one, other) for one, other in zip(*found)]
        graphs.append((counter.frame_count, torch._dynamo.utils.counters["frames"]["total"]))
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


@pytest.mark.thinned(3)
@pytest.mark.parametrize("monitor", [False, True])
@pytest.mark.parametrize("criterion", [ALRPLoss, RankSortLoss, APLoss])
def test_compiled_the_loss_stays_outside_of_the_graph(pool, criterion, monitor):
    for found in pool.run(compiled, criterion(process_group=True, monitor=monitor), False):
        assert found["same"] == [True] * (2 if criterion is APLoss else 3) * 5
        # One before the loss and one after it, which are made once more when the way around the loss is known; then
        # nothing is compiled anew, whatever the number of positives.
        counts = found["graphs"]
        assert counts[0][0] == 2
        assert counts[2:] == [counts[2]] * 3
        assert counts[2][0] <= 4


def test_one_whole_graph_is_refused(pool):
    for found in pool.run(compiled, ALRPLoss(process_group=True), True):
        assert "call_outside_graphs" in found["refused"]
