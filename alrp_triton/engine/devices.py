"""Properties of a device type: whether it is a GPU, and whether the host must wait for its values."""

from __future__ import annotations

from torch import device as Device

GPUS = {"cuda"}
"""The device types for which Triton's driver has kernels (PyTorch also calls ROCm's ``cuda``). Tests that compile
kernels for CPU tensors add ``"cpu"``; all code then behaves as on a GPU."""


def is_gpu(device: Device) -> bool:
    """Whether Triton's driver takes tensors of this device."""
    return device.type in GPUS


def is_asynchronous(device: Device) -> bool:
    """Whether the host waits for the device if it reads a value; on the CPU it does not."""
    return device.type != "cpu" or is_gpu(device)
