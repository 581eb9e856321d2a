"""What the model speaks of, measured on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from alrp_triton import alrp_loss

from .timing import gpu_times, middle, num_rotating
from .workloads import DTYPES, Case, Inputs, make_inputs

_REPEATS = 50


def _loss(inputs: Inputs) -> Tensor:
    cls, loc, _ = alrp_loss(inputs.levels, inputs.class_labels, inputs.loc_errors, backend="triton")
    return cls + loc


def measured_milliseconds(
    regime: str, num_logits: int, num_positives: int, dtype: str, device: str = "cuda"
) -> dict[str, float]:
    """Medians of forward and backward, by events, over inputs that together exceed the L2 cache."""
    case = Case("retinanet", regime, num_positives=num_positives, dtype=dtype, num_logits=num_logits)
    num = num_rotating(torch.device(device), 2 * num_logits * DTYPES[dtype].itemsize)
    inputs = [make_inputs(case, device, seed) for seed in range(num)]
    for given in inputs:
        _loss(given).backward()
    times, _ = gpu_times(_loss, inputs, _REPEATS, waits=False)
    return {"forward": middle(times.forward)[0], "backward": middle(times.backward)[0]}
