"""Launches that copy their tensors to a device and back; here the device is a virtual one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from dialect.borrowed_gpu import BorrowedDevice, package_on_borrowed
from torch import Tensor

from . import Device, virtual_gpu


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


@triton.jit
def add_kernel(pair, target, number, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    there = lane < number
    tl.store(target + lane, tl.load(pair[0] + lane, mask=there) + tl.load(pair[1] + lane, mask=there), mask=there)


@pytest.fixture
def borrowed() -> Iterator[BorrowedDevice]:
    with virtual_gpu(Device(90)):
        yield BorrowedDevice("cpu")


def test_views_of_one_memory(borrowed: BorrowedDevice) -> None:
    memory = torch.arange(100.0)
    first, second, target = memory[3:13], memory[8:18], memory[40:50]
    expected = memory.clone()
    expected[40:50] = first + second
    with package_on_borrowed(borrowed):
        add_kernel[(1,)](Pair(first, second), target, 10, BLOCK=16)
    assert torch.equal(memory, expected)
    assert borrowed.totals == {"launches": 1}
    assert not borrowed.errors


def test_what_is_written_beside_a_tensor(borrowed: BorrowedDevice) -> None:
    target = torch.zeros(10)
    with package_on_borrowed(borrowed):
        add_kernel[(1,)](Pair(torch.ones(16), torch.ones(16)), target, 12, BLOCK=16)
    assert torch.equal(target, torch.full((10,), 2.0))
    # Two numbers, of whose bytes none is as before.
    assert borrowed.errors == ["add_kernel: 8 bytes written beside its tensors"]


def test_other_dtypes(borrowed: BorrowedDevice) -> None:
    for dtype in (torch.int8, torch.float16, torch.int64):
        memory = torch.arange(20).to(dtype)
        with package_on_borrowed(borrowed):
            add_kernel[(1,)](Pair(memory[1:6], memory[1:6]), memory[10:], 5, BLOCK=8)
        assert memory[10:15].tolist() == [2, 4, 6, 8, 10]
    assert not borrowed.errors
