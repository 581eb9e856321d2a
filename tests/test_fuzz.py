"""Hostile input, 2000 cases; and what the fuzzer itself is worth. ``make fuzz`` runs 100 000."""

from __future__ import annotations

import importlib
import os
import time
from collections import Counter
from unittest.mock import patch

import fuzz
import fuzz_processes
import pytest
import torch
from cases import KERNELS
from checks import engine_backends
from family import AP
from fuzz_cases import draw_problem, what_labels_mean
from fuzz_draw import Draw, lay_out
from fuzz_processes import Record
from fuzz_run import OUTCOMES, run_case

from alrp_triton.engine import positives

PARTS, CASES = 4, 40 if KERNELS else 2000
BACKENDS = fuzz.default_backends()


@pytest.mark.parametrize("part", range(PARTS))
def test_every_case_gives_the_reference_s_answer_or_a_clear_error(part, looking):
    begin = time.process_time()
    outcomes = [run_case(2020, index, BACKENDS) for index in range(part, CASES, PARTS)]
    failed = [f"case {o.index}, {o.member}, {o.backend}: {o.text}" for o in outcomes if o.outcome == "FAILED"]
    assert not failed, "\n\n".join(failed[:5])
    counts = Counter(o.outcome for o in outcomes)
    assert counts["agreed"] > len(outcomes) / 2, counts
    if not KERNELS:
        assert {o for o in OUTCOMES if o != "FAILED"} == set(counts)
        assert len({(o.member, o.backend) for o in outcomes}) == 8 * len(set(BACKENDS))
    assert time.process_time() - begin < 20 * len(outcomes), "a case hangs"


def test_a_case_is_what_its_seed_and_index_make_of_it():
    for index in range(20):
        one, other = (draw_problem(3, index, BACKENDS) for _ in range(2))
        assert repr(one) == repr(other)
        assert all(a.stride() == b.stride() for a, b in zip(one.logits, other.logits))
    assert repr(draw_problem(3, 1, BACKENDS)) != repr(draw_problem(4, 1, BACKENDS))


def test_layouts_keep_their_numbers():
    draw, kinds = Draw(0, 0), set()
    for _ in range(60):
        x = torch.randn(3, 4, 5)
        y = lay_out(draw, x, torch.nan)
        assert torch.equal(x, y)
        kinds.add((y.is_contiguous(), y.storage_offset() > 0, y.is_neg()))
    assert len(kinds) >= 4


def test_labels_mean_what_the_documentation_says():
    assert what_labels_mean((2, 2), torch.tensor([0, 2]), -1).tolist() == [[1, 0], [0, 0]]
    assert what_labels_mean((3, 2), torch.tensor([-1, 1, 3]), -1).tolist() == [[-1, -1], [0, 1], [-2, -2]]
    assert what_labels_mean((4,), torch.tensor([0, 1, 2, 255], dtype=torch.uint8), -1).tolist() == [0, 1, -2, -2]
    assert what_labels_mean((2,), torch.tensor([1, 0]), 1).tolist() == [-1, 0]


# The fuzzer finds what is wrong: faults, planted in the package.

SHARE = 60 if KERNELS else 150


def outcomes_of(number: int = SHARE, backend: str | None = None) -> list[str]:
    outcomes = (run_case(0, index, [backend or engine_backends()[0]]) for index in range(number))
    return [outcome.text for outcome in outcomes if outcome.outcome == "FAILED"]


@pytest.mark.thinned(2)
@pytest.mark.skipif(KERNELS, reason="of the torch backend")
@pytest.mark.parametrize("fault", ["a value", "a gradient", "an input", "an exception", "no exception", "a lost NaN"])
def test_finds_planted_faults(fault, monkeypatch):
    module = importlib.import_module("alrp_triton.engine.backends.torch")
    count, write = module.count_negatives, module.write_gradient

    def counted(levels, *further):
        if fault == "an input" and levels.logits[0].numel():
            levels.logits[0].reshape(-1)[:1].view(-1).zero_()
        if fault == "an exception":
            raise IndexError("out of range")
        totals = count(levels, *further)
        if fault == "a value":
            totals[0, 1:-1] += 1
        if fault == "a lost NaN":
            totals[0, -1] = 0
        return totals

    def written(*arguments):
        gradients = write(*arguments)
        if fault == "a gradient":
            for gradient in gradients:
                gradient.view(-1)[-1:] *= 1.01
        return gradients

    monkeypatch.setattr(module, "count_negatives", counted)
    monkeypatch.setattr(module, "write_gradient", written)
    if fault == "no exception":
        monkeypatch.setattr(positives, "raise_on_mistakes", lambda *given: None)
    # One call in five has a mistake, and few of these are seen where this fault is.
    found = outcomes_of(4 * SHARE if fault == "no exception" else SHARE, backend="torch")
    assert found
    expected = {"an input": "an input was changed", "an exception": "IndexError", "a lost NaN": "hides a NaN"}
    expected["no exception"] = "nothing was raised"
    assert any(expected.get(fault, "expected") in text for text in found), found[0]


def hang_or_end(seed: int, index: int, of: list[str]) -> object:
    """What a process does with its cases."""
    if index == 3:
        os._exit(7)
    while index == 5:
        pass
    return run_case(seed, index, of)


def work_badly(pipe, seed, of):
    """A process that hangs and ends, as :func:`hang_or_end` says."""
    with patch.object(fuzz_processes, "run_case", hang_or_end):
        fuzz_processes.work(pipe, seed, of)


@pytest.mark.nightly
@pytest.mark.skipif(KERNELS, reason="of the fuzzer's processes")
def test_what_hangs_or_ends_its_process_fails_and_the_rest_goes_on(tmp_path, monkeypatch):
    # More than what the first case in a process spends on imports.
    monkeypatch.setattr(fuzz_processes, "SECONDS", 8.0)
    path = tmp_path / "fuzz.json"
    record = Record(0, ["torch"], path)
    with patch.object(fuzz_processes, "work", work_badly):
        assert sum(fuzz_processes.run_many(record, 10, jobs=1)) == 10
    assert record.total == 10
    failures = {failure.index: failure.text for failure in record.failures}
    assert sorted(failures) == [3, 5]
    assert "exit code 7" in failures[3]
    assert failures[5].startswith("hangs")
    # Another run has nothing left to do, and knows what failed.
    again = Record(0, ["torch"], path)
    assert again.total == 10
    assert list(fuzz_processes.run_many(again, 10, jobs=1)) == []
    assert fuzz.main(["--cases", "10", "--backend", "torch", "--json", str(path)]) == 1
    with pytest.raises(SystemExit):
        Record(1, ["torch"], path)


def test_one_case_alone(capsys):
    assert fuzz.main(["--case", "0", "--backend", engine_backends()[0]]) == 0
    printed = capsys.readouterr().out
    assert "logits: " in printed
    assert "case 0: " in printed
    member = draw_problem(0, 0, [engine_backends()[0]]).member
    assert member.name in printed or member is AP
