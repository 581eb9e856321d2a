"""Hostile input, 2000 cases, of which ``make test`` runs half; and what the fuzzer itself is worth. ``make fuzz`` runs
100,000."""

from __future__ import annotations

import os
import time
from collections import Counter
from functools import partial
from itertools import count
from pathlib import Path
from unittest.mock import patch

import fuzz
import fuzz_processes
import pytest
import torch
from dialect import AP, KERNELS, engine_backends
from fuzz_cases import draw_problem, what_labels_mean
from fuzz_draw import Draw, lay_out
from fuzz_processes import Record
from fuzz_run import OUTCOMES, run_case

from alrp_triton.engine.passes import find
from alrp_triton.engine.passes.eager import Eager

PARTS, CASES = (10, 300) if KERNELS else (4, 2000)
BACKENDS = fuzz.default_backends()


@pytest.mark.thinned(10 if KERNELS else 2)
@pytest.mark.parametrize("part", range(PARTS))
def test_every_case_gives_the_reference_s_answer_or_a_clear_error(part, looking):
    outcomes, seconds = [], []
    for index in range(part, CASES, PARTS):
        begin = time.process_time()
        outcomes.append(run_case(2020, index, BACKENDS))
        seconds.append(time.process_time() - begin)
    failed = [f"case {o.index}, {o.member}, {o.backend}: {o.text}" for o in outcomes if o.outcome == "FAILED"]
    assert not failed, "\n\n".join(failed[:5])
    counts = Counter(o.outcome for o in outcomes)
    assert counts["agreed"] > len(outcomes) / 2, counts
    if not KERNELS:
        assert {o for o in OUTCOMES if o != "FAILED"} == set(counts)
        assert len({(o.member, o.backend) for o in outcomes}) == 8 * len(set(BACKENDS))
    # Some take a second; none that is only slow, on a busy machine, takes so long.
    assert max(seconds) < fuzz_processes.SECONDS, "a case hangs"


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


@pytest.mark.thinned(3)
@pytest.mark.skipif(KERNELS, reason="of the torch backend")
@pytest.mark.parametrize("fault", ["a value", "a gradient", "an input", "an exception", "no exception", "a lost NaN"])
def test_finds_planted_faults(fault, monkeypatch):
    count, write = Eager.count, Eager.write

    def counted(passes, levels, table, own, totals, *further):
        if fault == "an input" and levels.logits[0].numel():
            levels.logits[0].reshape(-1)[:1].view(-1).zero_()
        if fault == "an exception":
            raise IndexError("out of range")
        count(passes, levels, table, own, totals, *further)
        if fault == "a value":
            totals[0, 1:-1] += 1
        if fault == "a lost NaN":
            totals[0, -1] = 0

    def written(*arguments):
        gradients = write(*arguments)
        if fault == "a gradient":
            for gradient in gradients:
                gradient.view(-1)[-1:] *= 1.01
        return gradients

    monkeypatch.setattr(Eager, "count", counted)
    monkeypatch.setattr(Eager, "write", written)
    if fault == "no exception":
        monkeypatch.setattr(find, "raise_on_mistakes", lambda *given: None)
    # One call in five has a mistake, and few of these are seen where this fault is.
    found = outcomes_of(4 * SHARE if fault == "no exception" else SHARE, backend="torch")
    assert found
    expected = {"an input": "an input was changed", "an exception": "IndexError", "a lost NaN": "hides a NaN"}
    expected["no exception"] = "nothing was raised"
    assert any(expected.get(fault, "expected") in text for text in found), found[0]


def work_badly(hangs, pipe, seed, of):
    """A process that ends in one case, and in another hangs, which it tells by a file."""

    def hang_or_end(seed, index, of):
        if index == 3:
            os._exit(7)
        if index == 5:
            hangs.write_text(str(os.getpid()))
            pipe.recv()  # which nothing is sent to
        return run_case(seed, index, of)

    with patch.object(fuzz_processes, "run_case", hang_or_end):
        fuzz_processes.work(pipe, seed, of)


@pytest.mark.nightly
@pytest.mark.skipif(KERNELS, reason="of the fuzzer's processes")
def test_what_hangs_or_ends_its_process_fails_and_the_rest_goes_on(tmp_path, monkeypatch):
    path, hangs, looks = tmp_path / "fuzz.json", tmp_path / "hangs", count()

    def seconds(pid):
        """Time passes where a process hangs alone, and there by being looked at."""
        return 2 * fuzz_processes.SECONDS * next(looks) if hangs.exists() and hangs.read_text() == str(pid) else 0.0

    monkeypatch.setattr(fuzz_processes, "_processor_seconds", seconds)
    record = Record(0, ["torch"], path)
    with patch.object(fuzz_processes, "work", partial(work_badly, hangs)):
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


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the system does not tell")
def test_seconds_are_those_of_the_processor():
    before, own = time.process_time(), fuzz_processes._processor_seconds(os.getpid())
    while time.process_time() < before + 0.2:
        pass
    between = fuzz_processes._processor_seconds(os.getpid())
    after = time.process_time()
    # By ticks of the clock of processes, a hundredth of a second each.
    assert 0.15 < between - own < after - before + 0.05
    assert fuzz_processes._processor_seconds(None) == 0


def test_one_case_alone(capsys):
    assert fuzz.main(["--case", "0", "--backend", engine_backends()[0]]) == 0
    printed = capsys.readouterr().out
    assert "logits: " in printed
    assert "case 0: " in printed
    member = draw_problem(0, 0, [engine_backends()[0]]).member
    assert member.name in printed or member is AP
