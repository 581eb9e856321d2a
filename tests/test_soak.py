"""The soak: how it judges growth, its file, and what it does in each step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from alrp_triton.benchmarks import soak
from alrp_triton.benchmarks.soak import LIMITS, Growth, Sample
from alrp_triton.benchmarks.soak_steps import MEMBERS, Step, make_step, take_step
from cases import KERNELS

import alrp_triton
from alrp_triton import compat, framework
from alrp_triton.engine.backends import why_unavailable

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(KERNELS, reason="a thousand steps")
# As in the short soak of test_soak_leaks.py.
STEPS, LOGITS, POSITIVES = 720, 3000, 50


def made(process: int = 0, first: int = 0, count: int = 12, every: int = 100, **quantities: Any) -> list[Sample]:
    """Samples in which quantities follow from the number of steps since the process began; others stay as they are."""
    constant = {"resident_mb": 500.0, "objects": 1000, "tensors": 3, "device_mb": 0.0}
    return [
        Sample(
            process, first + k * every, 1.5 * k,
            **{name: quantities[name](k * every) if name in quantities else constant[name] for name in LIMITS},
            device="cpu", torch="2", python="3",
        )
        for k in range(1, count + 1)
    ]  # fmt: skip


def met(samples: list[Sample], warm_up: int = 0) -> dict[str, bool]:
    """Which quantities keep their limit."""
    return {name: claim["met"] for name, claim in zip(LIMITS, soak.verdict(samples, warm_up), strict=True)}


def grown(*names: str) -> dict[str, bool]:
    return {name: name not in names for name in LIMITS}


# Its arithmetic.


def test_growth_is_that_between_the_thirds() -> None:
    # 12 samples: the medians of the first and the last four are eight samples apart.
    found = soak.growth(made(objects=lambda steps: 7 + steps // 50), "objects", 0)
    assert found == Growth(16, 800)
    assert found.rate == 200
    assert soak.growth(made(), "objects", 0) == Growth(0, 800)
    assert soak.growth(made(resident_mb=lambda steps: 600 - steps / 100), "resident_mb", 0) == Growth(-8, 800)


@pytest.mark.parametrize("odd", [100, 200, 700, 1100, 1200])
@pytest.mark.parametrize("by", [-300, 300])
def test_a_peak_or_a_dip_decides_nothing(odd: int, by: int) -> None:
    samples = made(resident_mb=lambda steps: 500.0 + (by if steps == odd else 0))
    assert soak.growth(samples, "resident_mb", 0) == Growth(0, 800)


def test_the_warm_up_of_each_process_is_left_out() -> None:
    def fills(steps: int) -> int:
        return min(steps, 400)

    # With a warm-up of 400 steps the sample at 400 is the first.
    assert soak.growth(made(objects=fills), "objects", 400) == Growth(0, 600)
    assert soak.growth(made(objects=fills), "objects", 0) == Growth(150, 800)
    # Another process has one of its own, from where it began, which is not where the file does.
    later = made(1, first=1250, objects=fills)
    assert soak.growth([*made(), *later], "objects", 400) == Growth(0, 600)
    assert soak.growth([*made(), *later], "objects", 300) == Growth(0, 700)
    assert soak.growth([*made(), *later], "objects", 200).amount > 0


def test_the_process_that_grows_fastest_counts() -> None:
    def leaks(steps: int) -> int:
        return steps

    def still(steps: int) -> int:
        return 10**6  # larger, and yet not grown

    for first, second in ((leaks, still), (still, leaks)):
        samples = [*made(objects=first), *made(1, 1200, objects=second)]
        assert soak.growth(samples, "objects", 0) == Growth(800, 800)
        assert met(samples) == grown("objects")


def test_eight_samples_of_a_process_are_needed() -> None:
    assert soak.growth(made(count=8), "objects", 0) == Growth(0, 600)
    assert soak.growth(made(count=8), "objects", 101) is None
    assert soak.growth([*made(count=7), *made(1, 700, count=7)], "objects", 0) is None
    assert soak.growth([], "objects", 0) is None
    with pytest.raises(ValueError, match="expected 8 of a process after the warm-up of 101 steps"):
        soak.verdict(made(count=8), 101)
    # Two of a process that has just begun neither count nor hinder.
    assert met([*made(), *made(1, 1200, count=2, objects=lambda steps: steps)]) == grown()


@pytest.mark.parametrize("name", list(LIMITS))
def test_each_limit_is_one(name: str) -> None:
    """In 100 000 steps, where it is not the allocator that decides."""
    for factor, fine in ((0.99, True), (1.01, False)):
        slope = factor * LIMITS[name] / 10_000
        samples = made(every=10_000, **{name: lambda steps, slope=slope: 100 + slope * steps})
        assert met(samples) == grown(*([] if fine else [name]))


def test_the_allocator_has_its_way_in_few_steps() -> None:
    # 4 MB between the thirds, in however few steps; objects and tensors have nothing of the kind.
    for amount, fine in ((3.9, True), (4.1, False)):
        assert met(made(resident_mb=lambda steps, mb=amount / 800: 500 + mb * steps))["resident_mb"] is fine
    assert met(made(objects=lambda steps: steps // 12))["objects"] is False
    assert met(made(tensors=lambda steps: steps // 400))["tensors"] is False


# Its file.


def test_samples_return_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "soak.csv"
    assert soak.read(path) == []
    samples = [*made(count=2), *made(1, 200, count=1)]
    samples[1] = Sample(**{**vars(samples[1]), "device": 'a GPU, "new"', "resident_mb": 1234.56})
    for entry in samples:
        soak.append(path, entry)
    assert soak.read(path) == samples


def test_a_half_written_row_is_dropped_once(tmp_path: Path) -> None:
    path = tmp_path / "soak.csv"
    samples = made(count=3)
    for entry in samples:
        soak.append(path, entry)
    whole = path.read_bytes()
    for end in range(len(whole) - 1, whole[:-1].rindex(b"\n") + 1, -1):
        path.write_bytes(whole[:end])
        assert soak.read(path) == samples[:2]
        soak.append(path, samples[2])
        assert path.read_bytes() == whole


def test_other_columns_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "soak.csv"
    for text in ("a,b\n1,2\n", "notes of mine"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"soak\.csv has other columns"):
            soak.read(path)
        assert path.read_text() == text


# Its steps.


def differing(one: Step, other: Step) -> list[str]:
    """In what two steps differ, to the bit."""

    def content(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return str(value.dtype), list(value.shape), value.requires_grad, value.detach().flatten().tolist()
        if isinstance(value, dict):
            return {key: content(entry) for key, entry in value.items()}
        return [content(entry) for entry in value] if isinstance(value, (list, tuple)) else value

    return [name for name in Step._fields if content(getattr(one, name)) != content(getattr(other, name))]


def test_a_step_follows_from_its_number() -> None:
    steps = [make_step(number, LOGITS, POSITIVES, CPU) for number in range(40)]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    for number in reversed(range(40)):
        assert differing(make_step(number, LOGITS, POSITIVES, CPU), steps[number]) == []
    assert torch.equal(torch.get_rng_state(), state)
    # Another number, or another seed, is another step.
    full = next(number for number in range(40) if len(steps[number].values) > 3)
    assert "values" in differing(steps[full], make_step(full, LOGITS, POSITIVES, CPU, seed=1))
    assert len({tuple(step.values.tolist()) for step in steps if len(step.values) > 3}) > 5


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Step]]:
    """Members in the order in which they are called, and with what."""
    calls: list[tuple[str, Step]] = []

    def watched(name: str, member: Callable[[Step], torch.Tensor]) -> Callable[[Step], torch.Tensor]:
        def call(step: Step) -> torch.Tensor:
            calls.append((name, step))
            return member(step)

        return call

    for name, member in MEMBERS.items():
        monkeypatch.setitem(MEMBERS, name, watched(name, member))
    return calls


def test_members_are_taken_in_turn(taken: list[tuple[str, Step]]) -> None:
    count = len(MEMBERS)
    for number in range(1, 2 * count + 1):
        take_step(number, LOGITS, POSITIVES, CPU)
    assert [name for name, _ in taken] == [list(MEMBERS)[number % count] for number in range(1, 2 * count + 1)]
    for number, (name, step) in enumerate(taken, 1):
        fewer = POSITIVES // 10 if "pair functions" in name else POSITIVES
        expected = make_step(number, LOGITS, fewer, CPU)
        assert [level.tolist() for level in step.logits] == [level.tolist() for level in expected.logits]
        assert len(step.values) == len(expected.values) <= fewer


def test_no_member_of_the_family_is_missing() -> None:
    public = {*alrp_triton.__all__, *framework.__all__, *(f"compat.{name}" for name in compat.__all__)}
    losses = {name for name in public if name.lower().endswith("loss")}
    assert losses == {name.partition(",")[0] for name in MEMBERS}


def test_every_member_meets_every_kind_of_input() -> None:
    """Within the steps of the short soak, thus a hundred times in the long one."""
    backends = [name for name in ("torch", "numba", "triton", "pairwise") if why_unavailable(name, CPU) is None]
    dtypes = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
    sizes = []
    for k, member in enumerate(MEMBERS):
        steps = [make_step(number, LOGITS, POSITIVES, CPU) for number in range(k, STEPS, len(MEMBERS))]
        found = {(step.logits[0].dtype, step.arguments["backend"]) for step in steps}
        assert found == {(dtype, backend) for dtype in dtypes for backend in backends}, member
        assert {step.arguments["delta"] for step in steps} == {0.0, 0.5, 1.0}
        assert {len(step.logits) for step in steps} == {1, 2, 3}
        assert {"groups" in step.arguments for step in steps} == {True, False}
        assert {step.labels[0].shape == step.logits[0].shape for step in steps} == {True, False}
        totals = [sum(level.numel() for level in step.logits) for step in steps]
        assert min(totals) == 0
        assert max(totals) <= LOGITS
        counts = {len(step.values) for step in steps}
        assert {0, 1} <= counts
        assert POSITIVES / 2 < max(counts) <= POSITIVES
        sizes += totals
        for step in steps:
            classes = step.logits[0].shape[-1]
            for_each = step.labels[0].dtype == torch.int8
            positive = [y == 1 if for_each else (y >= 0) & (y < classes) for y in step.labels]
            assert sum(int(y.sum()) for y in positive) == len(step.values) == len(step.boxes[0])
            assert all(leaf.is_leaf and leaf.requires_grad for leaf in (*step.logits, step.values, step.boxes[0]))
    # Of all magnitudes.
    for low, high in ((1, 30), (30, 300), (300, LOGITS + 1)):
        assert sum(low <= size < high for size in sizes) > len(sizes) / 20


def test_a_step_that_goes_wrong_is_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    number = list(MEMBERS).index("ap_loss")
    wrong: dict[str, Callable[[Step], torch.Tensor]] = {
        "finite": lambda step: step.logits[0].double().sum() * 0 + torch.nan,
        "gradient of every level": lambda step: step.values.sum() * 0 + torch.zeros((), requires_grad=True),
    }
    for said, member in wrong.items():
        monkeypatch.setitem(MEMBERS, "ap_loss", member)
        with pytest.raises(RuntimeError, match=f"step {number}, ap_loss: expected .*{said}"):
            take_step(number, LOGITS, POSITIVES, CPU)
