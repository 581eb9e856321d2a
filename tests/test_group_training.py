"""One ranking over several processes in training: DistributedDataParallel, copies, and what is sent."""

from __future__ import annotations

import contextlib
import copy
import pickle
import sys
from typing import Any
from unittest.mock import patch

import pytest
import torch
from dialect import FAMILY, KERNELS, Case, evaluate, imprecision, random_case
from dialect.processes import BACKENDS, MARKS, SIZE, counting_bytes, cut
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from alrp_triton import ALRPLoss, APLoss, NDCGLoss, RankSortLoss, alrp_loss, ap_loss
from alrp_triton.engine import scans
from alrp_triton.framework import RankingLoss

pytestmark = MARKS


def copies(rank: int) -> list[bool]:
    made = [criterion(process_group=True) for criterion in (APLoss, NDCGLoss, ALRPLoss, RankSortLoss)]
    made.append(RankingLoss(imprecision, process_group=True))
    twins = [*map(copy.deepcopy, made), *(pickle.loads(pickle.dumps(module)) for module in made)]
    return [twin.process_group is True for twin in twins]


def test_modules_with_the_default_group_can_be_copied(pool):
    assert pool.run(copies) == [[True] * 10] * SIZE


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
        losses.append((out.cls + out.loc).item())
        if step % 2 and hasattr(criterion.self_balance, "step_epoch"):
            criterion.self_balance.step_epoch()
    plain = model.module if isinstance(model, DistributedDataParallel) else model
    return losses, {**plain.state_dict(), **criterion.state_dict()}


def train_together(rank: int, name: str, rows: Tensor, labels: Tensor, targets: Tensor, ends: list[int]) -> Any:
    torch.manual_seed(0)
    model = DistributedDataParallel(Detector())
    part = slice(ends[rank], ends[rank + 1])
    return train(model, CRITERIA[name](process_group=True), rows[part], labels[part], targets[part])


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


def traffic(rank: int, at: int, sizes: list[int], num_positives: int) -> list[int]:
    """Bytes that this process gives to collectives, for each number of logits."""
    found = []
    for size in sizes:
        labels = (torch.arange(size) < num_positives).long()
        given = torch.randn(size), labels, torch.rand(num_positives)
        with counting_bytes() as sent:
            evaluate(FAMILY[at], *given, BACKENDS[0], process_group=True)
        found.append(sum(sent))
    return found


@pytest.mark.thinned(3)
@pytest.mark.parametrize("at", range(len(FAMILY)), ids=[member.name for member in FAMILY])
def test_traffic_does_not_grow_with_the_logits(pool, at):
    """16 numbers; the score of each positive here, and what the loss takes beside it; and two integers for each bucket
    of all positives."""
    num_positives = 20
    sizes = [100, 1000] if KERNELS else [100, 100_000]
    columns = 2 if FAMILY[at].takes else 1
    for found in pool.run(traffic, at, sizes, num_positives):
        total = SIZE * num_positives
        assert found == [8 * (16 + columns * num_positives + 2 * (2 * total + 2))] * len(sizes)


def resolution(rank: int, sizes: list[int]) -> list[int]:
    """For how many logits the fixed point of pass 1 has room."""
    asked = []

    def noted(num_logits: int) -> int:
        asked.append(num_logits)
        return scans.fraction_bits(num_logits)

    labels = (torch.arange(sizes[rank]) < 2).long()
    ap_loss(torch.zeros(1), torch.zeros(1, dtype=torch.int64), backend=BACKENDS[0])  # imports its passes
    using = [module for name, module in sys.modules.items() if name.startswith("alrp_triton.engine.")]
    with contextlib.ExitStack() as stack:
        for module in using:
            if module is not scans and hasattr(module, "fraction_bits"):
                stack.enter_context(patch.object(module, "fraction_bits", noted))
        ap_loss(torch.randn(sizes[rank]), labels, backend=BACKENDS[0], process_group=True)
    return asked


def test_integers_of_all_processes_have_one_unit_and_room_for_their_sum(pool):
    """The unit depends on the number of logits of all, from 2^26 on; so many do not fit into a test."""
    sizes = [10, 300, 0, 7]
    # Kernels that rank ask, too.
    assert [set(asked) for asked in pool.run(resolution, sizes)] == [{317}] * SIZE


def backward_alone(rank: int, case: Case) -> tuple[float, bool]:
    """Nobody waits for another in backward: process 0 differentiates, the others do not."""
    logits, labels, values = cut(case, case.loc_errors, SIZE)[rank]
    logits = logits.clone().requires_grad_()
    out = alrp_loss(logits, labels, values, process_group=True)
    if rank == 0:
        out.cls.backward()
    return out.cls.item(), logits.grad is not None


def test_backward_needs_no_communication(pool):
    found = pool.run(backward_alone, random_case(200, 20, seed=9))
    assert [done for _, done in found] == [True, False, False, False]
