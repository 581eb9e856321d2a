"""Same bits: for any order of the logits, any levels, threads, pieces and launch settings, and in any process."""

from __future__ import annotations

import hashlib
import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from dialect import (
    ALRP,
    AP,
    DEPTH,
    FAMILY,
    INF,
    KERNELS,
    NDCG,
    PLAIN_AP,
    RANK_SORT,
    Case,
    Member,
    assert_close,
    assert_right,
    assert_same_bits,
    assert_same_results,
    by_engine_backend,
    drawn_case,
    engine_backends,
    evaluate,
    of_case,
    problem_of_images,
    random_case,
    threads,
)
from torch import Tensor

from alrp_triton.engine.passes import eager, find

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
        assert_same_results(found, expected)


@pytest.mark.thinned(1 if KERNELS else 2)
@by_engine_backend
@by_member
@by_delta
def test_any_number_of_threads(delta, member, option, backend):
    """And in every run; of few positives among more logits than are read at once, if there are no kernels."""
    case = random_case(600 if KERNELS else 300_000, 8 if KERNELS else 40)
    expected = assert_right(member, case, backend, delta=delta, **option) if member is ALRP else None
    for number in (2, 1):
        with threads(number):
            found = of_case(member, case, backend, delta=delta, **option)
        expected = expected or found
        assert_same_results(found, expected)


@pytest.mark.skipif(KERNELS, reason="many positives")
@pytest.mark.thinned(4)
@by_backend
@pytest.mark.parametrize("member", FAMILY, ids=repr)
def test_any_number_of_threads_with_many_positives(member, backend):
    """So many that PyTorch would share a sum over them out among its threads."""
    size, num_pos = (3_000, 400) if member is RANK_SORT else (60_000, 35_000)
    case = random_case(size, num_pos, dtype=torch.float64)
    expected = None
    for number in (1, 2, 4):
        with threads(number):
            found = of_case(member, case, backend)
        expected = expected or found
        assert_same_results(found, expected)


def problems_of_pieces():
    """Logits, labels, values, groups: strides, levels, labels by class and by logit, constants, infinities."""
    logits, classes, labels, values = problem_of_images(4)
    logits[0, :3], logits[1, 2], logits[3] = 0.25, INF, -INF
    images = torch.tensor([5, 5, -1, 7])[:, None].expand(4, 14)
    by_logit = torch.arange(logits.numel()).view(logits.shape) // 33
    strided = torch.stack([labels, 1 - labels], dim=-1)[..., 0]
    yield logits, classes, values, images
    yield logits.permute(2, 0, 1), strided.permute(2, 0, 1), values, None
    yield logits.double(), strided, values, by_logit
    yield [logits[:2].transpose(0, 1), logits[2:]], [classes[:2].T, labels[2:]], values, [images[:2].T, by_logit[2:]]


@pytest.mark.thinned(12)
@pytest.mark.skipif(KERNELS, reason="of the CPU's backends")
@by_backend
@by_member
@by_delta
@pytest.mark.parametrize("piece", [1, 13, 50])
def test_any_pieces_give_the_same_bits(piece, delta, member, option, backend, monkeypatch):
    """Pieces of pieces are to be put in the right place, whatever lies between them."""
    module = importlib.import_module(f"alrp_triton.engine.passes.{backend}") if backend != "torch" else eager
    for *given, groups in problems_of_pieces():
        arguments = {"groups": groups, "delta": delta, **option}
        expected = evaluate(member, *given, backend, **arguments)
        with monkeypatch.context() as patched, threads(3):
            patched.setattr(find, "_PIECE", piece)
            for name in ("_PIECE", "_COPIED_PIECE", "_PER_THREAD"):
                if hasattr(module, name):
                    patched.setattr(module, name, piece)
            assert_same_results(evaluate(member, *given, backend, **arguments), expected)


@pytest.mark.skipif(KERNELS, reason="of the CPU's backends")
@by_backend
@pytest.mark.parametrize("per_class", [False, True])
@pytest.mark.parametrize("classes", [1, 3, 40])
def test_labels_in_even_steps_beside_contiguous_logits(classes, per_class, backend):
    """More logits than a piece holds, in rows whose labels lie apart: each part of the gradient is written once."""
    x = torch.randn(4, 75_000 // classes, classes, generator=torch.Generator().manual_seed(0))
    *rows, columns = (4, 75_000 // classes) if per_class else x.shape
    wide = torch.full((*rows, 2 * columns), classes if per_class else 0)
    wide.view(4, -1)[0, :60:2] = 0 if per_class else 1
    apart, values = wide[..., ::2], torch.full((30,), 0.5)
    assert not apart.is_contiguous()
    expected = evaluate(ALRP, x, apart.contiguous(), values, backend)
    assert_same_results(evaluate(ALRP, x, apart, values, backend), expected)


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
        assert_same_results(found, expected)


def digest(backends: list[str]) -> str:
    """Of all results of all losses."""
    hashed = hashlib.sha256()
    for backend in backends:
        for member in FAMILY:
            case = random_case(400, 40, dtype=torch.float64)
            groups = torch.arange(400) % 3
            results = of_case(member, case, backend, groups=groups)
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
