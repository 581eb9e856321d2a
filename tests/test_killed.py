"""A training that is killed, over and over, and started again ends with the bits of one that never was."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import killed
import pytest
import torch
import torch.distributed as dist
from dialect import KERNELS
from dialect.interpreters import DYNAMO, new_processes, start_python
from killed import FORGETFUL, SAVED_EVERY, STEPS

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [
    pytest.mark.skipif(KERNELS, reason="kernels have no state; there is nothing to kill them for"),
    pytest.mark.xdist_group("processes"),  # the trainings are then run once, and what they start from started once
]
together = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
BY_SIGNAL = -signal.SIGKILL if hasattr(signal, "SIGKILL") else 1
"""The exit status of a process that was killed; on Windows it is any other's."""
# Seconds after which silence means that something hangs: no process is silent for so long, however busy the machine.
PATIENCE = 30 * 60
Event = tuple[str, int]


class Kill(NamedTuple):
    """When to kill whom."""

    after: Event
    """What the first of the victims has said, a while before if it is a step; see ``killed.train``."""
    victims: tuple[int, ...] = (0,)
    found: int = 0
    """Step of the checkpoint that the killed run has to leave."""


class Run(NamedTuple):
    """What was seen of a run."""

    events: list[list[Event]]
    statuses: list[int | None]
    checkpoint: dict[str, Any] | None
    """Afterwards; None where there is none."""
    half_written: bool


KILLS = {
    # Before any checkpoint, within a step, and when half of a checkpoint is on disk.
    1: [
        Kill(("step", 2)),
        Kill(("step", 2 * SAVED_EVERY + 1), found=2 * SAVED_EVERY),
        Kill(("writing", 4 * SAVED_EVERY), found=3 * SAVED_EVERY),
        Kill(("step", STEPS - 3), found=STEPS - SAVED_EVERY),
    ],
    # One process of two, either, whereupon the other raises; and both, when one writes.
    2: [
        Kill(("step", 2 * SAVED_EVERY + 1), (1,), found=2 * SAVED_EVERY),
        Kill(("writing", 4 * SAVED_EVERY), (0, 1), found=3 * SAVED_EVERY),
        Kill(("step", STEPS - 3), (0,), found=STEPS - SAVED_EVERY),
    ],
}
"""By how many processes train together."""


def start(folder: Path, size: int) -> tuple[list[Any], dict[Connection, int]]:
    """So many processes, and pipes to them by rank."""
    context = new_processes()
    (folder / "store").unlink(missing_ok=True)  # where the processes of the run before found one another
    processes, pipes = [], {}
    for rank in range(size):
        mine, theirs = context.Pipe()
        processes.append(context.Process(target=killed.serve, args=(str(folder), rank, size, theirs), daemon=True))
        processes[-1].start()
        theirs.close()
        pipes[mine] = rank
    return processes, pipes


def is_due(kill: Kill, said: list[Event], size: int) -> bool:
    """After a step somewhere in the next: when some of the trainings have done it, and another is at work."""
    if kill.after not in said:
        return False
    done = len(said) - 1 - said.index(kill.after)
    some = random.Random(str(kill)).randrange(len(killed.names(size)) + 1)
    return kill.after[0] == "writing" or done >= some


def run(folder: Path, kill: Kill | None = None, size: int = 1) -> Run:
    """Train in so many processes, to the end or until they are killed."""
    processes, pipes = start(folder, size)
    events: list[list[Event]] = [[] for _ in processes]
    at_end, killed_now = list[Connection](), False
    while pipes:
        ready = wait(list(pipes), PATIENCE)
        assert ready, f"no word from processes {list(pipes.values())} after {events}"
        for pipe in ready:
            rank = pipes[pipe]
            try:
                event = pipe.recv()
                events[rank].append(event)
                if event[0] == "end":  # none leaves before the last
                    at_end.append(pipe)
                    for one in at_end if len(at_end) == size else []:
                        one.send(None)
                elif kill is None or rank != kill.victims[0] or not is_due(kill, events[rank], size):
                    pipe.send(None)
                elif not killed_now:
                    # Without its answer the first of them does not come far. It is the last to go: one of those that
                    # write together sees no other go, since it waits for that answer.
                    for victim in reversed(kill.victims):
                        processes[victim].kill()
                    killed_now = True
            except (EOFError, OSError):  # it has ended
                del pipes[pipe]
    for process in processes:
        process.join(PATIENCE)
        assert process.exitcode is not None, f"no end of a process after {events}"
    path = folder / "checkpoint.pt"
    checkpoint = torch.load(path, weights_only=True) if path.exists() else None
    return Run(events, [process.exitcode for process in processes], checkpoint, path.with_suffix(".part").exists())


def never_killed(folder: Path, size: int) -> dict[str, Any]:
    """The last checkpoint of a training that nothing interrupts."""
    folder.mkdir()
    found = run(folder, size=size)
    assert found.statuses == [0] * size
    assert found.events[0][0] == ("from", 0)
    assert found.checkpoint is not None
    return found.checkpoint


class Story(NamedTuple):
    """A training that was never killed, and one that was."""

    size: int
    """So many processes."""
    expected: dict[str, Any]
    runs: list[Run]
    ended: dict[str, Any]


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=[pytest.mark.nightly, together])])
def story(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Story:
    folder, size = tmp_path_factory.mktemp("story"), request.param
    expected = never_killed(folder / "never", size)
    (folder / "killed").mkdir()
    runs = [run(folder / "killed", kill, size) for kill in KILLS[size]]
    if size == 1:
        # Last by the command itself: nothing is left but the folder.
        code = "import runpy, sys; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
        script = ROOT / "tests" / "killed.py"
        done = start_python(code, str(script), str(folder / "killed"), given=DYNAMO, cwd=ROOT)
        assert done.returncode == 0, done.stderr
    else:
        runs.append(run(folder / "killed", size=size))
        assert runs[-1].statuses == [0] * size
    return Story(size, expected, runs, torch.load(folder / "killed" / "checkpoint.pt", weights_only=True))


def differences(one: Any, other: Any, where: str = "") -> Iterator[str]:
    """Where two checkpoints are not the same, bit for bit."""
    if isinstance(one, dict) and isinstance(other, dict):
        if list(one) != list(other):
            yield f"{where}: {list(one)} and {list(other)}"
        for key in one.keys() & other.keys():
            yield from differences(one[key], other[key], f"{where} {key}".strip())
    elif isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if one.dtype != other.dtype or one.shape != other.shape or one.numpy().tobytes() != other.numpy().tobytes():
            yield where
    elif one != other:
        yield where


def test_a_training_is_killed_midway(story: Story) -> None:
    done = 0
    for kill, killed_run in zip(KILLS[story.size], story.runs):
        for rank, status in enumerate(killed_run.statuses):
            # Another that ranks with it neither waits for ever nor goes on alone.
            assert status == BY_SIGNAL if rank in kill.victims else status not in (0, BY_SIGNAL)
        first = killed_run.events[kill.victims[0]]
        # It went on where the kill before had left the checkpoint, and came as far as it was to be killed, or a step.
        assert first[0] == ("from", done)
        assert kill.after in first
        assert max(number for _, number in first) <= kill.after[1] + 1 < STEPS
        assert killed_run.half_written == (kill.after[0] == "writing")
        checkpoint = killed_run.checkpoint
        done = checkpoint["step"] if checkpoint else 0
        assert done == kill.found < kill.after[1]
        if checkpoint:
            # It lay within a period: some of it had been counted.
            states = [training.get("criterion", {}) for training in checkpoint["trainings"].values()]
            counts = [int(state["self_balance.count"]) for state in states if state]
            assert counts
            assert all(0 < count < max(killed.PERIOD, killed.EPOCH) for count in counts), counts
    assert story.ended["step"] == story.expected["step"] == STEPS


def test_a_killed_training_ends_with_the_same_bits(story: Story) -> None:
    for name in killed.names(story.size):
        expected, ended = (checkpoint["trainings"][name] for checkpoint in (story.expected, story.ended))
        assert list(differences(expected, ended)) == [], name
        assert len(ended["losses"]) == STEPS
        assert torch.tensor(ended["losses"]).isfinite().all()
        assert len(set(ended["losses"])) > STEPS // 2


def test_without_the_state_of_the_criterion_it_would_not(story: Story) -> None:
    """What is held against one another above would differ."""
    expected, ended = (checkpoint["trainings"][FORGETFUL] for checkpoint in (story.expected, story.ended))
    said = list(differences(expected, ended))
    assert "losses" in said
    assert any(where.startswith("model") for where in said)
    # Never killed, it has nothing to remember, and is like the one that does not forget.
    faithful = story.expected["trainings"]["ALRPLoss, torch, float32"]
    assert list(differences(expected, {key: faithful[key] for key in expected})) == []
