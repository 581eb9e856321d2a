"""What a device's type says of it: whether it is a GPU, and whether the host would have to wait for its values."""

from __future__ import annotations

from torch import device as Device

GPUS = {"cuda"}
"""The types of devices that Triton's driver has kernels for (PyTorch calls ROCm's ``cuda``, too). Tests that compile
kernels for tensors of the CPU add ``"cpu"``: all code then does what it does on a GPU."""


def is_gpu(device: Device) -> bool:
    """Whether Triton's driver takes tensors of this device."""
    return device.type in GPUS


def is_asynchronous(device: Device) -> bool:
    """Whether looking at a value would make the host wait for the device; on the CPU it is there at once."""
    return device.type != "cpu" or is_gpu(device)
