"""Leaks: planted ones are found, and a short soak finds none."""

from __future__ import annotations

import gc
import json
import mmap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from alrp_triton.benchmarks import soak
from alrp_triton.benchmarks.soak import LIMITS, Sample
from alrp_triton.benchmarks.soak_steps import MEMBERS, Step
from cases import KERNELS
from interpreters import DYNAMO, start_python

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
pytestmark = [
    pytest.mark.skipif(KERNELS, reason="thousands of steps"),
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from /proc"),
]


@pytest.fixture
def alone() -> Iterator[None]:
    """Let samples count what comes from now on alone: what other tests have left may go at any time, and takes long to
    go through."""
    gc.freeze()
    yield
    gc.unfreeze()


class Thing:
    """An object that the collector of cycles knows of, as it does not know a plain ``object()``."""


def nothing(kept: list[Any], number: int) -> None:
    """What a step makes and lets go."""
    _ = [torch.zeros(100), Thing(), bytes(1000)]


def a_cache(kept: list[Any], number: int) -> None:
    """One that comes to an end, within the warm-up."""
    if len(kept) < 50:
        kept.append(torch.zeros(10))


def a_cycle(kept: list[Any], number: int) -> None:
    """What the collector frees is no leak."""
    thing = Thing()
    thing.itself = thing  # type: ignore[attr-defined]


def a_page(kept: list[Any], number: int) -> None:
    """Of memory, and no object: one that is only reserved is not resident until it is written to, and none of what the
    allocator holds since other tests can stand in for it."""
    if not kept:
        kept.append(mmap.mmap(-1, 20_000 * mmap.PAGESIZE))
    kept[0][number * mmap.PAGESIZE] = 1


def an_object(kept: list[Any], number: int) -> None:
    kept.append(Thing())


def a_tensor(kept: list[Any], number: int) -> None:
    kept.append(torch.zeros(1))


def by_one_member(leak: Callable[[list[Any], int], None]) -> Callable[[list[Any], int], None]:
    def step(kept: list[Any], number: int) -> None:
        if number % len(MEMBERS) == 5:
            leak(kept, number)

    return step


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (nothing, ()),
        (a_cache, ()),
        (a_cycle, ()),
        (a_page, ("resident_mb",)),
        (an_object, ("objects",)),
        (a_tensor, ("objects", "tensors")),
        (by_one_member(an_object), ("objects",)),
        (by_one_member(a_tensor), ("objects", "tensors")),
    ],
)
def test_planted_leaks_are_found(
    alone: None, step: Callable[[list[Any], int], None], expected: tuple[str, ...]
) -> None:
    kept: list[Any] = []
    samples = list(soak.soak(lambda number: step(kept, number), 0, 12_000, 1000, CPU))
    assert [entry.step for entry in samples] == list(range(1000, 13_000, 1000))
    found = {name: claim["met"] for name, claim in zip(LIMITS, soak.verdict(samples, 2000), strict=True)}
    # What things and tensors take besides may be seen in resident memory, too.
    if expected != ("resident_mb",) and expected:
        del found["resident_mb"]
    assert [name for name, fine in found.items() if not fine] == list(expected)


# Without the bar of the command, which remembers when it was moved. Twelve members, so that each is as often in any
# stretch between two samples.
SHORT = """
import dataclasses, json, torch
from alrp_triton.benchmarks.soak import soak
from alrp_triton.benchmarks.soak_steps import take_step
torch.set_num_threads(1)
cpu = torch.device("cpu")
for entry in soak(lambda number: take_step(number, 3000, 50, cpu), 0, 720, 72, cpu):
    print(json.dumps(dataclasses.asdict(entry)), flush=True)
"""


@pytest.mark.xdist_group("processes")
def test_nothing_grows_in_a_short_soak() -> None:
    """Each member forward and backward, sixty times, with sizes that always change."""
    done = start_python(SHORT, given=DYNAMO, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    samples = [Sample(**json.loads(line)) for line in done.stdout.splitlines()]
    warm = samples[1:]
    assert [entry.step for entry in warm] == list(range(144, 721, 72))
    # Not one tensor in 576 steps, and of objects no more than something makes once, when it is first asked for: what
    # a member kept in each of its steps would be 48.
    assert {entry.tensors for entry in warm} == {warm[0].tensors}, warm
    assert max(entry.objects for entry in warm) - min(entry.objects for entry in warm) <= 2, warm
    # So few steps say little of resident memory, in which the allocator takes and gives back megabytes at its pleasure;
    # the long soak holds it to 1 MB in 10 000 steps.
    assert warm[-1].resident_mb - warm[0].resident_mb <= 4.0, warm


# The command.


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: None, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, list[int]]]:
    """Run the command on files in a folder, with steps that do nothing but be counted, or what is given: its status,
    and the numbers of the steps that it took."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("rich")

    def command(*options: str, step: Callable[..., None] = lambda number, *settings: None) -> tuple[int, list[int]]:
        numbers = bytearray(2000)  # which does not grow

        def take(number: int, *settings: Any) -> None:
            assert settings == (3000, 50, CPU, 7)
            numbers[number] += 1
            step(number, *settings)

        monkeypatch.setattr(soak, "take_step", take)
        given = ["--logits", "3000", "--positives", "50", "--seed", "7", "--device", "cpu"]
        files = ["--csv", str(tmp_path / "soak.csv"), "--output", str(tmp_path / "images" / "soak.png")]
        status = soak.main([*options, *given, *files])
        assert max(numbers) <= 1
        return status, [number for number, count in enumerate(numbers) if count]

    return command


def test_the_command_writes_a_file_and_a_picture_and_goes_on(run, tmp_path, capsys) -> None:
    path, picture = tmp_path / "soak.csv", tmp_path / "images" / "soak.png"
    assert run("--steps", "1000", "--every", "100") == (0, list(range(1, 1001)))
    first = soak.read(path)
    assert [(entry.process, entry.step) for entry in first] == [(0, step) for step in range(100, 1001, 100)]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.count("yes") == len(LIMITS)

    # As if killed in the midst of a row: the steps since the last whole one are taken again, by another process.
    path.write_bytes(path.read_bytes()[:-10])
    assert run("--steps", "1850", "--every", "100", "--warm-up", "100") == (0, list(range(901, 1851)))
    both = soak.read(path)
    assert both[:9] == first[:9]
    assert [(entry.process, entry.step) for entry in both[9:]] == [
        (1, step) for step in (*range(1000, 1900, 100), 1850)
    ]

    # All steps are there: the file is read, and drawn anew.
    picture.unlink()
    content = path.read_bytes()
    assert run("--steps", "1850", "--every", "100", "--warm-up", "100") == (0, [])
    assert path.read_bytes() == content
    assert picture.exists()


@pytest.mark.parametrize("leak", [an_object, a_tensor])
def test_the_command_fails_on_a_leak(run, monkeypatch, capsys, leak) -> None:
    """Of one member, among the losses themselves; the other steps do nothing, to save time."""
    kept: list[Any] = []
    take_step, name = soak.take_step, "ndcg_loss"
    member, place = MEMBERS[name], list(MEMBERS).index(name)

    def leaking(step: Step) -> torch.Tensor:
        leak(kept, 0)
        return member(step)

    def take(number: int, *settings: Any) -> None:
        if number % len(MEMBERS) == place:
            take_step(number, *settings)

    # What is made once, at a first call, is made before.
    for number in range(place, 1200, len(MEMBERS)):
        take_step(number, 3000, 50, CPU, 7)
    options = ("--every", "60", "--warm-up", "120")
    assert run("--steps", "600", *options, step=take)[0] == 0
    monkeypatch.setitem(MEMBERS, name, leaking)
    assert run("--steps", "1200", *options, step=take)[0] == 1
    assert len(kept) == 600 // len(MEMBERS)
    printed = capsys.readouterr().out
    assert printed.count("NO") == (1 if leak is an_object else 2)


def test_the_command_stops_and_goes_on(run, tmp_path) -> None:
    def interrupted(number: int, *settings: Any) -> None:
        if number == 250:
            raise KeyboardInterrupt

    assert run("--steps", "1300", "--every", "100", step=interrupted)[0] == 130
    assert [entry.step for entry in soak.read(tmp_path / "soak.csv")] == [100, 200]
    assert run("--steps", "1300", "--every", "100") == (0, list(range(201, 1301)))


def test_the_command_without_enough_samples_gives_no_verdict(run, capsys) -> None:
    assert run("--steps", "300", "--every", "100")[0] == 2
    assert "no verdict: samples: expected 8" in capsys.readouterr().err
