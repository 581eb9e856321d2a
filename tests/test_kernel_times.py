"""What is made of a profile of a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch._C._autograd import DeviceType

from benchmarks.kernel_times import SUBJECTS, by_kernel, modelled, table, write


def event(name: str, microseconds: float, device: Any = DeviceType.CUDA, note: bool = False) -> SimpleNamespace:
    return SimpleNamespace(name=name, device_time=microseconds, device_type=device, is_user_annotation=note)


def test_kernels_of_an_iteration() -> None:
    events = [
        *(event("count_kernel", microseconds) for microseconds in (100.0, 120.0, 900.0)),
        # Two in each iteration.
        *(event("fill", 2.0) for _ in range(6)),
        event("write_kernel", 50.0, DeviceType.CPU),
        event("step", 5000.0, note=True),
    ]
    assert by_kernel(events, 3) == {"count_kernel": pytest.approx(0.12), "fill": pytest.approx(0.004)}


def test_the_model_stands_beside_what_it_knows(tmp_path: Path) -> None:
    found = {subject.name: {"fill": 0.002, "count_kernel": 0.25} for subject in SUBJECTS}
    assert len(found) == len(SUBJECTS)
    rows = table(found, "NVIDIA H100 80GB HBM3")
    assert [row[1] for row in rows[:3]] == ["count_kernel", "fill", "all"]
    assert rows[2][2] == "0.2520"
    with_model = {row[0] for row in rows if row[3]}
    flat = {case.name for case in SUBJECTS if case.layout == "flat" and case.head == "retinanet"}
    assert with_model == flat
    assert not any(row[3] for row in table(found, "Another GPU"))
    for subject in SUBJECTS:
        times = modelled(subject, "NVIDIA H200")
        assert set(times) in (set(), {"find_kernel", "count_kernel", "write_kernel"})
        assert all(0 < milliseconds < 10 for milliseconds in times.values())
    write(tmp_path / "found.json", {"device": "some"}, found)
    assert json.loads((tmp_path / "found.json").read_text())["milliseconds"] == found
