"""A fuzzer of all losses: every case gives the reference's answer or a clear error, and never changes its inputs.

    FUZZ_CASES=100000 FUZZ_SEED=0 pytest -n 2 tests/test_fuzz.py    # in rounds, each by the seed and its number
    python tests/fuzz.py --repeat AXicY2RkZGAAAAAYAAU=              # one case, as a failure names it
    python tests/fuzz.py --show .venv/fuzz-0                        # what the rounds kept there have found

Hypothesis draws the cases and looks for the simplest one that fails.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import hypothesis
import torch
from dialect import KERNELS, engine_backends
from fuzz_cases import Problem, problems
from fuzz_draw import odds
from fuzz_mistakes import spoilt
from fuzz_run import check
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

OUTCOMES = ("agreed", "NaN", "extreme", "at eps", "refused")
"""How a case may be judged; see :mod:`fuzz_judge`. Refused: by the error that was to be raised."""
BACKENDS = [*engine_backends() * 4, *(["reference", "auto"] if not KERNELS else [])]
"""All that run here; those that do the work more often than those that judge or choose."""
SECONDS, MINUTE = 1800.0, 60.0
"""A case that takes longer, or a minute less, hangs, and its process ends. None comes near, on whatever machine."""

Counts = Counter[tuple[str, str, str]]
"""How many cases of each loss and backend were judged in which way."""


@st.composite
def calls(draw: st.DrawFn, backends: Sequence[str]) -> Problem:
    """One in five has a wrong argument."""
    problem = draw(problems(backends, small=KERNELS))
    return draw(spoilt(problem)) if draw(odds(20)) else problem


def run_round(
    seed: int,
    number: int,
    cases: int,
    backends: Sequence[str] = BACKENDS,
    *,
    shrink: bool = True,
    repeat: str | None = None,
    words: Path | None = None,
) -> Counts:
    """Draw cases and judge them: what a seed and a number make of it, for the same backends, tree and Hypothesis.

    Args:
        seed, number: of the round.
        cases: how many.
        backends: to choose from.
        shrink: whether to look for the simplest case that fails.
        repeat: the one case to run instead, as a failure names it.
        words: a file that tells of the case under way, should that end the process.

    Raises:
        Exception: that of the first case that fails, with notes of what it is and how to repeat it.
    """
    counts: Counts = Counter()
    armed = -torch.inf

    def one(problem: Problem) -> None:
        nonlocal armed
        if words is not None:
            words.write_text(f"{problem}\n")
        if time.monotonic() >= armed + MINUTE:  # as it starts a thread
            armed = time.monotonic()
            faulthandler.dump_traceback_later(SECONDS, exit=True, file=sys.__stderr__)
        counts[(*problem.title, check(problem))] += 1

    how = settings(
        backend="independent",
        max_examples=cases,
        phases=[Phase.generate, *([Phase.shrink] if shrink else [])],
        database=None,
        deadline=None,
        print_blob=True,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    run = hypothesis.seed(f"{seed}:{number}")(how(hypothesis.given(calls(backends))(one)))
    if repeat is not None:
        run = hypothesis.reproduce_failure(hypothesis.__version__, repeat.encode())(run)
    try:
        run()
    except Exception as error:
        blob = re.search(r"reproduce_failure\('[^']*', b'([^']*)'\)", "\n".join(getattr(error, "__notes__", ())))
        if blob:
            chosen = "" if backends is BACKENDS else "".join(f" --backend {backend}" for backend in backends)
            error.__notes__ = [*error.__notes__, f"python tests/fuzz.py{chosen} --repeat {blob[1]}"]
        raise
    finally:
        faulthandler.cancel_dump_traceback_later()
    return counts


def keep(folder: Path, seed: int, number: int, cases: int) -> Counts | None:
    """Run a round, and keep what it found in a folder; None where that is known already."""
    path, words = (folder / f"{seed}-{number}-of-{cases}.{suffix}" for suffix in ("json", "txt"))
    if path.exists():
        return None
    folder.mkdir(parents=True, exist_ok=True)
    counts = run_round(seed, number, cases, words=words)
    words.unlink()
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps([*counts.items()]))
    partial.rename(path)
    return counts


def show(folder: Path) -> str:
    """How the cases of all rounds in a folder were judged, and the last case of the rounds that did not end."""
    outcomes = Counter[str]()
    for path in folder.glob("*.json"):
        for (_, _, outcome), n in json.loads(path.read_text()):
            outcomes[outcome] += n
    told = ", ".join(f"{outcomes[outcome]:,} {outcome}" for outcome in OUTCOMES)
    failed = [f"\n{path.name}, failed or under way:\n{path.read_text()}" for path in sorted(folder.glob("*.txt"))]
    return "\n".join([f"{outcomes.total():,} cases: {told}; {len(failed)} rounds failed or under way", *failed])


def main(arguments: Sequence[str] | None = None) -> int:
    """Raises what a repeated case raises."""
    parser = argparse.ArgumentParser(description="Repeat a case of the fuzzer, or show what its rounds have found.")
    parser.add_argument("--repeat", help="run the case that a failure names so")
    parser.add_argument("--backend", action="append", help="as the failure says; may be repeated")
    parser.add_argument("--show", type=Path, help="the folder that rounds are kept in")
    given = parser.parse_args(arguments)
    if given.show is not None:
        print(show(given.show))
    if given.repeat is not None:
        torch.set_num_threads(1)
        run_round(0, 0, 1, given.backend or BACKENDS, repeat=given.repeat)
    return 0


if __name__ == "__main__":
    sys.exit(main())
