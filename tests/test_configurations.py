"""Launch settings: what is pinned, what a search finds, and what it keeps on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from alrp_triton.kernels import configurations
from alrp_triton.kernels.configurations import CANDIDATES, PINNED, Settings
from interpreters import start_python

KERNELS = sorted(PINNED)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache on disk, in a folder that does not exist yet, and in memory."""
    monkeypatch.setenv("ALRP_TRITON_CACHE", str(tmp_path / "some" / "cache"))
    monkeypatch.setattr(configurations, "_known", {})
    return tmp_path / "some" / "cache" / "settings.json"


class Clock:
    """Times each candidate as told, by default 1 ms, and notes what it was asked."""

    def __init__(self, **milliseconds: float | Exception) -> None:
        self.milliseconds = {int(place.removeprefix("at")): value for place, value in milliseconds.items()}
        self.asked: list[Settings] = []

    def __call__(self, settings: Settings) -> float:
        answer = self.milliseconds.get(len(self.asked), 1.0)
        self.asked.append(settings)
        if isinstance(answer, Exception):
            raise answer
        return answer


def new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configurations, "_known", {})


def write(cache: Path, content: Any) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def test_the_longest_prefix_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {name: {"block": i} for i, name in enumerate(["default", "sm_9", "sm_90", "gfx", "gfx94", "sm_100"])}
    monkeypatch.setitem(PINNED, "buckets", table)
    found = {"sm_90": 2, "sm_90a": 2, "sm_91": 1, "sm_100": 5, "sm_10": 0, "gfx942": 4, "gfx1100": 3, "interpreter": 0}
    assert {name: configurations.pinned("buckets", name)["block"] for name in found} == found


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_is_pinned_is_among_the_candidates(kernel: str) -> None:
    assert "default" in PINNED[kernel]
    for settings in PINNED[kernel].values():
        assert settings in CANDIDATES[kernel]
    assert sorted(CANDIDATES) == KERNELS
    for name in ("block", "num_warps"):  # Triton takes powers of two
        assert all(settings[name].bit_count() == 1 for settings in CANDIDATES[kernel])


def test_candidates_are_distinct() -> None:
    for candidates in CANDIDATES.values():
        assert len({tuple(sorted(settings.items())) for settings in candidates}) == len(candidates)


@pytest.mark.parametrize("place", [0, 3, 7])
def test_search_takes_the_fastest(cache: Path, place: int) -> None:
    clock = Clock(**{f"at{place}": 0.5})
    assert configurations.search("buckets", "buckets|a|b|c", clock) == CANDIDATES["buckets"][place]
    assert clock.asked == CANDIDATES["buckets"]
    assert json.loads(cache.read_text()) == {"buckets|a|b|c": CANDIDATES["buckets"][place]}
    assert list(cache.parent.iterdir()) == [cache]  # no partial file is left


def test_of_equally_fast_ones_the_first_is_taken() -> None:
    assert configurations.search("gradient", "gradient|", Clock()) == CANDIDATES["gradient"][0]


def test_each_key_is_timed_once(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    first = configurations.search("buckets", "buckets|a", Clock(at2=0.5))
    again = Clock(at1=0.1)
    assert configurations.search("buckets", "buckets|a", again) == first
    assert configurations.search("buckets", "buckets|b", Clock(at1=0.1)) == CANDIDATES["buckets"][1]
    new_process(monkeypatch)
    assert configurations.search("buckets", "buckets|a", again) == first
    assert not again.asked
    assert set(json.loads(cache.read_text())) == {"buckets|a", "buckets|b"}


def test_a_choice_stays_whatever_others_write(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    chosen = configurations.search("pairwise_gradient", "pairwise_gradient|a", Clock(at2=0.5))
    other = {"pairwise_gradient|a": CANDIDATES["pairwise_gradient"][4]}
    cache.write_text(json.dumps(other))
    # Another key has the file read again.
    configurations.search("pairwise_gradient", "pairwise_gradient|b", Clock(at1=0.5))
    assert configurations.search("pairwise_gradient", "pairwise_gradient|a", Clock()) == chosen
    # Nor do we change what others go by.
    expected = other | {"pairwise_gradient|b": CANDIDATES["pairwise_gradient"][1]}
    assert json.loads(cache.read_text()) == expected


def test_candidates_that_cannot_run_are_passed_over() -> None:
    broken = {f"at{i}": RuntimeError("out of resources") if i % 2 else float("inf") for i in range(5)}
    found = configurations.search("buckets", "buckets|", Clock(**broken, at6=0.5))
    assert found == CANDIDATES["buckets"][6]


def test_nothing_is_kept_where_no_candidate_runs(cache: Path) -> None:
    broken = Clock(**{f"at{i}": RuntimeError() for i in range(len(CANDIDATES["buckets"]))})
    assert configurations.search("buckets", "buckets|", broken) is None
    assert not cache.exists()
    assert configurations.search("buckets", "buckets|", Clock(at1=0.5)) == CANDIDATES["buckets"][1]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_ends_the_search(cache: Path, error: type[BaseException]) -> None:
    def interrupted(settings: Settings) -> float:
        raise error

    with pytest.raises(error):
        configurations.search("buckets", "buckets|", interrupted)
    assert not cache.exists()


@pytest.mark.parametrize(
    "content",
    ["", "{", "\0", "[]", "3", "null", '"buckets|"', {"buckets|": None}, {"buckets|": [1024, 4]}, {"buckets|": {}}],
)
def test_a_damaged_file_is_ignored_and_replaced(cache: Path, content: Any) -> None:
    write(cache, content)
    assert configurations.load() == {}
    assert configurations.search("buckets", "buckets|", Clock(at3=0.5)) == CANDIDATES["buckets"][3]
    assert json.loads(cache.read_text()) == {"buckets|": CANDIDATES["buckets"][3]}


def test_a_file_that_is_no_text_is_ignored(cache: Path) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_bytes(b"\xff\xfe\x00")
    assert configurations.load() == {}


def test_foreign_entries_are_left_out(cache: Path) -> None:
    good = CANDIDATES["buckets"][2]
    foreign = {
        "buckets|a": good,
        "buckets|b": {**good, "block": 3 * good["block"]},
        "buckets|c": {**good, "num_stages": 3},
        "pairwise_count|d": good,
        "no_kernel|e": good,
        "": good,
    }
    write(cache, foreign)
    assert configurations.load() == {"buckets|a": good}


def test_numbers_from_the_file_are_integers(cache: Path) -> None:
    write(cache, {"buckets|": {name: float(value) for name, value in CANDIDATES["buckets"][2].items()}})
    for value in configurations.load()["buckets|"].values():
        assert type(value) is int


def test_a_folder_that_cannot_be_written_loses_nothing_but_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ALRP_TRITON_CACHE", str(tmp_path / "file"))
    assert configurations.search("buckets", "buckets|", Clock(at3=0.5)) == CANDIDATES["buckets"][3]
    assert configurations.search("buckets", "buckets|", Clock()) == CANDIDATES["buckets"][3]


def test_cache_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALRP_TRITON_CACHE", str(tmp_path))
    assert configurations.cache_file() == tmp_path / "settings.json"
    for empty in (True, False):
        if empty:
            monkeypatch.setenv("ALRP_TRITON_CACHE", "")
        else:
            monkeypatch.delenv("ALRP_TRITON_CACHE")
        assert configurations.cache_file() == Path.home() / ".cache" / "alrp-triton" / "settings.json"


def test_key_names_kernel_device_dtype_and_size_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")

    def key(num_logits: int, dtype: torch.dtype = torch.float32) -> str:
        return configurations.key_of("buckets", torch.empty(num_logits, dtype=dtype))

    assert key(5000).split("|")[:3] == ["buckets", "Some GPU", "torch.float32"]
    assert key(5000, torch.bfloat16).split("|")[2] == "torch.bfloat16"
    classes = [int(key(2**k).split("|")[3].removeprefix("2^")) for k in range(20)]
    # A class is a power of four, and none holds numbers of which one is four times another.
    assert classes == sorted(classes)
    assert all(2**k / 2 <= 2**size_class <= 2 * 2**k for k, size_class in enumerate(classes))
    assert all(one < other for one, other in zip(classes, classes[2:]))


@pytest.mark.parametrize("value", ["", "0", None])
@pytest.mark.parametrize("kernel", KERNELS)
def test_choose_returns_what_is_pinned_unless_asked_to_search(
    kernel: str, value: str | None, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    def launch(**settings: int) -> None:
        raise AssertionError("launched")

    monkeypatch.delenv("ALRP_TRITON_AUTOTUNE", raising=False)
    if value is not None:
        monkeypatch.setenv("ALRP_TRITON_AUTOTUNE", value)
    assert not configurations.autotuning()
    assert configurations.choose(kernel, on_gpu(monkeypatch), launch) == PINNED[kernel]["default"]
    # In the interpreter there is nothing to time, asked or not.
    monkeypatch.setenv("ALRP_TRITON_AUTOTUNE", "1")
    assert configurations.choose(kernel, torch.empty(9), launch) == PINNED[kernel]["default"]
    assert not cache.exists()


def test_choose_searches_when_asked(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    logits = on_gpu(monkeypatch)
    monkeypatch.setenv("ALRP_TRITON_AUTOTUNE", "1")
    launched: list[dict[str, int]] = []

    def milliseconds(launch: Any, settings: Settings) -> float:
        launch(**settings)
        return 0.5 if len(launched) == 4 else 1.0

    monkeypatch.setattr(configurations, "_milliseconds", milliseconds)
    for _ in range(2):
        found = configurations.choose("gradient", logits, lambda **settings: launched.append(settings))
        assert found == CANDIDATES["gradient"][3]
        assert launched == CANDIDATES["gradient"]
    assert json.loads(cache.read_text()) == {configurations.key_of("gradient", logits): found}


def test_choose_returns_what_is_pinned_where_no_candidate_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def milliseconds(launch: Any, settings: Settings) -> float:
        raise RuntimeError

    monkeypatch.setattr(configurations, "_milliseconds", milliseconds)
    monkeypatch.setenv("ALRP_TRITON_AUTOTUNE", "1")
    assert configurations.choose("gradient", on_gpu(monkeypatch), lambda **_: None) == PINNED["gradient"]["default"]


def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What ``choose`` asks of a tensor on a GPU that does not exist."""
    logits = torch.empty(5000, device="meta")

    class OnGPU:
        device = torch.device("cuda", 0)
        dtype = logits.dtype
        numel = logits.numel

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(configurations, "architecture_of", lambda device: "sm_75")
    return OnGPU()


def test_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        major, minor, gcnArchName = 10, 3, "gfx942:sramecc+:xnack-"

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(torch.version, "hip", None)
    assert configurations.architecture_of(torch.device("cuda", 1)) == "sm_103"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert configurations.architecture_of(torch.device("cuda", 1)) == "gfx942"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert configurations.architecture_of(torch.device("cpu")) == "interpreter"


def test_settings_are_known_without_triton() -> None:
    code = """
import sys
sys.modules["triton"] = None
from alrp_triton.kernels import configurations
assert configurations.pinned("buckets", "sm_90")
"""
    done = start_python(code)
    assert done.returncode == 0, done.stderr
