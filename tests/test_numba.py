"""The backend that Numba compiles, against the torch backend, bit for bit; and its threads."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest.mock import patch

import pytest
import torch
from dialect import (
    ALRP,
    INF,
    KERNELS,
    NAN,
    Case,
    all_cases,
    assert_same_bits,
    assert_same_passes,
    assert_same_results,
    draw_groups,
    drawn_case,
    layouts,
    of_case,
    problems,
    random_case,
)
from dialect.interpreters import DYNAMO, start_python
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from alrp_triton import alrp_loss
from alrp_triton.engine import Levels, passes
from alrp_triton.engine.passes import choose, numba_installed, why_unavailable

if KERNELS:
    pytest.skip("needs no kernel", allow_module_level=True)

CPU = torch.device("cpu")
DELTAS = (1.0, 0.0, 1e-6, 1e30)
needs_numba = pytest.mark.skipif(not numba_installed(), reason="needs Numba")


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def levels_of(case: Case, groups: Tensor | None = None) -> Levels:
    return Levels([case.logits], [case.labels], [] if groups is None else [groups])


@pytest.mark.thinned(2)
@needs_numba
@pytest.mark.parametrize("case", all_cases(), ids=lambda case: case.name)
def test_every_named_case(case: Case) -> None:
    for delta in DELTAS:
        assert_same_passes(levels_of(case), delta)
        assert_same_passes(levels_of(case, draw_groups(case)), delta)


@needs_numba
@given(case=problems(), delta=st.sampled_from([*DELTAS, 0.25]), nan=st.booleans(), data=st.data())
@settings(max_examples=150, deadline=None)
def test_drawn_cases(case: Case, delta: float, nan: bool, data: st.DataObject) -> None:
    logits = case.logits.clone()
    if nan:
        logits[case.labels == 0] = NAN
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]))
    length = len(case.labels)
    some = st.sampled_from([-(2**63), -1, 0, 3, 2**63 - 1])
    ids = data.draw(st.none() | st.lists(some, min_size=length, max_size=length))
    groups = [] if ids is None else [torch.tensor(ids, dtype=torch.int64)]
    assert_same_passes(Levels([logits.to(dtype)], [case.labels], groups), delta)


@needs_numba
@pytest.mark.parametrize("num_threads", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_any_number_of_threads(num_threads: int, dtype: torch.dtype) -> None:
    """Enough logits that each of them gets pieces."""
    from alrp_triton.engine.passes import numba as by_numba

    torch.set_num_threads(num_threads)
    case = random_case(300_007, 60, ignored=0.01, dtype=dtype)
    with patch.object(by_numba, "ThreadPoolExecutor", wraps=ThreadPoolExecutor) as started:
        assert_same_passes(levels_of(case))
    assert [call.args for call in started.mock_calls] == ([(min(num_threads, 4),)] * 2 if num_threads > 1 else [])
    assert_same_passes(Levels([case.logits], [case.labels], [torch.arange(300_007) // 40_000]))


@pytest.mark.thinned(2)
@needs_numba
@pytest.mark.parametrize("regime", ["early", "middle", "late", "inverted"])
@pytest.mark.parametrize("size", [1, 31, 32, 33, 511, 512, 513, 1024, 5000])
def test_sizes_about_a_block(size: int, regime: str) -> None:
    for num_pos in {0, 1, min(40, size), size}:
        for ignored in (0.0, 0.02):
            assert_same_passes(levels_of(random_case(size, num_pos, regime, ignored=ignored)))


@needs_numba
@pytest.mark.parametrize("delta", [1.0, 0.0])
def test_a_score_at_the_next_threshold_among_others_of_one_bucket(delta: float) -> None:
    """All of a block but one, after a first block that has told the bucket."""
    x = torch.full((2500,), 0.5)
    x[[0, 1, -1]] = torch.tensor([0.0, 1.0, 1.0])
    assert_same_passes(Levels([x], [(torch.arange(2500) < 2).long()]), delta)


@needs_numba
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scores", [[0.0, 1e-7, 2e-7, 1e6], [-INF, -1.0, 0.0, 1.0, INF], [0.5 * k for k in range(64)]])
def test_many_thresholds_at_one_place(scores: list[float], dtype: torch.dtype) -> None:
    """Cells of the grid that are searched by halves, and thresholds that are equal."""
    fine = [score + k * 1e-6 for score in scores for k in range(40)]
    assert_same_passes(levels_of(drawn_case("crowd", fine, 4000, 900, dtype=dtype)))
    assert_same_passes(levels_of(drawn_case("ties", scores, 4000, 900, dtype=dtype)), 0.0)


@needs_numba
@pytest.mark.parametrize("name", layouts())
@pytest.mark.parametrize("size", [1 << 17, 64])
def test_layouts(name: str, size: int) -> None:
    """In pieces of any size, those that are read as they are and those that are copied."""
    from alrp_triton.engine.passes import numba as by_numba

    with patch.multiple(by_numba, _PIECE=size, _COPIED_PIECE=size // 2, _PER_THREAD=100):
        torch.set_num_threads(3)
        for ignore_index in (-1, 5, 255, 2**70):
            levels = layouts()[name]._replace(ignore_index=ignore_index)
            if ignore_index != -1:
                levels = levels._replace(labels=[labels.clamp(min=0) for labels in levels.labels])
            assert_same_passes(levels, 0.5)


@needs_numba
@pytest.mark.parametrize("num_columns", [1, 7, 300, 1500, 5000])
@pytest.mark.parametrize("regime", ["early", "middle", "late"])
def test_a_ranking_for_each_column(num_columns: int, regime: str) -> None:
    """Blocks that hold some rows, or a part of one; columns with and without positives, whose places differ."""
    for ignored, delta in ((0.01, 1.0), (0.0, 1.0), (0.0, 1e-3)):
        case = random_case(60_000 // num_columns * num_columns, 40, regime=regime, ignored=ignored)
        x, y = case.logits.view(-1, num_columns), case.labels.view(-1, num_columns)
        x[3 % len(x), -1], x[len(x) // 2, 0] = NAN, -INF
        groups = (torch.arange(num_columns) * 2).expand(x.shape)
        assert_same_passes(Levels([x], [y], [groups]), delta)


@needs_numba
def test_from_threads_at_once() -> None:
    torch.set_num_threads(2)
    case = random_case(200_000, 30)
    expected = of_case(ALRP, case, "torch")
    results: list[Any] = []
    callers = [threading.Thread(target=lambda: results.append(of_case(ALRP, case, "numba"))) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(results) == 4
    for result in results:
        assert_same_results(result, expected)


def output_of(code: str) -> str:
    done = start_python(code, given=DYNAMO)
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_numba
@pytest.mark.xdist_group("processes")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_after_a_fork() -> None:
    """Of PyTorch's own threads a child may only use one; ours are new."""
    code = """
import os, sys, torch
from alrp_triton.engine import Levels
from alrp_triton.engine.knots import make_table
from alrp_triton.engine.passes import Found, passes_of
torch.set_num_threads(2)
x = torch.randn(300_000, generator=torch.Generator().manual_seed(0))
levels, thresholds = Levels([x], [torch.zeros(300_000, dtype=torch.int64)]), torch.tensor([-1.0, 0.0, 1.0, 2.0])
nothing = Found(thresholds[:0].long(), thresholds[:0], None)
def totals():
    found = torch.zeros(2, 6, dtype=torch.int64)
    passes_of("numba").count(levels, make_table(thresholds, None), nothing, found, 1.0, 300_000)
    return found
before = totals()
child = os.fork()
if child == 0:
    torch.set_num_threads(1)
    torch.get_num_threads = lambda: 2
    os._exit(0 if totals().equal(before) else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert output_of(code) == "0\n"


@needs_numba
def test_what_a_thread_raises_is_raised() -> None:
    from alrp_triton.engine.passes import numba as by_numba

    torch.set_num_threads(2)
    case = random_case(200_000, 30)
    with patch.object(by_numba, "count", side_effect=MemoryError("full")), pytest.raises(MemoryError):
        of_case(ALRP, case, "numba")


@needs_numba
@pytest.mark.parametrize("inference", [False, True])
def test_without_gradients(inference: bool) -> None:
    case = random_case(150_000, 30, dtype=torch.bfloat16)
    torch.set_num_threads(2)
    with torch.inference_mode(inference), torch.no_grad():
        logits = case.logits.clone()
        found = alrp_loss(logits, case.labels, case.loc_errors, backend="numba")
        assert_same_bits("cls", found.cls, alrp_loss(logits, case.labels, case.loc_errors, backend="torch").cls)
        assert_same_passes(Levels([logits], [case.labels]))


@needs_numba
def test_compiles_without_a_break() -> None:
    case = random_case(500, 20)
    expected = of_case(ALRP, case, "torch")

    def loss(x: Tensor, errors: Tensor) -> Sequence[Tensor]:
        return alrp_loss(x, case.labels, errors, backend="numba")

    x = case.logits.clone().requires_grad_()
    cls, _, rank = torch.compile(loss, backend="aot_eager", fullgraph=True)(x, case.loc_errors)
    assert_same_bits("cls", cls.detach(), expected["cls"])
    assert_same_bits("rank", rank, expected["rank"])
    assert_same_bits("gradient", torch.autograd.grad(cls, x)[0], expected["cls by logits"])


@pytest.mark.nightly
@needs_numba
def test_where_no_folder_can_be_written() -> None:
    """Compiled code is then kept by nobody, and each process compiles anew."""
    code = """
from numba.core import caching
caching.CacheImpl._locator_classes = []
import torch
from alrp_triton import alrp_loss
print(float(alrp_loss(torch.zeros(3), torch.tensor([1, 0, 0]), torch.ones(1), backend="numba").cls))
"""
    assert output_of(code) == "0.5\n"


def test_only_where_it_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    if numba_installed():
        assert why_unavailable("numba", CPU) is None
    monkeypatch.setattr(passes, "_NUMBA_INSTALLED", True)
    assert choose("numba", CPU) == "numba"
    assert choose("auto", CPU) == "numba"
    assert "CPU" in (why_unavailable("numba", torch.device("cuda")) or "")
    monkeypatch.setattr(passes, "_NUMBA_INSTALLED", False)
    assert choose("auto", CPU) == "torch"
    with pytest.raises(ValueError, match=r"numba is not installed; pip install 'alrp-triton\[numba\]'"):
        alrp_loss(torch.zeros(2), torch.tensor([1, 0]), torch.ones(1), backend="numba")


@pytest.mark.xdist_group("processes")
def test_nothing_is_imported_before_it_is_needed() -> None:
    code = """
import sys, torch, alrp_triton
alrp_triton.alrp_loss(torch.zeros(2), torch.tensor([1, 0]), torch.ones(1), backend="torch")
print("numba" in sys.modules)
"""
    assert output_of(code) == "False\n"
