"""A small case of the benchmark suite, a contender that is right, and rows as if they had been measured."""

from __future__ import annotations

import dataclasses

import torch
from alrp_triton.benchmarks import peers, presets, rows
from alrp_triton.benchmarks.measure import Setting
from alrp_triton.benchmarks.peers import BUCKETED, FOCAL, LOOP, Contender, vectorised
from alrp_triton.benchmarks.workloads import REGIMES, Case, Inputs
from torch import Tensor

CPU = torch.device("cpu")
SMALL = Case("atss", "middle", image=32, batch=2, num_positives=12)


def eager() -> list[Contender]:
    return [contender for contender in peers.contenders(CPU).values() if not contender.compiled]


def setting(**changes) -> Setting:
    machine = {
        "command": "test", "device": "some CPU", "kind": "cpu", "threads": 1, "alrp_triton": "0", "commit": None,
        "torch": "2", "triton": None, "python": "3",
    }  # fmt: skip
    return Setting(CPU, machine | changes, 1e10, 0.01, 2)


def right(inputs: Inputs) -> Tensor:
    return vectorised(inputs.flat().float(), inputs.logit_labels, inputs.loc_errors)


def row(**changes) -> rows.Row:
    made = rows.Row(
        date="2026-01-01", status="ok", contender="ours, torch", exact=True, both_ms=10.0, both_iqr=1.0, repeats=5,
        bandwidth_share=0.5, **setting().machine, **rows.describe(SMALL),
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


def measured() -> list[rows.Row]:
    """As if an H100 and a CPU had been measured."""
    found = []
    gpu = {"kind": "cuda", "device": "H100", "graph_ms": 0.2, "floor_ratio": 1.4, "beyond_gradient_mb": 1.0}
    times = {"ours, triton": 0.3, LOOP: 600, FOCAL: 3.0, peers.OURS_BOXES: 0.5, peers.FOCAL_COMPILED: 0.4}
    times |= {peers.OURS_COMPILED: 0.4, BUCKETED: 9.0}
    for case in (*presets.PRESETS["h100"].cases, presets.SMALL):
        for name, ms in times.items():
            shape = {**rows.describe(case), "contender": name, "both_ms": ms, "exact": name != BUCKETED}
            graph_ms = None if name in (LOOP, BUCKETED) else min(ms, 0.2)
            found.append(row(**shape, **{**gpu, "graph_ms": graph_ms, "launches": 10, "error": 0.01}))
    times = {"ours, torch": 50.0, BUCKETED: 300.0, FOCAL: 40.0, peers.OURS_BOXES: 50.0}
    for positives, image in ((500, 512), (50, 512), (500, 256)):
        for regime in REGIMES:
            case = presets.ON_CPU._replace(regime=regime, num_positives=positives, image=image)
            found += [row(**rows.describe(case), contender=name, both_ms=ms) for name, ms in times.items()]
    return found
