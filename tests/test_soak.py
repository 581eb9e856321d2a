"""Memory over many steps of all losses, with sizes that always change: nothing grows, and planted leaks are found.

``make soak`` takes 100,000 steps in place of 840, and draws them from the samples that they leave.
"""

from __future__ import annotations

import csv
import gc
import json
import mmap
import os
import platform
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from dialect import KERNELS
from dialect.interpreters import DYNAMO, start_python
from soaking import MEMBERS, Sample, Step, make_step, soak, take_step

import alrp_triton
from alrp_triton import framework

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
STEPS = int(os.environ.get("SOAK_STEPS", "840"))
LOGITS, POSITIVES = (3000, 50) if STEPS == 840 else (10_000, 300)
# What may grow in any number of steps, such as what is made on first use, and in each step. A tensor that one of the
# fourteen members kept in each of its steps would be 0.071 in each step. The allocator takes and gives back megabytes.
LIMITS = {"resident_mb": (4.0, 1e-4), "objects": (2, 0.04), "tensors": (0, 0.001), "device_mb": (0.1, 1e-4)}
pytestmark = [
    pytest.mark.skipif(KERNELS, reason="thousands of steps"),
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from /proc"),
]


def grown(samples: Sequence[Sample]) -> dict[str, float]:
    """What has grown beyond its limit, and by how much.

    It compares the medians of the first and the last third of the samples, so that neither a peak nor a dip at either
    end decides. The first fifth is the warm-up, which it leaves out.
    """
    warm = samples[len(samples) // 5 :]
    third = len(warm) // 3
    assert third > 1

    def growth(name: str) -> float:
        first, last = (statistics.median(getattr(s, name) for s in part) for part in (warm[:third], warm[-third:]))
        return last - first

    steps = growth("step")
    return {n: growth(n) for n, (any_number, each) in LIMITS.items() if growth(n) > max(any_number, each * steps)}


SOAK = """
import json, sys, torch
from soaking import soak, take_step
torch.set_num_threads(1)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
steps, logits, positives = map(int, sys.argv[1:])
# With this seed the first fifth compiles what is compiled on first use. The number of members, 14, divides the
# number of steps between two samples.
for entry in soak(lambda number: take_step(number, logits, positives, device, 1), steps, 84 if steps == 840 else 602):
    print(json.dumps(entry), flush=True)
"""


@pytest.mark.xdist_group("processes")
def test_nothing_grows() -> None:
    numbers = map(str, (STEPS, LOGITS, POSITIVES))
    done = start_python(SOAK, *numbers, given=DYNAMO, cwd=ROOT, path=[ROOT / "tests"])
    assert done.returncode == 0, done.stderr
    samples = [Sample(*json.loads(line)) for line in done.stdout.splitlines()]
    if "SOAK_STEPS" in os.environ:
        _write(samples, ROOT / "benchmarks" / "results" / "soak.csv")
    assert not grown(samples), samples


def _write(samples: Sequence[Sample], path: Path) -> None:
    about = ("cuda" if torch.cuda.is_available() else "cpu", torch.__version__, platform.python_version())
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["process", *Sample._fields, "device", "torch", "python"])
        writer.writerows([0, *(round(x, 2) for x in sample), *about] for sample in samples)


# Planted leaks.


class Thing:
    """An object that the collector of cycles knows of, unlike a plain ``object()``."""


def nothing(kept: list[Any], number: int) -> None:
    """What a step makes and lets go."""
    _ = [torch.zeros(100), Thing(), bytes(1000)]


def a_cache(kept: list[Any], number: int) -> None:
    """One that is full within the warm-up."""
    if len(kept) < 50:
        kept.append(torch.zeros(10))


def a_cycle(kept: list[Any], number: int) -> None:
    """The collector frees it: it is no leak."""
    thing = Thing()
    thing.itself = thing  # type: ignore[attr-defined]


def a_page(kept: list[Any], number: int) -> None:
    """Memory, and no object. It becomes resident when it is written to, and the allocator has no part in it."""
    if not kept:
        kept.append(mmap.mmap(-1, 20_000 * mmap.PAGESIZE))
    kept[0][number * mmap.PAGESIZE] = 1


def an_object(kept: list[Any], number: int) -> None:
    kept.append(Thing())


def a_tensor(kept: list[Any], number: int) -> None:
    kept.append(torch.zeros(1))


def of_one_member(leak: Callable[[list[Any], int], None]) -> Callable[[list[Any], int], None]:
    return lambda kept, number: leak(kept, number) if number % len(MEMBERS) == 5 else None


@pytest.fixture
def alone() -> Iterator[None]:
    """Let samples count only what comes from now on: what other tests have left may go at any time."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (nothing, set()),
        (a_cache, set()),
        (a_cycle, set()),
        (a_page, {"resident_mb"}),
        (an_object, {"objects"}),
        (a_tensor, {"objects", "tensors"}),
        (of_one_member(an_object), {"objects"}),
        (of_one_member(a_tensor), {"objects", "tensors"}),
    ],
)
def test_planted_leaks_are_found(alone: None, step: Callable[[list[Any], int], None], expected: set[str]) -> None:
    kept: list[Any] = []
    found = set(grown(list(soak(lambda number: step(kept, number), 12_000, 1000))))
    # Objects and tensors may show in resident memory, too.
    assert found - ({"resident_mb"} if expected else set()) == expected - {"resident_mb"}
    assert "resident_mb" in found or "resident_mb" not in expected


@pytest.mark.parametrize("leak", [an_object, a_tensor])
def test_a_leak_of_a_loss_is_found(alone: None, monkeypatch: pytest.MonkeyPatch, leak: Callable[..., None]) -> None:
    """Other members do nothing, to save time."""
    kept: list[Any] = []
    member, place = MEMBERS["ndcg_loss"], list(MEMBERS).index("ndcg_loss")

    def leaking(step: Step) -> torch.Tensor:
        leak(kept, 0)
        return member(step)

    def take(number: int) -> None:
        if number % len(MEMBERS) == place:
            take_step(number, 3000, 50, CPU)

    for number in range(1, 601):
        take(number)  # what is made on first use
    assert not set(grown(list(soak(take, 600, 60)))) - {"resident_mb"}
    monkeypatch.setitem(MEMBERS, "ndcg_loss", leaking)
    assert "objects" in grown(list(soak(take, 600, 60)))


# The steps.


def test_no_loss_is_missing() -> None:
    # The others of compat are calls of these.
    public = {*alrp_triton.__all__, *framework.__all__, "compat.aLRPLoss"}
    assert {name for name in public if name.lower().endswith("loss")} == {name.partition(",")[0] for name in MEMBERS}


def test_every_member_meets_every_kind_of_input() -> None:
    for k, member in enumerate(MEMBERS):
        steps = [make_step(number, 3000, 50, CPU) for number in range(k, 840, len(MEMBERS))]
        assert {"torch"} <= {step.arguments["backend"] for step in steps}
        assert len({step.logits[0].dtype for step in steps}) == 4, member
        assert {step.arguments["delta"] for step in steps} == {0.0, 0.5, 1.0}
        assert {len(step.logits) for step in steps} == {1, 2, 3}
        assert {"groups" in step.arguments for step in steps} == {True, False}
        totals = [sum(level.numel() for level in step.logits) for step in steps]
        assert min(totals) == 0
        assert 300 < max(totals) <= 3000
        assert {0, 1} <= {len(step.values) for step in steps}


def test_a_step_that_goes_wrong_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    number = list(MEMBERS).index("ap_loss")
    wrong: dict[str, Callable[[Step], torch.Tensor]] = {
        "finite": lambda step: step.logits[0].double().sum() * 0 + torch.nan,
        "gradient of every level": lambda step: step.values.sum() * 0 + torch.zeros((), requires_grad=True),
    }
    for said, member in wrong.items():
        monkeypatch.setitem(MEMBERS, "ap_loss", member)
        with pytest.raises(RuntimeError, match=f"step {number}, ap_loss: expected .*{said}"):
            take_step(number, 3000, 50, CPU)
