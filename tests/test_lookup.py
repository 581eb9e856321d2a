"""Lookups and sums folded into rows, one for each thread."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from dialect import random_case
from dialect.checks import assert_same_results, evaluate

from alrp_triton.engine.passes.tables import Sums, look_up


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("num_threads", [1, 2, 3, 4])
@pytest.mark.parametrize("length", [0, 1, 6, 12, 13])
def test_any_length_on_any_number_of_threads(num_threads: int, length: int) -> None:
    torch.set_num_threads(num_threads)
    table, index = torch.arange(7) ** 2, torch.arange(length) % 7
    assert look_up(table, index).tolist() == [int(i) ** 2 for i in index]
    sums = Sums(8, torch.device("cpu"))
    sums.add(index, torch.full((length,), 1 << 40))
    sums.add_at(7, 5)
    assert sums.total().tolist() == [int((index == k).sum()) << 40 for k in range(7)] + [5]


@pytest.mark.parametrize(("made_with", "used_with"), [(4, 1), (1, 4), (4, 3), (6, 4)])
def test_sums_serve_another_number_of_threads(made_with: int, used_with: int) -> None:
    torch.set_num_threads(made_with)
    sums = Sums(3, torch.device("cpu"))
    torch.set_num_threads(used_with)
    sums.add(torch.arange(12) % 3, torch.arange(12))
    assert sums.total().tolist() == [18, 22, 26]


def test_the_number_of_threads_changes_no_bit() -> None:
    case = random_case(200_000, 60, "middle", ignored=0.1)
    results = []
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        results.append(evaluate(case.logits, case.labels, case.loc_errors, "torch"))
    for other in results[1:]:
        assert_same_results(other, results[0])
