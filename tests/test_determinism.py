"""Same bits: for any order of the logits, any levels, threads, pieces and launch settings, and in any process."""

from __future__ import annotations

import hashlib
import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from dialect import (
    ALRP,
    AP,
    DEPTH,
    FAMILY,
    KERNELS,
    NDCG,
    PLAIN_AP,
    RANK_SORT,
    Case,
    Member,
    Results,
    assert_close,
    assert_same_bits,
    drawn_case,
    engine_backends,
    evaluate,
    random_case,
)
from torch import Tensor

from alrp_triton.engine.passes import find

# The pairwise form sums float32, a strip of logits at a time.
LINEAR = [backend for backend in engine_backends() if backend != "pairwise"]
by_backend = pytest.mark.parametrize("backend", LINEAR)
by_delta = pytest.mark.parametrize("delta", [1.0, 0.0])
MEMBERS = [
    *((member, {}) for member in ([AP, RANK_SORT] if KERNELS else FAMILY)),
    (ALRP, {"loc_ranking": "smooth"}),
]
by_member = pytest.mark.parametrize(("member", "option"), MEMBERS, ids=lambda given: str(given) or None)
WITHOUT_ORDER = [AP, PLAIN_AP, NDCG, RANK_SORT]
"""Losses that treat positives of equal score alike; others take them in flat order."""


def distinct_case(size: int, num_pos: int, dtype: torch.dtype, seed: int = 0) -> Case:
    """Positives of distinct scores; negatives that equal them and each other."""
    case = random_case(size, num_pos, seed=seed, dtype=dtype)
    own = case.logits[case.labels == 1]
    assert len(own.unique()) == num_pos
    copied = case.labels == 0
    copied[::2] = False
    generator = torch.Generator().manual_seed(seed)
    others = own[torch.randint(num_pos, (int(copied.sum()),), generator=generator)]
    return case._replace(logits=case.logits.masked_scatter(copied, others))


def order_of(case: Case, seed: int, negatives_only: bool = False) -> tuple[Tensor, Tensor]:
    """A permutation of the logits, and what it makes of the order of the positives."""
    order = torch.randperm(len(case.logits), generator=torch.Generator().manual_seed(seed))
    if negatives_only:
        places = (case.labels[order] == 1).nonzero().squeeze(1)
        order[places] = order[places].sort().values
    number = (case.labels == 1).cumsum(0) - 1
    return order, number[order[case.labels[order] == 1]]


def assert_permuted(
    member: Member,
    case: Case,
    backend: str,
    *,
    negatives_only: bool = False,
    groups: Tensor | None = None,
    **given: Any,
) -> None:
    values = member.values(case)
    expected = evaluate(member, case.logits, case.labels, values, backend, groups=groups, **given)
    for seed in range(1 if KERNELS else 3):
        order, of_positives = order_of(case, seed, negatives_only)
        permuted = None if groups is None else groups[order]
        found = evaluate(
            member, case.logits[order], case.labels[order], values[of_positives], backend, groups=permuted, **given
        )
        for name, tensor in expected.items():
            place = order if name.endswith("by logits") else of_positives if tensor.dim() else ...
            assert_same_bits(name, found[name], tensor[place])


@pytest.mark.thinned(2)
@pytest.mark.skipif(KERNELS, reason="kernels sum over few positives in flat order")
@by_backend
@by_member
@by_delta
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_permuted_input_gives_the_permuted_gradient(dtype, delta, member, option, backend):
    """Also of scalars and in float64, where no rounding hides the order of a sum."""
    case = distinct_case(500, 60, dtype)
    groups = torch.randint(3, (500,), generator=torch.Generator().manual_seed(0))
    for given in (None, groups):
        assert_permuted(member, case, backend, delta=delta, groups=given, **option)


@pytest.mark.skipif(KERNELS, reason="kernels sum over few positives in flat order")
@by_backend
@pytest.mark.parametrize("member", FAMILY, ids=repr)
def test_permuted_input_where_ramps_are_wider_than_scores_are_exact(member, backend):
    """Their ends, rounded to the scores' dtype, are equal for positives that are not."""
    for dtype, delta in ((torch.float64, 1e17), (torch.float32, 1e8)):
        assert_permuted(member, distinct_case(300, 40, dtype), backend, delta=delta)


@pytest.mark.skipif(KERNELS, reason="kernels sum over few positives in flat order")
@by_backend
@pytest.mark.parametrize("member", WITHOUT_ORDER, ids=repr)
@by_delta
def test_permuted_input_with_positives_of_equal_scores(delta, member, backend):
    case = drawn_case("", [k / 3 for k in range(-6, 7)], 500, 60, dtype=torch.float64)
    groups = torch.randint(3, (500,), generator=torch.Generator().manual_seed(0))
    for given in (None, groups):
        assert_permuted(member, case, backend, delta=delta, groups=given)


@by_backend
@by_member
@by_delta
def test_permuted_negatives_change_no_bit(delta, member, option, backend):
    """Whatever ties there are: the positives keep their order."""
    size, num_pos = (90, 8) if KERNELS else (500, 60)
    case = drawn_case("", [k / 3 for k in range(-6, 7)], size, num_pos, dtype=torch.float64)
    assert_permuted(member, case, backend, negatives_only=True, delta=delta, **option)


@pytest.mark.skipif(KERNELS, reason="many positives")
@by_backend
def test_what_ties_leave_of_it_for_losses_with_values(backend):
    """Sums over positives of equal score take them in flat order: float64 then differs in its last bits."""
    case = drawn_case("", [k / 3 for k in range(-6, 7)], 500, 60, dtype=torch.float64)
    order, of_positives = order_of(case, 0)
    expected = evaluate(ALRP, case.logits, case.labels, case.loc_errors, backend, loc_ranking="smooth")
    permuted = case.logits[order], case.labels[order], case.loc_errors[of_positives]
    found = evaluate(ALRP, *permuted, backend, loc_ranking="smooth")
    assert_close("gradient", found["cls by logits"], expected["cls by logits"][order], 1e-15)
    # Of two equal ones the later in flat order is above: that is the rule.
    one = evaluate(ALRP, torch.zeros(3), torch.tensor([1, 1, 0]), torch.tensor([0.25, 0.75]), backend)
    other = evaluate(ALRP, torch.zeros(3), torch.tensor([1, 1, 0]), torch.tensor([0.75, 0.25]), backend)
    assert one["loc"] != other["loc"]


@by_backend
@by_member
def test_any_split_into_levels_gives_the_same_bits(member, option, backend):
    size, num_pos = (90, 8) if KERNELS else (600, 60)
    case = drawn_case("", [k / 3 for k in range(-6, 7)], size, num_pos, dtype=torch.float64)
    values, groups = member.values(case), torch.arange(size) % 3
    expected = evaluate(member, case.logits, case.labels, values, backend, groups=groups, **option)
    for sizes in ([size], [0, 1, size - 1, 0]) if KERNELS else ([size], [0, 1, size - 1, 0], [1] * 50 + [size - 50]):
        parts = (list(t.split(sizes)) for t in (case.logits, case.labels))
        found = evaluate(member, *parts, values, backend, groups=list(groups.split(sizes)), **option)
        assert_same(found, expected)


@pytest.mark.skipif(KERNELS, reason="many positives")
@pytest.mark.thinned(2)
@by_backend
@pytest.mark.parametrize("member", FAMILY, ids=repr)
def test_any_number_of_threads_with_many_positives(member, backend):
    """So many that PyTorch would share a sum over them out among its threads."""
    size, num_pos = (3_000, 400) if member is RANK_SORT else (60_000, 35_000)
    case = random_case(size, num_pos, dtype=torch.float64)
    expected = None
    for number in (1, 2, 4):
        with threads(number):
            found = evaluate(member, case.logits, case.labels, member.values(case), backend)
        expected = expected or found
        assert_same(found, expected)


@pytest.mark.thinned(2)
@pytest.mark.skipif(KERNELS, reason="of the CPU's backends")
@by_backend
@by_member
@pytest.mark.parametrize("piece", [1, 13, 100])
def test_any_pieces_give_the_same_bits(piece, member, option, backend, monkeypatch):
    """Strides and groups as well: pieces of pieces are to be put in the right place."""
    case = random_case(600, 30, dtype=torch.float64)
    strided = torch.stack([case.labels, 1 - case.labels], dim=-1)[..., 0]
    values, groups = member.values(case), torch.arange(600) // 100 % 3
    x, y = case.logits.view(2, 3, 100), strided.view(2, 3, 100)
    for given in ({}, {"groups": groups.view(2, 3, 100)}):
        expected = evaluate(member, x, y.contiguous(), values, backend, **given, **option)
        with monkeypatch.context() as patched, threads(3):
            patched.setattr(find, "_PIECE", piece)
            name = {"torch": "eager"}.get(backend, backend)
            module = importlib.import_module(f"alrp_triton.engine.passes.{name}")
            for name in ("_PIECE", "_COPIED_PIECE", "_PER_THREAD"):
                if hasattr(module, name):
                    patched.setattr(module, name, piece)
            assert_same(evaluate(member, x, y, values, backend, **given, **option), expected)


@pytest.mark.skipif(KERNELS, reason="of the CPU's backends")
@by_backend
@pytest.mark.parametrize("classes", [1, 40])
def test_strided_labels_beside_contiguous_logits(classes, backend):
    """More logits than a piece holds, in rows whose labels lie apart: each part of the gradient is written once."""
    rows = 300_000 // classes
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, rows // 2, classes, generator=generator)
    labels = torch.full((2, rows // 2), classes)
    labels[:, ::1000] = 0
    values = torch.rand(int((labels == 0).sum()), generator=generator)
    apart = torch.stack([labels, labels], dim=-1)[..., 0]
    assert not apart.is_contiguous()
    expected = evaluate(ALRP, x, labels, values, backend)
    assert_same(evaluate(ALRP, x, apart, values, backend), expected)
    by_logit = torch.zeros(x.shape, dtype=torch.int64).masked_fill(labels[..., None] == 0, -1)
    by_logit[..., 0] = (labels == 0).long()
    if classes == 1:
        apart = torch.stack([by_logit, by_logit], dim=-1)[..., 0]
        assert_same(evaluate(ALRP, x, apart, values, backend), expected)


@pytest.mark.skipif(not KERNELS, reason="of the kernels")
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("member", [ALRP, RANK_SORT, DEPTH], ids=repr)
def test_any_launch_settings_give_the_same_bits(member, grouped, monkeypatch):
    """Blocks of logits, that is; the pairs of Rank & Sort Loss are summed block by block, and so to the last bits."""
    from alrp_triton.kernels import settings

    case = random_case(700, 9)
    groups = torch.arange(700) % 3 if grouped else None
    expected = evaluate(member, case.logits, case.labels, member.values(case), "triton", groups=groups)
    for block in (512, 2048):
        for kernel in ("find", "count", "count_grouped", "write", "write_grouped"):
            monkeypatch.setitem(settings.PINNED, kernel, {"default": {"block": block, "num_warps": 8}})
        found = evaluate(member, case.logits, case.labels, member.values(case), "triton", groups=groups)
        assert_same(found, expected)


def digest(backends: list[str]) -> str:
    """Of all results of all losses."""
    hashed = hashlib.sha256()
    for backend in backends:
        for member in FAMILY:
            case = random_case(400, 40, dtype=torch.float64)
            groups = torch.arange(400) % 3
            results = evaluate(member, case.logits, case.labels, member.values(case), backend, groups=groups)
            for name in sorted(results):
                hashed.update(name.encode() + results[name].contiguous().numpy().tobytes())
    return hashed.hexdigest()


@pytest.mark.skipif(KERNELS, reason="of the CPU's backends")
@pytest.mark.thinned(2)
@pytest.mark.parametrize(("seed", "number"), [("12345", "3"), ("0", "1")])
def test_same_bits_in_other_processes(seed, number):
    folder = Path(__file__).parent
    code = f"import test_determinism; print(test_determinism.digest({LINEAR!r}))"
    paths = os.pathsep.join([str(folder), str(folder.parent)])
    env = {**os.environ, "PYTHONPATH": paths, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": number}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == digest(LINEAR)


def assert_same(found: Results, expected: Results) -> None:
    for name, tensor in expected.items():
        assert_same_bits(name, found[name].reshape(tensor.shape), tensor)


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
