"""Hostile input: ``make test`` runs 300 cases, ``make nightly`` 2100, ``make fuzz`` 100,000; and the fuzzer itself."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import fuzz
import pytest
import torch
from dialect import KERNELS
from fuzz import BACKENDS, OUTCOMES, run_round
from fuzz_cases import what_labels_mean
from fuzz_draw import lay_out
from hypothesis import given
from hypothesis import strategies as st

from alrp_triton.engine.passes import find
from alrp_triton.engine.passes.eager import Eager

SEED, CASES = int(os.environ.get("FUZZ_SEED", 2020)), int(os.environ.get("FUZZ_CASES", 300 if KERNELS else 2100))
ROUND = 15 if KERNELS else 300


@pytest.mark.thinned(20 if KERNELS else 7)
@pytest.mark.parametrize("number", range(-(-CASES // ROUND)))
def test_every_case_gives_the_reference_s_answer_or_a_clear_error(number, looking, tmp_path):
    folder = Path(os.environ.get("FUZZ_KEEP", tmp_path))
    counts = fuzz.keep(folder, SEED, number, ROUND)
    if counts is None:
        pytest.skip("done before")
    losses, backends, outcomes = (Counter[str]() for _ in range(3))
    for key, n in counts.items():
        for counter, name in zip((losses, backends, outcomes), key):
            counter[name] += n
    assert outcomes.total() >= ROUND
    assert outcomes["agreed"] > ROUND / 2
    if not KERNELS:
        assert set(outcomes) >= {*OUTCOMES} - {"at eps"}  # which is seldom
        assert len(losses) == 9
        assert set(backends) == set(BACKENDS)
    # What is kept is not run again.
    assert fuzz.keep(folder, SEED, number, ROUND) is None


def test_a_round_is_what_its_seed_and_number_make_of_it(monkeypatch):
    def drawn(seed: int, number: int) -> list[str]:
        problems: list[str] = []
        monkeypatch.setattr(fuzz, "check", lambda problem: problems.append(repr(problem)) or "agreed")
        run_round(seed, number, 20)
        return problems

    assert drawn(3, 1) == drawn(3, 1)
    assert len({*drawn(3, 1), *drawn(3, 2), *drawn(4, 1)}) > 50


def test_layouts_keep_their_numbers():
    kinds = set()

    @given(st.data())
    def lie(data):
        x = torch.arange(60.0).view(3, 4, 5)
        y = lay_out(data.draw, x, torch.nan)
        assert torch.equal(x, y)
        kinds.add((y.is_contiguous(), y.storage_offset() > 0, y.is_neg()))

    lie()
    assert len(kinds) >= 4


def test_labels_mean_what_the_documentation_says():
    assert what_labels_mean((2, 2), torch.tensor([0, 2]), -1).tolist() == [[1, 0], [0, 0]]
    assert what_labels_mean((3, 2), torch.tensor([-1, 1, 3]), -1).tolist() == [[-1, -1], [0, 1], [-2, -2]]
    assert what_labels_mean((4,), torch.tensor([0, 1, 2, 255], dtype=torch.uint8), -1).tolist() == [0, 1, -2, -2]
    assert what_labels_mean((2,), torch.tensor([1, 0]), 1).tolist() == [-1, 0]


def plant(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plant a fault in the torch backend."""
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


FAULTS = {
    "a value": "expected",
    "a gradient": "expected",
    "an input": "an input was changed",
    "an exception": "out of range",
    "no exception": "nothing was raised|out of bounds",
    "a lost NaN": "hides a NaN",
}


@pytest.mark.thinned(3)
@pytest.mark.skipif(KERNELS, reason="of the torch backend")
@pytest.mark.parametrize("fault", FAULTS)
def test_finds_planted_faults(fault, monkeypatch):
    plant(fault, monkeypatch)
    with pytest.raises(Exception, match=FAULTS[fault]):
        run_round(0, 0, 600, ["torch"], shrink=False)


@pytest.mark.skipif(KERNELS, reason="of the torch backend")
def test_what_fails_is_made_simple_and_can_be_repeated(monkeypatch, capsys):
    with monkeypatch.context() as patched:
        plant("a gradient", patched)
        with pytest.raises(Exception, match="expected") as failed:
            run_round(1, 0, 200, ["torch"])
        told = "\n".join(failed.value.__notes__)
        assert re.search(r"logits: float32\[[\d, ]+\] by \[[1, ]+\] \[[^;]*\]\n", told), told  # one small level
        command = re.search(r"python tests/fuzz.py (--backend torch --repeat \S+)", told)
        with pytest.raises(type(failed.value), match="expected"):
            fuzz.main(command[1].split())
    with pytest.raises(Exception, match="completed successfully"):
        fuzz.main(command[1].split())


ENDS = """
import os, sys, time
from pathlib import Path
import fuzz

def check(problem):
    if problem.mode == "inference":
        {}
    return "agreed"

fuzz.check, fuzz.SECONDS, fuzz.MINUTE = check, 5.0, 0.0
fuzz.keep(Path(sys.argv[1]), 0, 0, 100)
"""


@pytest.mark.nightly
@pytest.mark.skipif(KERNELS, reason="of the fuzzer's processes")
@pytest.mark.parametrize(("way", "status"), [("os._exit(7)", 7), ("time.sleep(600)", 1)], ids=["ends", "hangs"])
def test_a_case_that_ends_its_process_or_hangs_is_known(way, status, tmp_path, capsys):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run([sys.executable, "-c", ENDS.format(way), tmp_path], env=environment)
    assert ended.returncode == status
    fuzz.main(["--show", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "0-0-of-100.txt, failed or under way" in printed
    assert "mode inference" in printed
