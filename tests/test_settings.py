"""Launch settings: what is pinned, what a search finds, and what it keeps on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from alrp_triton.kernels import settings
from alrp_triton.kernels.settings import CANDIDATES, PINNED
from dialect.interpreters import start_python

SOME = CANDIDATES["count"]


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("ALRP_TRITON_CACHE", str(tmp_path / "some" / "cache"))
    settings._loaded.cache_clear()
    yield tmp_path / "some" / "cache" / "settings.json"
    settings._loaded.cache_clear()


def on_gpu(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype = torch.float32) -> Any:
    """What is asked of a tensor on a GPU that does not exist."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(settings, "architecture_of", lambda device: "sm_75")
    return type("OnGPU", (), {"device": torch.device("cuda", 0), "dtype": dtype})


def test_the_longest_prefix_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {name: {"block": i} for i, name in enumerate(["default", "sm_9", "sm_90", "gfx", "gfx94", "sm_100"])}
    monkeypatch.setitem(PINNED, "count", table)
    found = {"sm_90": 2, "sm_90a": 2, "sm_91": 1, "sm_100": 5, "sm_10": 0, "gfx942": 4, "gfx1100": 3, "interpreter": 0}
    assert {name: settings.pinned("count", name)["block"] for name in found} == found


@pytest.mark.parametrize("kernel", PINNED)
def test_what_is_pinned_is_among_the_candidates(kernel: str) -> None:
    assert "default" in PINNED[kernel]
    # Some are too short to search for.
    candidates = CANDIDATES.get(kernel, list(PINNED[kernel].values()))
    assert all(chosen in candidates for chosen in PINNED[kernel].values())
    assert len({tuple(sorted(candidate.items())) for candidate in candidates}) == len(candidates)
    for name in ("block", "num_warps"):  # Triton takes powers of two
        assert all(chosen[name].bit_count() == 1 for chosen in candidates)


def test_a_search_times_every_candidate_and_passes_over_those_that_do_not_run() -> None:
    def milliseconds() -> float:
        tried = settings.settings_of("count", torch.empty(9), 9)
        return 1 / (tried["block"] if tried["block"] <= 1024 else 0)

    def interrupted() -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        settings.search("count", interrupted)
    times = settings.search("count", milliseconds)
    assert sorted(map(str, SOME)) == sorted(str(candidate) for _, candidate in times)
    assert times[0] == (1 / 1024, {"block": 1024, "num_warps": 4})
    assert all((time == float("inf")) == (candidate["block"] > 1024) for time, candidate in times)
    # Afterwards nothing is tried any more.
    assert not settings._tried


def test_a_search_keeps_what_gains(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``alrp-triton bench --autotune`` on the virtual GPU, with the number of tiles in the place of a time."""
    from virtual_gpu import on_virtual_gpu

    from benchmarks.tune import tune
    from benchmarks.workloads import Case

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(settings, "CANDIDATES", {kernel: [SOME[k] for k in (0, 2, 5, 6)] for kernel in CANDIDATES})
    with on_virtual_gpu() as device:

        def tiles(call: Callable[[], object]) -> float:
            before = len(device.results)
            call()
            return float(sum(result.grid[0] for result in device.results[before:]))

        case = Case("retinanet", num_logits=20_000, num_positives=9)
        gains = list(tune([case, case], torch.device("cpu"), tiles))
    kernels = ["find", "count", "write", "count_grouped", "write_grouped"]
    assert [gain.kernel for gain in gains] == kernels
    # All labels are in one tile of any size; the first of equals is taken.
    assert [gain.found for gain in gains] == [SOME[0], *[SOME[6]] * 4]
    assert all(gain.found_ms < gain.pinned_ms for gain in gains[1:])
    assert {key.split("|")[0]: kept for key, kept in settings.load().items()} == {g.kernel: g.found for g in gains}


def test_what_is_kept_is_used_and_read_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = on_gpu(monkeypatch)
    assert settings.settings_of("count", logits, 5000) == PINNED["count"]["default"]
    settings.keep({settings.key_of("count", logits, 5000): SOME[3]})
    settings.keep({settings.key_of("write", logits, 5000): SOME[4]})
    assert list(file.parent.iterdir()) == [file]  # no partial file is left
    assert len(settings.load()) == 2
    file.write_text("{}")
    # Whatever others write, a process chooses as before, at every size of the class, and no other.
    assert settings.settings_of("count", logits, 5001) == SOME[3]
    assert settings.settings_of("write", logits, 5000) == SOME[4]
    for other in (("count", logits, 500_000), ("find", logits, 5000), ("count", on_gpu(monkeypatch, torch.half), 5000)):
        assert settings.settings_of(*other) == PINNED[other[0]]["default"]
    assert settings.settings_of("count", torch.empty(9), 5000) == settings.pinned("count", "sm_75")


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\0", b"\xff\xfe\x00", [], 3, None, "count|", {"count|": None}, {"count|": [1]}]
)
def test_a_damaged_file_is_ignored_and_replaced(content: Any, file: Path) -> None:
    file.parent.mkdir(parents=True)
    file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    assert settings.load() == {}
    settings.keep({"count|": SOME[2]})
    assert json.loads(file.read_text()) == settings.load() == {"count|": SOME[2]}


def test_what_is_no_candidate_is_left_out(file: Path) -> None:
    good, block = SOME[2], SOME[2]["block"]
    foreign = {"count|b": {**good, "block": 3 * block}, "count|c": {**good, "num_stages": 3}, "pairwise_count|d": good}
    floats = {name: float(value) for name, value in good.items()}
    settings.keep({"count|a": floats, "": good, "no|e": good, **foreign})
    assert settings.load() == {"count|a": good}
    assert all(type(value) is int for value in settings.load()["count|a"].values())


def test_a_class_of_sizes_is_a_power_of_four(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [settings.key_of("count", on_gpu(monkeypatch, torch.half), 2**k) for k in range(20)]
    classes = [int(key.removeprefix("count|Some GPU|torch.float16|2^")) for key in keys]
    assert all(2**k / 2 <= 2**size_class <= 2 * 2**k for k, size_class in enumerate(classes))
    assert all(one < other for one, other in zip(classes, classes[2:]))


def test_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    about = type("Properties", (), {"major": 10, "minor": 3, "gcnArchName": "gfx942:sramecc+:xnack-"})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: about)
    for hip, interpret, name in ((None, "0", "sm_103"), ("6.4", "0", "gfx942"), (None, "1", "interpreter")):
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setenv("TRITON_INTERPRET", interpret)
        settings._architecture_of_gpu.cache_clear()
        assert settings.architecture_of(torch.device("cuda")) == name


def test_processes_that_read_one_file_choose_alike_without_triton(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings.keep({"count|x": SOME[5], "find|x": SOME[1]})
    code = "import sys; sys.modules['triton'] = None\nfrom alrp_triton.kernels import settings; print(settings.load())"
    found = [start_python(code) for _ in range(2)]
    assert all(done.returncode == 0 for done in found), found[0].stderr
    assert {done.stdout for done in found} == {f"{settings.load()}\n"}
