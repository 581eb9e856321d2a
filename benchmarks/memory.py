"""Peak memory of a contender on the CPU, beyond its inputs and the gradient of the scores.

Each case runs in a fresh process, where its inputs exist before the count begins, and where a tiny call has loaded what
PyTorch loads on the first use of an operator. Linux only: the resident sizes come from /proc.
"""

from __future__ import annotations

import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest.mock import patch

import torch

from .peers import contenders
from .workloads import Case, Inputs, make_inputs


def resident(what: str) -> int:
    """Bytes of resident memory: ``"VmRSS"`` now, ``"VmHWM"`` at its peak."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(what + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status: no {what}")


def _reset_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError as error:
        print(f"cannot reset the peak ({error}); the result is an upper bound", file=sys.stderr)


def cpu_memory(case: Case, contender: str) -> tuple[float, float]:
    """Megabytes beyond the inputs, and beyond the inputs and the gradient, of a run in a fresh process."""
    # glibc then writes to what it allocates, so that a gradient is resident at once. Otherwise something else as large
    # could come and go unseen while the gradient's pages fill little by little.
    with (
        patch.dict("os.environ", {"MALLOC_PERTURB_": "165"}),
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool,
    ):
        return pool.submit(_measured, case, contender, torch.get_num_threads()).result()


def _measured(case: Case, contender: str, threads: int) -> tuple[float, float]:
    torch.set_num_threads(threads)
    loss = contenders(torch.device("cpu"))[contender].loss

    def run(inputs: Inputs) -> tuple[int, int]:
        _ = inputs.logit_labels
        before = resident("VmRSS")
        _reset_peak()
        value = loss(inputs)
        forward = resident("VmHWM") - before
        _reset_peak()
        value.backward()
        return forward, resident("VmHWM") - before

    run(make_inputs(Case("retinanet", num_positives=5, num_logits=800)))
    forward, backward = run(make_inputs(case))
    gradient = case.bytes_moved // 3
    return max(forward, backward) / 1e6, max(forward, backward - gradient) / 1e6
